"""Graders for the tests of the pool: what a response says happens. They run in the pool's processes."""

from __future__ import annotations

import os
import signal
import sys
import time

from openmimo.tasks import Problem


def obey(problem: Problem, response: str) -> float:
    """Scores numbers as they are; other responses name a misfortune."""
    command, _, argument = response.partition(" ")
    if command == "hang":
        while True:
            time.sleep(1)
    if command == "spin":
        while True:
            pass
    if command == "deaf":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(3600)
    if command == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if command == "leave":
        os._exit(0)
    if command == "exit":
        sys.exit(0)
    if command == "raise":
        raise ValueError(problem.prompt)
    if command == "print":
        print("[0, 1.0, 'ok', 0, 0]", flush=True)
        sys.stdin.read()
        return 0.5
    if command == "sleep":
        time.sleep(float(argument))
        return 1.0
    if command == "count":
        with open(argument, "a") as file:
            file.write(f"{problem.key}\n")
        return 1.0
    if command == "torch":
        return float("torch" in sys.modules or "numpy" in sys.modules)
    if command == "fork":
        if os.fork() == 0:
            time.sleep(3600)
        os._exit(3)
    return float(response)
