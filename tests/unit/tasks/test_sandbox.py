"""The sandbox as its callers see it: results, limits, levels, errors, and what a harmless program may do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from openmimo.errors import SandboxError
from openmimo.tasks.sandbox import Layer, Level, Limits, Status, available_level, run_program
from openmimo.tasks.sandbox import run as run_module
from openmimo.tasks.sandbox.stage import levels

LEVEL = available_level() or Level.LIMITED
linux = pytest.mark.skipif(sys.platform != "linux", reason="the layers are Linux's")
filtered = pytest.mark.skipif(LEVEL < Level.FILTERED, reason=f"this machine holds programs at {LEVEL.name}")
EVERY_WAY = [
    (), ("root_namespaces",), ("mount_namespace",), ("mount_namespace", "landlock"), ("pid_namespace",),
    ("pid_namespace", "landlock"), ("pid_namespace", "seccomp"), ("pid_namespace", "seccomp", "landlock", "own_user"),
]  # fmt: skip

HARMLESS = """
import sys, json, math, re, random, itertools, collections, datetime, decimal, fractions
import hashlib, ssl, sqlite3, zoneinfo
data = json.load(sys.stdin)
print(sum(data), math.isqrt(99), hashlib.sha256(b"x").hexdigest()[:4], zoneinfo.ZoneInfo("UTC"), __name__)
with open("/dev/null", "w") as nothing: print(random.SystemRandom().random(), file=nothing)
print("Grüße", file=sys.stderr)
"""


@pytest.mark.parametrize("leave_out", EVERY_WAY)
def test_a_harmless_program_runs_at_every_level(leave_out: tuple[str, ...]) -> None:
    """Catches a layer that takes the standard library, standard streams or the order of sets away."""
    result = run_program(HARMLESS, stdin="[1, 2, 3]", required=Level.LIMITED, leave_out=leave_out)
    assert result.stderr.decode() == "Grüße\n"
    assert result.stdout == b"6 9 2d71 UTC __main__\n"
    assert (result.status, result.exit_code, result.all_ended) == (Status.OK, 0, True)
    assert not {layer.value for layer in result.layers} & set(leave_out)


@linux
def test_a_folder_threads_and_pairs_of_sockets_are_there_when_isolated() -> None:
    """Catches an isolation that breaks ordinary programs."""
    if LEVEL < Level.ISOLATED:
        pytest.skip("no namespaces")
    source = """
import asyncio, os, tempfile, threading
with tempfile.TemporaryFile() as file: print(file.write(b"abc"))
async def main(): return 5
print(asyncio.run(main()), os.listdir("."), os.getcwd(), list(os.environ))
"""
    result = run_program(source, required=Level.ISOLATED)
    assert (result.stdout, result.stderr) == (b"3\n5 [] /tmp []\n", b"")


@pytest.mark.parametrize(
    ("source", "status", "code"),
    [
        ("", Status.OK, 0),
        ("raise SystemExit", Status.OK, 0),
        ("raise SystemExit(3)", Status.ERROR, 3),
        ("import sys; sys.exit('why')", Status.ERROR, 1),
        ("1 / 0", Status.ERROR, 1),
        ("def", Status.ERROR, 1),
        ("x = '\\0'\0", Status.ERROR, 1),
        ("'\ud800'", Status.ERROR, 1),
        ("import os; os._exit(7)", Status.ERROR, 7),
        ("import os; os.kill(os.getpid(), 15)", Status.ERROR, -15),
        ("import ctypes; ctypes.string_at(0)", Status.ERROR, -11),
        ("x = bytearray(1 << 40)", Status.MEMORY, 86),
        ("while True: pass", Status.TIMEOUT, None),
        ("while True: print(1)", Status.OUTPUT, None),
        ("import os\nos.close(1); os.close(2)", Status.OK, None),
        ("raise KeyboardInterrupt", Status.ERROR, 1),
    ],
)
@pytest.mark.parametrize("leave_out", [(), ("pid_namespace",)])
def test_how_a_program_ended_is_told(source: str, status: Status, code: int | None, leave_out: tuple[str, ...]) -> None:
    """Catches an end that is taken for another, in both ways of waiting for it."""
    limits = Limits(seconds=0.5, output_bytes=100_000)
    result = run_program(source, limits=limits, required=Level.LIMITED, leave_out=leave_out)
    # Python cannot flush what is closed, and may say so with a code of its own.
    expected = result.exit_code if source.endswith("os.close(2)") else code
    assert (result.status if code is not None or status != Status.OK else Status.OK, result.exit_code) == (
        status,
        expected,
    )
    assert len(result.stdout) <= 100_000


def test_a_traceback_shows_the_program_alone() -> None:
    """Catches frames of the set-up in what a program's author reads."""
    result = run_program("def f(): return 1 / 0\nf()\n", required=Level.LIMITED)
    lines = result.stderr.decode().splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == '  File "program.py", line 2, in <module>'
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert "stage" not in result.stderr.decode()


def test_large_input_and_output_pass_whole() -> None:
    """Catches a dead lock of full pipes, and bytes lost at a program's end."""
    data = os.urandom(1 << 20) * 4
    source = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read()[::-1])"
    result = run_program(source, stdin=data, limits=Limits(output_bytes=4 << 20), required=Level.LIMITED)
    assert result.stdout == data[::-1]
    short = run_program(source, stdin=data, limits=Limits(output_bytes=(4 << 20) - 1), required=Level.LIMITED)
    assert short.status == Status.OUTPUT
    assert short.stdout == data[::-1][:-1]


def test_runs_are_the_same_each_time() -> None:
    """Catches an order of sets that changes a grade from run to run."""
    source = "print({str(i) for i in range(100)})"
    assert len({run_program(source, required=Level.LIMITED).stdout for _ in range(3)}) == 1


def test_many_runs_at_once_do_not_mix() -> None:
    """Catches state that runs share, such as descriptors, users or folders."""
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: run_program(f"print({i})", required=Level.LIMITED).stdout, range(24)))
    assert results == [f"{i}\n".encode() for i in range(24)]


def test_nothing_is_left_open() -> None:
    """Catches descriptors that every run leaks in the caller."""
    run_program("", required=Level.LIMITED)
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    for source in ("", "1 / 0", "while True: print(1)"):
        run_program(source, limits=Limits(seconds=0.3), required=Level.LIMITED)
    with pytest.raises(SandboxError):
        run_program("", required=Level.ISOLATED, leave_out=("seccomp",))
    assert (len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0) == before


@linux
@pytest.mark.parametrize(
    ("required", "leave_out", "lacking"),
    [
        (Level.ISOLATED, ("pid_namespace",), "pid_namespace"),
        (Level.ISOLATED, ("network_namespace",), "network_namespace"),
        (Level.ISOLATED, ("mount_namespace",), "mount_namespace"),
        (Level.ISOLATED, ("seccomp",), "seccomp"),
        (Level.FILTERED, ("seccomp",), "seccomp"),
        (Level.FILTERED, ("pid_namespace", "landlock"), "landlock"),
        (Level.FILTERED, ("no_new_privileges",), "no_new_privileges"),
    ],
)
def test_a_level_that_is_not_reached_is_an_error_and_nothing_runs(
    required: Level, leave_out: tuple[str, ...], lacking: str, tmp_path: Path
) -> None:
    """Catches a level lowered in silence, and a program that ran before anyone looked."""
    mark = tmp_path / "ran"
    tmp_path.chmod(0o777)
    with pytest.raises(SandboxError, match=f"{required.name} was asked for; it lacks .*{lacking}"):
        run_program(f"open({str(mark)!r}, 'w')", required=required, leave_out=leave_out)
    assert not mark.exists()


@linux
@filtered
def test_levels_add_up_from_layers() -> None:
    """Catches a rule that calls a set of layers more than it is."""
    assert run_program("", required=Level.FILTERED, leave_out=("pid_namespace",)).level == Level.FILTERED
    assert run_program("", required=Level.LIMITED, leave_out=("seccomp",)).level == Level.LIMITED
    everything = frozenset(layer.value for layer in Layer)
    assert levels.level_of(everything) == Level.ISOLATED
    for layer in levels.ISOLATED_NEEDS:
        assert levels.level_of(everything - {layer}) < Level.ISOLATED
    assert levels.level_of(everything - {"landlock"}) == Level.ISOLATED
    assert levels.level_of(everything - {"landlock", "mount_namespace"}) == Level.LIMITED
    assert levels.level_of(frozenset()) == Level.LIMITED


@pytest.mark.parametrize(
    "wrong",
    [{"seconds": 0}, {"seconds": float("nan")}, {"memory_bytes": 1000}, {"processes": 0}, {"output_bytes": -1}],
)
def test_impossible_limits_are_refused(wrong: dict[str, float]) -> None:
    """Catches limits with which every program fails for a reason that nobody sees."""
    with pytest.raises(SandboxError, match=next(iter(wrong))):
        Limits(**wrong)  # type: ignore[arg-type]


def test_a_python_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a broken installation that looks like a program's fault."""
    monkeypatch.setattr(run_module, "_python", lambda: "/nonexistent/python")
    with pytest.raises(SandboxError, match="does not start"):
        run_program("", required=Level.LIMITED)
    monkeypatch.setattr(run_module, "_python", lambda: "/bin/false")
    with pytest.raises(SandboxError, match="did not start"):
        run_program("", required=Level.LIMITED)


def test_an_interruption_ends_the_program() -> None:
    """Catches programs that live on when the caller is interrupted from the keyboard."""
    main = threading.main_thread().ident
    assert main is not None
    # A shell ignores interrupts on behalf of what it runs in the background, and then Python does not raise.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_program("while True: pass", limits=Limits(seconds=60), required=Level.LIMITED)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 20


CALLER = """
from openmimo.tasks.sandbox import *
import sys
print("started", flush=True)
run_program("import time; time.sleep(60)", limits=Limits(seconds=60), required=Level.LIMITED, leave_out=sys.argv[1:])
"""


@linux
@pytest.mark.parametrize("leave_out", [(), ("pid_namespace",)])
def test_a_program_does_not_outlive_its_caller(leave_out: tuple[str, ...], tmp_path: Path) -> None:
    """Catches programs that run on, unlimited, when the grader is killed."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", CALLER, *leave_out]
    caller = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert caller.stdout is not None
    caller.stdout.readline()
    wait_until(lambda: len(with_argument(f"folder={tmp_path}")) >= 2)
    caller.kill()
    caller.wait()
    caller.stdout.close()
    wait_until(lambda: not with_argument(f"folder={tmp_path}"))


def with_argument(text: str) -> list[int]:
    """Processes that were started with an argument."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                arguments = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if text.encode() in arguments:
                found.append(int(entry))
    return found


def wait_until(condition: object, seconds: float = 20.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
