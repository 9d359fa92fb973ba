"""A model small enough to run in milliseconds."""

from __future__ import annotations

import pytest

from openmimo.config.model import ModelConfig, preset


@pytest.fixture
def tiny_config() -> ModelConfig:
    return preset("nano").replace(vocab_size=64, hidden_size=32, dense_dim=32)
