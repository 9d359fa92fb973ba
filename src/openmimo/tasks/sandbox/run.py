"""Run a program: start its processes, feed and watch them, end them, and say what happened."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import IO

from openmimo.errors import SandboxError
from openmimo.tasks.sandbox.level import Layer, Level, level_of, read_layers
from openmimo.tasks.sandbox.stage.program import OUT_OF_MEMORY

START = "import sys; sys.path.insert(0, sys.argv[1]); from stage.start import main; del sys.path[0]; main(sys.argv[2:])"
# The folder that holds the set-up as a top-level package.
STAGE_FOLDER = Path(__file__).parent
START_SECONDS = 10.0
# After an order to end: how long the launcher gets before it is killed itself, and how long its end may then take.
ORDER_SECONDS = 0.4
KILL_SECONDS = 0.5
CHUNK = 1 << 16
MAX_PIPE_BYTES = 1 << 22


class Status(str, Enum):
    """How a program ended. OK is exit code 0; ERROR any other, or a signal."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT = "output"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use.

    `seconds` of wall clock from its first line; `memory_bytes` of address space for each of its processes;
    `output_bytes` on standard output and standard error together; `disk_bytes` in its folder (at LIMITED: in each
    file); `processes` at once, threads and itself included; `open_files` at once.
    Raises: SandboxError for values that no program could run with.
    """

    seconds: float = 5.0
    memory_bytes: int = 256 << 20
    output_bytes: int = 1 << 20
    disk_bytes: int = 16 << 20
    processes: int = 8
    open_files: int = 64

    def __post_init__(self) -> None:
        lowest = {"memory_bytes": 64 << 20, "output_bytes": 0, "disk_bytes": 4096, "processes": 1, "open_files": 8}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise SandboxError(f"{name} is {getattr(self, name)}; a program needs at least {least}")
        if not 0 < self.seconds < 1e6:
            raise SandboxError(f"seconds is {self.seconds}; expected a number above 0 and below 1,000,000")


@dataclass(frozen=True, kw_only=True)
class ProgramResult:
    """What a program did.

    `stdout` and `stderr` are cut at the limit on output; `exit_code` is minus the signal's number where one ended the
    program, None where it was ended from outside; `seconds` of wall clock go from its first line until
    all its processes had ended; `all_ended` is False when one of them may live on, which only happens below FILTERED.
    """

    status: Status
    stdout: bytes
    stderr: bytes
    exit_code: int | None
    seconds: float
    layers: frozenset[Layer]
    level: Level
    all_ended: bool


def run_program(
    source: str,
    *,
    stdin: bytes | str = b"",
    limits: Limits | None = None,
    required: Level = Level.FILTERED,
    leave_out: Collection[str] = (),
) -> ProgramResult:
    """Run `source` as a Python program of its own, fed with `stdin`; returns when all its processes have ended.

    The program gets the standard library, an empty environment and one folder to write into (none at FILTERED without
    a root of its own). What it wrote is to be judged here, by the caller: nothing that it must not know goes in.
    `leave_out` names layers to do without, for tests.
    Raises: SandboxError when the layers that `required` needs are not to be had (the program has not run then), or the
    sandbox cannot start.
    """
    limits = limits or Limits()
    run = _Run(source, stdin.encode() if isinstance(stdin, str) else stdin, limits, required, leave_out)
    with run:
        run.follow()
    return run.result(required)


@dataclass
class _Output:
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    report: bytearray = field(default_factory=bytearray)


class _Run:
    """One run, from the start of the launcher to the end of all processes."""

    def __init__(self, source: str, stdin: bytes, limits: Limits, required: Level, leave_out: Collection[str]) -> None:
        self._limits = limits
        self._output = _Output()
        self._status: Status | None = None
        self._began: float | None = None
        self._ended = 0.0
        self._open = True  # whether someone still holds the other end of the report pipe
        report, report_end = os.pipe()
        control_end, control = os.pipe()
        self._control = control
        with _file_of(source.encode("utf-8", "surrogatepass")) as program, _file_of(stdin) as given:
            options: dict[str, object] = {
                "report": report_end, "control": control_end, "source": program.fileno(), "required": int(required),
                "cpu_seconds": math.ceil(limits.seconds) + 1, "memory_bytes": limits.memory_bytes,
                "disk_bytes": limits.disk_bytes, "processes": limits.processes, "open_files": limits.open_files,
                "without": ",".join(leave_out), "folder": tempfile.gettempdir(),
            }  # fmt: skip
            command = [_python(), "-S", "-s", "-P", "-X", "utf8", "-c", START, str(STAGE_FOLDER)]
            try:
                self._process = subprocess.Popen(
                    [*command, *(f"{name}={value}" for name, value in options.items())],
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    cwd="/",
                    # All the environment there is; it fixes the order of sets, so that a program always does the same.
                    env={"PYTHONHASHSEED": "0"},
                    pass_fds=(report_end, control_end, program.fileno()),
                    start_new_session=True,
                )
            except OSError as error:
                os.close(report)
                os.close(control)
                raise SandboxError(
                    f"the sandbox's process does not start: {error}; free memory or processes"
                ) from error
            finally:
                os.close(report_end)
                os.close(control_end)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._report = report
        self._pipes = {
            report: self._output.report,
            self._process.stdout.fileno(): self._output.stdout,
            self._process.stderr.fileno(): self._output.stderr,
        }
        self._selector = DefaultSelector()
        for pipe in self._pipes:
            os.set_blocking(pipe, False)
            self._selector.register(pipe, EVENT_READ)

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever happened, an interruption from the keyboard included: nothing stays."""
        self._order_end()
        try:
            self._process.wait(ORDER_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._selector.close()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
        os.close(self._report)
        os.close(self._control)
        folder = self._told("folder")
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def follow(self) -> None:
        """Read until the launcher has ended, which closes the report pipe's last other end; make it end in time."""
        self._listen(time.monotonic() + START_SECONDS, self._has_begun)
        if self._began is not None:
            self._listen(self._began + self._limits.seconds, self._is_decided)
        if self._open:
            self._decide(Status.TIMEOUT)
            self._order_end()
            self._listen(time.monotonic() + ORDER_SECONDS)
        if self._open:
            self._process.kill()
            self._listen(time.monotonic() + KILL_SECONDS)
        # What is left in the pipes; more than they hold would come from a process that is still there.
        for pipe in self._pipes:
            for _ in range(MAX_PIPE_BYTES // CHUNK):
                if not self._read(pipe):
                    break
        self._ended = time.monotonic()

    def result(self, required: Level) -> ProgramResult:
        """What happened. Raises: SandboxError when the program never ran."""
        lacking = self._told("missing")
        if lacking is not None:
            held = read_layers(lacking)
            raise SandboxError(
                f"this system holds a program at level {level_of(held).name}, {required.name} was asked for; it lacks "
                f"{', '.join(required.missing(held))}. Allow unprivileged user namespaces, use a kernel with Landlock "
                "and seccomp, or pass a lower `required`"
            )
        layers = self._told("ready")
        if layers is None or self._began is None:
            reason = self._output.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise SandboxError(
                f"the sandbox did not start within {START_SECONDS:.0f} s ({reason or 'no reason given'}); "
                "see that this user may read Python's own files and start processes"
            )
        left, ended = self._told("left"), self._told("ended")
        said = ended if ended is not None else left
        code = int(said) if said is not None else None
        status = self._status or (Status.OK if code == 0 else Status.MEMORY if code == OUT_OF_MEMORY else Status.ERROR)
        held = read_layers(layers)
        return ProgramResult(
            status=status,
            stdout=bytes(self._output.stdout),
            stderr=bytes(self._output.stderr),
            exit_code=code,
            seconds=self._ended - self._began,
            layers=held,
            level=level_of(held),
            all_ended=not self._open and left is None,
        )

    def _has_begun(self) -> bool:
        return self._began is not None

    def _is_decided(self) -> bool:
        return self._status is not None

    def _decide(self, status: Status) -> None:
        """The first reason counts."""
        if self._status is None:
            self._status = status

    def _listen(self, deadline: float, stop: Callable[[], bool] = lambda: False) -> None:
        while self._open and not stop():
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                return
            for key, _ in self._selector.select(seconds):
                self._read(key.fd)

    def _read(self, pipe: int) -> bool:
        """Take one piece from a pipe; False when there is none."""
        try:
            data = os.read(pipe, CHUNK)
        except BlockingIOError:
            return False
        if not data:
            if pipe in self._selector.get_map():
                self._selector.unregister(pipe)
            self._open = self._open and pipe != self._report
            return False
        output = self._output
        if pipe == self._report:
            output.report += data
            if self._began is None and self._told("ready") is not None:
                self._began = time.monotonic()
            return True
        room = self._limits.output_bytes - len(output.stdout) - len(output.stderr)
        self._pipes[pipe] += data[:room]
        if len(data) > room:
            self._decide(Status.OUTPUT)
        return True

    def _told(self, word: str) -> str | None:
        """What follows `word` in the report, where a whole line begins with it."""
        for line in bytes(self._output.report).split(b"\n")[:-1]:
            first, _, rest = line.partition(b" ")
            if first == word.encode():
                return os.fsdecode(rest)
        return None

    def _order_end(self) -> None:
        try:
            os.write(self._control, b"e")
        except OSError:
            return  # the launcher has ended


def _python() -> str:
    """This interpreter without its virtual environment, whose start it would only slow down."""
    return getattr(sys, "_base_executable", None) or sys.executable


def _file_of(content: bytes) -> IO[bytes]:
    """An open file without a name that holds `content`, read from its start; sealed where the system can."""
    if sys.platform != "linux":
        file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
        file.write(content)
        file.seek(0)
        return file
    import fcntl

    file = open(os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b", buffering=0)  # noqa: SIM115
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]
    file.seek(0)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return file
