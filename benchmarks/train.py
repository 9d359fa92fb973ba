"""Training speed beside transformers: forward, backward and AdamW of the same architecture, in turns.

    python benchmarks/train.py --preset tiny --batch 8 --length 512 --steps 5
    python benchmarks/train.py --preset small --apart --steps 3    # 20 GB for transformers alone

Both sides train next-token loss in bf16 on the same tokens with gradient clipping; MTP heads, which transformers does
not have, are off unless `--mtp-heads` asks for them. transformers runs in the fastest of its settings, found by a short
probe of all of them. Each side has a process of its own, so that neither runs under what the other set up: `openmimo
train` keeps freed memory, which is worth a third to transformers too; `--keep-memory both` lends it that. With
`--apart` the processes still take turns, but each ends before the other begins: for models of which two do not fit in
memory. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from common import (
    describe_machine,
    in_turns,
    matmul_peak,
    print_result,
    print_table,
    reported_in_turns,
    spread,
    timed,
)
from openmimo.config.cost import training_flops
from openmimo.config.model import AttentionKind, ModelConfig, preset
from openmimo.model import build_model
from openmimo.train.memory import keep_freed_memory
from openmimo.train.optimizer import MasterAdamW
from openmimo.train.step import StepSettings, train_step

LEARNING_RATE = 1e-4
# The gathered expert weights of `batched_mm`, in bytes per layer, above which it is not probed.
BATCHED_LIMIT = 1 << 28
WARM_UP = 2

Step = Callable[[], object]


@dataclass(frozen=True)
class TheirSettings:
    """`autocast`: fp32 weights under bf16 autocast; otherwise weights in bf16."""

    autocast: bool
    experts: str

    @property
    def name(self) -> str:
        return f"{'autocast' if self.autocast else 'bf16 weights'}, experts {self.experts}"


def our_step(config: ModelConfig, tokens_BT: Tensor) -> Step:
    """The step of `openmimo train`: bf16 model, fp32 masters."""
    model = build_model(config, dtype=torch.bfloat16).train()
    optimizer = MasterAdamW(model.named_parameters())
    settings = StepSettings(
        num_mtp_heads=config.num_mtp_heads, mtp_weight=0.3, balance_weight=1e-5, bias_update_rate=1e-3
    )
    documents_BT = torch.zeros_like(tokens_BT)
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)

    def step() -> object:
        return train_step(
            model,
            optimizer,
            tokens_BT,
            documents_BT,
            positions_BT,
            mask_BT,
            learning_rate=LEARNING_RATE,
            settings=settings,
        )

    return step


def their_step(config: ModelConfig, tokens_BT: Tensor, settings: TheirSettings) -> Step:
    """transformers' model of the same shape, with its own loss and PyTorch's fused AdamW."""
    from transformers import MiMoV2FlashForCausalLM

    model = MiMoV2FlashForCausalLM(their_config(config)).train()
    model.set_experts_implementation(settings.experts)
    if not settings.autocast:
        model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> object:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.autocast):
            loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def their_config(config: ModelConfig) -> object:
    """The same shape in transformers' words."""
    from transformers import MiMoV2FlashConfig

    moe, whole, local = config.moe, config.global_attention, config.sliding_attention
    assert moe is not None
    assert local.num_kv_heads == 2 * whole.num_kv_heads
    names = {AttentionKind.GLOBAL: "full_attention", AttentionKind.SLIDING: "sliding_attention"}
    return MiMoV2FlashConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.dense_dim,
        moe_intermediate_size=moe.expert_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=whole.num_heads,
        num_key_value_heads=whole.num_kv_heads,
        head_dim=whole.qk_head_dim,
        v_head_dim=whole.v_head_dim,
        sliding_window=local.window_keys,
        n_routed_experts=moe.num_experts,
        num_experts_per_tok=moe.num_experts_per_token,
        layer_types=[names[kind] for kind in config.layer_kinds],
        mlp_layer_types=["sparse" if sparse else "dense" for sparse in config.layer_is_moe],
        rope_parameters={
            names[kind]: {
                "rope_type": "default",
                "rope_theta": config.attention(kind).rope_theta,
                "partial_rotary_factor": config.rope_fraction,
            }
            for kind in AttentionKind
        },
        max_position_embeddings=config.max_positions,
        bos_token_id=None,
        attn_implementation="eager",
    )


def fastest_settings(config: ModelConfig, tokens_BT: Tensor) -> tuple[TheirSettings, dict[str, float]]:
    """Probe every setting of theirs, best of three steps after a warm-up; returns the fastest and all seconds."""
    moe = config.moe
    assert moe is not None
    gathered = 2 * tokens_BT.numel() * moe.num_experts_per_token * 3 * moe.expert_dim * config.hidden_size
    implementations = ["eager", "grouped_mm", *(["batched_mm"] if gathered <= BATCHED_LIMIT else [])]
    seconds: dict[TheirSettings, float] = {}
    for experts in implementations:
        for autocast in (False, True):
            settings = TheirSettings(autocast, experts)
            step = their_step(config, tokens_BT, settings)
            step()
            seconds[settings] = min(timed(step) for _ in range(3))
    best = min(seconds, key=lambda settings: seconds[settings])
    return best, {settings.name: value for settings, value in seconds.items()}


class Side:
    """A side's steps in a process of their own; calling it runs one and waits. `info` is what it says of itself.

    Without settings transformers' side finds its fastest ones first.
    """

    def __init__(
        self, which: str, config: ModelConfig, options: argparse.Namespace, settings: TheirSettings | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, which, config, options, settings)
        self._process = context.Process(target=_serve_steps, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # so that a side that dies is an end of file here
        self.info: Any = self._pipe.recv()

    def __call__(self) -> None:
        self._pipe.send(True)
        self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(False)
        self._process.join()


def step_alone(which: str, config: ModelConfig, options: argparse.Namespace, settings: TheirSettings) -> float:
    """Seconds of a warm step of a side whose process lives for that alone."""
    with closing(Side(which, config, options, settings)) as side:
        for _ in range(WARM_UP):
            side()
        return timed(side)


def _serve_steps(
    pipe: Connection, which: str, config: ModelConfig, options: argparse.Namespace, settings: TheirSettings | None
) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if which == "openmimo" or options.keep_memory == "both":
        keep_freed_memory()
    tokens_BT = torch.randint(config.vocab_size, (options.batch, options.length))
    if which == "openmimo":
        step, info = our_step(config, tokens_BT), None
    else:
        info = (settings, {}) if settings else fastest_settings(config, tokens_BT)
        step = their_step(config, tokens_BT, info[0])
    pipe.send(info)
    while pipe.recv():
        step()
        pipe.send(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--mtp-heads", type=int, default=0, help="MTP heads that our side trains in addition")
    parser.add_argument("--keep-memory", choices=("ours", "both"), default="ours", help="who keeps freed memory")
    parser.add_argument("--apart", action="store_true", help="never both sides in memory")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    config = preset(options.preset).replace(num_mtp_heads=options.mtp_heads)
    theirs = Side("transformers", config, options)
    best, probe = theirs.info
    peak_before = matmul_peak(torch.bfloat16)
    if options.apart:
        theirs.close()
        alone = {which: partial(step_alone, which, config, options, best) for which in ("transformers", "openmimo")}
        seconds = reported_in_turns(alone, options.steps, warm_up=0)
    else:
        with closing(theirs), closing(Side("openmimo", config, options)) as ours:
            seconds = in_turns({"transformers": theirs, "openmimo": ours}, rounds=options.steps, warm_up=WARM_UP)
    peak = max(peak_before, matmul_peak(torch.bfloat16))

    num_tokens = options.batch * options.length
    flops = num_tokens * training_flops(config, options.length, mtp_heads=config.num_mtp_heads)
    plain_flops = num_tokens * training_flops(config, options.length)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    utilisation = {
        "openmimo": flops / medians["openmimo"] / peak,
        "transformers": plain_flops / medians["transformers"] / peak,
    }
    rows = [
        [name, medians[name], num_tokens / medians[name], spread(seconds[name]), utilisation[name]] for name in seconds
    ]
    ratios = [their / our for our, their in zip(seconds["openmimo"], seconds["transformers"], strict=True)]
    ratio = statistics.median(ratios)
    print(
        f"{options.preset}, {options.batch} x {options.length} tokens, {options.threads} threads; theirs: {best.name}"
    )
    print_table(("side", "s/step", "tokens/s", "spread", "of matmul peak"), rows)
    print(f"ratio {ratio:.2f} (pairs {min(ratios):.2f} to {max(ratios):.2f}); matmul peak {peak / 1e9:.0f} GFLOP/s")
    figures = {
        "options": vars(options),
        "seconds": seconds,
        "tokens_per_second": {name: num_tokens / median for name, median in medians.items()},
        "ratio": ratio,
        "utilisation": utilisation,
        "matmul_peak_flops": peak,
        "their_settings": best.name,
        "their_probe_seconds": probe,
    }
    print_result("train", describe_machine(), figures)


if __name__ == "__main__":
    main()
