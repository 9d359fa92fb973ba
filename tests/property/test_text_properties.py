"""Text: what must hold for any Unicode, any cut, any conversation."""

from __future__ import annotations

import functools
import unicodedata
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from openmimo.text import (
    ChatTemplate,
    IncrementalDecoder,
    ResponseParser,
    Tokenizer,
    join_events,
    parse_response,
    train_tokenizer,
)
from openmimo.text.mimo_template import MIMO_TEMPLATE

NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>")
TAGS = (
    *NAMES,
    "<function=f>",
    "<function=g>",
    "</function>",
    "<parameter=a>",
    "</parameter>",
    "\n",
    " ",
    "x",
    "<",
    "1",
)
TOOLS = [{"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}]

anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
pieces = st.lists(st.one_of(anything, st.sampled_from(TAGS)), max_size=6).map("".join)
answers = st.lists(st.sampled_from(TAGS), max_size=25).map("".join)
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": pieces}),
    min_size=1,
    max_size=4,
)
calm = settings(max_examples=150, deadline=None)


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(["user assistant system think call é漢 the answer is 12\n"] * 3, vocab_size=300)


@functools.cache
def templates() -> tuple[ChatTemplate, ChatTemplate]:
    return ChatTemplate(tokenizer()), ChatTemplate(tokenizer(), template=MIMO_TEMPLATE + "{# #}")


@calm
@given(pieces)
def test_decode_gives_back_composed_text_and_no_added_token_appears(text: str) -> None:
    ids = tokenizer().encode(text)
    assert tokenizer().decode(ids) == unicodedata.normalize("NFC", text)
    assert not {token.token_id for token in tokenizer().added_tokens}.intersection(ids)
    assert tokenizer().encode_batch([text, ""]) == [ids, []]


@calm
@given(st.data())
def test_decoding_in_pieces_equals_decoding_at_once(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer().vocab_size + 3), max_size=30))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    decoder = IncrementalDecoder(tokenizer())
    parts = [decoder.push(ids[start:stop]) for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert "".join(parts) + decoder.finish() == tokenizer().decode(ids)


@calm
@given(turns, st.booleans(), st.booleans())
def test_the_written_out_template_equals_jinja(messages: Any, thinking: bool, prompt: bool) -> None:
    fast, slow = (
        template.render(messages, enable_thinking=thinking, add_generation_prompt=prompt) for template in templates()
    )
    assert fast == slow


@calm
@given(turns, pieces, st.one_of(st.none(), pieces.filter(bool)))
def test_a_prompt_is_the_start_of_its_training_document(messages: Any, content: str, reasoning: str | None) -> None:
    template = templates()[0]
    answer = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    split = reasoning is None and content.startswith("<think>") and "</think>" in content
    ids, mask = template.render_training([*messages, answer])
    prompt = template.render(
        messages, enable_thinking=bool(reasoning) or (split and not content.startswith("<think></"))
    )
    assert ids[: len(prompt)] == prompt
    assert all(mask[len(prompt) :])
    assert not mask[len(prompt) - 1]
    turn_ends = sum(token == tokenizer().special("<|im_end|>") for token in ids)
    assert turn_ends == len(messages) + 1 + (messages[0]["role"] != "system")


@settings(max_examples=400, deadline=None)
@given(answers, st.data())
def test_parsing_in_pieces_equals_parsing_at_once(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parser = ResponseParser(TOOLS)
    events = [
        event
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)
        for event in parser.push(text[start:stop])
    ]
    assert join_events([*events, *parser.finish()]) == parse_response(text, TOOLS)


@calm
@given(answers.filter(lambda text: "<tool_call>" not in text and "<think>" not in text))
def test_text_without_opening_tags_is_all_content(text: str) -> None:
    parsed = parse_response(text, TOOLS)
    assert (parsed.reasoning, parsed.content, parsed.tool_calls) == ("", text, ())
