"""The frame of the command: verbs, help, what a failure looks like."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import openmimo
from openmimo.cli import main as main_module
from openmimo.errors import ConfigError

EXPECTED_VERBS = [
    "demo",
    "train",
    "generate",
    "chat",
    "serve",
    "eval",
    "convert",
    "bench",
    "reproduce",
    "plan",
    "doctor",
]
HEAVY = ("torch", "numpy", "transformers", "tokenizers", "matplotlib", "safetensors", "jinja2")


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `main` as the console script does; returns the exit status."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["openmimo", *arguments])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # Typer sets its own
        with pytest.raises(SystemExit) as stopped:
            main_module.main()
        return int(stopped.value.code or 0)

    return run


def test_the_verbs_are_those_of_the_table_in_its_order() -> None:
    """A verb lost, or groups listed behind commands."""
    assert list(main_module.VERBS) == EXPECTED_VERBS
    result = CliRunner().invoke(main_module.build_app(), ["--help"], env={"COLUMNS": "100", "NO_COLOR": "1"})
    listed = re.findall(r"^\W*([a-z]+)  ", result.stdout, re.MULTILINE)
    assert [word for word in listed if word in EXPECTED_VERBS] == EXPECTED_VERBS


@pytest.mark.parametrize("verb", EXPECTED_VERBS)
def test_every_verb_has_its_own_file_and_help(verb: str) -> None:
    """A table entry whose file or function is missing, or a verb without a description."""
    module, attribute = main_module.VERBS[verb]
    assert hasattr(importlib.import_module(module), attribute)
    result = CliRunner().invoke(main_module.build_app(), [verb, "--help"], prog_name="openmimo")
    assert result.exit_code == 0
    assert f"openmimo {verb}" in result.stdout
    listing = CliRunner().invoke(main_module.build_app(), ["--help"], env={"COLUMNS": "300"}).stdout
    assert re.search(rf"\W{verb}\s+[A-Z]\w+", listing)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["demo", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """A heavy import at the top of a verb's file: help would take seconds."""
    code = (
        "import atexit, sys\n"
        f"sys.argv = ['openmimo', *{arguments!r}]\n"
        f"atexit.register(lambda: print('heavy:', [name for name in {HEAVY!r} if name in sys.modules]))\n"
        "from openmimo.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_an_error_of_the_user_is_one_line_and_status_2(
    run_main: Callable[..., int], capsys: pytest.CaptureFixture[str], run_dir: Path
) -> None:
    """A traceback for a file that is not there."""
    assert run_main("train", "pretrain", str(run_dir / "missing.toml")) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "missing.toml" in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "hint"), [(["trian"], "train"), (["doctor", "--jsn"], "--json"), (["train", "pretrian"], "pretrain")]
)
def test_a_typing_error_names_the_nearest_word(
    run_main: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: list[str], hint: str
) -> None:
    """A user left to guess which verb or option was meant."""
    assert run_main(*arguments) == 2
    assert hint in capsys.readouterr().err


def test_version(run_main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts ask for it: nothing else may be printed."""
    assert run_main("--version") == 0
    assert capsys.readouterr().out.strip() == openmimo.__version__


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(ConfigError("got 1, expected 2"), 2, "error: got 1, expected 2\n"), (KeyboardInterrupt(), 130, "")],
)
def test_exit_status_by_kind_of_error(
    run_main: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    message: str,
) -> None:
    """Scripts that look at the status would take an interruption for success or for a wrong option."""

    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(main_module, "build_app", lambda: fail)
    assert run_main() == status
    assert capsys.readouterr().err == message


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own mistakes dressed up as the user's."""

    def fail(**_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(main_module, "build_app", lambda: fail)
    with pytest.raises(ZeroDivisionError):
        main_module.main()
