"""`openmimo bench`: what is fed, in which order, and what is made of the seconds. No clock is judged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from openmimo.checkpoint import save_model
from openmimo.cli.main import build_app
from openmimo.config.model import ModelConfig, preset
from openmimo.engine import DraftStats, Engine, SamplingParams
from openmimo.engine.native_runner import NativeRunner, load_extension
from openmimo.errors import CheckpointError, RequestError
from openmimo.evals import bench_limits
from openmimo.evals.bench import WARM_STEPS, bench_decode, bench_mtp, bench_prefill
from openmimo.evals.bench_limits import Limits
from openmimo.evals.bench_process import TargetProcess
from openmimo.evals.bench_run import BenchPlan
from openmimo.evals.bench_target import Drafts, Generation, TargetSpec
from openmimo.evals.runner_target import RunnerTarget
from openmimo.model import build_model

Steps = Sequence[Sequence[int]]


class ScriptedTarget:
    """Writes down what it is asked; every call takes the next of `seconds`."""

    settings = "scripted"

    def __init__(self, name: str, log: list[str], seconds: Sequence[float]) -> None:
        self.name, self.log, self.seconds = name, log, iter(seconds)
        self.prompts: list[list[int]] = []
        self.room = 0
        self.steps: list[list[list[int]]] = []

    def prefill(self, prompt: Sequence[int]) -> float:
        self.log.append(self.name)
        self.prompts = [list(prompt)]
        return next(self.seconds)

    def start(self, prompts: Steps, *, room: int) -> None:
        self.prompts, self.room = [list(prompt) for prompt in prompts], room

    def decode(self, steps: Steps) -> float:
        self.log.append(self.name)
        self.steps.append([list(step) for step in steps])
        return next(self.seconds)

    def generate(self, prompts: Steps, num_tokens: int, *, num_drafts: Drafts) -> Generation:
        self.log.append(f"{self.name}{num_drafts}x{len(prompts)}")
        texts = tuple((int(num_drafts == 2),) * num_tokens if self.name == "a" else (0,) for _ in prompts)
        return Generation(seconds=next(self.seconds), token_ids=texts, draft=DraftStats((1, 0, 0, 3)))

    def close(self) -> None: ...


@pytest.fixture
def limits(tiny_config: ModelConfig) -> Limits:
    return Limits(tiny_config, "bf16", 1e9)


def test_prefill_takes_turns_and_reports_medians(tiny_config: ModelConfig, limits: Limits) -> None:
    """Rounds not in turns, untimed work counted, a mean in place of a median, or another prompt for each target."""
    log: list[str] = []
    a = ScriptedTarget("a", log, [99, 99, 99, 1, 99, 2, 99, 6])
    b = ScriptedTarget("b", log, [99, 99, 99, 4, 99, 4, 99, 5])
    rows = bench_prefill({"a": a, "b": b}, tiny_config, limits, lengths=[8], rounds=3)
    assert log == ["a", "a", "b", "b"] * 4  # each turn warms up first
    assert [row.tokens_per_s for row in rows] == [4.0, 2.0]
    assert (rows[0].spread, rows[0].seconds) == (2.5, (1, 2, 6))
    assert a.prompts == b.prompts
    assert len(set(a.prompts[0])) > 3
    assert rows[0].limit_tokens_per_s == limits.prefill_tokens_per_s(8)


def test_decode_feeds_every_sequence_tokens_of_its_own(tiny_config: ModelConfig, limits: Limits) -> None:
    """The same token for all sequences, which flatters a mixture of experts; too little room for a round."""
    a = ScriptedTarget("a", [], [9, 1, 9, 0.5, 9, 0.5])
    (row,) = bench_decode(
        {"a": a}, tiny_config, limits, batches=[3], contexts=[10], num_steps=4, rounds=2
    )  # fmt: skip
    assert [len(prompt) for prompt in a.prompts] == [10] * 3
    assert a.room == WARM_STEPS + 4 == sum(map(len, a.steps)) // 3
    columns = list(zip(*(step for steps in a.steps for step in steps), strict=True))
    assert len(set(columns)) == len(columns) == 3
    assert len(set(columns[0])) > 3
    assert row.tokens_per_s == 3 * 4 / 0.5


def test_the_limit_of_memory_takes_turns_with_the_targets(
    tiny_config: ModelConfig, limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of another time than the round's, or a peer compared with this package in another round."""
    log: list[str] = []
    rates = iter([0.1, 8, 4, 2])

    def measured(self: Limits, batch_size: int, context_tokens: int) -> float:
        log.append("limit")
        return next(rates)

    monkeypatch.setattr(Limits, "decode_tokens_per_s", measured)
    a = ScriptedTarget("a", log, [9, 9, 9, 1, 9, 4, 9, 2.5])
    (row,) = bench_decode({"a": a}, tiny_config, limits, batches=[1], contexts=[10], num_steps=4, rounds=3)
    assert log == ["limit", "a", "a"] * 4  # each turn warms up first
    assert row.share_of_limit == 0.5  # of 0.5, 0.25 and 0.8
    assert (row.tokens_per_s, row.limit_tokens_per_s) == (1.6, 4)


def test_mtp_compares_with_and_without_drafts(limits: Limits) -> None:
    """Drafts left on in the plain arm, llama.cpp asked to draft for several sequences, or a changed text unseen."""
    log: list[str] = []
    targets = {name: ScriptedTarget(name[0], log, [1] * 24) for name in ("a", "openmimo", "llama.cpp")}
    prompts = {"math": [[1], [2]]}
    rows = bench_mtp(targets, prompts, batches=[1, 2], num_tokens=5, num_drafts=2, rounds=1)
    ours = ["o0x{}", "o2x{}", "oautox{}"]
    alone, together = ([name.format(batch) for name in ours] for batch in (1, 2))
    first, second = ["a0x1", "a2x1", *alone, "l0x1", "l2x1"] * 2, ["a0x2", "a2x2", *together, "l0x2"] * 2
    assert log == [name for name in first + second for _ in range(2)]  # each turn warms up first
    assert [row.details["same_text"] for row in rows if row.target[0] == "a"] == [1, 0, 1, 0]
    assert all(row.details["same_text"] for row in rows if row.target[0] != "a")
    assert rows[0].details["acceptance_length"] == 1 + 3 * 3 / 4
    assert rows[-1].tokens_per_s == 10
    with pytest.raises(RequestError, match="fewer prompts"):
        bench_mtp(targets, prompts, batches=[3], num_tokens=5, num_drafts=2, rounds=1)


def test_the_limit_is_the_slower_of_bytes_and_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that a large batch could pass, or one that forgets the experts which several tokens touch."""
    monkeypatch.setattr(bench_limits.MemoryReader, "bandwidth", lambda *_, **__: 30e9)
    small = preset("small")
    fast = Limits(small, "bf16", 1e15)
    assert fast.decode_tokens_per_s(1, 128) == pytest.approx(81, rel=0.05)  # 372 MB of weights at 30 GB/s
    assert fast.decode_tokens_per_s(32, 128) == pytest.approx(690, rel=0.05)
    slow = Limits(small, "bf16", 1e11)
    assert slow.decode_tokens_per_s(32, 128) < 1e11 / 370e6
    assert Limits(small, "int8", 1e15).decode_tokens_per_s(1, 128) > 1.8 * fast.decode_tokens_per_s(1, 128)


def test_a_target_in_its_own_process(tmp_path: Path, tiny_config: ModelConfig) -> None:
    """A process that hides the reason of a failure, or that stays behind."""
    save_model(build_model(tiny_config), tmp_path / "m", dtype="float32")
    target = TargetProcess(TargetSpec(kind="openmimo", path=tmp_path / "m", weights="float32", threads=1))
    try:
        assert target.load_seconds > 0
        assert target.prefill([1, 2]) > 0
        assert target.generate([[1, 2]], 3, num_drafts=0).draft.acceptance_length == 1.0
        assert target.settings.split()[0] in ("TorchRunner", "NativeRunner")
        assert target.peak_bytes > 50_000_000
        with pytest.raises(RequestError, match="outside the vocabulary"):
            target.generate([[99999]], 3, num_drafts=0)
    finally:
        target.close()
    assert target._process.exitcode == 0
    with pytest.raises(RequestError, match=r"openmimo: .*config"):
        TargetProcess(TargetSpec(kind="openmimo", path=tmp_path, weights="bf16", threads=1))


def test_the_command_prints_a_table_and_one_json_line(tmp_path: Path, tiny_config: ModelConfig) -> None:
    """A seam between command, models and measurement; a model folder that the run changes."""
    save_model(build_model(tiny_config), tmp_path / "m", dtype="float32")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["bench", "decode", "--model", str(tmp_path / "m"), "--weights", "float32", "--batches", "1,2"]
    arguments += ["--contexts", "5", "--tokens", "2", "--rounds", "2", "--threads", "1"]
    result = CliRunner().invoke(build_app(), arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    *_, last = result.stdout.splitlines()
    figures = json.loads(last)
    assert (figures["benchmark"], figures["threads"]) == ("bench decode", 1)
    assert [row["work"] for row in figures["rows"]] == ["batch 1, context 5", "batch 2, context 5"]
    assert all(row["tokens_per_s"] > 0 and len(row["seconds"]) == 2 for row in figures["rows"])
    assert "batch 2, context 5" in result.stdout.splitlines()[2]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--against", "llama"], "did you mean 'llama.cpp'"),
        (["--runner", "none"], "nothing to measure"),
        (["--batches", "1;2"], "commas"),
        (["--batches", "0"], "at least 1"),
    ],
)
def test_senseless_plans_are_refused(options: list[str], reason: str) -> None:
    result = CliRunner().invoke(build_app(), ["bench", "decode", *options])
    assert isinstance(result.exception, RequestError)
    assert reason in str(result.exception)


def test_int8_without_an_engine_that_has_it(tmp_path: Path, tiny_config: ModelConfig) -> None:
    """A row that says int8 and was measured in bf16."""
    save_model(build_model(tiny_config), tmp_path / "m")
    for kind, runner in (("openmimo", "torch"), ("transformers", "auto")):
        spec = TargetSpec(kind=kind, path=tmp_path / "m", weights="int8", threads=1, runner=runner)
        with pytest.raises((RequestError, CheckpointError), match="int8"):
            TargetProcess(spec)


def test_targets_are_listed_in_one_order() -> None:
    """A ratio taken against the wrong column."""
    plan = BenchPlan(work="decode", model="nano", against=("llama.cpp", "transformers"))
    assert plan.kinds == ["openmimo", "transformers", "llama.cpp"]


def test_a_bare_runner_decodes_the_given_tokens(tmp_path: Path, tiny_config: ModelConfig) -> None:
    """Chunks of a prompt that overwrite each other, pages shared by two rows, or lengths that stand still."""
    try:
        load_extension()
    except RequestError as error:
        pytest.skip(str(error))
    model = build_model(tiny_config)
    target = RunnerTarget(
        lambda rows, pages: NativeRunner(
            model, weights="float32", num_rows=rows, num_pages=pages, max_step_tokens=16, threads=1
        )
    )
    prompts = [[(7 * row + 3 * i) % 64 for i in range(70)] for row in range(2)]
    assert target.prefill(prompts[0]) > 0
    target.start(prompts, room=3)
    target.decode([[7, 8], [9, 10]])
    rows_S = np.arange(2, dtype=np.int32)
    logits_SV = target._forward(np.array([11, 12], np.int32), rows_S, target._lengths_S, rows_S * 0 + 1, rows_S)
    for row, prompt in enumerate(prompts):
        text = [*prompt, *([7, 9, 11] if row == 0 else [8, 10, 12])]
        with torch.inference_mode():
            expected_V = model(torch.tensor([text])).logits[0, -1].numpy()
        assert np.abs(logits_SV[row] - expected_V).max() < 1e-4
    made = target.generate(prompts, 6, num_drafts=0)
    ours = Engine(model).generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))
    assert made.token_ids == tuple(completion.token_ids for completion in ours)
    drafted = target.generate(prompts, 6, num_drafts=tiny_config.num_mtp_heads)
    assert drafted.token_ids == made.token_ids
    assert drafted.draft.num_steps > 0
