"""The process in which responses are graded: reads problems and responses, writes scores. Imports no PyTorch.

A batch is one line of JSON, `[[ticket, [fields of the problem], response], ...]`; every grade is one line,
`[ticket, score, status, start, end]`, with times of the system's monotonic clock, and is written at once: what was not
written has not been graded, whatever happens to this process.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from openmimo.tasks.problem import Problem

Grader = Callable[[Problem, str], float]
GradeStatus = Literal["ok", "timeout", "error"]
READY = b"[]\n"
FIELDS = ("prompt", "solution", "answer", "domain", "task", "level", "key")


def encode(items: Sequence[tuple[int, Problem, str]]) -> bytes:
    """One batch as a line."""
    rows = [[ticket, [getattr(problem, name) for name in FIELDS], response] for ticket, problem, response in items]
    return json.dumps(rows, separators=(",", ":")).encode() + b"\n"


def find_grader(name: str) -> Grader:
    """The function that `module:attribute` names."""
    module, _, attribute = name.partition(":")
    return cast("Grader", getattr(importlib.import_module(module), attribute))


def grade_one(grader: Grader, problem: Problem, response: str) -> tuple[float, GradeStatus]:
    """The score; 0.0 and "error" when the grader raises, leaves, or gives anything but a number in [0, 1]."""
    try:
        score = float(grader(problem, response))
    except (Exception, SystemExit):
        return 0.0, "error"
    return (score, "ok") if 0.0 <= score <= 1.0 else (0.0, "error")


def serve(grader_name: str) -> None:
    """Grade batches from standard input until its end; scores go where standard output went at the start."""
    requests, answers = os.dup(0), os.dup(1)
    # A grader that prints or reads must not disturb the exchange.
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    grader = find_grader(grader_name)
    os.write(answers, READY)
    with open(requests, "rb") as lines:
        for line in lines:
            for ticket, fields, response in cast("list[tuple[int, list[Any], str]]", json.loads(line)):
                start = time.monotonic()
                score, status = grade_one(grader, Problem(*fields), response)
                row = [ticket, score, status, start, time.monotonic()]
                os.write(answers, json.dumps(row).encode() + b"\n")


def _end_with_parent(parent: int) -> None:
    """A grader that hangs would not see the end of its input when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
