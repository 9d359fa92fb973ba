"""The system call filter: what is dangerous or of no use to a program that reads, computes and writes is refused."""

from __future__ import annotations

import ctypes
import errno
import os

from . import kernel
from .syscalls import LAST_KNOWN, REFUSED, WATCHED

# Per processor: its column in the tables, and what the kernel calls it.
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
X32_CALLS = 0x40000000
NAMESPACE_FLAGS = 0x7E020000
AF_UNIX = 1
# Requests that have a signal sent to another process when something can be read (SETOWN, SETSIG, SETOWN_EX; the two for
# sockets), and keys pushed into a terminal.
REFUSED_REQUESTS = {"fcntl": (8, 10, 15), "ioctl": (0x8901, 0x8902, 0x5412, 0x541C)}

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_MODE_FILTER = 2

Instruction = tuple[int, int, int, int]


def install(*, allow_tasks: bool) -> None:
    """Filter the calls of this process, which must have no_new_privs, and of all that it forks.

    Without `allow_tasks` it starts no thread and no process.
    Raises: OSError on a processor whose numbers are not known, or when the kernel refuses.
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise OSError(f"no table of system calls for {machine}")
    column, architecture = ARCHITECTURES[machine]
    code = b"".join(_pack(step) for step in program(column, architecture, os.getpid(), allow_tasks))
    buffer = ctypes.create_string_buffer(code, len(code))
    header = (len(code) // 8).to_bytes(8, "little") + ctypes.addressof(buffer).to_bytes(8, "little")
    kernel.prctl(kernel.PR_SET_SECCOMP, _MODE_FILTER, header)


def program(column: int, architecture: int, own_pid: int, allow_tasks: bool) -> list[Instruction]:
    """The filter for one processor: (code, steps to skip if true, if false, operand) each."""
    steps: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if column == 0:
        # The other binary interface of this processor has its own numbers, which this table does not know.
        steps += [(_AT_LEAST, 0, 1, X32_CALLS), (_RETURN, 0, 0, _KILL)]
    steps += [(_AT_LEAST, 0, 1, LAST_KNOWN + 1), _fails(errno.ENOSYS)]
    for numbers in REFUSED.values():
        steps += [(_EQUAL, 0, 1, numbers[column]), _fails(errno.EPERM)]
    number = {name: numbers[column] for name, numbers in WATCHED.items()}
    # The C library falls back to clone, whose flags can be read here; those of clone3 lie in memory.
    steps += [(_EQUAL, 0, 1, number["clone3"]), _fails(errno.ENOSYS)]
    if not allow_tasks:
        for name in ("clone", "fork", "vfork"):
            steps += [(_EQUAL, 0, 1, number[name]), _fails(errno.EAGAIN)]
    steps += _refuse_if(number["clone"], 0, [(_ANY_BIT, NAMESPACE_FLAGS)])
    steps += _allow_only(number["socketpair"], AF_UNIX)
    for name in ("kill", "tgkill"):
        steps += _allow_only(number[name], own_pid)
    # 0 is the caller itself: no other process's limits.
    steps += _allow_only(number["prlimit64"], 0)
    for name, requests in REFUSED_REQUESTS.items():
        steps += _refuse_if(number[name], 1, [(_EQUAL, request) for request in requests])
    return [*steps, (_RETURN, 0, 0, _ALLOW)]


def _allow_only(number: int, value: int) -> list[Instruction]:
    """Refuse call `number` unless its first argument (the low 32 bits, all that these calls look at) is `value`."""
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 0, 1, value),
        (_RETURN, 0, 0, _ALLOW),
        _fails(errno.EPERM),
    ]


def _refuse_if(number: int, argument: int, tests: list[tuple[int, int]]) -> list[Instruction]:
    """Refuse call `number` if its argument (the low 32 bits) passes one of the tests."""
    steps: list[Instruction] = [(_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * argument)]
    for code, operand in tests:
        steps += [(code, 0, 1, operand), _fails(errno.EPERM)]
    steps.append((_RETURN, 0, 0, _ALLOW))
    return [(_EQUAL, 0, len(steps), number), *steps]


def _fails(number: int) -> Instruction:
    return (_RETURN, 0, 0, 0x00050000 | number)


def _pack(step: Instruction) -> bytes:
    code, if_true, if_false, operand = step
    # -1 in the tables becomes the largest word: no call has that number.
    return code.to_bytes(2, "little") + bytes((if_true, if_false)) + (operand & 0xFFFFFFFF).to_bytes(4, "little")
