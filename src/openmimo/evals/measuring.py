"""What every measurement of speed shares: the machine and its limits, runs in turns, a table and one JSON line."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from openmimo.train.monitors import matmul_peak as matmul_peak

FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Machine:
    """Where figures were measured."""

    cpu: str
    features: tuple[str, ...]
    cores: int
    threads: int
    torch_version: str
    python: str


def describe_machine() -> Machine:
    """The CPU as Linux names it, or as `platform` does elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", "").split())
    return Machine(
        cpu=fields.get("model name", platform.processor() or platform.machine()),
        features=tuple(name for name in FEATURES if name in flags),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        python=platform.python_version(),
    )


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def resident_peak() -> int:
    """Bytes of this process's greatest resident set.

    Linux keeps it per address space in `VmHWM`; what `getrusage` reports there survives `exec`, so a process begun by a
    large one would start from that one's peak. Elsewhere `getrusage` is all there is; macOS counts in bytes.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class MemoryReader:
    """Reads a buffer of its own over and over: what caches and memory allow, by the number of bytes.

    Two ways to read, a sum and a matrix-vector product, because a library may be slow at either; the faster counts.
    """

    COLUMNS = 1024

    def __init__(self, most_bytes: int) -> None:
        self._x_NC = torch.ones(max(1, most_bytes // (4 * self.COLUMNS)), self.COLUMNS)
        self._ones_C = torch.ones(self.COLUMNS)

    def bandwidth(
        self,
        num_bytes: int,
        *,
        rounds: int = 5,
        min_seconds: float = 0.02,
        of_rounds: Callable[[Sequence[float]], float] = min,
    ) -> float:
        """Bytes per second of the buffer's first `num_bytes`; of a way's rounds the fastest counts, or `of_rounds`.

        A round takes `min_seconds`, or one reading if that is longer.
        """
        x_NC = self._x_NC[: max(1, num_bytes // (4 * self.COLUMNS))]
        best = 0.0
        for read in (x_NC.sum, lambda: torch.mv(x_NC, self._ones_C)):
            repeats = max(1, round(min_seconds / max(timed(read), 1e-7)))
            seconds = of_rounds([timed(lambda: [read() for _ in range(repeats)]) for _ in range(rounds)])  # noqa: B023
            best = max(best, repeats * x_NC.nbytes / seconds)
        return best


def in_turns(arms: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every call, the arms taking turns (A B A B), so that drift of the machine meets all of them."""
    return reported_in_turns({name: lambda run=run: timed(run) for name, run in arms.items()}, rounds, warm_up=warm_up)


def reported_in_turns(
    arms: Mapping[str, Callable[[], float]], rounds: int, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """As `in_turns`, for arms that return the seconds themselves."""
    for run in arms.values():
        for _ in range(warm_up):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            seconds[name].append(run())
    return seconds


def spread(values: Sequence[float]) -> float:
    """(Greatest - least) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as their widest cell; floats with four figures."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_result(name: str, machine: Machine, figures: Mapping[str, object]) -> None:
    """The one JSON line that ends a benchmark."""
    print(json.dumps({"benchmark": name, "machine": asdict(machine), **figures}))
