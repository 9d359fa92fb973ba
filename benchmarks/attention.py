"""Time and peak memory of one sliding layer as the text doubles, a global layer beside it.

    python benchmarks/attention.py --preset tiny --shortest 1024 --longest 32768

A sliding layer's time and memory should double with the text; a global layer's time quadruples in the end. Each length
runs in a process of its own, since the peak of the resident set never falls. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass

import torch

from common import describe_machine, print_result, print_table, timed
from openmimo.config.model import AttentionKind, preset
from openmimo.model.attention import Attention, make_plans
from openmimo.train.memory import keep_freed_memory


@dataclass(frozen=True)
class Measurement:
    """One layer at one length; `peak_bytes` is what the run added to the process, masks and input included."""

    kind: str
    length: int
    backward: bool
    seconds: float
    peak_bytes: int


def resident_peak() -> int:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(kind: AttentionKind, length: int, *, backward: bool, options: argparse.Namespace) -> Measurement:
    """Median seconds of `--rounds` passes over one sequence, and the peak of all of them."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_freed_memory()  # as the training loop does
    config, dtype = preset(options.preset), getattr(torch, options.dtype)
    layer = Attention(config, kind)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    layer.to(dtype)

    def run(num_tokens: int) -> list[float]:
        positions_BT = torch.arange(num_tokens)[None]
        documents_BT = torch.zeros_like(positions_BT) if options.packed else None
        plan = make_plans(config, positions_BT, documents_BT, dtype)[kind]
        x_BTD = torch.randn(1, num_tokens, config.hidden_size).to(dtype).requires_grad_(backward)

        def once() -> None:
            with torch.set_grad_enabled(backward):
                y_BTD = layer(x_BTD, plan)
            if backward:
                y_BTD.backward(torch.ones_like(y_BTD))

        once()
        return [timed(once) for _ in range(options.rounds)]

    run(64)  # libraries load and threads start before the memory is counted
    before = resident_peak()
    seconds = statistics.median(run(length))
    return Measurement(kind.value, length, backward, seconds, resident_peak() - before)


def measure_apart(kind: AttentionKind, length: int, *, backward: bool, options: argparse.Namespace) -> Measurement:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--child", kind.value, "--shortest", str(length)]
    command += ["--preset", options.preset, "--dtype", options.dtype, "--rounds", str(options.rounds)]
    command += ["--threads", str(options.threads)] + (["--backward"] if backward else [])
    command += ["--packed"] if options.packed else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Measurement(**json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--shortest", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=32768)
    parser.add_argument("--longest-global", type=int, default=8192, help="global layers take quadratic time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--packed", action="store_true", help="with document ids, as in training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--child", choices=[kind.value for kind in AttentionKind], help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        found = measure(AttentionKind(options.child), options.shortest, backward=options.backward, options=options)
        print(json.dumps(asdict(found)))
        return

    measurements: list[Measurement] = []
    rows: list[list[object]] = []
    for kind in (AttentionKind.SLIDING, AttentionKind.GLOBAL):
        longest = options.longest if kind is AttentionKind.SLIDING else min(options.longest, options.longest_global)
        for backward in (False, True):
            length, last = options.shortest, None
            while length <= longest:
                found = measure_apart(kind, length, backward=backward, options=options)
                time_ratio = found.seconds / last.seconds if last else "-"
                memory_ratio = found.peak_bytes / max(last.peak_bytes, 1) if last else "-"
                label = "forward + backward" if backward else "forward"
                mebibytes = found.peak_bytes / 2**20
                rows.append([kind.value, label, length, found.seconds * 1e3, time_ratio, mebibytes, memory_ratio])
                measurements.append(found)
                last, length = found, 2 * length
    print_table(("layer", "pass", "tokens", "ms", "x", "peak MiB", "x"), rows)
    figures = {"options": vars(options), "measurements": [asdict(found) for found in measurements]}
    print_result("attention", describe_machine(), figures)


if __name__ == "__main__":
    main()
