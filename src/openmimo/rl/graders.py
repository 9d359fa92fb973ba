"""Grading beside sampling and training: a pool of processes that grades every ticket exactly once."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from types import TracebackType
from typing import Any, cast

from openmimo.errors import SandboxError
from openmimo.rl.grader_process import GraderProcess
from openmimo.tasks import Problem
from openmimo.tasks.grading_worker import GradeStatus, find_grader, grade_one

DEFAULT_GRADER = "openmimo.tasks:grade_response"
MAX_BATCH = 32
MAX_START_FAILURES = 3

Item = tuple[int, Problem, str]


@dataclass(frozen=True, slots=True)
class Grade:
    """What became of a ticket. `score` is in [0, 1], and 0.0 unless `status` is "ok"; `seconds` of grading."""

    ticket: int
    score: float
    seconds: float
    status: GradeStatus


class GraderPool:
    """Grades responses in `num_workers` processes of their own, which import `openmimo.tasks` and no PyTorch.

    A response that takes longer than `timeout_s`, or whose grader ends its process, scores 0.0 with its status; its
    process is replaced and the others' tickets go on. At most `queue_size` tickets wait or are being graded: `submit`
    waits for room. With no workers `submit` grades in this process, without a time-out.
    `grader` names the function as `module:attribute`.
    Raises: SandboxError when a process cannot start.
    """

    def __init__(
        self, num_workers: int = 1, *, timeout_s: float = 10.0, queue_size: int = 4096, grader: str = DEFAULT_GRADER
    ) -> None:
        if num_workers < 0 or timeout_s <= 0 or queue_size < 1:
            raise SandboxError(
                f"num_workers={num_workers}, timeout_s={timeout_s}, queue_size={queue_size}; expected at least 0, "
                "more than 0 and at least 1"
            )
        self._timeout_s = timeout_s
        self._queue_size = queue_size
        self._grader = grader
        self._next_ticket = 0
        self._waiting: deque[Item] = deque()
        self._outstanding = 0
        self._done: dict[int, Grade] = {}
        self._claimed: set[int] = set()
        self._broken: str | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._in_process = find_grader(grader) if num_workers == 0 else None
        self._start_failures = 0
        self._workers: list[GraderProcess] = []
        self._thread: threading.Thread | None = None
        if num_workers:
            self._wake_end, self._wake = os.pipe()
            os.set_blocking(self._wake, False)
            os.set_blocking(self._wake_end, False)
            self._selector = DefaultSelector()
            self._selector.register(self._wake_end, EVENT_READ)
            self._thread = threading.Thread(target=self._run, args=(num_workers,), name="graders", daemon=True)
            self._thread.start()
            self._wait_for_start(num_workers)

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, problem: Problem, response: str) -> int:
        """Hand in a response; returns its ticket. Waits while the queue is full.

        Raises: SandboxError when the pool is closed or its processes no longer start.
        """
        return self._submit(problem, response, claim=False)

    def poll(self, timeout_s: float = 0.0) -> list[Grade]:
        """All grades that are there, each handed out once; waits up to `timeout_s` for the first while any is due."""
        with self._changed:
            self._changed.wait_for(lambda: self._free() or not self._due() or self._closed, timeout_s)
            return [self._done.pop(ticket) for ticket in self._free()]

    def grade_all(self, pairs: Iterable[tuple[Problem, str]]) -> list[Grade]:
        """Grades of all pairs, in their order. Tickets handed in by `submit` stay for `poll`."""
        tickets = [self._submit(problem, response, claim=True) for problem, response in pairs]
        with self._changed:
            for ticket in tickets:
                self._changed.wait_for(lambda ticket=ticket: self._closed or ticket in self._done)
                if ticket not in self._done:
                    raise SandboxError("the grader pool was closed while it graded")
            self._claimed.difference_update(tickets)
            return [self._done.pop(ticket) for ticket in tickets]

    def close(self) -> None:
        """End all processes; tickets that were not graded are dropped. Does nothing the second time."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._ring()
            self._thread.join()
            self._thread = None
            os.close(self._wake)
            os.close(self._wake_end)

    def _submit(self, problem: Problem, response: str, *, claim: bool) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._outstanding < self._queue_size or self._closed)
            if self._closed or self._broken:
                raise SandboxError(self._broken or "the grader pool is closed; make a new one")
            ticket = self._next_ticket
            self._next_ticket += 1
            if claim:
                self._claimed.add(ticket)
            if self._in_process is None:
                self._outstanding += 1
                self._waiting.append((ticket, problem, response))
                # The thread looks at the queue whenever it wakes; it needs a call only if it found it empty.
                if len(self._waiting) == 1:
                    self._ring()
                return ticket
        start = time.monotonic()
        score, status = grade_one(self._in_process, problem, response)
        with self._changed:
            self._done[ticket] = Grade(ticket, score, time.monotonic() - start, status)
        return ticket

    def _free(self) -> list[int]:
        """Tickets of grades that no call of `grade_all` waits for."""
        return [ticket for ticket in self._done if ticket not in self._claimed]

    def _due(self) -> bool:
        return self._outstanding > 0

    def _wait_for_start(self, num_workers: int) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._broken or (len(self._workers) == num_workers and all(w.ready for w in self._workers))
            )
        if self._broken:
            self.close()
            raise SandboxError(self._broken)

    # What follows runs in the pool's thread alone.

    def _run(self, num_workers: int) -> None:
        try:
            for _ in range(num_workers):
                self._start_worker()
            while not self._closed:
                self._hand_out()
                deadline = min((w.deadline(self._timeout_s) for w in self._workers), default=float("inf"))
                wait = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
                for key, events in self._selector.select(wait):
                    worker = cast("GraderProcess | None", key.data)
                    if worker is None:
                        self._silence()
                    elif worker in self._workers:  # it may have been replaced in this round
                        self._attend(worker, events)
                for worker in list(self._workers):
                    if time.monotonic() >= worker.deadline(self._timeout_s):
                        self._take_grades(worker)  # written, but not read yet
                        if time.monotonic() >= worker.deadline(self._timeout_s):
                            # One that ended may go unseen until here, if a child of its holds the pipe open.
                            self._replace(worker, "error" if worker.has_ended() else "timeout")
        except BaseException as error:
            self._break(f"the grader pool's thread failed: {error!r}")
            raise
        finally:
            for worker in self._workers:
                worker.end()
            self._selector.close()

    def _attend(self, worker: GraderProcess, events: int) -> None:
        alive = True
        if events & EVENT_READ:
            alive = self._take_grades(worker)
        if alive and events & EVENT_WRITE:
            alive = worker.send()
            if not worker.outgoing:
                self._selector.unregister(worker.requests)
        if not alive:
            self._replace(worker, "error")

    def _take_grades(self, worker: GraderProcess) -> bool:
        """Read what the worker has written; False when it has ended."""
        lines, alive = worker.receive()
        grades: list[Grade] = []
        for line in lines:
            row = cast("list[Any]", json.loads(line))
            if not row:
                worker.ready = True
                self._start_failures = 0
                continue
            ticket, score, status, start, end = row
            worker.finished(ticket, end)
            grades.append(Grade(ticket, score, end - start, status))
        if lines:
            self._hand_in(grades)
        return alive

    def _hand_in(self, grades: list[Grade]) -> None:
        with self._changed:
            self._outstanding -= len(grades)
            self._done.update((grade.ticket, grade) for grade in grades)
            self._changed.notify_all()

    def _hand_out(self) -> None:
        """Give every worker that has little left to do a fair share of the queue."""
        with self._changed:
            for worker in self._workers:
                if not self._waiting:
                    return
                if not worker.ready or len(worker.in_hand) >= MAX_BATCH // 2:
                    continue
                count = min(MAX_BATCH, -(-len(self._waiting) // len(self._workers)))
                batch = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
                was_sending = bool(worker.outgoing)
                worker.give(batch)
                if worker.send() and worker.outgoing and not was_sending:
                    self._selector.register(worker.requests, EVENT_WRITE, worker)

    def _replace(self, worker: GraderProcess, status: GradeStatus) -> None:
        """End a worker; what it had in hand goes back to the queue, but for the response that it was at."""
        worker.kill()
        self._take_grades(worker)  # what it had written before its end counts
        self._selector.unregister(worker.answers)
        if worker.requests in self._selector.get_map():
            self._selector.unregister(worker.requests)
        worker.end()
        self._workers.remove(worker)
        if not worker.ready:
            self._start_failures += 1
            if self._start_failures >= MAX_START_FAILURES:
                self._break(
                    f"processes for the grader {self._grader!r} end before they start; "
                    "see what they said on standard error, and that the module can be imported"
                )
                return
        back = list(worker.in_hand)
        if back and worker.ready:
            ticket = back.pop(0)[0]
            self._hand_in([Grade(ticket, 0.0, time.monotonic() - worker.began, status)])
        with self._changed:
            self._waiting.extendleft(reversed(back))
        self._start_worker()

    def _start_worker(self) -> None:
        worker = GraderProcess(self._grader)
        self._selector.register(worker.answers, EVENT_READ, worker)
        with self._changed:
            self._workers.append(worker)

    def _break(self, reason: str) -> None:
        """No more grades will come: every ticket gets an error."""
        with self._changed:
            self._broken = reason
            lost = [item for worker in self._workers for item in worker.in_hand] + list(self._waiting)
            self._waiting.clear()
            for worker in self._workers:
                worker.in_hand.clear()
            self._outstanding = 0
            self._done.update((ticket, Grade(ticket, 0.0, 0.0, "error")) for ticket, _, _ in lost)
            self._changed.notify_all()

    def _ring(self) -> None:
        try:
            os.write(self._wake, b"!")
        except BlockingIOError:
            return  # it is ringing already

    def _silence(self) -> None:
        try:
            os.read(self._wake_end, 4096)
        except BlockingIOError:
            return
