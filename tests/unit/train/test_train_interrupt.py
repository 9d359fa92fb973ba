"""How runs end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

CHILD = """
import time
from openmimo.train.interrupt import end_with_parent, interrupt_flag
end_with_parent()
print("ready", flush=True)
with interrupt_flag() as interrupted:
    while not interrupted():
        time.sleep(0.1)
print("saved", flush=True)
"""
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""


@pytest.mark.skipif(not hasattr(os, "getppid") or sys.platform == "win32", reason="processes have no parents here")
def test_a_run_saves_and_ends_when_its_parent_is_killed() -> None:
    """A run that goes on for hours, without anybody who waits for it, on processors that others believe free."""
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        time.sleep(0.2)
        parent.send_signal(signal.SIGKILL)
        assert parent.communicate(timeout=30)[0] == "saved\n"  # waits until the child has closed it too
