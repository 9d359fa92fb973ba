"""`openmimo doctor` on this machine and without parts of it."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from openmimo.cli import doctor
from openmimo.cli.main import build_app
from openmimo.kernels import native

REQUIREMENTS = [
    "torch>=2.11",
    'matplotlib>=3.8; extra == "plots"',
    'transformers==5.23.0; extra == "bench"',
    "openmimo[bench,plots]; extra == 'dev'",
    'import-linter>=2.0; extra == "dev"',
]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), ["doctor", *arguments], catch_exceptions=False)


@pytest.fixture
def no_sandbox_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openmimo.cli.machine.read_sandbox", lambda: None)


def test_json_has_all_sections_with_sane_values() -> None:
    """A section dropped, sizes in the wrong unit, or text around the one JSON object."""
    import torch

    result = invoke("--json")
    assert result.exit_code == 0
    report: dict[str, Any] = json.loads(result.stdout)
    assert set(report) == {
        "openmimo", "python", "system", "processor", "memory", "disk", "torch", "torch_error", "compiler", "kernels",
        "sandbox", "program_level", "extras", "works", "missing",
    }  # fmt: skip
    processor, memory, disk = report["processor"], report["memory"], report["disk"]
    assert 1 <= processor["cores_usable"] <= processor["cores"] == os.cpu_count()
    assert 2**28 < memory["total_bytes"] < 2**50
    assert memory["available_bytes"] is None or 0 < memory["available_bytes"] <= memory["total_bytes"]
    assert 0 <= disk["free_bytes"] <= disk["total_bytes"]
    assert report["torch"]["version"] == torch.__version__
    assert report["torch"]["threads"] == torch.get_num_threads()
    assert report["torch_error"] is None
    assert report["works"][0].startswith("training, decoding")
    if sys.platform == "linux":
        assert report["sandbox"]["landlock_abi"] >= 0
        assert report["program_level"] in (None, "limited", "filtered", "isolated")


@pytest.mark.usefixtures("no_sandbox_probe")
def test_plain_lines_without_a_terminal() -> None:
    """Box drawing or colours in a log file; a fact of the JSON that the text leaves out."""
    lines = invoke().stdout.splitlines()
    sections = {line.split(" ", 1)[0].rstrip(":") for line in lines}
    assert sections >= {
        "openmimo",
        "processor",
        "memory",
        "disk",
        "torch",
        "compiler",
        "kernels",
        "sandbox",
        "packages",
    }
    assert "works" in sections
    assert all(line.isascii() and ": " in line for line in lines)


@pytest.mark.usefixtures("no_sandbox_probe")
def test_tables_on_a_terminal_hold_the_same_facts() -> None:
    """A value that contains square brackets read as markup and swallowed."""
    from rich.console import Console

    report = doctor.examine()
    console = Console(width=200, force_terminal=True, color_system=None, highlight=False)
    gap = doctor.Gap(what="a part", get='pip install "openmimo[plots]"')
    with console.capture() as capture:
        doctor.print_tables(console, replace(report, missing=(gap,)))
    assert report.processor.name in capture.get()
    assert 'pip install "openmimo[plots]"' in capture.get()


@pytest.mark.usefixtures("no_sandbox_probe")
def test_works_without_torch_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb that should explain a broken installation dying of it."""
    monkeypatch.setitem(sys.modules, "torch", None)
    report = json.loads(invoke("--json").stdout)
    assert report["torch"] is None
    assert "torch" in report["torch_error"]
    assert "pip install" in report["missing"][0]["get"]
    assert "torch" in report["missing"][0]["what"]
    assert not any("training, decoding" in line for line in report["works"])
    assert "torch version: missing" in invoke().stdout


@pytest.mark.usefixtures("no_sandbox_probe")
def test_a_missing_package_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extra reported as working although one of its packages is missing."""
    monkeypatch.setattr(metadata, "requires", lambda _: REQUIREMENTS)
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "matplotlib" else "1.0")
    report = doctor.examine()
    gaps = {gap.what: gap.get for gap in report.missing}
    assert gaps["training curves as pictures (matplotlib)"].endswith('-m pip install "openmimo[plots]"')
    assert "tests and checks (matplotlib)" in gaps
    assert "benchmarks beside transformers and llama.cpp (bench)" in report.works


@pytest.mark.usefixtures("no_sandbox_probe")
@pytest.mark.parametrize(
    ("found", "environment", "hint"),
    [
        ("no C++ compiler found", "1", "apt install g++"),
        ("switched off", "0", "unset OPENMIMO_NATIVE"),
        (None, "1", ""),
    ],
)
def test_the_state_of_the_kernels_is_reported(
    found: str | None, environment: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow training without a word, or advice to install a compiler where they were switched off."""
    kernels = native.NativeKernels(None, found) if found else native.NativeKernels(ctypes.CDLL(None), "built")
    monkeypatch.setattr(native, "native_kernels", lambda: kernels)
    monkeypatch.setenv("OPENMIMO_NATIVE", environment)
    report = doctor.examine()
    gaps = [gap for gap in report.missing if "C++ kernels" in gap.what]
    assert doctor.report_facts(report)["kernels"] == [("C++", f"none: {found}" if found else "built")]
    assert any("C++ kernels" in line for line in report.works) == (found is None)
    assert len(gaps) == (found is not None)
    assert all(hint in gap.get and str(found) in gap.what for gap in gaps)


@pytest.mark.usefixtures("no_sandbox_probe")
def test_a_folder_that_is_not_installed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONPATH=src instead of an installation: no metadata."""

    def fail(_: str) -> None:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "requires", fail)
    report = doctor.examine()
    assert report.extras == ()
    assert any("pip install --editable ." in gap.get for gap in report.missing)


def test_extras_are_read_from_the_metadata_with_those_they_include() -> None:
    """A core requirement listed as optional, or the included extras lost."""
    assert doctor.extra_packages(REQUIREMENTS, "plots") == ["matplotlib"]
    assert doctor.extra_packages(REQUIREMENTS, "dev") == ["import-linter", "matplotlib", "transformers"]
    assert doctor.extra_packages(REQUIREMENTS, "nothing") == []


def test_every_extra_that_doctor_names_is_declared() -> None:
    """A command that pip would answer with a warning and nothing installed."""
    assert set(doctor.EXTRAS) <= set(metadata.metadata("openmimo").get_all("Provides-Extra") or [])


@pytest.mark.usefixtures("no_sandbox_probe")
@pytest.mark.parametrize("installed", [True, False])
def test_the_runtime_is_reported(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a missing C++ runtime that nobody is told of: decoding would only be slow."""
    extension = SimpleNamespace(available_kernels=lambda: ["scalar", "avx2"]) if installed else None
    monkeypatch.setitem(sys.modules, "openmimo._native", extension)  # type: ignore[arg-type]
    report = doctor.examine()
    assert any("C++ runtime (scalar, avx2)" in line for line in report.works) == installed
    assert any("C++ runtime" in gap.what and "compiler" in gap.get for gap in report.missing) != installed
