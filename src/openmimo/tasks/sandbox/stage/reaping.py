"""Ending everything that a program started, where there is no process namespace that does it."""

from __future__ import annotations

import os
import select
import time

# How long the launcher tries to end what fights back; beyond that it reports that something is left.
DEATH_SECONDS = 0.3
SIGKILL = 9


def wait_for(program: int, control: int) -> int | None:
    """Wait until the program has ended, collecting orphans too, or the caller orders the end.

    Returns the program's exit code (minus a signal's number), None after an order.
    """
    import signal  # here, because only the launcher without namespaces needs it

    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    while True:
        # Looked at before the first wait: the program may have ended before the wake-up was in place.
        code = reap(program)
        if code is not None:
            return code
        ready, _, _ = select.select([control, reader], [], [])
        if control in ready:
            return None
        os.read(reader, 4096)


def reap(program: int) -> int | None:
    """Collect children that have ended; the program's exit code (minus a signal's number) if it is among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == program:
            code = os.waitstatus_to_exitcode(status)


def end_descendants(program: int, user: tuple[int, int] | None) -> bool:
    """Kill the program's group, all processes of `user` if it has one of its own, and all descendants.

    Returns whether something may be left: it went on forking and leaving its group for `DEATH_SECONDS`.
    """
    deadline = time.monotonic() + DEATH_SECONDS
    while True:
        _kill_group(program)
        if user is not None:
            _kill_user(user)
        for pid in _descendants():
            _kill(pid)
        if not _children_left():
            return False
        if time.monotonic() > deadline:
            return True
        time.sleep(0.001)


def _children_left() -> bool:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, SIGKILL)
    except OSError:
        return


def _kill_user(user: tuple[int, int]) -> None:
    """A signal to "all" reaches whatever runs under that user, in one call that no fork outruns."""
    helper = os.fork()
    if helper == 0:
        try:
            os.setresuid(user[0], user[0], user[0])
            os.kill(-1, SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(helper, 0)


def _descendants() -> list[int]:
    """Processes that this one is an ancestor of, by /proc; as their subreaper it is one of all that are left."""
    parents: dict[int, int] = {}
    try:
        names = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    for name in names:
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        parents[int(name)] = int(fields[1])
    found: list[int] = []
    edge = {os.getpid()}
    while edge:
        edge = {pid for pid, parent in parents.items() if parent in edge}
        found += edge
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, SIGKILL)
    except OSError:
        return
