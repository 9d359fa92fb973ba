"""One live server for all tests that do not change it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from server_fakes import LiveServer, serving, small_engine, small_tokenizer

from openmimo.text import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="session")
def live(tokenizer: Tokenizer) -> Iterator[LiveServer]:
    with serving(small_engine(tokenizer), model_name="nano") as server:
        yield server
