"""`openmimo plan` beside what is: bytes of weights and caches, a decoding step's time, and bytes of a training step.

    python benchmarks/plan.py --presets tiny small medium --train tiny small

Each measurement has a process of its own. Bytes are what its memory grew by since before the model was opened (for
training: to the peak, since before it was made); files of weights that are mapped count whole, read or not. Time is the
median of decoding steps at batch 1 behind a prompt; the plan's comes from this machine's products and layers and from
the speed of its caches and memory, which is measured again in turns of a fraction of a second with the steps, because
it changes by half within seconds. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common import MemoryReader, describe_machine, print_result, print_table, resident_peak
from openmimo.config.model import preset
from openmimo.evals.bench_limits import MOST_READ_BYTES
from openmimo.evals.bench_models import prepare_models
from openmimo.evals.bench_target import TargetSpec, open_target
from openmimo.evals.this_machine import measure_here, read_rates
from openmimo.model import build_model
from openmimo.planning.devices import Fleet
from openmimo.planning.serving import Replica
from openmimo.planning.training import training_memory
from openmimo.train.memory import keep_freed_memory
from openmimo.train.optimizer import MasterAdamW
from openmimo.train.step import StepSettings, train_step

SERVED, TRAINED = "served", "trained"
TURNS = 15
TURN_SECONDS = 0.2  # of steps, about; before them a quarter as many that are not timed
FEWEST_STEPS, MOST_STEPS = 4, 64
REST = 0.05  # seconds behind a reading, whose threads look for more work for a while


def serve(name: str, folder: Path, smallest: Path, context: int, threads: int) -> dict[str, float]:
    """Bytes of an opened model with one sequence's cache, and seconds of a step; the plan's for both."""
    device = measure_here(1e12, threads)
    reader = MemoryReader(MOST_READ_BYTES)
    guess = Replica(preset(name), Fleet(device=device, count=1)).decode_step(1, context).seconds
    steps = min(MOST_STEPS, max(FEWEST_STEPS, round(TURN_SECONDS / guess)))
    warm = steps // 4
    room = context + TURNS * (warm + steps)
    open_target(TargetSpec(kind="openmimo", path=smallest, weights="bf16", threads=threads)).close()  # loads libraries
    before = held_now()
    target = open_target(TargetSpec(kind="openmimo", path=folder, weights="bf16", threads=threads))
    ids = random.Random(0).choices(range(preset(name).vocab_size), k=room)
    target.start([ids[:context]], room=room - context)
    seconds, planned, held = list[float](), list[float](), 0
    for turn in range(TURNS):
        tokens = [[token] for token in ids[context + turn * (warm + steps) :][: warm + steps]]
        target.decode(tokens[:warm])
        seconds.append(target.decode(tokens[warm:]) / steps)
        if turn == TURNS - 1:
            held = held_now()
        reads = read_rates(reader, rounds=1, min_seconds=0.01)
        device = replace(device, bandwidth=reads[-1][1], reads=reads)
        replica = Replica(preset(name), Fleet(device=device, count=1))
        planned.append(replica.decode_step(1, (context + room) // 2).seconds)
        time.sleep(REST)
    replica = Replica(preset(name), Fleet(device=device, count=1))
    caches = replica.sequence_bytes(room) + replica.rotary_bytes(room)
    return {
        "bytes": held - before,
        "planned_bytes": replica.weight_bytes() + caches + replica.step_bytes(),
        "seconds": statistics.median(seconds),
        "planned_seconds": statistics.median(planned),
    }


def train(name: str, length: int, threads: int, recompute: bool) -> dict[str, float]:
    """Bytes of two training steps at their peak, and the plan's."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    step(preset("nano"), 64, recompute)  # the libraries' own buffers
    gc.collect()
    before = resident_now()
    config = preset(name).replace(num_mtp_heads=1)
    step(config, length, recompute)
    plan = training_memory(
        config, devices=1, expert_ranks=1, tokens_per_device=length, mtp_heads=1, recompute=recompute
    )
    return {"bytes": resident_peak() - before, "planned_bytes": plan.total}


def step(config: Any, length: int, recompute: bool) -> None:
    model = build_model(config, dtype=torch.bfloat16).train()
    model.recompute = recompute
    optimizer = MasterAdamW(model.named_parameters())
    settings = StepSettings(
        num_mtp_heads=config.num_mtp_heads, mtp_weight=0.3, balance_weight=1e-5, bias_update_rate=1e-3
    )
    ids_BT = torch.randint(0, config.vocab_size, (1, length))
    documents_BT = torch.zeros(1, length, dtype=torch.int32)
    positions_BT = torch.arange(length, dtype=torch.int32)[None]
    for _ in range(2):
        train_step(
            model,
            optimizer,
            ids_BT,
            documents_BT,
            positions_BT,
            documents_BT == 0,
            learning_rate=1e-4,
            settings=settings,
        )


def resident_now() -> int:
    """Bytes of this process's resident set."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def held_now() -> int:
    """Bytes of this process's own memory, and of the files of weights that it has mapped.

    What was freed goes back to the system first: else it would count as held, or hide what is taken from it later.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc
    own = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert own is not None
    mapped = re.findall(r"^(\w+)-(\w+) .*\.(?:packed|safetensors)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return int(own[1]) * 1024 + sum(int(end, 16) - int(start, 16) for start, end in mapped)


def alone(work: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """The result of a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=["tiny", "small", "medium"])
    parser.add_argument("--train", nargs="*", default=["tiny", "small"])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--train-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    rows: list[tuple[str, str, str]] = []
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        smallest = prepare_models("nano", "bf16", ["openmimo"], Path(scratch))["openmimo"]
        for name in options.presets:
            print(f"{name}: served", file=sys.stderr)
            folder = prepare_models(name, "bf16", ["openmimo"], Path(scratch))["openmimo"]
            alone(serve, name, folder, smallest, 64, options.threads)  # packs the weights, once
            found[f"{name} {SERVED}"] = alone(serve, name, folder, smallest, options.context, options.threads)
    for name in options.train:
        for recompute in (False, True):
            key = f"{name} {TRAINED}, {options.train_tokens} tokens{', recomputed' if recompute else ''}"
            print(key, file=sys.stderr)
            found[key] = alone(train, name, options.train_tokens, options.threads, recompute)
    for key, figures in found.items():
        rows.append((f"{key}: memory", *_compared(figures, "bytes", 1e6, "MB")))
        if "seconds" in figures:
            rows.append((f"{key}: a decoding step", *_compared(figures, "seconds", 1e-3, "ms")))
    print_table(("", "plan", "measured, and over the plan"), rows)
    print_result("plan", describe_machine(), {"context": options.context, "figures": found})


def _compared(figures: dict[str, float], key: str, unit: float, name: str) -> tuple[str, str]:
    planned, measured = figures[f"planned_{key}"], figures[key]
    return f"{planned / unit:,.2f} {name}", f"{measured / unit:,.2f} {name}, {measured / planned - 1:+.1%}"


if __name__ == "__main__":
    main()
