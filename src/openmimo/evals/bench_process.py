"""A bench target in its own process: memory is counted apart, and no threads or crashes reach the others."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, cast

from openmimo.errors import MimoError, RequestError
from openmimo.evals.bench_target import BenchTarget, Drafts, Generation, TargetSpec, open_target
from openmimo.evals.measuring import resident_peak


class TargetProcess:
    """A `BenchTarget` that another process runs; the seconds are taken there.

    `load_seconds` is how long `open_target` took, without the start of Python and its imports.
    Raises: RequestError with the other side's reason.
    """

    def __init__(self, spec: TargetSpec) -> None:
        self.kind = spec.kind
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
        self._process.start()
        theirs.close()
        self.load_seconds = cast("float", self._receive())

    @property
    def settings(self) -> str:
        return cast("str", self._call("settings"))

    @property
    def peak_bytes(self) -> int:
        """The most memory that the process has held so far, mapped files included."""
        return cast("int", self._call("peak_bytes"))

    def prefill(self, prompt: Sequence[int]) -> float:
        return cast("float", self._call("prefill", prompt))

    def start(self, prompts: Sequence[Sequence[int]], *, room: int) -> None:
        self._call("start", prompts, room=room)

    def decode(self, steps: Sequence[Sequence[int]]) -> float:
        return cast("float", self._call("decode", steps))

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, num_drafts: Drafts) -> Generation:
        return cast("Generation", self._call("generate", prompts, num_tokens, num_drafts=num_drafts))

    def close(self) -> None:
        """End the process; does nothing the second time."""
        if self._process.is_alive():
            self._connection.send(("close", (), {}))
            self._process.join(timeout=10)
            self._process.kill()
        self._connection.close()

    def _call(self, method: str, *args: Any, **options: Any) -> object:
        self._connection.send((method, args, options))
        return self._receive()

    def _receive(self) -> object:
        try:
            worked, result = self._connection.recv()
        except EOFError as error:
            self._process.join()
            raise RequestError(
                f"the {self.kind} process ended with status {self._process.exitcode} (-9 is often too little memory, "
                "-4 a build for another CPU); measure a smaller model or build it again"
            ) from error
        if not worked:
            raise RequestError(f"{self.kind}: {result}")
        return result


def _serve(connection: Connection, spec: TargetSpec) -> None:
    """Open the target and answer calls until `close`."""
    try:
        started = time.perf_counter()
        target = open_target(spec)
        connection.send((True, time.perf_counter() - started))
    except MimoError as error:
        connection.send((False, str(error)))
        return
    while True:
        method, args, options = connection.recv()
        if method == "close":
            target.close()
            return
        try:
            connection.send((True, _answer(target, method, args, options)))
        except MimoError as error:
            connection.send((False, str(error)))


def _answer(target: BenchTarget, method: str, args: Sequence[Any], options: dict[str, Any]) -> object:
    if method == "peak_bytes":
        return resident_peak()
    found = getattr(target, method)
    return found(*args, **options) if callable(found) else found
