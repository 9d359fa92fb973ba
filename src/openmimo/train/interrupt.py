"""Ending a run on Ctrl-C or SIGTERM, or with the process that began it, only after it has saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

from openmimo.errors import MimoError


class TrainingInterruptedError(MimoError, KeyboardInterrupt):
    """Ctrl-C, after the state was saved."""


@contextmanager
def interrupt_flag() -> Generator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag; the second acts as usual."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in previous:
            signal.signal(number, note)
    except ValueError:  # Not the main thread: the caller handles signals.
        pass
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is note:
                signal.signal(number, handler)


def end_with_parent() -> None:
    """From now on, the end of the process that began this one is a SIGTERM to this one.

    For runs in processes of their own: nobody waits for them when what began them was killed.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
