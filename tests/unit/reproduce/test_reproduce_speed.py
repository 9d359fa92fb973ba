"""`openmimo reproduce`: the fit, the replayed drafts, and whether JSON, picture and table hold what was measured."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from openmimo import tasks
from openmimo.checkpoint import save_model
from openmimo.cli.main import build_app
from openmimo.config.model import preset
from openmimo.engine import Engine, SamplingParams
from openmimo.engine.torch_runner import TorchRunner
from openmimo.errors import RequestError
from openmimo.model import MiMoModel, build_model
from openmimo.reproduce import plots
from openmimo.reproduce.acceptance_curve import AcceptanceCurve, fit_curve
from openmimo.reproduce.figure7 import Dataset, measure_figure7
from openmimo.reproduce.replay_drafts import ReplayRunner, head_acceptance
from openmimo.text import train_tokenizer


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model small enough for milliseconds, with a tokenizer."""
    texts = [tasks.sample_problem("logic", split="train", level=1, seed=0, index=i).prompt for i in range(40)]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    folder = tmp_path_factory.mktemp("run")
    save_model(small_model(tokenizer.vocab_size), folder / "model", dtype="float32")
    tokenizer.save(folder / "model")
    return folder


def small_model(vocab_size: int) -> MiMoModel:
    config = preset("nano").replace(
        vocab_size=vocab_size, hidden_size=32, dense_dim=32, num_mtp_heads=3, init_std=0.3, eos_token_ids=()
    )
    return build_model(config, seed=0)


def invoke(*arguments: str):
    return CliRunner().invoke(build_app(), ["reproduce", *arguments], catch_exceptions=False)


@pytest.mark.parametrize(("scale", "exponent"), [(0.58, 0.58), (0.3, 1.7), (0.9, 0.1)])
def test_the_fit_finds_the_curve_that_made_the_points(scale: float, exponent: float) -> None:
    """A search that stops early or at a bound, a fit of another family, or a maximum that moves."""
    truth = AcceptanceCurve(most=4.0, scale=scale, exponent=exponent)
    x = [0.0, 0.02, 0.1, 0.3, 0.7, 1.0]
    found = fit_curve(x, [truth.at(each) for each in x], num_heads=3)
    assert (found.most, found.scale, found.exponent) == pytest.approx((4.0, scale, exponent), abs=1e-6)
    assert found.r_squared(x, [truth.at(each) for each in x]) == pytest.approx(1.0)


def test_the_fit_is_least_squares_and_r_squared_its_share() -> None:
    """A fit of logarithms, which weighs points otherwise; an R2 against zero in place of the mean."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0.05, 1.0, 30)
    y = AcceptanceCurve(most=4.0, scale=0.5, exponent=0.6).at(1.0) + rng.normal(0, 0.3, 30) + (1 - x)
    found = fit_curve(x.tolist(), y.tolist(), num_heads=3)

    def error(curve: AcceptanceCurve) -> float:
        return sum((curve.at(a) - b) ** 2 for a, b in zip(x, y, strict=True))

    for step in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        moved = AcceptanceCurve(most=4.0, scale=found.scale + step[0], exponent=found.exponent + step[1])
        assert error(found) < error(moved)
    assert found.r_squared(x.tolist(), y.tolist()) == pytest.approx(1 - error(found) / (30 * y.var()))
    with pytest.raises(RequestError, match="at least 3 datasets"):
        fit_curve([1.0, 1.0, 2.0], [1.0, 2.0, 3.0], num_heads=3)


def test_points_are_what_their_text_says() -> None:
    """Cross-entropy at another temperature than the text was drawn at, or drafts that some steps went without."""
    engine = Engine(small_model(vocab_size=9), runner="torch")  # so few tokens that heads are right by chance
    prompts = ((5, 6, 7), (8, 4))
    datasets = [
        Dataset(name=str(temperature), group="g", temperature=temperature, prompts=prompts)
        for temperature in (0.5, 1.0, 2.0)
    ]
    figure = measure_figure7(engine, datasets, max_tokens=40, seed=3)
    assert [point.temperature for point in figure.points] == [0.5, 1.0, 2.0]  # the flatter, the harder to foretell
    for point in figure.points:
        params = SamplingParams(temperature=point.temperature, max_tokens=40, seed=3, logprobs=True)
        done = engine.with_drafts(0).generate(prompts, params)
        drawn = [value for each in done for value in each.logprobs or ()]
        assert point.num_tokens == len(drawn)
        assert point.cross_entropy == pytest.approx(-sum(drawn) / len(drawn), rel=1e-3)
        assert sum(point.histogram[1:]) > 0
        kept = sum(number * count for number, count in enumerate(point.histogram))
        assert point.acceptance_length == pytest.approx(1 + kept / sum(point.histogram))
        # All tokens but each answer's first come from steps; a step whose last draft ended the answer gave one less.
        assert 0 <= sum(point.histogram) + kept - (point.num_tokens - len(done)) <= 3 * len(done)
    with pytest.raises(RequestError, match="temperature 0"):
        measure_figure7(engine, [Dataset(name="x", group="g", temperature=0.0, prompts=((1,),))])


@pytest.mark.parametrize("wanted", [1.0, 2.3, 3.4, 4.0])
def test_replayed_drafts_are_kept_as_often_as_wanted(wanted: float) -> None:
    """Drafts taken one place off, rows taken for one another, or text that follows a wrong draft."""
    inner = TorchRunner(small_model(vocab_size=64), num_rows=4, num_pages=16, max_step_tokens=64)
    replay = ReplayRunner(inner)
    engine = Engine(replay, draft_heads=3, max_batch=3, prefix_cache_bytes=0)
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8]]
    plain = engine.with_drafts(0).generate(prompts, SamplingParams(max_tokens=104, ignore_eos=True))
    share = head_acceptance(wanted, 3)
    assert sum(share**n for n in range(4)) == pytest.approx(wanted)
    replay.begin([[*p, *c.token_ids] for p, c in zip(prompts, plain, strict=True)], share)
    done = engine.generate(prompts, SamplingParams(max_tokens=100, ignore_eos=True))
    assert [each.token_ids for each in done] == [each.token_ids[:100] for each in plain]
    for each in done:  # one step more or less of an answer's
        assert each.draft.acceptance_length == pytest.approx(wanted, rel=1.5 / each.draft.num_steps)
    with pytest.raises(RequestError, match="1 to 1 \\+ 3 heads"):
        head_acceptance(4.2, 3)


def test_figure7_writes_what_it_prints(run_folder: Path, tmp_path: Path) -> None:
    """A table, JSON and picture of different points; datasets left out."""
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    options = ("--domains", "logic", "--levels", "1", "--temperatures", "0.7,1", "--num", "2", "--max-tokens", "6")
    done = invoke("figure7", "--model", str(run_folder), "--out", str(tmp_path / "f"), *options, "--runner", "torch")
    assert done.exit_code == 0
    content = json.loads((tmp_path / "f" / "figure7.json").read_text())
    lines = [line.split() for line in done.stdout.splitlines()]
    names = {task.name for task in tasks.tasks("logic", level=1)}
    assert len(content["points"]) == 2 * (len(names) + 1)
    for point, line in zip(content["points"], lines[1:], strict=False):
        assert line[:2] == [point["group"], point["name"].split()[0]]
        assert line[-3:-1] == [f"{point['cross_entropy']:.4g}", f"{point['acceptance_length']:.4g}"]
    assert f"R2 = {content['r_squared']:.3f}" in done.stdout
    assert [fit["temperature"] for fit in content["by_temperature"]] == [0.7, 1.0]
    assert content["report"]["r_squared"] == 0.995
    assert (tmp_path / "f" / "figure7.png").read_bytes().startswith(b"\x89PNG")


def test_table10_writes_what_it_prints(run_folder: Path, tmp_path: Path) -> None:
    """Speeds of one row under another's name, or an acceptance that the drafts did not have."""
    options = ["--batches", "1,3", "--acceptance", "2.5,4", "--domains", "logic", "--tokens", "24", "--rounds", "1"]
    options += ["--out", str(tmp_path), "--no-plot", "--runner", "torch", "--threads", "1"]
    done = invoke("table10", "--model", str(run_folder), *options)
    assert done.exit_code == 0
    cells = json.loads((tmp_path / "table10.json").read_text())["cells"]
    assert [(c["batch"], c["wanted"]) for c in cells] == [(b, w) for b in (1, 3) for w in (2.5, 4.0, None)]
    for cell in cells:
        assert cell["speedup"] == pytest.approx(cell["draft_tokens_per_s"] / cell["plain_tokens_per_s"])
        if cell["wanted"] is not None:
            assert math.isclose(cell["acceptance_length"], cell["wanted"], rel_tol=0.12)
    line = next(line.split() for line in done.stdout.splitlines() if line.startswith("replayed, 4"))
    assert line[2:] == ["4.00", *(f"{c['speedup']:.2f}x" for c in cells if c["wanted"] == 4.0)]
    assert not (tmp_path / "table10.png").exists()


def test_a_missing_matplotlib_is_said_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import error after minutes of measuring."""
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"openmimo\[plots\]"):
        invoke("figure7", "--model", "nowhere")
