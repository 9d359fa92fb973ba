"""Where documents come from: generated tasks and text files. Every source is endless and resumable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from openmimo import tasks
from openmimo.data.documents import Document, Encoder, State, TrainingTemplate, whole_number
from openmimo.data.files import TEXT_SUFFIXES, find_files, fingerprint, shuffled
from openmimo.data.readers import Record, RecordFile, open_records
from openmimo.errors import DataError, TextError
from openmimo.tasks.problem import ANSWER_MARK, Problem, number_from

END_OF_TEXT = "<|endoftext|>"
CACHE_ENTRY_BYTES = 600
"""What a kept record costs beside its tokens: objects, key and table slot, measured on short lines."""


class Source(Protocol):
    """An endless stream of documents whose position is a small JSON state."""

    @property
    def name(self) -> str:
        """What the documents are counted under."""
        ...

    def next_document(self) -> Document:
        """The document at the position; moves on."""
        ...

    def state(self) -> State:
        """The position, as JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes a position that an equal source's `state()` gave."""
        ...

    def close(self) -> None:
        """Releases open files; the source stays usable."""
        ...


class TaskSource:
    """Problems of one domain, or of one `task` of it, with worked answers; problem `i` is the same whoever makes it.

    With a `template` a document is a conversation (prompt by the user, solution by the assistant) and the assistant's
    tokens are the targets; without one it is the text `prompt`, a line end, `solution`, and all of it is target.
    The levels take turns. A `guess_share` of the answers are guesses: one line, with another problem's answer.
    """

    def __init__(
        self,
        domain: str,
        *,
        levels: Sequence[int],
        split: str,
        seed: int,
        tokenizer: Encoder,
        template: TrainingTemplate | None = None,
        task: str | None = None,
        guess_share: float = 0.0,
    ) -> None:
        if not levels:
            raise DataError(f"task source {domain!r} got no levels; give at least one, such as levels = [1]")
        self.name = f"task:{domain}" if task is None else f"task:{domain}.{task}"
        self._domain = domain
        self._task = task
        self._levels = tuple(levels)
        self._split = split
        self._seed = seed
        self._tokenizer = tokenizer
        self._template = template
        self._guess_share = guess_share
        self._index = 0

    def next_document(self) -> Document:
        """The document at the position; moves on."""
        problem = self._problem(self._index)
        solution = self._guess(problem) or problem.solution
        self._index += 1
        if self._template is None:
            ids = self._tokenizer.encode(f"{problem.prompt}\n{solution}")
            return _document([*ids, self._tokenizer.special(END_OF_TEXT)], None, self.name)
        turns = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": solution}]
        return _document(*self._template.render_training(turns), self.name)

    def state(self) -> State:
        """The number of documents made."""
        return {"index": self._index}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes a position that an equal source's `state()` gave."""
        self._index = whole_number(state, "index")

    def close(self) -> None:
        """Nothing to release."""

    def _problem(self, index: int, task: str | None = None) -> Problem:
        round_index, turn = divmod(index, len(self._levels))
        return tasks.sample_problem(
            self._domain,
            split=self._split,
            level=self._levels[turn],
            seed=self._seed,
            index=round_index,
            task=task or self._task,
        )

    def _guess(self, problem: Problem) -> str:
        """The answer of another problem of that task, or "" where this one is worked out."""
        if self._guess_share == 0.0:
            return ""
        rng = Random(number_from(f"guess/{self.name}/{self._seed}/{self._index}"))
        if rng.random() >= self._guess_share:
            return ""
        # One of the same level that the stream has elsewhere.
        other = self._problem(self._index % len(self._levels) + len(self._levels) * rng.getrandbits(30), problem.task)
        return f"{ANSWER_MARK} {other.answer}"


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A record's tokens; `cut` says whether it may become several documents."""

    document: Document
    cut: bool
    next_position: int | None


class TextSource:
    """Text files, in a new order every epoch, and the lines of a `.jsonl` file likewise.

    Every token comes out exactly once per epoch. `END_OF_TEXT` closes each plain text file and each `text` record,
    which are cut into documents of at most `max_document_tokens`. `messages` records are rendered with `template` and
    kept whole; with `assistant_only` just the assistant's tokens of them are targets. A plain text file is tokenised
    block by block, so memory does not grow with it; tokens are kept for later epochs within `cache_bytes`.
    `on_bad="skip"` leaves out unreadable lines and counts them in `num_skipped` each time they are met.

    Raises: DataError for missing paths, and from `next_document` for unreadable files and lines.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        seed: int,
        tokenizer: Encoder,
        template: TrainingTemplate | None = None,
        assistant_only: bool = False,
        max_document_tokens: int = 8192,
        text_suffixes: Sequence[str] = TEXT_SUFFIXES,
        on_bad: Literal["error", "skip"] = "error",
        cache_bytes: int = 1 << 27,
    ) -> None:
        if max_document_tokens < 2:
            raise DataError(f"max_document_tokens={max_document_tokens} must be at least 2")
        self.name = "text:" + ",".join(Path(path).name for path in paths)
        self.num_skipped = 0
        self._files = find_files(paths, text_suffixes=text_suffixes)
        self._fingerprint = fingerprint(self._files)
        self._seed = seed
        self._tokenizer = tokenizer
        self._template = template
        self._assistant_only = assistant_only
        self._max_document_tokens = max_document_tokens
        self._on_bad = on_bad
        self._cache: dict[tuple[int, int], _Encoded] = {}
        self._cache_room = cache_bytes
        self._num_records: dict[int, int | None] = {}
        self._open: tuple[int, RecordFile] | None = None
        self._current: tuple[tuple[int, int], _Encoded] | None = None
        self._epoch_is_empty = True
        self._go_to(epoch=0, turn=0, position=0, token=0)

    def next_document(self) -> Document:
        """The document at the position; moves on."""
        while True:
            record = self._record()
            if self._token < len(record.document):
                start, stop = self._token, len(record.document)
                self._token = min(start + self._max_document_tokens, stop) if record.cut else stop
                self._epoch_is_empty = False
                return record.document.part(start, self._token)
            self._token = 0
            if record.next_position is not None:
                self._position = record.next_position
            else:
                self._next_file()

    def state(self) -> State:
        """Epoch, turn within its order of files, turn within the lines or position in the file, token in the record."""
        return {
            "epoch": self._epoch,
            "turn": self._turn,
            "position": self._position,
            "token": self._token,
            "files": self._fingerprint,
            "skipped": self.num_skipped,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes a position that an equal source's `state()` gave.

        Raises: DataError if the files are not those of the saved state.
        """
        if state.get("files") != self._fingerprint:
            raise DataError(
                f"the files of {self.name} are not those of the saved run (added, removed, renamed or resized); "
                "restore them or start without the data cursor"
            )
        turn = whole_number(state, "turn")
        if turn >= len(self._files):
            raise DataError(f"saved data state has turn={turn}, expected one below {len(self._files)}")
        self._go_to(
            epoch=whole_number(state, "epoch"),
            turn=turn,
            position=whole_number(state, "position"),
            token=whole_number(state, "token"),
        )
        self._epoch_is_empty = turn == self._position == self._token == 0
        self.num_skipped = whole_number(state, "skipped")

    def close(self) -> None:
        """Releases the open file; the source stays usable."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _go_to(self, *, epoch: int, turn: int, position: int, token: int) -> None:
        self._epoch, self._turn, self._position, self._token = epoch, turn, position, token
        self._order: npt.NDArray[np.int64] = shuffled(len(self._files), self._seed, epoch)
        self._lines: tuple[int, npt.NDArray[np.int64] | None] | None = None

    def _next_file(self) -> None:
        if self._turn + 1 < len(self._files):
            self._turn += 1
            self._position = 0
            return
        if self._epoch_is_empty:
            raise DataError(f"{self.name}: no text in {len(self._files)} file(s); add some or remove the source")
        self._epoch_is_empty = True
        self._go_to(epoch=self._epoch + 1, turn=0, position=0, token=0)

    def _record(self) -> _Encoded:
        """The tokens of the record at the position: the one at hand, a kept one, or a fresh one."""
        file_index = int(self._order[self._turn])
        lines = self._line_order(file_index)
        place, following = self._position, None
        if lines is not None and self._position < len(lines):
            place = int(lines[self._position])
            following = self._position + 1 if self._position + 1 < len(lines) else None
        key = (file_index, place)
        if self._current is None or self._current[0] != key:
            self._current = (key, self._cached(key))
        encoded = self._current[1]
        return encoded if lines is None else dataclasses.replace(encoded, next_position=following)

    def _line_order(self, file_index: int) -> npt.NDArray[np.int64] | None:
        """The order of the records of a file that can be read in any order, or None."""
        if self._lines is None or self._lines[0] != file_index:
            if file_index not in self._num_records:
                self._num_records[file_index] = self._opened(file_index).num_records
            count = self._num_records[file_index]
            order = None if count is None else shuffled(count, self._seed, self._epoch, self._files[file_index].name)
            self._lines = (file_index, order)
        return self._lines[1]

    def _cached(self, key: tuple[int, int]) -> _Encoded:
        if key in self._cache:
            return self._cache[key]
        file_index, place = key
        skipped = self.num_skipped
        record = self._opened(file_index).read(place)
        if record.problem:
            self._refuse(record.problem, record.bad_position, num_bad=record.num_bad)
        encoded = self._encode(record, place)
        # What is kept stays: replacing the oldest would never hit, as files come round in turn.
        num_bytes = CACHE_ENTRY_BYTES + encoded.document.num_bytes
        if num_bytes <= self._cache_room and self.num_skipped == skipped:
            self._cache[key] = encoded
            self._cache_room -= num_bytes
        return encoded

    def _opened(self, file_index: int) -> RecordFile:
        if self._open is None or self._open[0] != file_index:
            self.close()
            self._open = (file_index, open_records(self._files[file_index].path))
        return self._open[1]

    def _refuse(self, problem: str, position: int, *, num_bad: int, cause: Exception | None = None) -> None:
        self.num_skipped += num_bad
        if self._on_bad == "error" and self._open is not None:
            where = self._open[1].where(position)
            raise DataError(f'{where}: {problem}; correct it or pass on_bad="skip"') from cause

    def _encode(self, record: Record, place: int) -> _Encoded:
        ids: list[int] = []
        mask: list[bool] | None = None
        if record.messages is not None:
            ids, mask = self._render(record.messages, place)
        elif record.text is not None:
            ids = self._tokenizer.encode(record.text)
            if record.ends_document:
                ids.append(self._tokenizer.special(END_OF_TEXT))
        document = _document(ids, mask if self._assistant_only else None, self.name)
        return _Encoded(document, record.messages is None, record.next_position)

    def _render(self, messages: list[dict[str, Any]], place: int) -> tuple[list[int], list[bool]]:
        if self._template is None:
            raise DataError(f"{self.name} has `messages` but no chat template was given; pass `template`")
        try:
            return self._template.render_training(messages)
        except TextError as error:
            self._refuse(f"messages cannot be rendered ({error})", place, num_bad=1, cause=error)
            return [], []


def _document(ids: list[int], mask: list[bool] | None, source: str) -> Document:
    token_ids: npt.NDArray[np.int32] = np.array(ids, np.int32)
    loss_mask = np.ones(len(ids), np.bool_) if mask is None else np.array(mask, np.bool_)
    return Document(token_ids, loss_mask, source)
