"""A small recipe, and how to train it on several processes of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

RECIPE = """
name = "ranks"
seed = 3
threads = 1
precision = "fp32"
[model]
preset = "nano"
[tokenizer]
vocab_size = 400
train_documents = 60
[data]
sequence_length = 64
batch_sequences = 8
[[data.sources]]
kind = "task"
domain = "math"
[[data.sources]]
kind = "task"
domain = "logic"
[checkpoint]
every_steps = 4
keep = 4
[log]
every_steps = 1
[optimizer]
peak_lr = 3e-3
[[stages]]
name = "pretrain"
steps = 6
mtp_heads = 1
[[stages]]
name = "sft"
kind = "sft"
steps = 8
mtp_heads = 3
"""
STEPS = 14
WORKER = Path(__file__).parent / "ranks_worker.py"


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent)}


def torchrun(size: int, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = torchrun_command(size, *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, check=False)


def torchrun_command(size: int, *arguments: str) -> list[str]:
    """On a port of its own, so that several can run beside each other."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    return [*launcher, "--master-port", str(free_port()), *arguments]


def train_command(recipe: Path, out: Path, *options: str) -> list[str]:
    """What a launcher runs."""
    return ["-m", "openmimo", "train", "pretrain", str(recipe), "--out", str(out), *options]


def train_on(size: int, recipe: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return torchrun(size, *train_command(recipe, out, *options))


def children(pid: int) -> list[int]:
    """A process's children, none where the system does not tell."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return list(map(int, path.read_text().split())) if path.exists() else []


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
