"""Rows by hand for both modes, padding, and what happens to long documents."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from data_fakes import CountingSource

from openmimo.data import Document, Packer
from openmimo.errors import DataError


def feed(*documents: list[int]):
    rest = [Document(np.array(ids, np.int32), np.ones(len(ids), np.bool_), "s") for ids in documents]
    return lambda: rest.pop(0)


def test_split_rows_by_hand() -> None:
    """A document goes on in the next row as a new one, whose first token is no target."""
    packer = Packer(4, 2, mode="split")
    batch = packer.next_batch(feed([1, 2], [], [3, 4, 5, 6, 7, 8], [9]))
    assert batch.token_ids_BT.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert batch.document_ids_BT.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert batch.loss_mask_BT.tolist() == [[False, True, False, True], [False, True, True, True]]
    assert (batch.num_tokens, batch.num_targets, batch.padding_share) == (8, 5, 0.0)
    dtypes = [batch.token_ids_BT.dtype, batch.document_ids_BT.dtype, batch.position_ids_BT.dtype]
    assert [*dtypes, batch.loss_mask_BT.dtype] == [torch.int64, torch.int32, torch.int32, torch.bool]


def test_split_goes_on_in_the_next_batch() -> None:
    packer = Packer(4, 1, mode="split")
    next_document = feed([1, 2, 3, 4, 5, 6], [7, 8])
    assert packer.next_batch(next_document).token_ids_BT.tolist() == [[1, 2, 3, 4]]
    batch = packer.next_batch(next_document)
    assert batch.token_ids_BT.tolist() == [[5, 6, 7, 8]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 0, 1]]


def test_whole_rows_by_hand() -> None:
    """Oldest first, then the longest that fits; padding is no target and belongs to no document."""
    packer = Packer(6, 1, mode="whole", waiting_documents=3)
    next_document = feed([1, 1, 1], [2, 2], [3, 3, 3, 3], [4], [5, 5], [6, 6, 6, 6, 6, 6], [7], [8] * 6, [9] * 6)
    batch = packer.next_batch(next_document)
    assert batch.token_ids_BT.tolist() == [[1, 1, 1, 2, 2, 4]]
    assert batch.document_ids_BT.tolist() == [[0, 0, 0, 1, 1, 2]]
    batch = packer.next_batch(next_document)
    assert batch.token_ids_BT.tolist() == [[3, 3, 3, 3, 5, 5]]
    batch = packer.next_batch(next_document)
    assert batch.token_ids_BT.tolist() == [[6] * 6]


def test_whole_row_is_padded_where_nothing_fits() -> None:
    batch = Packer(4, 2, mode="whole", waiting_documents=2).next_batch(feed(*[[1, 1, 1]] * 4))
    assert batch.token_ids_BT.tolist() == [[1, 1, 1, 0]] * 2
    assert batch.document_ids_BT.tolist() == [[0, 0, 0, -1]] * 2
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0]] * 2
    assert batch.loss_mask_BT.tolist() == [[False, True, True, False]] * 2
    assert (batch.num_tokens, batch.num_targets, batch.padding_share) == (6, 4, 0.25)


def test_whole_packing_pads_little() -> None:
    """Documents of 40 to 120 tokens in rows of 512: the promised 3% at most."""
    draw = random.Random(0)
    source = CountingSource("s", [draw.randint(40, 120) for _ in range(3000)])
    packer = Packer(512, 8, mode="whole")
    shares = [packer.next_batch(source.next_document).padding_share for _ in range(50)]
    assert 0 < sum(shares) / len(shares) <= 0.03


def test_whole_packing_starves_no_document() -> None:
    """A document that never is the best fit must still come out in its turn."""
    awkward = [9] * 7
    next_document = feed(awkward, *[[1] * 4] * 2, awkward, *[[2] * 4] * 40)
    packer = Packer(8, 1, mode="whole", waiting_documents=4)
    rows = [packer.next_batch(next_document).token_ids_BT.tolist()[0] for _ in range(6)]
    assert [row[0] for row in rows].count(9) == 2


def test_long_documents_are_truncated_dropped_or_refused() -> None:
    long = [1, 2, 3, 4, 5, 6]
    packer = Packer(4, 1, mode="whole", waiting_documents=1)
    assert packer.next_batch(feed(long, [7])).token_ids_BT.tolist() == [[1, 2, 3, 4]]
    assert packer.num_too_long == 1
    packer = Packer(4, 1, mode="whole", long_documents="drop", waiting_documents=1)
    assert packer.next_batch(feed(long, [7, 7, 7, 7], [8])).token_ids_BT.tolist() == [[7, 7, 7, 7]]
    assert packer.num_too_long == 1
    with pytest.raises(DataError, match="a document of s has 6 tokens, expected at most 4"):
        Packer(4, 1, mode="whole", long_documents="error").next_batch(feed(long))


def test_masked_tokens_stay_masked() -> None:
    document = Document(np.arange(4, dtype=np.int32), np.array([True, False, True, False]), "s")
    batch = Packer(4, 1).next_batch(lambda: document)
    assert batch.loss_mask_BT.tolist() == [[False, False, True, False]]


def test_waiting_documents_survive_json() -> None:
    packer = Packer(4, 1, mode="split")
    mask = np.array([True, False, True, True, False, True, False, True, True, False, True])
    packer.next_batch(lambda: Document(np.arange(11, dtype=np.int32) + 70_000, mask, "s"))
    twin = Packer(4, 1, mode="split")
    twin.restore(json.loads(json.dumps(packer.state())))
    nothing = feed([1, 1, 1])
    batch = twin.next_batch(nothing)
    assert batch.token_ids_BT.tolist() == [[70_004, 70_005, 70_006, 70_007]]
    assert batch.loss_mask_BT.tolist() == [[False, True, False, True]]
    assert twin.next_batch(nothing).loss_mask_BT.tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("broken", [{"tokens": "A"}, {"tokens": "AAAA", "targets": "!", "source": "s"}, {}, 5])
def test_damaged_state_is_refused(broken: object) -> None:
    with pytest.raises(DataError, match="unreadable document"):
        Packer(4, 1).restore({"too_long": 0, "waiting": [broken]})


@pytest.mark.parametrize("sizes", [(1, 1), (4, 0)])
def test_sizes_are_checked(sizes: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="expected at least 2, 1 and 1"):
        Packer(*sizes)
