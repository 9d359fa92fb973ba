"""The verbs generate, chat and eval on a saved random model: every seam between the packages, once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from openmimo import tasks
from openmimo.checkpoint import save_model
from openmimo.cli.chat import chat_command, printable
from openmimo.cli.evaluate import eval_command
from openmimo.cli.generate import generate_command
from openmimo.config.model import ModelConfig, preset
from openmimo.engine import Engine, SamplingParams
from openmimo.errors import CheckpointError, RequestError
from openmimo.evals.accuracy import chat_renderer
from openmimo.evals.retrieval import LONG_TASKS
from openmimo.model import build_model
from openmimo.text import train_tokenizer


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the checkpoint in model/, as training leaves it."""
    texts = [tasks.sample_problem("math", split="train", level=1, seed=0, index=i).prompt for i in range(50)]
    tokenizer = train_tokenizer(texts, vocab_size=320)
    config = preset("nano").replace(vocab_size=tokenizer.vocab_size, hidden_size=32, dense_dim=32)
    folder = tmp_path_factory.mktemp("run")
    save_model(build_model(config, seed=0), folder / "model", dtype="float32")
    tokenizer.save(folder / "model")
    return folder


def invoke(command, *arguments: str, text: str | None = None):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(arguments), input=text, catch_exceptions=False)


def test_generate_prints_what_the_engine_gives(run_folder: Path) -> None:
    """Catches prompts sent raw that should be chat, and figures of another call."""
    for flag in ("--chat", "--raw"):
        done = invoke(generate_command, "--model", str(run_folder), "--prompt", "What is 2?", "--max-tokens", "5", flag)
        engine = Engine(run_folder)
        prompt = chat_renderer(engine)("What is 2?") if flag == "--chat" else "What is 2?"
        (expected,) = engine.generate([prompt], SamplingParams(max_tokens=5))
        assert done.exit_code == 0
        assert printable(expected.text) in done.output
        assert f"[{len(expected.token_ids)} tokens, acceptance length 1.00" in done.output


def test_eval_prints_a_table_and_one_json_line(run_folder: Path) -> None:
    done = invoke(
        eval_command, "--model", str(run_folder), "--domains", "math,logic", "--num", "2", "--max-tokens", "3"
    )
    assert done.exit_code == 0
    assert "tokens per step" in done.output
    figures = json.loads(done.output.strip().split("\n")[-1])["domains"]
    assert list(figures) == ["math", "logic"]
    assert figures["math"]["num_problems"] == 2


def test_eval_without_domains_is_refused(run_folder: Path) -> None:
    """An empty table and status 0."""
    with pytest.raises(RequestError, match="no domains; name some of math, code"):
        invoke(eval_command, "--model", str(run_folder), "--domains", " , ")


def test_chat_reads_lines_without_a_terminal(run_folder: Path) -> None:
    done = invoke(chat_command, "--model", str(run_folder), "--max-tokens", "4", text="hello\n/drafts off\nagain\n")
    assert done.exit_code == 0
    assert done.output.count("per step]") == 2
    assert "no drafts" in done.output
    assert "\x1b" not in done.output


def test_a_folder_without_a_tokenizer_cannot_chat(tmp_path: Path, tiny_config: ModelConfig) -> None:
    save_model(build_model(tiny_config), tmp_path / "model", dtype="float32")
    with pytest.raises(RequestError, match="no tokenizer"):
        invoke(chat_command, "--model", str(tmp_path), text="hi\n")
    with pytest.raises(RequestError, match="3 MTP heads"):
        invoke(generate_command, "--model", str(tmp_path), "--prompt", "hi", "--draft-heads", "9")


def test_verify_finds_a_flipped_bit(run_folder: Path, tmp_path: Path) -> None:
    """Catches a --verify that is not handed on to the loader."""
    damaged = tmp_path / "run"
    shutil.copytree(run_folder, damaged)
    weights = max((damaged / "model").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    Engine(damaged)
    options = ("--model", str(damaged), "--prompt", "2", "--max-tokens", "1", "--raw")
    with pytest.raises(CheckpointError, match=weights.name):
        invoke(generate_command, *options, "--verify")
    assert invoke(generate_command, *options).exit_code == 0


def test_eval_retrieval_prints_lengths_and_one_json_line(run_folder: Path, tmp_path: Path) -> None:
    """Catches a level that is dropped, and a heat map that is not drawn."""
    pytest.importorskip("matplotlib")
    options = ["--levels", "1,2", "--num", "2", "--max-tokens", "3", "--native-length", "64"]
    result = invoke(
        eval_command, "retrieval", "--model", str(run_folder), *options, "--plot", str(tmp_path / "map.png")
    )
    assert "times the native length" in result.stdout
    cells = json.loads(result.stdout.splitlines()[-1])["retrieval"]
    assert {(cell["task"], cell["level"]) for cell in cells} == {(t, n) for t in LONG_TASKS for n in (1, 2)}
    assert all(cell["num_problems"] == 2 for cell in cells)
    assert (tmp_path / "map.png").is_file()
    one = invoke(eval_command, "retrieval", "--model", str(run_folder), *options[:6], "--tasks", "needle")
    assert {cell["task"] for cell in json.loads(one.stdout.splitlines()[-1])["retrieval"]} == {"needle"}
