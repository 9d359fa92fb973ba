"""The set-up stage: what the sandbox's first process does before, beside and after the program.

    caller --> launcher (outside, ends everything) --> init (first in its namespaces, reaps) --> program

Without namespaces the launcher is the program's parent itself. The caller hears of it by lines in the report pipe, of
which the program holds no end: `folder PATH`, `ready LAYERS` or `missing LAYERS`, `ended CODE`. A byte in the control
pipe, or its end with the caller's, orders the launcher to end everything.
"""

from __future__ import annotations

import os
import select
import sys

from . import levels, limits
from .files import WORK, Needed
from .lock import Lock, choose_user
from .program import run_source
from .reaping import end_descendants, wait_for

if sys.platform == "linux":
    from . import files, kernel, landlock

HIGHEST_OWN_DESCRIPTOR = 256


class Options:
    """What the caller passes by argument: file descriptors, the level it needs, limits, layers to leave out."""

    def __init__(self, arguments: list[str]) -> None:
        given = dict(argument.split("=", 1) for argument in arguments)
        self.report = int(given["report"])
        self.control = int(given["control"])
        self.source = int(given["source"])
        self.required = int(given["required"])
        self.numbers = {name: int(given[name]) for name in limits.NAMES}
        self.without = frozenset(given["without"].split(","))
        self.folder = given["folder"]


def main(arguments: list[str]) -> None:
    """Everything. Returns in the program's own process alone, with the exit code to end with in SystemExit."""
    options = Options(arguments)
    with open(options.source, "rb") as file:
        source = file.read().decode("utf-8", "surrogatepass")
    held = {"wall_clock", "resource_limits", "empty_environment"}
    user = choose_user(held) if sys.platform == "linux" and "own_user" not in options.without else None
    paths = files.needed() if sys.platform == "linux" else Needed((), ())
    lock = Lock(options.numbers, options.without, held, user, paths)
    if sys.platform == "linux" and _enter_process_namespace(lock):
        _launch_init(options, lock, source)
    else:
        _launch_program(options, lock, source)


def _enter_process_namespace(lock: Lock) -> bool:
    """Have the next child start a process namespace, by right of root or in a user namespace of its own."""
    if "pid_namespace" in lock.without:
        return False
    if os.geteuid() == 0 and "root_namespaces" not in lock.without:
        try:
            kernel.unshare(kernel.CLONE_NEWPID)
            return True
        except OSError:
            pass
    if "user_namespace" in lock.without:
        return False
    user, group = os.geteuid(), os.getegid()
    try:
        kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWPID)
    except OSError:
        return False
    lock.held.add("user_namespace")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        try:
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
        except OSError:
            continue
    # Only one user exists in there, so there is none to change to.
    lock.forget_user()
    return True


def _launch_init(options: Options, lock: Lock, source: str) -> None:
    """The launcher with namespaces: start init, wait for its end or the caller's order."""
    from_init, to_launcher = os.pipe()
    from_launcher, to_init = os.pipe()
    init = os.fork()
    if init == 0:
        os.close(from_init)
        os.close(to_init)
        _init(options, lock, source, from_launcher, to_launcher)
        return
    os.close(to_launcher)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    if os.read(from_init, 1):
        os.write(to_init, b"g")
    # Init keeps its end of the pipe for as long as it lives.
    select.select([options.control, from_init], [], [])
    _kill(init)
    # Init ends only after the kernel has ended and reaped everything in its namespace.
    os.waitpid(init, 0)
    os._exit(0)


def _init(options: Options, lock: Lock, source: str, from_launcher: int, to_launcher: int) -> None:
    # First tie init to the launcher's life, then hear whether the launcher was still alive after that.
    kernel.prctl(kernel.PR_SET_PDEATHSIG, kernel.SIGKILL)
    os.write(to_launcher, b"r")
    if not os.read(from_launcher, 1):
        os._exit(1)
    os.close(from_launcher)
    os.close(options.control)
    lock.held.add("pid_namespace")
    lock.enter_other_namespaces()
    folder = WORK if "mount_namespace" in lock.held else _writable_folder(options, lock)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    program = os.fork()
    if program == 0:
        os.close(to_launcher)
        _program(options, lock, source, folder)
        return
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == program:
            break
    os.write(options.report, f"ended {os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _launch_program(options: Options, lock: Lock, source: str) -> None:
    """The launcher without namespaces: it is the parent, and adopts whatever the program leaves behind."""
    folder = _writable_folder(options, lock)
    if sys.platform == "linux":
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    lock.count_other_tasks()
    program = os.fork()
    if program == 0:
        if sys.platform == "linux":
            kernel.prctl(kernel.PR_SET_PDEATHSIG, kernel.SIGKILL)
        os.setpgid(0, 0)
        os.close(options.control)
        _program(options, lock, source, folder)
        return
    _make_leader(program)
    code = wait_for(program, options.control)
    left = end_descendants(program, lock.user if lock.unique_user else None)
    if code is not None:
        os.write(options.report, f"{'left' if left else 'ended'} {code}\n".encode())
    os._exit(0)


def _writable_folder(options: Options, lock: Lock) -> str:
    """A new folder where nothing better bounds what is written; with Landlock a program writes nowhere at all."""
    if sys.platform == "linux" and "landlock" not in lock.without and landlock.version() > 0:
        return "/"
    folder = os.path.join(options.folder, f"openmimo-{os.urandom(8).hex()}")
    os.mkdir(folder, 0o700)
    if lock.user is not None:
        os.chown(folder, *lock.user)
    os.write(options.report, f"folder {folder}\n".encode())
    return folder


def _program(options: Options, lock: Lock, source: str, folder: str) -> None:
    """Lock this process in, report, and run. Ends with SystemExit."""
    os.chdir(folder)
    report = 3
    if options.report != report:
        os.dup2(options.report, report, inheritable=False)
    # The caller passed three descriptors and no others; the set-up's own came after them, at the lowest free numbers.
    for number in (options.control, options.source):
        if number > report:
            os.closerange(number, number + 1)
    os.closerange(report + 1, HIGHEST_OWN_DESCRIPTOR)
    os.environ.clear()
    lock.close()
    lacking = levels.missing(options.required, lock.held)
    word, layers = ("missing", lock.held) if lacking else ("ready", lock.held)
    os.write(report, f"{word} {','.join(sorted(layers))}\n".encode())
    os.close(report)
    if lacking:
        os._exit(1)
    for name in [name for name in sys.modules if name.partition(".")[0] == __name__.partition(".")[0]]:
        del sys.modules[name]
    raise SystemExit(run_source(source))


def _make_leader(program: int) -> None:
    """The program does the same; whoever is first, it leads its group before the launcher goes on."""
    try:
        os.setpgid(program, program)
    except OSError:
        return  # it may even have ended


def _kill(pid: int) -> None:
    try:
        os.kill(pid, kernel.SIGKILL)
    except ProcessLookupError:
        return
