"""Shares by tokens, without chance."""

from __future__ import annotations

import pytest
from data_fakes import CountingSource

from openmimo.data import Mixture
from openmimo.errors import DataError


def test_shares_count_tokens_not_documents() -> None:
    """Long documents of one source must not crowd out the other's short ones."""
    mixture = Mixture([CountingSource("long", [900]), CountingSource("short", [10])], [1, 3])
    documents = [mixture.next_document() for _ in range(2000)]
    long, short = (
        sum(len(document) for document in documents if document.source == name) for name in ("long", "short")
    )
    assert abs(long - 0.25 * (long + short)) <= 900
    assert mixture.tokens_by_source == [("long", long), ("short", short)]


def test_source_of_weight_zero_is_never_asked() -> None:
    mixture = Mixture([CountingSource("off", [1]), CountingSource("on", [5])], [0, 0.1])
    assert {mixture.next_document().source for _ in range(50)} == {"on"}


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1e308, 1e308]])
def test_unusable_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match="mixture weights"):
        Mixture([CountingSource("a", [1]), CountingSource("b", [1])], weights)


def test_weights_must_match_sources() -> None:
    with pytest.raises(DataError, match="2 weights, expected one weight per source"):
        Mixture([CountingSource("a", [1])], [1, 2])
    with pytest.raises(DataError, match="0 sources"):
        Mixture([], [])


def test_state_of_other_sources_is_refused() -> None:
    state = Mixture([CountingSource("a", [1])], [1]).state()
    with pytest.raises(DataError, match=r"has sources \['a'\], the recipe has \['b'\]"):
        Mixture([CountingSource("b", [1])], [1]).restore(state)
