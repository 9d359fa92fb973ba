"""A saved tokenizer, loaded by transformers, gives the same ids: of text and of whole conversations."""

from __future__ import annotations

from typing import Any

import pytest

from openmimo.text import ChatTemplate, Tokenizer

pytestmark = pytest.mark.parity

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells \"it\" <b> é",
        "parameters": {"type": "object", "properties": {"city": {"type": ["string", "null"], "enum": ["A"]}}},
    },
}  # fmt: skip
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "\n How is 12 + 7? "},
    {"role": "assistant", "content": "<think>r</think>Hm."},
    {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "text", "text": "now"}]},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "look",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "é", "n": [1, True]}}}
        ],
    },
    {"role": "tool", "content": "sun."},
    {"role": "tool", "content": "rain\n"},
    {"role": "assistant", "content": "Sun"},
]


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    return transformers.AutoTokenizer.from_pretrained(str(folder))


def test_ids_of_text(tokenizer: Tokenizer, theirs: Any) -> None:
    for text in (
        "Hello 123, don't\n\n  x",
        "é e\u0301 漢字 \U0001f600",
        "",
        "<|im_start|>user\nx<|im_end|><think></think>",
    ):
        assert theirs.encode(text) == tokenizer.encode_with_special(text)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.special("<|im_end|>"), tokenizer.pad_token_id)
    assert len(theirs) == tokenizer.vocab_size


@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("enable_thinking", [False, True])
@pytest.mark.parametrize("end", [1, 2, 3, 4, 5, 7, 8])
def test_ids_of_conversations(tokenizer: Tokenizer, theirs: Any, tools: Any, enable_thinking: bool, end: int) -> None:
    """Catches a template that leans on our sandbox, and a fast path that differs from Jinja elsewhere."""
    ours = ChatTemplate(tokenizer).render(MESSAGES[:end], tools=tools, enable_thinking=enable_thinking)
    encoded = theirs.apply_chat_template(
        MESSAGES[:end], tools=tools, enable_thinking=enable_thinking, add_generation_prompt=True, return_dict=False
    )
    assert ours == encoded
