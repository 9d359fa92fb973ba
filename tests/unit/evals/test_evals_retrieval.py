"""Retrieval by task and length, with an engine that answers on command."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_evals_accuracy import ScriptedEngine, as_codes

from openmimo import tasks
from openmimo.errors import RequestError, TaskError
from openmimo.evals.retrieval import LONG_TASKS, measure_retrieval, retrieval_rows
from openmimo.reproduce.plots import plot_retrieval


def test_every_task_and_level_has_its_own_problems_and_score() -> None:
    """Catches answers dealt to another task or level, training problems, and lengths of other prompts."""
    asked = {"split": "test", "seed": 3}
    wanted = {
        (name, level, index): tasks.sample_problem("retrieval", task=name, level=level, index=index, **asked)
        for level in (1, 3)
        for name in ("needle", "track")
        for index in range(4)
    }
    by_prompt = {tuple(as_codes(problem.prompt)): place for place, problem in wanted.items()}

    class Knows(ScriptedEngine):
        """Right for the first `level` problems of a task."""

        def __init__(self) -> None:
            super().__init__(self.solve)

        def solve(self, place: int) -> str:
            name, level, index = by_prompt[tuple(self.prompts[place])]
            return wanted[name, level, index].solution if index < level else "answer: 0"

    cells = measure_retrieval(
        Knows(), names=["needle", "track"], levels=[1, 3], num_problems=4, seed=3, render=as_codes
    )  # type: ignore[arg-type]
    assert {(cell.task, cell.level): cell.accuracy for cell in cells} == {
        ("needle", 1): 0.25, ("track", 1): 0.25, ("needle", 3): 0.75, ("track", 3): 0.75,
    }  # fmt: skip
    lengths = [len(problem.prompt) for (name, level, _), problem in wanted.items() if (name, level) == ("track", 3)]
    assert cells[3].num_tokens == sum(lengths) / 4
    assert 0 < cells[0].constant < 1
    header, rows = retrieval_rows(cells, native_tokens=250)
    assert header == ["", "level 1", "level 3"]
    assert rows[0] == ["needle", "25.0%", "75.0%"]
    assert rows[-1][0] == "times the native length"
    assert float(rows[-1][2]) == pytest.approx(4.2, abs=0.2)
    assert len(retrieval_rows(cells, native_tokens=0)[1]) == 3


def test_long_tasks_are_those_that_have_long_levels() -> None:
    """Catches a task that cannot grow, or one that is left out."""
    assert set(LONG_TASKS) == {task.name for task in tasks.tasks("retrieval", level=8)}


def test_the_heat_map_is_a_picture(tmp_path: Path) -> None:
    """Catches a drawing that fails for one level, or without a native length."""
    pytest.importorskip("matplotlib")
    cells = measure_retrieval(
        ScriptedEngine(lambda _: "answer: 1"),
        names=["needle"],
        levels=[1],
        num_problems=2,
        render=as_codes,  # type: ignore[arg-type]
    )
    for native in (0, 100):
        plot_retrieval(cells, tmp_path / "map.png", native)
        assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_ask_is_refused() -> None:
    """Catches an empty table, and a level that is taken for another."""
    engine = ScriptedEngine(lambda _: "")
    for names, levels, num in (([], [1], 1), (["needle"], [], 1), (["needle"], [1], 0)):
        with pytest.raises(RequestError, match="give some"):
            measure_retrieval(engine, names=names, levels=levels, num_problems=num, render=as_codes)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="no level 9"):
        measure_retrieval(engine, names=["needle"], levels=[9], num_problems=1, render=as_codes)  # type: ignore[arg-type]
