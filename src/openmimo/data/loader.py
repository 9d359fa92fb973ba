"""Makes batches ahead of the consumer, each with the cursor that follows it."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, cast

from openmimo.data.documents import State
from openmimo.data.mixture import Mixture
from openmimo.data.packing import Batch, Packer
from openmimo.errors import DataError

CURSOR_VERSION = 1


class BatchLoader:
    """An endless iterator over batches, made by one thread at most `prefetch` batches ahead.

    A loader that is given `batch.cursor` continues with the batch behind that one, bit for bit, whatever had been
    prefetched. Of `world_size` equal loaders number `rank` gets batches rank, rank + world_size, ...; all hold the
    same cursor, so a run may resume with another `world_size`. Cost: each rank makes the other ranks' batches too.

    Raises: DataError from `next()` for whatever the sources raise; the loader is then closed.
    """

    def __init__(
        self,
        mixture: Mixture,
        packer: Packer,
        *,
        cursor: Mapping[str, Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
    ) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"rank={rank} must be at least 0 and below world_size={world_size}")
        if prefetch < 1:
            raise DataError(f"prefetch={prefetch} must be at least 1")
        self._mixture = mixture
        self._packer = packer
        self._rank = rank
        self._world_size = world_size
        if cursor is not None:
            self._restore(cursor)
        self._worker: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix="openmimo-data")
        self._ahead: deque[Future[Batch]] = deque(self._worker.submit(self._make) for _ in range(prefetch))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._worker is None:
            raise DataError("the loader is closed; make a new one from the last batch's cursor")
        future = self._ahead[0]
        if future.exception() is not None:
            # Later batches would skip what failed, so none may come out.
            self.close()
        else:
            self._ahead.popleft()
            self._ahead.append(self._worker.submit(self._make))
        return future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops the thread and releases files; harmless when repeated."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
            self._worker = None
            self._ahead.clear()
            self._mixture.close()

    def _make(self) -> Batch:
        """This rank's share of one step; the cursor is that behind all ranks' shares."""
        batches = [self._packer.next_batch(self._mixture.next_document) for _ in range(self._world_size)]
        return dataclasses.replace(batches[self._rank], cursor=self._cursor())

    def _cursor(self) -> State:
        return {"version": CURSOR_VERSION, "mixture": self._mixture.state(), "packer": self._packer.state()}

    def _restore(self, cursor: Mapping[str, Any]) -> None:
        if cursor.get("version") != CURSOR_VERSION:
            raise DataError(
                f"data cursor has version {cursor.get('version')!r}, expected {CURSOR_VERSION}; "
                "it was written by another release, start without it"
            )
        self._mixture.restore(cast("Mapping[str, Any]", cursor.get("mixture") or {}))
        self._packer.restore(cast("Mapping[str, Any]", cursor.get("packer") or {}))
