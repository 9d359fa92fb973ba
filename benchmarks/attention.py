"""Time and peak memory of one sliding layer as the text doubles, a global layer beside it.

    python benchmarks/attention.py --preset tiny --shortest 1024 --longest 32768

A sliding layer's time and memory should double with the text; a global layer's time quadruples in the end. The lengths
take turns in one process that has run a while: in a new one the system may keep both threads on one core for some
60 ms. Memory is measured in a process per length, since the peak of the resident set never falls. Prints a table, then
one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from common import describe_machine, print_result, print_table, reported_in_turns, resident_peak, timed
from openmimo.config.model import AttentionKind, preset
from openmimo.model.attention import Attention, make_plans
from openmimo.train.memory import keep_freed_memory

Times = dict[int, list[float]]  # seconds of each round, by length


@dataclass(frozen=True)
class Measurement:
    """One layer at one length: seconds of a pass, and the bytes that passes added to a process of their own."""

    kind: str
    length: int
    backward: bool
    seconds: list[float]
    peak_bytes: int


def make_layer(kind: AttentionKind, options: argparse.Namespace) -> Attention:
    torch.manual_seed(0)
    layer = Attention(preset(options.preset), kind)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer.to(getattr(torch, options.dtype))


def make_pass(layer: Attention, length: int, *, backward: bool, options: argparse.Namespace) -> Callable[[], None]:
    """One pass over a sequence of `length` tokens."""
    positions_BT = torch.arange(length)[None]
    documents_BT = torch.zeros_like(positions_BT) if options.packed else None
    dtype = getattr(torch, options.dtype)
    plan = make_plans(preset(options.preset), positions_BT, documents_BT, dtype)[layer.kind]
    x_BTD = torch.randn(1, length, preset(options.preset).hidden_size).to(dtype).requires_grad_(backward)

    def once() -> None:
        with torch.set_grad_enabled(backward):
            y_BTD = layer(x_BTD, plan)
        if backward:
            y_BTD.backward(torch.ones_like(y_BTD))

    return once


def measure_times(kind: AttentionKind, lengths: list[int], *, backward: bool, options: argparse.Namespace) -> Times:
    """Seconds of a pass at each length, once per round, the lengths taking turns."""
    layer = make_layer(kind, options)

    def settled(once: Callable[[], None]) -> float:
        """Median seconds of the passes of 50 ms, after one that fills the caches."""
        once()
        end, seconds = time.perf_counter() + 0.05, [timed(once)]
        while time.perf_counter() < end:
            seconds.append(timed(once))
        return statistics.median(seconds)

    arms = {length: make_pass(layer, length, backward=backward, options=options) for length in lengths}
    turns = {str(length): lambda once=once: settled(once) for length, once in arms.items()}
    found = reported_in_turns(turns, options.rounds)
    return {length: found[str(length)] for length in lengths}


def measure_memory(kind: AttentionKind, length: int, *, backward: bool, options: argparse.Namespace) -> int:
    """Bytes that passes at this length add to this process, masks and input included."""
    layer = make_layer(kind, options)
    make_pass(layer, 64, backward=backward, options=options)()  # libraries load and threads start before the count
    before = resident_peak()
    once = make_pass(layer, length, backward=backward, options=options)
    for _ in range(4):
        once()
    return resident_peak() - before


def measure_memory_apart(kind: AttentionKind, length: int, *, backward: bool, options: argparse.Namespace) -> int:
    """`measure_memory` in a fresh process."""
    command = [sys.executable, __file__, "--child", kind.value, "--shortest", str(length)]
    command += ["--preset", options.preset, "--dtype", options.dtype, "--threads", str(options.threads)]
    command += ["--backward"] if backward else []
    command += ["--packed"] if options.packed else []
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--shortest", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=32768)
    parser.add_argument("--longest-global", type=int, default=8192, help="global layers take quadratic time")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--packed", action="store_true", help="with document ids, as in training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--child", choices=[kind.value for kind in AttentionKind], help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the training loop does
    if options.child is not None:
        kind = AttentionKind(options.child)
        print(measure_memory(kind, options.shortest, backward=options.backward, options=options))
        return

    measurements: list[Measurement] = []
    rows: list[list[object]] = []
    for kind in (AttentionKind.SLIDING, AttentionKind.GLOBAL):
        longest = options.longest if kind is AttentionKind.SLIDING else min(options.longest, options.longest_global)
        lengths = [options.shortest]
        while 2 * lengths[-1] <= longest:
            lengths.append(2 * lengths[-1])
        for backward in (False, True):
            times = measure_times(kind, lengths, backward=backward, options=options)
            last: Measurement | None = None
            for length in lengths:
                peak_bytes = measure_memory_apart(kind, length, backward=backward, options=options)
                found = Measurement(kind.value, length, backward, times[length], peak_bytes)
                pairs = zip(found.seconds, last.seconds, strict=True) if last else ()
                time_ratio = statistics.median(now / before for now, before in pairs) if last else "-"
                memory_ratio = peak_bytes / max(last.peak_bytes, 1) if last else "-"
                label = "forward + backward" if backward else "forward"
                milliseconds = statistics.median(found.seconds) * 1e3
                rows.append([kind.value, label, length, milliseconds, time_ratio, peak_bytes / 2**20, memory_ratio])
                measurements.append(found)
                last = found
    print_table(("layer", "pass", "tokens", "ms", "x", "peak MiB", "x"), rows)
    figures = {"options": vars(options), "measurements": [asdict(found) for found in measurements]}
    print_result("attention", describe_machine(), figures)


if __name__ == "__main__":
    main()
