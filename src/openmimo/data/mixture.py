"""Mixes sources by share of tokens, without chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from openmimo.data.documents import Document, State, whole_number
from openmimo.data.sources import Source
from openmimo.errors import DataError


class Mixture:
    """Takes each document from the source whose tokens lag furthest behind its share.

    Shares are `weights` divided by their sum; a source of weight 0 is never asked. No source gets ahead of its share
    by more than one of its documents.

    Raises: DataError if the weights do not fit the sources, or none is above 0.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        if not sources or len(sources) != len(weights):
            raise DataError(
                f"a mixture got {len(sources)} sources and {len(weights)} weights, expected one weight per source"
            )
        total = sum(weights)
        if not all(0 <= weight < math.inf for weight in weights) or not 0 < total < math.inf:
            raise DataError(f"mixture weights {list(weights)} must be finite, at least 0, and one of them above 0")
        self._sources = tuple(sources)
        self._shares = [weight / total for weight in weights]
        self._tokens = [0] * len(sources)

    @property
    def tokens_by_source(self) -> list[tuple[str, int]]:
        """Name of each source and the tokens taken from it, in the order given."""
        return [(source.name, tokens) for source, tokens in zip(self._sources, self._tokens, strict=True)]

    def next_document(self) -> Document:
        """The next document of the source that lags most; the first of equals."""
        total = sum(self._tokens)
        lags = [
            share * total - tokens if share else -math.inf
            for share, tokens in zip(self._shares, self._tokens, strict=True)
        ]
        chosen = lags.index(max(lags))
        document = self._sources[chosen].next_document()
        self._tokens[chosen] += len(document)
        return document

    def state(self) -> State:
        """Tokens taken from each source, and each source's own state."""
        return {
            "sources": [
                {"name": source.name, "tokens": tokens, "state": source.state()}
                for source, tokens in zip(self._sources, self._tokens, strict=True)
            ]
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes the state of a mixture of the same sources; weights may differ.

        Raises: DataError if the names of the sources differ.
        """
        entries = cast("list[Mapping[str, Any]]", state.get("sources") or [])
        saved, here = [entry.get("name") for entry in entries], [source.name for source in self._sources]
        if saved != here:
            raise DataError(f"saved data state has sources {saved}, the recipe has {here}; use the saved recipe")
        for position, (source, entry) in enumerate(zip(self._sources, entries, strict=True)):
            self._tokens[position] = whole_number(entry, "tokens")
            source.restore(cast("Mapping[str, Any]", entry.get("state") or {}))

    def close(self) -> None:
        """Releases the sources' open files."""
        for source in self._sources:
            source.close()
