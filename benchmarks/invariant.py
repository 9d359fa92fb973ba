"""What the invariant mode costs: tokens per second in fp32, ordinary and invariant, and how far the logits differ.

    python benchmarks/invariant.py --presets nano tiny

Forward is a training pass over packed rows without gradients, training the same with its backward pass, decoding the
PyTorch runner with a batch of answers, and without a compiler the forward pass in PyTorch alone. Both modes take turns.
Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from common import describe_machine, print_result, print_table, reported_in_turns, timed
from openmimo.config.model import preset
from openmimo.engine import Engine, SamplingParams
from openmimo.kernels import invariant, native
from openmimo.model import MiMoModel, build_model

MODES = ("ordinary", "invariant")
WITHOUT = native.NativeKernels(None, "switched off")


def make_rows(model: MiMoModel, options: argparse.Namespace) -> dict[str, Tensor]:
    """Rows of packed documents, as a loader gives them."""
    shape = (options.rows, options.documents, options.length)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(options.length).expand(shape)
    documents = torch.arange(options.documents)[None, :, None].expand(shape)
    names = ("input_ids_BT", "position_ids_BT", "document_ids_BT")
    return {name: x.flatten(1) for name, x in zip(names, (ids, positions, documents), strict=True)}


def forward(model: MiMoModel, rows: dict[str, Tensor], *, backward: bool) -> Tensor:
    with torch.set_grad_enabled(backward):
        logits = model(**rows).logits
    if backward:
        logits.square().mean().backward()
        model.zero_grad()
    return logits.detach()


def decode(model: MiMoModel, options: argparse.Namespace) -> None:
    engine = Engine(model, runner="torch", draft_heads=0, max_batch=options.batch, prefix_cache_bytes=0)
    prompts = [[(17 * row + 3) % model.config.vocab_size] for row in range(options.batch)]
    engine.generate(prompts, SamplingParams(temperature=1.0, max_tokens=options.decoded, ignore_eos=True, seed=1))


def without_kernels(run: Callable[[], object]) -> None:
    """Run with the form that needs no compiler."""
    kept, invariant.native_kernels = invariant.native_kernels, lambda: WITHOUT
    try:
        run()
    finally:
        invariant.native_kernels = kept


def measure(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Tokens per second of every pass in both modes, and the largest difference of logits."""
    model = build_model(preset(name))
    rows = make_rows(model, options)
    num_tokens = rows["input_ids_BT"].numel()
    passes: dict[str, tuple[int, Callable[[], object]]] = {
        "forward": (num_tokens, lambda: forward(model, rows, backward=False)),
        "training": (num_tokens, lambda: forward(model, rows, backward=True)),
        "decoding": (options.batch * options.decoded, lambda: decode(model, options)),
    }
    arms: dict[str, Callable[[], float]] = {}
    for what, (_, run) in passes.items():
        for mode in MODES:
            arms[f"{what} {mode}"] = lambda run=run, mode=mode: once(model, mode, run)
    slow = passes["forward"][1]
    arms["forward without a compiler"] = lambda: once(model, "invariant", lambda: without_kernels(slow))
    for arm in arms.values():
        arm()
    seconds = {arm: statistics.median(found) for arm, found in reported_in_turns(arms, options.rounds).items()}
    found = {arm: (passes[arm.split()[0]][0]) / each for arm, each in seconds.items()}
    logits = [forward(model.set_invariant(mode == "invariant"), rows, backward=False) for mode in MODES]
    difference = float((logits[0] - logits[1]).abs().max())
    return {"preset": name, "tokens_per_second": found, "largest_difference": difference}


def once(model: MiMoModel, mode: str, run: Callable[[], object]) -> float:
    model.set_invariant(mode == "invariant")
    return timed(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["nano", "tiny"])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--documents", type=int, default=4, help="per row")
    parser.add_argument("--length", type=int, default=128, help="tokens per document")
    parser.add_argument("--batch", type=int, default=16, help="answers that are decoded at once")
    parser.add_argument("--decoded", type=int, default=24, help="tokens per answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = [measure(name, options) for name in options.presets]
    table: list[list[object]] = []
    for result in results:
        speeds = result["tokens_per_second"]
        assert isinstance(speeds, dict)
        for arm, speed in speeds.items():
            ordinary = speeds[f"{arm.split()[0]} ordinary"]
            table.append([result["preset"], arm, speed, ordinary / speed])
    print_table(("preset", "pass", "tokens/s", "times slower"), table)
    print_result("invariant", describe_machine(), {"options": vars(options), "results": results})


if __name__ == "__main__":
    main()
