"""What all tests share: threads, repeatable randomness, no network."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from openmimo.cli.machine import usable_cores

# Read when torch and huggingface_hub are first imported. Torch by itself counts cores that a container may not use.
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores())))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Another build of the C++ runtime in place of the installed one: `make sanitize` sets this.
if native_folder := os.environ.get("OPENMIMO_NATIVE_FOLDER"):
    (native_file,) = Path(native_folder).glob("_native*.so")
    spec = importlib.util.spec_from_file_location("openmimo._native", native_file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["openmimo._native"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["openmimo._native"])

# A slow or busy machine must not fail a property; continuous integration draws the same examples every time.
settings.register_profile("openmimo", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("openmimo")


@pytest.fixture(autouse=True)
def same_start() -> None:
    """Every test starts from the same random state and number of threads, whichever tests ran before.

    A run sets its own number of threads, sums in float32 may depend on it, and other processes start from the default.
    """
    random.seed(0)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.manual_seed(0)
        if torch.get_num_threads() != THREADS:
            torch.set_num_threads(THREADS)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder that does not exist yet."""
    return tmp_path / "run"
