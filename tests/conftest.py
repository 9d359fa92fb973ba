"""What all tests share: threads, repeatable randomness, no network."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from openmimo.cli.machine import usable_cores

# Read when torch and huggingface_hub are first imported. Torch by itself counts cores that a container may not use.
os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A slow or busy machine must not fail a property; continuous integration draws the same examples every time.
settings.register_profile("openmimo", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("openmimo")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whichever tests ran before."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder that does not exist yet."""
    return tmp_path / "run"
