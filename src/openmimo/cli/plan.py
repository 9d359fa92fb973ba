"""`openmimo plan`: what a model takes on given devices, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openmimo.cli.bench import parse_numbers, parse_words
from openmimo.cli.machine import read_memory, usable_cores
from openmimo.errors import ConfigError

if TYPE_CHECKING:
    from openmimo.config.model import ModelConfig
    from openmimo.planning.devices import Fleet
    from openmimo.planning.serving import Drafting

GB = 1e9


def plan_command(
    model: Annotated[str, typer.Option(help="A preset, or a checkpoint or run folder.")] = "flash",
    devices: Annotated[
        str, typer.Option(help="Name:number, comma-separated; here is this machine, which is measured.")
    ] = "h200,h200:8,h200:256",
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence when it is decoded.")] = 32768,
    weights: Annotated[str, typer.Option(help="Weights for serving: fp32, bf16, fp8, int8, int4.")] = "fp8",
    cache: Annotated[str, typer.Option(help="Keys and values: fp32, bf16, fp8, int8.")] = "bf16",
    batches: Annotated[str, typer.Option(help="Sequences of a copy, for what drafts are worth.")] = "1,32,64,96,128",
    acceptance: Annotated[str, typer.Option(help="Tokens per step with drafts.")] = "2.8,3.2,3.6,3.8",
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence in training.")] = 32768,
    tokens_per_device: Annotated[
        int, typer.Option(min=0, help="Tokens of a training step on each device; 0: one sequence.")
    ] = 0,
    train_heads: Annotated[int, typer.Option(min=0, help="MTP heads in training.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="Threads of `here`; 0: all usable cores.")] = 0,
) -> None:
    """Memory, limits of speed and layouts by formula: tables, then a JSON line. Nothing runs but a look at `here`."""
    from openmimo.config.io import read_model_config
    from openmimo.config.model import preset, preset_names
    from openmimo.evals.measuring import print_table
    from openmimo.planning.devices import HERE, parse_fleet

    names = parse_words(devices)
    if not names:
        raise ConfigError("no devices to plan for; name some, such as --devices h200:8")
    if model in preset_names():
        config = preset(model)
    else:
        from openmimo.engine.loading import resolve_model_folder

        config = read_model_config(resolve_model_folder(model))
    here = None
    if any(name.partition(":")[0] == HERE for name in names):
        from openmimo.evals.this_machine import measure_here

        here = measure_here(_memory_here(), threads or usable_cores())
    fleets = [parse_fleet(name, here) for name in names]
    record: dict[str, Any] = {"model": model, "context": context, "weights": weights, "cache": cache}
    record["sizes"] = _print_sizes(model, config, context)
    record["serving"] = [_print_serving(config, fleet, context, weights, cache) for fleet in fleets]
    record["drafting"] = [
        _print_drafting(config, fleet, context, weights, cache, parse_numbers("--batches", batches), acceptance)
        for fleet in fleets
        if config.num_mtp_heads
    ]
    rows = [
        _training_row(config, fleet, sequence_length, tokens_per_device or sequence_length, train_heads)
        for fleet in fleets
    ]
    print(f"\nTraining in bf16 with fp32 masters, rows of {sequence_length:,} tokens, {train_heads} MTP heads")
    print_table(("on", "layout", "GB a device", "activations", "limit tokens/s", "bound by"), [row for row, _ in rows])
    record["training"] = [facts for _, facts in rows]
    print(json.dumps({"plan": record}))


def _memory_here() -> float:
    found = read_memory()
    total = found.limit_bytes or found.total_bytes
    if total is None:
        raise ConfigError("this system does not tell how much memory it has; plan for a named device instead")
    return float(total)


def _print_sizes(name: str, config: ModelConfig, context: int) -> dict[str, Any]:
    from openmimo.config.cost import count_active, count_parameters, forward_flops, kv_cache_bytes
    from openmimo.config.model import AttentionKind
    from openmimo.evals.measuring import print_table

    stored, active = count_parameters(config), count_active(config)
    kinds = config.layer_kinds
    print(
        f"{name}: {config.num_layers} layers, {kinds.count(AttentionKind.GLOBAL)} of them global, "
        f"{config.num_mtp_heads} MTP heads; {stored.total / 1e9:.4g} B parameters, "
        f"{active.total / 1e9:.4g} B of them active for a token"
    )
    parts = [part for part, count in vars(stored).items() if count]
    print_table(
        ("parameters, millions", *parts),
        [
            ("stored", *(f"{getattr(stored, part) / 1e6:,.4g}" for part in parts)),
            ("active", *(f"{getattr(active, part) / 1e6:,.4g}" for part in parts)),
        ],
    )
    cache = kv_cache_bytes(config, context)
    everywhere = config.replace(layer_kinds=(AttentionKind.GLOBAL,) * config.num_layers)
    ratio = kv_cache_bytes(everywhere, context).total / cache.total
    gflops = forward_flops(config, context) / 1e9
    print(
        f"a sequence of {context:,} tokens keeps {cache.global_layers / 1e6:,.4g} MB of keys and values in global "
        f"layers and {cache.sliding_layers / 1e6:,.4g} MB in sliding ones (bf16), {ratio:.2f} times less than with "
        f"global layers alone; its next token costs {gflops:,.4g} GFLOP"
    )
    return {
        "parameters": stored.total,
        "active": active.total,
        "cache_bytes": asdict(cache),
        "all_global_ratio": ratio,
        "flops_per_token": forward_flops(config, context),
    }


def _print_serving(config: ModelConfig, fleet: Fleet, context: int, weights: str, cache: str) -> dict[str, Any]:
    from openmimo.planning.layouts import devices_to_serve, plan_serving
    from openmimo.planning.serving import STEP_TOKENS, Replica

    layout = plan_serving(config, fleet, context_tokens=context, weights=weights, cache=cache)
    head = f"\nServing on {fleet.name} in {weights}: "
    if layout is None:
        needed = devices_to_serve(config, fleet, context_tokens=context, weights=weights, cache=cache)
        number = "no number of them" if needed is None else f"{needed} of them"
        print(f"{head}it does not fit; {number} would hold the weights and one sequence of {context:,} tokens")
        return {"on": fleet.name, "fits": False, "devices_needed": needed}
    replica = Replica(config, fleet, ranks=layout.ranks, weights=weights, cache=cache)
    prompt, buffers = replica.prefill(context), replica.step_bytes() + replica.rotary_bytes(context)
    print(
        f"{head}{layout.replicas} copies on {layout.ranks} devices each, {layout.weight_bytes / GB:.4g} GB of weights "
        f"a device, {buffers / GB:.3g} GB for a step of {STEP_TOKENS} tokens and {layout.sequence_bytes / GB:.4g} GB a "
        f"sequence, so {layout.most_sequences:,} sequences a copy\n"
        f"  limits without drafts: {layout.alone_tokens_per_second:,.4g} tokens/s for one sequence, "
        f"{layout.tokens_per_second:,.4g} tokens/s for {layout.replicas} x {layout.batch:,} ({layout.bound}); "
        f"a prompt of {context:,} tokens in {prompt.seconds:.3g} s ({prompt.bound})"
    )
    facts = {
        "step_bytes": buffers,
        "tokens_per_second": layout.tokens_per_second,
        "prefill_seconds": prompt.seconds,
    }
    return {"on": fleet.name, "fits": True, **asdict(layout), **facts}


def _print_drafting(
    config: ModelConfig,
    fleet: Fleet,
    context: int,
    weights: str,
    cache: str,
    batches: Sequence[int],
    acceptance: str,
) -> dict[str, Any]:
    from openmimo.evals.measuring import print_table
    from openmimo.planning.layouts import plan_serving
    from openmimo.planning.serving import Replica

    layout = plan_serving(config, fleet, context_tokens=context, weights=weights, cache=cache)
    if layout is None:
        return {"on": fleet.name, "cells": []}
    replica = Replica(config, fleet, ranks=layout.ranks, weights=weights, cache=cache)
    lengths = _lengths(acceptance)
    cells: list[list[Drafting]] = [
        [replica.drafting(batch, context, length) for length in lengths] for batch in batches
    ]
    print(f"{config.num_mtp_heads} MTP heads on {fleet.name}, times the speed without drafts, by tokens per step")
    rows = [(f"batch {row[0].batch}", *(f"{cell.speedup:.2f}x" for cell in row)) for row in cells]
    print_table(("", *(f"{length:g}" for length in lengths)), rows)
    return {"on": fleet.name, "cells": [asdict(cell) for row in cells for cell in row]}


def _lengths(text: str) -> list[float]:
    try:
        return [float(word) for word in parse_words(text)]
    except ValueError:
        raise ConfigError(f"--acceptance {text!r} must be numbers with commas between them, such as 2.8,3.6") from None


def _training_row(
    config: ModelConfig, fleet: Fleet, sequence_length: int, tokens: int, heads: int
) -> tuple[list[object], dict[str, Any]]:
    from openmimo.planning.training import devices_needed, plan_training

    plan = plan_training(config, fleet, sequence_length=sequence_length, tokens_per_device=tokens, mtp_heads=heads)
    if plan is None:
        needed = devices_needed(config, fleet, tokens_per_device=tokens, mtp_heads=heads)
        number = "no number of them does" if needed is None else f"{needed} of them do"
        return [fleet.name, f"does not fit; {number}", "", "", "", ""], {"on": fleet.name, "devices_needed": needed}
    kept = "layer inputs kept" if plan.recompute else "all kept"
    row: list[object] = [
        fleet.name,
        f"weights over {fleet.count}, experts over {plan.expert_ranks} first, {kept}",
        f"{plan.memory.total / GB:.4g}",
        f"{plan.memory.activations / GB:.4g}",
        f"{plan.tokens_per_second:,.4g}",
        plan.bound,
    ]
    return row, {"on": fleet.name, **asdict(plan)}
