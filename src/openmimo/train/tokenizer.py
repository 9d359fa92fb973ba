"""The tokenizer of a run: loaded, or trained on a sample of the run's own sources."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from openmimo.config.train import SourceKind, SourceRecipe, StageKind, TrainRecipe
from openmimo.data.files import find_files
from openmimo.data.readers import open_records
from openmimo.tasks import sample_problem
from openmimo.text import DEFAULT_SYSTEM, Tokenizer, train_tokenizer

# Longer documents are cut into pieces of this length, so that no single one makes up the sample.
SAMPLE_CHARACTERS = 2_000


def tokenizer_for(recipe: TrainRecipe, folder: Path) -> Tokenizer:
    """Load the recipe's tokenizer or train it, and save it to `folder`."""
    wanted = recipe.tokenizer
    if wanted.path:
        tokenizer = Tokenizer.load(Path(wanted.path))
    else:
        assert wanted.vocab_size is not None
        sources = wanted.sources or _all_sources(recipe)
        texts = chain(_sample(sources, wanted.train_documents, recipe.seed), _frame(recipe, wanted.train_documents))
        tokenizer = train_tokenizer(texts, vocab_size=wanted.vocab_size)
    tokenizer.save(folder)
    return tokenizer


def _all_sources(recipe: TrainRecipe) -> tuple[SourceRecipe, ...]:
    found = [source for stage in recipe.stages for source in recipe.data_of(stage).sources]
    return tuple(dict.fromkeys(found))


def _sample(sources: tuple[SourceRecipe, ...], num_documents: int, seed: int) -> Iterator[str]:
    """Documents of every source in equal number, so that small domains get their words too."""
    share = max(1, num_documents // len(sources))
    for source in sources:
        if source.kind is SourceKind.TASK:
            for index in range(share):
                level = source.levels[index % len(source.levels)]
                problem = sample_problem(
                    source.domain, split="train", level=level, seed=seed, index=index, task=source.task or None
                )
                yield f"{problem.prompt}\n{problem.solution}\n"
        else:
            yield from islice(_texts(source.path, share), share)


def _frame(recipe: TrainRecipe, num_documents: int) -> Iterator[str]:
    """The words that stand in every conversation, so that they become whole tokens."""
    if any(stage.kind is StageKind.SFT for stage in recipe.stages):
        for _ in range(max(1, num_documents // 10)):
            yield f"system\n{DEFAULT_SYSTEM}"
            yield "user\n"
            yield "assistant\n"


def _texts(path: str, num_documents: int) -> Iterator[str]:
    """The beginning of every file; more of each where there are few."""
    files = find_files([path])
    for file in files:
        yield from islice(_pieces(file.path), max(1, num_documents // len(files)))


def _pieces(path: Path) -> Iterator[str]:
    """A file's text, in pieces of at most SAMPLE_CHARACTERS; of conversations what is said in them."""
    records = open_records(path)
    try:
        position: int | None = 0
        while position is not None:
            record = records.read(position)
            text = record.text or "\n".join(str(message.get("content", "")) for message in record.messages or ())
            yield from (text[start : start + SAMPLE_CHARACTERS] for start in range(0, len(text), SAMPLE_CHARACTERS))
            position = record.next_position
    finally:
        records.close()
