"""Limits that every system has: memory, processes, files and processor time of the process itself."""

from __future__ import annotations

import os
import resource

NAMES = ("cpu_seconds", "memory_bytes", "disk_bytes", "processes", "open_files")


def apply(numbers: dict[str, int], others: int) -> None:
    """Set the limits of this process for good: those of NAMES.

    `others` is how many of the user's processes are not the program's. A system that does not know a limit, or does not
    let it be set, goes without it.
    """
    wanted = {
        "RLIMIT_CPU": numbers["cpu_seconds"],
        "RLIMIT_AS": numbers["memory_bytes"],
        "RLIMIT_FSIZE": numbers["disk_bytes"],
        "RLIMIT_NPROC": numbers["processes"] + others,
        "RLIMIT_NOFILE": numbers["open_files"],
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    for name, value in wanted.items():
        which = getattr(resource, name, None)
        if which is None:
            continue
        highest = resource.getrlimit(which)[1]
        bound = value if highest == resource.RLIM_INFINITY else min(value, highest)
        try:
            resource.setrlimit(which, (bound, bound))
        except (OSError, ValueError):
            continue


def tasks_of_user(user: int) -> int:
    """How many tasks (threads of all processes) the user has, where that can be seen."""
    count = 0
    try:
        entries = os.scandir("/proc")
    except OSError:
        return 0
    with entries:
        for entry in entries:
            if not entry.name.isdigit():
                continue
            try:
                if os.stat(entry.path).st_uid == user:
                    count += len(os.listdir(f"{entry.path}/task"))
            except OSError:
                continue
    return count
