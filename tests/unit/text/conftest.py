"""Two tokenizers: one trained here, one with the 26 added tokens of the published model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openmimo.text import Tokenizer, train_tokenizer

# fmt: off
PUBLISHED_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)
PUBLISHED_PLAIN = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)
WORDS = (
    "system", "user", "assistant", "tool", "answer", "the", "of", "and", "think", "call", "function", "parameter",
    "value", "im", "start", "end", "text",
)
# fmt: on


def corpus() -> list[str]:
    return [f"{first} {second}, {first}s\n{number}" for number, first in enumerate(WORDS) for second in WORDS] * 2


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(corpus(), vocab_size=352)


@pytest.fixture(scope="session")
def published(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("published")
    tokenizer.save(folder)
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    first = definition["added_tokens"][0]["id"]
    definition["added_tokens"] = [
        {**definition["added_tokens"][0], "id": first + place, "content": name, "special": name in PUBLISHED_SPECIAL}
        for place, name in enumerate((*PUBLISHED_SPECIAL, *PUBLISHED_PLAIN))
    ]
    path.write_text(json.dumps(definition))
    return Tokenizer.load(folder)


@pytest.fixture
def saved(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path)
    return tmp_path
