"""An installation without the C++ runtime, as where no compiler is: it decodes with PyTorch and says so."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from openmimo.checkpoint import save_model
from openmimo.config.model import preset
from openmimo.engine import Engine, SamplingParams
from openmimo.model import build_model
from openmimo.text import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PROMPT, NUM_TOKENS = "a wheel without", 12
# Packages other than the editable installation of this checkout, which finds its modules by a hook or a path.
COMMAND = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.append({sysconfig.get_path("purelib")!r})
from openmimo.cli.main import main
import openmimo
assert openmimo.__file__.startswith(sys.argv.pop(1)), openmimo.__file__
main()
"""


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as `pip` installs it with OPENMIMO_BUILD_NATIVE=0, in a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(ROOT)]
    if importlib.util.find_spec("scikit_build_core") and importlib.util.find_spec("nanobind"):
        command.append("--no-build-isolation")
    subprocess.run(command, env={**os.environ, "OPENMIMO_BUILD_NATIVE": "0"}, check=True)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(build_model(preset("nano")), folder)
    train_tokenizer([PROMPT] * 3, vocab_size=300).save(folder)
    return folder


def generate(installation: Path, model: Path, runner: str) -> subprocess.CompletedProcess[str]:
    options = ["--model", str(model), "--prompt", PROMPT, "--max-tokens", str(NUM_TOKENS), "--runner", runner]
    return subprocess.run(
        [sys.executable, "-S", "-c", COMMAND, str(installation), "generate", *options],
        env={**os.environ, "PYTHONPATH": str(installation)},
        cwd=installation,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_it_decodes_and_says_that_it_is_slower(installation: Path, model: Path) -> None:
    """A pure Python wheel that needs the extension, or that is slow without a word."""
    assert not list(installation.rglob("*.so"))
    done = generate(installation, model, "auto")
    assert done.returncode == 0, done.stderr
    expected = Engine(model, runner="torch").generate([PROMPT], SamplingParams(max_tokens=NUM_TOKENS))[0]
    assert done.stdout == f"{PROMPT}{expected.text}\n"
    assert "slower" in done.stderr


@pytest.mark.slow
def test_asking_for_the_native_runner_is_refused_with_the_remedy(installation: Path, model: Path) -> None:
    """A fallback that nobody asked for, or an error that does not say what to install."""
    done = generate(installation, model, "native")
    assert done.returncode != 0
    assert "pip install" in done.stderr
