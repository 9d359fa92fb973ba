"""All hostile programs, the world around them that shows what they reached, and one run with its findings."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from hostile_grading import GRADING
from hostile_reach import REACH
from hostile_resources import RESOURCES

import openmimo
from openmimo.tasks.sandbox import Level, Limits, ProgramResult, run_program

# What every program starts with. `attempt` is for what must be refused, `attempt_quiet` for what may be harmless.
PRELUDE = """
import json, os, sys, time
world = json.loads(sys.stdin.read())
os.write(1, b"began\\n")
def escaped(what): os.write(1, b"ESC" + f"APED {what}\\n".encode())
def leak(text): os.write(1, text.encode(errors="replace"))
def attempt(action):
    try: action()
    except BaseException: return
    escaped(action.__code__.co_names)
def attempt_quiet(action):
    try: action()
    except BaseException: pass
"""
LIMITS = Limits(seconds=0.4, output_bytes=256 << 10, memory_bytes=128 << 20)
REAP_SECONDS = 0.5
VICTIM = """
import ctypes, sys, time
text = ctypes.create_string_buffer(sys.argv[1].encode())
print(ctypes.addressof(text), flush=True)
time.sleep(3600)
"""


@dataclass(frozen=True)
class HostileProgram:
    """One program of one class."""

    kind: str
    name: str
    source: str


def corpus() -> list[HostileProgram]:
    """Every program, in the order of the texts."""
    found: list[HostileProgram] = []
    for kind, text in (RESOURCES | REACH | GRADING).items():
        for name, source in re.findall(r"^### (.*)\n((?:(?!### ).*\n)*)", text, re.MULTILINE):
            found.append(HostileProgram(kind, name, source))
    return found


@dataclass
class Finding:
    """What one run showed; `seconds` is the whole call. An empty list of escapes is what is wanted."""

    result: ProgramResult
    seconds: float
    escapes: list[str] = field(default_factory=list)
    forged: bool = False
    late: bool = False


class World:
    """Things that a program must not reach, each of which shows whether it was."""

    def __init__(self) -> None:
        self.secret = secrets.token_hex(12)
        self.answer = f"answer-{secrets.token_hex(6)}"
        self._folder = tempfile.TemporaryDirectory(prefix="openmimo-world-")
        self.folder = Path(self._folder.name).resolve()
        # Open to everyone, so that only the sandbox stands between a program and these.
        self.folder.chmod(0o777)
        self.temporary = self.folder.parent / f"{self.folder.name}-runs"
        self.temporary.mkdir(mode=0o777)
        self.temporary.chmod(0o777)
        self.file = self.folder / "secret.txt"
        self._write_secret()
        self._descriptor = os.open(self.file, os.O_RDWR)
        os.set_inheritable(self._descriptor, True)
        self._listeners = self._listen()
        self._signals: list[int] = []
        self._handler = signal.signal(signal.SIGUSR1, lambda number, _: self._signals.append(number))
        self._before = self._state()
        self.restart_victim()

    def _write_secret(self) -> None:
        self.file.write_text(f"secret {self.secret}")
        self.file.chmod(0o666)

    def restart_victim(self) -> None:
        """A neighbour of the same user with the secret in its arguments, environment and memory."""
        self.victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, self.secret],
            env={"OPENMIMO_TEST_SECRET": self.secret},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.victim.stdout is not None
        with self.victim.stdout as lines:
            self.address = int(lines.readline())

    def repair(self) -> None:
        """Undo what an attack without a sandbox has done."""
        for pid in self.processes_left():
            os.kill(pid, signal.SIGKILL)
        if self._victim_state() not in ("S", "R"):
            self.victim.kill()
            self.victim.wait()
            self.restart_victim()
        for path in self.folder.iterdir():
            if path.name not in ("secret.txt", "socket"):
                path.unlink()
        self._write_secret()
        self._before = self._state()

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        signal.signal(signal.SIGUSR1, self._handler)
        for listener in self._listeners.values():
            listener.close()
        os.close(self._descriptor)
        self._folder.cleanup()
        self.temporary.rmdir()

    def run(self, program: HostileProgram, *, required: Level, leave_out: Collection[str] = ()) -> Finding:
        """Run one program and look at everything that it might have reached."""
        told = json.dumps(self._told())
        # The launcher's argument names this folder, by which processes of this run can be found.
        previous, tempfile.tempdir = tempfile.tempdir, str(self.temporary)
        os.environ["OPENMIMO_TEST_SECRET"] = self.secret
        try:
            started = time.perf_counter()
            result = run_program(
                PRELUDE + program.source, stdin=told, limits=LIMITS, required=required, leave_out=leave_out
            )
            seconds = time.perf_counter() - started
        finally:
            tempfile.tempdir = previous
            del os.environ["OPENMIMO_TEST_SECRET"]
        finding = Finding(result, seconds)
        finding.escapes = self._escapes(result)
        finding.forged = self.reward(result) != 0.0
        finding.late = result.seconds > LIMITS.seconds + REAP_SECONDS
        return finding

    def reward(self, result: ProgramResult) -> float:
        """The verdict of a grader: on this side of the wall, by what was written alone."""
        written = result.stdout.decode(errors="replace").removeprefix("began\n").strip()
        return float(result.status == "ok" and written == self.answer)

    def _told(self) -> dict[str, object]:
        return {
            "file": str(self.file),
            "folder": str(self.folder),
            "secret_name": "OPENMIMO_TEST_SECRET",
            "source": str(Path(openmimo.__file__).parents[1]),
            "victim": self.victim.pid,
            "address": self.address,
            "grader": os.getpid(),
            "port": self._listeners["tcp"].getsockname()[1],
            "port6": self._listeners["tcp6"].getsockname()[1] if "tcp6" in self._listeners else 1,
            "udp": self._listeners["udp"].getsockname()[1],
            "unix": str(self.folder / "socket"),
            "abstract": f"openmimo-{self.secret[:6]}",
        }

    def _listen(self) -> dict[str, socket.socket]:
        found = {
            "tcp": socket.create_server(("127.0.0.1", 0)),
            "udp": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            "unix": socket.socket(socket.AF_UNIX),
            "abstract": socket.socket(socket.AF_UNIX),
        }
        if socket.has_dualstack_ipv6():
            found["tcp6"] = socket.create_server(("::1", 0), family=socket.AF_INET6)
        found["udp"].bind(("127.0.0.1", 0))
        found["unix"].bind(str(self.folder / "socket"))
        (self.folder / "socket").chmod(0o777)
        found["abstract"].bind(f"\0openmimo-{self.secret[:6]}")
        for name, listener in found.items():
            if name not in ("udp", "tcp", "tcp6"):
                listener.listen()
            listener.setblocking(False)
        return found

    def _state(self) -> tuple[object, ...]:
        status = self.file.stat() if self.file.exists() else None
        return (
            self.file.read_text() if status else None,
            status and (stat.S_IMODE(status.st_mode), status.st_uid, status.st_mtime, status.st_nlink),
            os.listxattr(self.file) if status else None,
            sorted(path.name for path in self.folder.iterdir()),
        )

    def _escapes(self, result: ProgramResult) -> list[str]:
        found: list[str] = []
        time.sleep(0.01)  # a neighbour that was killed needs a moment to be seen dead
        written = result.stdout + result.stderr
        if not result.stdout.startswith(b"began"):
            found.append(f"did not run: {written[:300]!r}")
        if b"NameError" in written or b"SyntaxError: invalid" in written:
            found.append(f"does not do what it should: {written[-300:]!r}")
        if b"ESCAPED" in written:
            found.append(re.findall(rb"ESCAPED.*", written)[0].decode(errors="replace"))
        if self.secret.encode() in written:
            found.append("the secret was read")
        if self._state() != self._before:
            found.append(f"the file or its folder changed: {self._state()}")
        if self._descriptor and os.lseek(self._descriptor, 0, os.SEEK_CUR) != 0:
            found.append("an open file of the grader was used")
        found += [f"a message reached the {name} socket" for name, it in self._listeners.items() if self._reached(it)]
        status = self._victim_state()
        if status not in "SR":
            found.append(f"the neighbour is in state {status!r}")
        if self._signals:
            found.append("a signal reached the grader")
            self._signals.clear()
        left = self.processes_left()
        if left:
            found.append(f"processes left: {left}")
        folders = list(self.temporary.iterdir())
        if folders:
            found.append(f"folders left: {folders}")
        return found

    @staticmethod
    def _reached(listener: socket.socket) -> bool:
        try:
            if listener.type == socket.SOCK_DGRAM:
                listener.recv(1)
            else:
                listener.accept()[0].close()
        except BlockingIOError:
            return False
        return True

    def _victim_state(self) -> str:
        if self.victim.poll() is not None:
            return "ended"
        return Path(f"/proc/{self.victim.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def processes_left(self) -> list[int]:
        """Processes of any run in this world: they all bear the launcher's arguments."""
        mark, found = str(self.temporary).encode(), list[int]()
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                try:
                    line = Path(f"/proc/{entry}/cmdline").read_bytes()
                except OSError:
                    continue
                if mark in line:
                    found.append(int(entry))
        return found
