"""Run the hostile programs of the tests in the sandbox, in every way that this machine allows, and time harmless ones.

Usage: python benchmarks/sandbox.py [--runs 40] [--python /usr/bin/python3] [--ways isolated "user namespace" ...]
Prints tables and one JSON line. Exits with 1 on an escape, a forged reward, a process left, or an end later than the
time-out and half a second. `--python` names the interpreter that programs run with: as root, one that every user may
read lets them run as another user.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "unit" / "tasks"))

from sandbox_corpus import LIMITS, REAP_SECONDS, Finding, HostileProgram, World, corpus

from openmimo.errors import SandboxError
from openmimo.tasks.sandbox import Level, run, run_program

# What is left out, so that a machine with everything also shows what others have.
WAYS: dict[str, tuple[str, ...]] = {
    "isolated": (),
    "user namespace": ("root_namespaces",),
    "filtered": ("pid_namespace",),
}


def main() -> int:
    options = parse_options()
    if options.python:
        run._python = lambda: options.python  # pyright: ignore[reportPrivateUsage]
    report: dict[str, object] = {"benchmark": "sandbox", "programs": len(corpus())}
    ways, clean = dict[str, object](), True
    for way in options.ways:
        try:
            layers = run_program("", required=Level.FILTERED, leave_out=WAYS[way]).layers
        except SandboxError as error:
            print(f"{way}: {error}")
            continue
        findings = attack(WAYS[way])
        figures = summarise(findings) | start_times(WAYS[way], options.runs)
        ways[way] = figures | {"layers": sorted(layer.value for layer in layers)}
        print_table(way, findings, figures)
        clean = clean and not figures["escapes"] and not figures["forged"] and not figures["late"]
    print(json.dumps(report | {"ways": ways}))
    return 0 if clean else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40, help="harmless programs to time in each way")
    parser.add_argument("--python", default="", help="interpreter for the programs; this one unless given")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    return parser.parse_args()


def attack(leave_out: tuple[str, ...]) -> list[tuple[HostileProgram, Finding]]:
    world = World()
    try:
        return [(it, world.run(it, required=Level.FILTERED, leave_out=leave_out)) for it in corpus()]
    finally:
        world.close()


def summarise(findings: list[tuple[HostileProgram, Finding]]) -> dict[str, float]:
    """Counts over all programs; `latest_s` is the end of the slowest one after its time-out."""
    return {
        "escapes": sum(bool(finding.escapes) for _, finding in findings),
        "forged": sum(finding.forged for _, finding in findings),
        "late": sum(finding.late or not finding.result.all_ended for _, finding in findings),
        "latest_s": round(max(finding.result.seconds for _, finding in findings) - LIMITS.seconds, 3),
    }


def start_times(leave_out: tuple[str, ...], runs: int) -> dict[str, float]:
    """Milliseconds of the whole call for a program that prints one line."""
    times: list[float] = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        run_program("print(1)", leave_out=leave_out)
        times.append(1e3 * (time.perf_counter() - start))
    return {"median_ms": round(statistics.median(times[2:]), 1), "fastest_ms": round(min(times[2:]), 1)}


def print_table(way: str, findings: list[tuple[HostileProgram, Finding]], figures: dict[str, float]) -> None:
    classes = defaultdict[str, list[Finding]](list)
    for program, finding in findings:
        classes[program.kind].append(finding)
    print(f"{way}: a harmless program takes {figures['median_ms']} ms (median), {figures['fastest_ms']} ms (fastest)")
    print(
        f"  {'class':28} programs escapes forged late  end after the {LIMITS.seconds} s given (allowed {REAP_SECONDS})"
    )
    for kind, found in classes.items():
        latest = max(finding.result.seconds for finding in found) - LIMITS.seconds
        print(
            f"  {kind:28} {len(found):8} {sum(bool(f.escapes) for f in found):7} {sum(f.forged for f in found):6} "
            f"{sum(f.late for f in found):4}  {f'{latest:.3f} s' if latest > 0 else 'sooner'}"
        )
    for program, finding in findings:
        if finding.escapes or finding.forged or finding.late:
            print(f"  {program.kind}: {program.name}: {finding.escapes}, {finding.result.seconds:.2f} s")


if __name__ == "__main__":
    sys.exit(main())
