"""The background worker: cursors, errors, ranks and a clean end."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from data_fakes import CountingSource

from openmimo.data import BatchLoader, Document, Mixture, Packer
from openmimo.errors import DataError


def loader_of(source: CountingSource | None = None, **options: Any) -> BatchLoader:
    return BatchLoader(Mixture([source or CountingSource("s", [3, 10, 7])], [1]), Packer(8, 2), **options)


def tokens(loader: BatchLoader, count: int) -> list[list[list[int]]]:
    return [next(loader).token_ids_BT.tolist() for _ in range(count)]


class FailingSource(CountingSource):
    def next_document(self) -> Document:
        if self._made == 20:
            raise DataError("a.txt line 7: broken")
        return super().next_document()


def test_error_surfaces_behind_the_batches_before_it_and_stays() -> None:
    """A worker that dies must neither hang the consumer nor lose good batches nor go on behind the hole."""
    source = FailingSource("s", [8])
    loader = loader_of(source, prefetch=4)
    assert len(tokens(loader, 10)) == 10
    with pytest.raises(DataError, match="line 7: broken"):
        next(loader)
    with pytest.raises(DataError, match="the loader is closed"):
        next(loader)
    assert source.num_closed == 1


def test_close_ends_the_thread_and_is_harmless_twice() -> None:
    source = CountingSource("s", [8])
    with loader_of(source) as loader:
        next(loader)
        assert [thread for thread in threading.enumerate() if thread.name.startswith("openmimo-data")]
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("openmimo-data")]
    assert source.num_closed == 1


def test_worker_stays_within_the_prefetch_depth() -> None:
    """An unbounded queue would fill the memory."""
    made = threading.Semaphore(0)

    class Signalling(CountingSource):
        num_made = 0

        def next_document(self) -> Document:
            self.num_made += 1
            made.release()
            return super().next_document()

    source = Signalling("s", [16])
    with loader_of(source, prefetch=3) as loader:
        for _ in range(3):
            assert made.acquire(timeout=30)
        assert not made.acquire(timeout=0.05)
        next(loader)
        assert made.acquire(timeout=30)
        assert not made.acquire(timeout=0.05)
    assert source.num_made == 4


def test_ranks_share_the_batches_and_the_cursor() -> None:
    with loader_of() as loader:
        alone = tokens(loader, 8)
    with loader_of(rank=0, world_size=2) as first, loader_of(rank=1, world_size=2) as second:
        pairs = [(next(first), next(second)) for _ in range(4)]
    assert [batch.token_ids_BT.tolist() for pair in pairs for batch in pair] == alone
    assert pairs[1][0].cursor == pairs[1][1].cursor
    with loader_of(cursor=pairs[1][0].cursor, rank=2, world_size=3) as third:
        assert tokens(third, 1) == [alone[6]]


@pytest.mark.parametrize(
    ("cursor", "message"),
    [
        ({}, "version None, expected 1"),
        ({"version": 1}, r"has sources \[\], the recipe has \['s'\]"),
        ({"version": 1, "mixture": {"sources": [{"name": "s"}]}}, "tokens=None, expected a whole number"),
    ],
)
def test_damaged_cursor_is_refused(cursor: Mapping[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        loader_of(cursor=cursor)


def test_cursor_is_json() -> None:
    with loader_of() as loader:
        cursor = next(loader).cursor
        assert json.loads(json.dumps(cursor)) == cursor


@pytest.mark.parametrize("options", [{"rank": 1}, {"rank": -1}, {"prefetch": 0}])
def test_options_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(DataError, match="must be at least"):
        loader_of(**options)
