"""What every benchmark shares. It lives in the package, where `openmimo bench` uses it too."""

from openmimo.evals.measuring import (
    Machine,
    MemoryReader,
    describe_machine,
    in_turns,
    matmul_peak,
    print_result,
    print_table,
    reported_in_turns,
    resident_peak,
    spread,
    timed,
)

__all__ = [
    "Machine",
    "MemoryReader",
    "describe_machine",
    "in_turns",
    "matmul_peak",
    "print_result",
    "print_table",
    "reported_in_turns",
    "resident_peak",
    "spread",
    "timed",
]
