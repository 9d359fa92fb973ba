"""Joins documents to rows of equal length.

Suffix legend: B rows of a batch, T tokens of a row, N tokens of a batch (B * T).
"""

from __future__ import annotations

import base64
import binascii
from bisect import bisect_right, insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from openmimo.data.documents import Document, State, whole_number
from openmimo.errors import DataError

PADDING_TOKEN = 0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed rows, and the cursor from which the next batch would be made.

    Shapes: all (B, T). `token_ids_BT` int64; `document_ids_BT` int32, counts up in each row, -1 on padding;
    `position_ids_BT` int32, restarts with every document; `loss_mask_BT` bool, whether token t is a target (the first
    token of a document never is). Padding holds token 0.
    """

    token_ids_BT: torch.Tensor
    document_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    loss_mask_BT: torch.Tensor
    num_tokens: int
    num_targets: int
    cursor: State = field(default_factory=dict[str, Any], repr=False)

    @property
    def padding_share(self) -> float:
        """Padding tokens over all tokens."""
        return 1.0 - self.num_tokens / self.token_ids_BT.numel()


class PackingMode(str, Enum):
    """What happens to a document that does not fit into the rest of a row."""

    SPLIT = "split"
    WHOLE = "whole"


class LongDocuments(str, Enum):
    """What `whole` packing does with a document longer than a row."""

    TRUNCATE = "truncate"
    DROP = "drop"
    ERROR = "error"


class Packer:
    """Fills batches of exactly `batch_sequences` rows of `sequence_length` tokens.

    `split` cuts a document at the end of a row and goes on in the next row, as a document of its own: no padding, and
    one token per row lacks its context. `whole` never cuts: each row starts with the document that waited longest, then
    takes the longest that fits among `waiting_documents`; the rest is padding.
    """

    def __init__(
        self,
        sequence_length: int,
        batch_sequences: int,
        *,
        mode: PackingMode | str = PackingMode.SPLIT,
        long_documents: LongDocuments | str = LongDocuments.TRUNCATE,
        waiting_documents: int = 64,
    ) -> None:
        if sequence_length < 2 or batch_sequences < 1 or waiting_documents < 1:
            raise DataError(
                f"sequence_length={sequence_length}, batch_sequences={batch_sequences}, "
                f"waiting_documents={waiting_documents}: expected at least 2, 1 and 1"
            )
        self._sequence_length = sequence_length
        self._batch_sequences = batch_sequences
        self._mode = PackingMode(mode)
        self._long_documents = LongDocuments(long_documents)
        self._waiting_documents = waiting_documents if self._mode is PackingMode.WHOLE else 0
        self._waiting: list[Document] = []
        self.num_too_long = 0

    def next_batch(self, next_document: Callable[[], Document]) -> Batch:
        """One batch from as many documents as it takes."""
        if self._mode is PackingMode.SPLIT:
            return self._assemble([self._split_rows(next_document)])
        return self._assemble([self._whole_row(next_document) for _ in range(self._batch_sequences)])

    def state(self) -> State:
        """The documents taken but not yet given out, oldest first."""
        return {"too_long": self.num_too_long, "waiting": [_to_json(document) for document in self._waiting]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes the documents that another packer's `state()` left over."""
        self.num_too_long = whole_number(state, "too_long")
        entries = cast("list[Mapping[str, Any]]", state.get("waiting") or [])
        self._waiting = [_from_json(entry) for entry in entries]

    def _split_rows(self, next_document: Callable[[], Document]) -> list[Document]:
        """Documents of exactly one batch of tokens; the last one's rest waits."""
        documents, self._waiting = self._waiting, []
        room = self._batch_sequences * self._sequence_length - sum(map(len, documents))
        while room > 0:
            documents.append(next_document())
            room -= len(documents[-1])
        if room < 0:
            last = documents.pop()
            documents.append(last.part(0, len(last) + room))
            self._waiting = [last.part(len(last) + room, len(last))]
        return documents

    def _whole_row(self, next_document: Callable[[], Document]) -> list[Document]:
        """Documents of one row: the oldest, then always the longest that fits."""
        self._refill(next_document)
        row = [self._waiting.pop(0)]
        room = self._sequence_length - len(row[0])
        self._refill(next_document)
        # (length, -place): the longest that fits, the oldest of equals.
        by_length = sorted((len(document), -place) for place, document in enumerate(self._waiting))
        taken: set[int] = set()
        while (best := bisect_right(by_length, (room, 1)) - 1) >= 0:
            length, place = by_length.pop(best)
            taken.add(-place)
            row.append(self._waiting[-place])
            room -= length
            self._waiting.append(self._admitted(next_document))
            insort(by_length, (len(self._waiting[-1]), 1 - len(self._waiting)))
        self._waiting = [document for place, document in enumerate(self._waiting) if place not in taken]
        return row

    def _refill(self, next_document: Callable[[], Document]) -> None:
        while len(self._waiting) < self._waiting_documents:
            self._waiting.append(self._admitted(next_document))

    def _admitted(self, next_document: Callable[[], Document]) -> Document:
        """The next document that may go into a row."""
        while True:
            document = next_document()
            if len(document) <= self._sequence_length:
                if len(document):
                    return document
                continue
            if self._long_documents is LongDocuments.ERROR:
                raise DataError(
                    f"a document of {document.source} has {len(document)} tokens, expected at most "
                    f'{self._sequence_length}; raise sequence_length or pass long_documents="truncate"'
                )
            self.num_too_long += 1
            if self._long_documents is LongDocuments.TRUNCATE:
                return document.part(0, self._sequence_length)

    def _assemble(self, rows: list[list[Document]]) -> Batch:
        """Lays groups of documents out behind each other; a group that is short of a row's end is padded to it."""
        shape = (self._batch_sequences, self._sequence_length)
        num_all = shape[0] * shape[1]
        token_ids_N = np.full(num_all, PADDING_TOKEN, np.int64)
        loss_mask_N = np.zeros(num_all, np.bool_)
        filled_N = np.zeros(num_all, np.bool_)
        starts_N = np.zeros(num_all, np.bool_)
        for number, row in enumerate(rows):
            start = number * shape[1]
            lengths = np.array([len(document) for document in row])
            stop = start + int(lengths.sum())
            token_ids_N[start:stop] = np.concatenate([document.token_ids for document in row])
            loss_mask_N[start:stop] = np.concatenate([document.loss_mask for document in row])
            filled_N[start:stop] = True
            starts_N[start + np.cumsum(lengths) - lengths] = True
        starts_N[:: shape[1]] = True
        loss_mask_N &= ~starts_N
        places_N = np.arange(num_all)
        positions_N = places_N - np.maximum.accumulate(np.where(starts_N, places_N, 0))
        document_ids_BT = np.cumsum(starts_N.reshape(shape), axis=1) - 1
        filled_BT = filled_N.reshape(shape)
        return Batch(
            token_ids_BT=torch.from_numpy(token_ids_N.reshape(shape)),
            document_ids_BT=torch.from_numpy(np.where(filled_BT, document_ids_BT, -1).astype(np.int32)),
            position_ids_BT=torch.from_numpy(np.where(filled_BT, positions_N.reshape(shape), 0).astype(np.int32)),
            loss_mask_BT=torch.from_numpy(loss_mask_N.reshape(shape)),
            num_tokens=int(filled_N.sum()),
            num_targets=int(loss_mask_N.sum()),
        )


def _to_json(document: Document) -> State:
    return {
        "tokens": base64.b64encode(document.token_ids.astype("<i4").tobytes()).decode(),
        "targets": base64.b64encode(np.packbits(document.loss_mask).tobytes()).decode(),
        "source": document.source,
    }


def _from_json(state: Mapping[str, Any]) -> Document:
    try:
        tokens = np.frombuffer(base64.b64decode(state["tokens"], validate=True), "<i4")
        packed = np.frombuffer(base64.b64decode(state["targets"], validate=True), np.uint8)
        loss_mask: npt.NDArray[np.bool_] = np.unpackbits(packed, count=len(tokens)).astype(np.bool_)
        return Document(tokens.astype(np.int32), loss_mask, str(state["source"]))
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise DataError(f"saved data state has an unreadable document ({error}); start without this cursor") from error
