"""Generated problems as documents, and the loader that a recipe describes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from data_fakes import ASSISTANT, END, USER, ByteTokenizer, RoleTemplate, fake_problem

from openmimo import tasks
from openmimo.config.train import Packing
from openmimo.data import TaskSource, build_loader
from openmimo.errors import DataError


@pytest.fixture(autouse=True)
def fake_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "sample_problem", fake_problem, raising=False)


@dataclass(frozen=True, kw_only=True)
class FakeSource:
    kind: str = "task"
    weight: float = 1.0
    domain: str = "arithmetic"
    levels: tuple[int, ...] = (1, 2)
    path: str = ""
    task: str = ""
    split: str = "train"
    guess_share: float = 0.0


@dataclass(frozen=True)
class FakeRecipe:
    sources: tuple[FakeSource, ...]
    sequence_length: int = 64
    batch_sequences: int = 2
    packing: Packing = Packing.AUTO


def build(*sources: FakeSource, **options: Any):
    options = {"seed": 3, "stage": "pretrain", "template": RoleTemplate(), **options}
    return build_loader(FakeRecipe(sources), ByteTokenizer(), **options)  # type: ignore[arg-type]


def test_plain_text_trains_on_prompt_and_solution() -> None:
    source = TaskSource("sums", levels=[4], split="train", seed=9, tokenizer=ByteTokenizer())
    problem = fake_problem("sums", split="train", level=4, seed=9, index=0)
    document = source.next_document()
    assert document.token_ids.tolist() == [*f"{problem.prompt}\n{problem.solution}".encode(), END]
    assert document.loss_mask.all()


def test_conversation_trains_on_the_solution_only() -> None:
    source = TaskSource("sums", levels=[4], split="test", seed=9, tokenizer=ByteTokenizer(), template=RoleTemplate())
    problem = fake_problem("sums", split="test", level=4, seed=9, index=0)
    document = source.next_document()
    prompt, solution = problem.prompt.encode(), problem.solution.encode()
    assert document.token_ids.tolist() == [USER, *prompt, ASSISTANT, *solution]
    assert document.loss_mask.tolist() == [False] * (len(prompt) + 2) + [True] * len(solution)


def test_a_share_of_the_answers_is_guessed_wherever_the_stream_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a share that is not kept, a guess that is right or of another task, a draw from earlier ones."""
    monkeypatch.undo()
    tokenizer = ByteTokenizer()

    def source() -> TaskSource:
        return TaskSource("logic", levels=[1], split="train", seed=2, tokenizer=tokenizer, guess_share=0.7)

    stream, texts, right, num_guesses = source(), list[str](), 0, 0
    for index in range(400):
        problem = tasks.sample_problem("logic", split="train", level=1, seed=2, index=index)
        text = bytes(stream.next_document().token_ids[:-1].tolist()).decode()
        texts.append(text)
        prompt, answer = text.split("\n", 1)
        assert prompt == problem.prompt
        if answer == problem.solution:
            continue
        mark, guess = answer.split(" ", 1)
        assert mark == "answer:"
        # As another problem of that task would be answered: as many parts, of the same kind.
        assert len(guess.split()) == len(problem.answer.split())
        num_guesses += 1
        right += guess == problem.answer
    assert 0.6 < num_guesses / len(texts) < 0.8
    assert right < 0.25 * num_guesses
    later = source()
    later.restore({"index": 123})
    assert bytes(later.next_document().token_ids[:-1].tolist()).decode() == texts[123]


def test_levels_take_turns_and_no_problem_repeats() -> None:
    source = TaskSource("sums", levels=[1, 5], split="train", seed=0, tokenizer=ByteTokenizer())
    texts = [bytes(source.next_document().token_ids[:-1].tolist()).decode() for _ in range(8)]
    assert ["level 1" in text for text in texts] == [True, False] * 4
    assert len(set(texts)) == 8


def test_state_is_the_index() -> None:
    def source() -> TaskSource:
        return TaskSource("sums", levels=[1, 5], split="train", seed=0, tokenizer=ByteTokenizer())

    first, second = source(), source()
    for _ in range(5):
        first.next_document()
    assert first.state() == {"index": 5}
    second.restore({"index": 5})
    assert second.next_document().token_ids.tolist() == first.next_document().token_ids.tolist()
    with pytest.raises(DataError, match="index=-1, expected a whole number"):
        second.restore({"index": -1})


def test_levels_must_not_be_empty() -> None:
    with pytest.raises(DataError, match="no levels"):
        TaskSource("sums", levels=[], split="train", seed=0, tokenizer=ByteTokenizer())


def test_pretraining_recipe_fills_rows_and_trains_on_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words " * 100)
    with build(FakeSource(), FakeSource(kind="text", path=str(tmp_path), weight=2.0)) as loader:
        batches = [next(loader) for _ in range(30)]
    assert all(batch.num_tokens == 128 for batch in batches)
    for batch in batches:
        assert batch.loss_mask_BT.equal(batch.position_ids_BT > 0)
    entries = batches[-1].cursor["mixture"]["sources"]
    assert [entry["name"] for entry in entries] == ["task:arithmetic", f"text:{tmp_path.name}"]
    assert entries[1]["tokens"] == pytest.approx(2 * entries[0]["tokens"], abs=700)


def test_sft_recipe_keeps_conversations_whole() -> None:
    with build(FakeSource(), stage="sft") as loader:
        batch = next(loader)
    firsts = batch.token_ids_BT[(batch.position_ids_BT == 0) & (batch.document_ids_BT >= 0)]
    assert set(firsts.tolist()) == {USER}
    assert 0 < batch.num_targets < batch.num_tokens


def test_seed_changes_the_data_and_cursor_continues_it() -> None:
    def ids(**options: Any) -> list[list[int]]:
        with build(FakeSource(), **options) as loader:
            return [next(loader).token_ids_BT.tolist() for _ in range(3)]

    assert ids() == ids()
    assert ids(seed=4) != ids()
    with build(FakeSource()) as loader:
        next(loader)
        cursor = next(loader).cursor
    assert ids(cursor=cursor)[0] == ids()[2]


def test_wrong_stage_kind_and_missing_template_are_named() -> None:
    with pytest.raises(DataError, match="unknown stage 'pretrian': did you mean 'pretrain'"):
        build(FakeSource(), stage="pretrian")
    with pytest.raises(DataError, match="unknown source kind 'texts': did you mean 'text'"):
        build(FakeSource(kind="texts"))
    with pytest.raises(DataError, match="pass `template`"):
        build(FakeSource(), stage="sft", template=None)
