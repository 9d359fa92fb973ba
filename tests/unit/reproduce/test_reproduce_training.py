"""The runs that figures share, the other ways to a student, and what tables and curves say of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from openmimo.checkpoint import load_model, save_model
from openmimo.cli.main import build_app
from openmimo.errors import ConfigError
from openmimo.reproduce import numzeros, seesaw, story, students
from openmimo.reproduce.figure6 import Arm, first_reached, measure_figure6
from openmimo.reproduce.numzeros import CONTROL, IMBALANCE, OVERFIT, measure_numzeros
from openmimo.reproduce.r3 import EXACT, measure_r3
from openmimo.reproduce.story import DOMAINS, CurvePoint, FinishedRun, Story, load_story
from openmimo.reproduce.table7 import MOPD, measure_table7, table7_rows
from openmimo.train.plots import read_metrics

SHORT = [
    "base.threads=1",
    "base.tokenizer.train_documents=60",
    "base.data.sequence_length=128",
    "base.data.batch_sequences=2",
    *(f"base.stages.{index}.steps=2" for index in range(3)),
    "base.stages.0.warmup_steps=1",
    "base.model.max_positions=512",
    *(
        f"{part}.{change}"
        for part in ("teacher", "student")
        for change in (
            "threads=1",
            "steps=2",
            "rollout.prompts=3",
            "rollout.group_size=2",
            "rollout.max_tokens=8",
            "optimizer.peak_lr=1e-3",
            "optimizer.final_lr=1e-3",
            "warmup_steps=0",
        )
    ),
]


@pytest.fixture(autouse=True)
def short_exams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model after six steps never stops by itself."""
    monkeypatch.setattr(story, "MAX_TOKENS", 8)
    monkeypatch.setattr(story, "CURVE_PROBLEMS", 2)
    monkeypatch.setattr(students, "TUNING_PROBLEMS", 2)
    monkeypatch.setattr(students, "PROMPTS_PER_ROUND", 4)
    monkeypatch.setattr(students, "EPOCHS", 1)
    monkeypatch.setattr(numzeros, "BASE_STEPS", 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that the tests of this module share."""
    return tmp_path_factory.mktemp("story")


def short_story(folder: Path, *changes: str) -> tuple[Story, list[str]]:
    said: list[str] = []
    return Story(folder, load_story([*SHORT, *changes]), say=said.append), said


def point(step: int, *scores: float) -> CurvePoint:
    return CurvePoint(step=step, sampled_tokens=100 * step, scores=dict(zip(DOMAINS, scores, strict=True)))


def test_a_finished_run_is_read_and_a_changed_recipe_or_model_makes_it_again(tmp_path: Path) -> None:
    """Catches a figure from runs of another recipe, a student of teachers that are no more, and work done twice."""
    made, said = short_story(tmp_path)
    teacher = made.teacher("logic")
    assert [line.split(":")[0] for line in said] == ["base", "logic-teacher"]
    again, said = short_story(tmp_path)
    assert again.teacher("logic") == teacher
    assert said == []
    assert [p.step for p in teacher.curve] == [0, 2]
    other, said = short_story(tmp_path, "teacher.steps=1")
    assert other.teacher("logic").steps == 1
    assert [line.split(":")[0] for line in said] == ["logic-teacher"]
    other, said = short_story(tmp_path, "teacher.steps=1", "base.seed=5")
    other.teacher("logic")
    assert [line.split(":")[0] for line in said] == ["base", "logic-teacher"]


def test_forgetting_leaves_what_is_not_a_run(tmp_path: Path) -> None:
    """Catches a demo that empties a folder somebody put something into."""
    made, _ = short_story(tmp_path)
    made.base()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("kept")
    made.forget()
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_an_override_must_name_its_recipe() -> None:
    """Catches an override that is dropped in silence."""
    with pytest.raises(ConfigError, match="'steps=3' names no recipe; begin it with one of base, teacher, student"):
        load_story(["steps=3"])


def moved_model(made: Story, folder: Path) -> FinishedRun:
    """The base with every weight moved, differently for every folder."""
    if not folder.exists():
        model = load_model(made.base().model)
        generator = torch.Generator().manual_seed(len(str(folder)))
        with torch.no_grad():
            for value in model.state_dict().values():
                value += torch.rand(value.shape, generator=generator) + 0.5
        save_model(model, folder / "model", dtype="float32")
    return FinishedRun(folder=folder, steps=1, sampled_tokens=0, seconds=0.0)


@pytest.mark.parametrize(("name", "scale"), [("averaged", 1 / 3), ("arithmetic", 1.0)])
def test_merged_weights_are_the_base_and_the_teachers_differences(
    folder: Path, name: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a teacher left out, a base counted twice, or a merge that loses the heads."""
    made, _ = short_story(folder)
    monkeypatch.setattr(students, "ARITHMETIC_SCALES", (1.0,))
    monkeypatch.setattr(made, "teacher", lambda domain: moved_model(made, folder / "moved" / domain))
    merged = students.averaged(made) if name == "averaged" else students.task_arithmetic(made)
    base = load_model(made.base().model).state_dict()
    teachers = [load_model(made.teacher(domain).model).state_dict() for domain in DOMAINS]
    for key, value in load_model(merged).state_dict().items():
        want = base[key].double() + scale * sum(teacher[key].double() - base[key].double() for teacher in teachers)
        torch.testing.assert_close(value.double(), want, rtol=1e-2, atol=1e-6)
        assert not torch.equal(value, base[key])


@pytest.mark.parametrize(("only_right", "kept"), [(False, (0, 1, 2, 3, 4)), (True, (0, 3))])
def test_imitation_counts_all_answers_and_learns_from_those_asked_for(
    folder: Path, only_right: bool, kept: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a budget of right answers only, one that a domain overdraws, and an answer kept although it is wrong."""
    made, _ = short_story(folder)

    def answers(_: Story, domain: str, seed: int) -> Iterator[dict[str, Any]]:
        for index in count():
            yield {"messages": [domain, index], "num_tokens": 10, "right": index % 3 == 0}

    monkeypatch.setattr(students, "_answers", answers)
    path = students._answers_file(made, 0, 150, only_right=only_right)  # pyright: ignore[reportPrivateUsage]
    told = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert told == [[domain, index] for domain in DOMAINS for index in kept]


def test_a_teacher_writes_until_it_is_told_to_stop(folder: Path) -> None:
    """Catches prompts that repeat from round to round, and lengths that are not those of the tokens sampled."""
    made, _ = short_story(folder)
    told = list(islice(students._answers(made, "logic", 0), 6))  # pyright: ignore[reportPrivateUsage]
    assert len({answer["messages"][0]["content"] for answer in told}) == 6  # a round has four
    assert all(1 <= answer["num_tokens"] <= 8 for answer in told)


def test_table7_has_every_way_with_its_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a student that is examined with another model's weights, tokens that are not those sampled, and a row
    that is computed from the wrong column."""
    made, _ = short_story(folder)

    def answers(_: Story, domain: str, seed: int) -> Iterator[dict[str, Any]]:
        """An untrained teacher has no right answers to imitate."""
        turns = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "answer: 2"}]
        return ({"messages": turns, "num_tokens": 8, "right": index % 2 == 0} for index in count())

    monkeypatch.setattr(students, "_answers", answers)
    table = measure_table7(made, seeds=[0, 1], num_problems=3, baselines=True)
    names = [student.name for student in table.students]
    assert names[0] == MOPD
    assert len(names) == 8
    assert len(table.mopd.by_seed) == 2
    teachers = sum(made.teacher(domain).sampled_tokens for domain in DOMAINS)
    by_name = {student.name: student for student in table.students}
    assert table.teacher_tokens == teachers
    assert by_name["linear merge"].sampled_tokens == 0
    spent, one_step = table.mopd.sampled_tokens, 2 * 48  # groups that are replaced count
    assert spent <= by_name["mixed RL"].sampled_tokens < spent + one_step
    assert spent <= by_name["sequential RL"].sampled_tokens + len(DOMAINS) < spent + len(DOMAINS) * one_step
    assert spent + teachers <= by_name["mixed RL, teachers' tokens too"].sampled_tokens < spent + teachers + one_step
    header, rows = table7_rows(table)
    assert header[:4] == ["", "before", "best teacher", MOPD]
    assert all(len(row) == len(header) for row in rows)
    better = replace(
        table, base=replace(table.base, drawn=dict.fromkeys(DOMAINS, 0.2)), best=dict.fromkeys(DOMAINS, 0.6)
    )
    assert table7_rows(better)[1][0][1:3] == ["20.0", "60.0"]


def test_a_budget_ends_a_run_with_the_step_that_spends_it(folder: Path) -> None:
    """Catches a budget that is ignored, or that cuts a step short, and progress that counts steps alone."""
    made, _ = short_story(folder)
    recipe = replace(made.teacher_recipe("logic"), steps=50, token_budget=200)
    run = made.policy("budget", recipe)
    assert 1 < run.steps < 50
    assert 200 <= run.sampled_tokens <= 200 + 2 * 48  # groups that are replaced count
    assert run.curve[-1].step == run.steps
    *earlier, last = [record["progress"] for record in read_metrics(run.folder)]
    assert all(progress < 1.0 for progress in earlier)
    assert last == run.sampled_tokens / 200


def test_runs_of_a_number_of_steps_are_not_cut_by_the_teachers_budget(tmp_path: Path) -> None:
    """Catches an arm of Figure 6, or learning with and without replay, that ends when a teacher would."""
    made, _ = short_story(tmp_path, "teacher.token_budget=1")
    assert made.teacher("math").steps == 1
    figure = measure_figure6(made, seeds=[0], outcome_steps=3)
    assert figure.arms[0].curves[0][-1].step == 3
    options = {"learning_rate": 1e-3, "minibatches": 1, "weights": "int8"}
    report = measure_r3(made, domain="math", precisions=[], seeds=[0], steps=2, **options)
    assert [len(arm.rewards[0]) for arm in report.learning] == [2, 2]


def test_reaching_is_the_first_step_that_is_good_enough() -> None:
    """Catches the last step, or one before the score was there."""
    points = [(0, 0.2), (5, 0.5), (10, 0.7), (15, 0.6)]
    assert first_reached(points, 0.6) == 10
    assert first_reached(points, 0.2) == 0
    assert first_reached(points, 0.9) is None


def test_the_mean_curve_has_the_steps_of_all_seeds() -> None:
    """Catches a mean over fewer seeds where one run was shorter."""
    curves = ((point(0, 0.1, 0.2, 0.3), point(5, 0.4, 0.5, 0.6)), (point(0, 0.3, 0.4, 0.5),))
    assert Arm(name="", curves=curves, reached=None, final=0.0).mean_curve() == [(0, pytest.approx(0.3))]


def test_what_is_lost_is_the_way_down_from_the_best() -> None:
    """Catches a loss measured from the beginning, or against another domain."""
    lost = seesaw.lost([point(0, 0.2, 0.5, 0.1), point(5, 0.9, 0.4, 0.2), point(10, 0.6, 0.3, 0.3)])
    assert lost == {"math": pytest.approx(0.3), "code": pytest.approx(0.2), "logic": 0.0}


def test_replay_closes_the_gap_and_the_exact_path_has_none(folder: Path) -> None:
    """Catches a precision that is not the one named, and columns of native and replayed figures exchanged."""
    made, _ = short_story(folder)
    report = measure_r3(
        made,
        domain="logic",
        precisions=[EXACT, "int4"],
        seeds=[0],
        steps=1,
        learning_rate=1e-3,
        minibatches=1,
        weights="int4",
    )
    exact, rough = report.gaps
    assert exact.worst == 0.0
    assert exact.routes == exact.native_routes == 0.0
    assert rough.routes == 0.0
    assert rough.native_routes > 0.0
    assert rough.kl > 0.0
    assert [arm.replay for arm in report.learning] == [False, True]


def test_num_zeros_rises_when_experts_starve(folder: Path) -> None:
    """Catches a bias that is moved the right way in the arm that should undo balance, and arms that share a model."""
    made, _ = short_story(folder)
    report = measure_numzeros(made, steps=25, conversations=3, reverse_rate=0.2, seed=0)
    arms = {arm.name: arm for arm in report.arms}
    assert list(arms) == [CONTROL, IMBALANCE, OVERFIT]
    assert arms[CONTROL].losses[0] == arms[IMBALANCE].losses[0]
    assert arms[IMBALANCE].change > 1.2 * arms[CONTROL].change
    assert arms[OVERFIT].losses[-1] < arms[CONTROL].losses[-1]


@pytest.mark.parametrize("name", ["table7", "figure6", "seesaw", "r3", "numzeros"])
def test_the_commands_print_a_table_and_a_json_line_and_draw(folder: Path, name: str) -> None:
    """Catches a command whose option does not reach its measurement, and a picture or file that is not written."""
    options = {
        "table7": ["--seeds", "0", "--num", "2", "--no-baselines"],
        "figure6": ["--seeds", "0", "--outcome-steps", "2"],
        "seesaw": [],
        "r3": ["--precisions", "int8", "--seeds", "0", "--steps", "1", "--weights", "int4"],
        "numzeros": ["--steps", "21"],
    }[name]
    done = CliRunner().invoke(
        build_app(), ["reproduce", name, "--out", str(folder), *options, *SHORT], catch_exceptions=False
    )
    assert done.exit_code == 0
    lines = [line for line in done.output.splitlines() if line.startswith("{")]
    assert json.loads(lines[-1])["reproduce"] == name
    assert json.loads((folder / f"{name}.json").read_text()) == json.loads(lines[-1])
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
