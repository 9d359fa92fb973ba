"""How a run reports itself: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Shows steps, tokens/s and time left. `plain_every_s` spaces the lines where there is no terminal."""

    def __init__(self, console: Console | None = None, *, plain_every_s: float = 10.0) -> None:
        self.console = console or Console()
        self.plain_every_s = plain_every_s
        self._bar: Progress | None = None
        self._task: Any = None
        self._rate = 0.0
        self._total = 0
        self._step = 0
        self._seconds_per_step = 0.0
        self._last_line = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, total_steps: int, done: int) -> None:
        self._total, self._step = total_steps, done
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.fields[stage]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tok/s  left"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("train", total=total_steps, completed=done, stage="", loss="-", rate="-")
            self._bar.start()

    def leave_out(self, num_steps: int) -> None:
        """So many steps will not be taken."""
        self._total -= num_steps
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)

    def step(self, step: int, num_tokens: int, seconds: float) -> None:
        """Count one finished step."""
        self._step = step
        weight = 0.1 if self._rate else 1.0
        self._rate += weight * (num_tokens / seconds - self._rate)
        self._seconds_per_step += weight * (seconds - self._seconds_per_step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=f"{self._rate:,.0f}")

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Show the figures of a logged step."""
        if self._bar is not None:
            self._bar.update(self._task, stage=record["stage"], loss=f"{record['loss']:.3f}")
            return
        now = time.monotonic()
        last = self._step == self._total
        if now - self._last_line < self.plain_every_s and not last:
            return
        self._last_line = now
        left = self._seconds_per_step * (self._total - self._step)
        mtp = "/".join(f"{loss:.3f}" for loss in record["mtp_losses"]) or "-"
        self.console.print(
            f"{record['stage']} step {self._step}/{self._total}  loss {record['loss']:.3f}  mtp {mtp}  "
            f"{self._rate:,.0f} tok/s  {record['flops_utilisation']:.0%} of peak  left {left / 60:.1f} min",
            highlight=False,
            soft_wrap=True,
        )
