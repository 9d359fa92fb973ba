"""One process that grades, seen from its pool: what it has in hand, what it has written, how long it has taken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import openmimo
from openmimo.errors import SandboxError
from openmimo.tasks import Problem
from openmimo.tasks.grading_worker import encode

SERVE = (
    "import sys; sys.path.insert(0, sys.argv[1]); from openmimo.tasks.grading_worker import serve; serve(sys.argv[2])"
)
START_SECONDS = 60.0
CHUNK = 1 << 16


class GraderProcess:
    """Starts the process. `in_hand` holds what it was given and has not answered, in the order in which it answers."""

    def __init__(self, grader: str) -> None:
        source = str(Path(openmimo.__file__).parents[1])
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVE, source, grader],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"a process for grading does not start: {error}") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.requests = self._process.stdin.fileno()
        self.answers = self._process.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.answers, False)
        self.ready = False
        self.in_hand: deque[tuple[int, Problem, str]] = deque()
        self.outgoing = bytearray()
        self._incoming = bytearray()
        self.began = time.monotonic()

    def deadline(self, timeout_s: float) -> float:
        """When what the process is at takes too long."""
        if not self.ready:
            return self.began + START_SECONDS
        return self.began + timeout_s if self.in_hand else float("inf")

    def give(self, batch: Sequence[tuple[int, Problem, str]]) -> None:
        if not self.in_hand:
            self.began = time.monotonic()
        self.in_hand.extend(batch)
        self.outgoing += encode(batch)

    def send(self) -> bool:
        """Write as much as the pipe takes; False when the process no longer reads."""
        while self.outgoing:
            try:
                sent = os.write(self.requests, self.outgoing[:CHUNK])
            except BlockingIOError:
                break
            except OSError:
                return False
            del self.outgoing[:sent]
        return True

    def receive(self) -> tuple[list[bytes], bool]:
        """The whole lines that have arrived, and whether more may come."""
        alive = True
        while True:
            try:
                data = os.read(self.answers, CHUNK)
            except BlockingIOError:
                break
            if not data:
                alive = False
                break
            self._incoming += data
        *lines, rest = bytes(self._incoming).split(b"\n")
        self._incoming[:] = rest
        return lines, alive

    def finished(self, ticket: int, end: float) -> None:
        """The first in hand is answered, and the next one has begun at `end`."""
        expected = self.in_hand.popleft()[0]
        assert ticket == expected, f"ticket {ticket} was answered in place of {expected}"
        self.began = end

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """End the process and all that it started in its session."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except OSError:
            self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Kill, and let go of the pipes."""
        if self._process.poll() is None:
            self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
