"""Answers under a grammar: always in its language, the same with and without drafts, freed by the end of thinking."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from engine_fakes import small_config

from openmimo.engine import Engine, Grammar, SamplingParams
from openmimo.errors import RequestError
from openmimo.model import build_model
from openmimo.text import Tokenizer, train_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = ("name", "age", "true", "false", '{"name": "', '", "age": ')
    texts = [f"{first} {second} {number}" for first in words for second in words for number in range(9)]
    return train_tokenizer(texts, vocab_size=320)


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> Engine:
    model = build_model(small_config(vocab_size=tokenizer.vocab_size), seed=0)
    return Engine(model, runner="torch", tokenizer=tokenizer, draft_heads=3, max_batch=8)


def answers(engine: Engine, grammar: Grammar, drafts: int, count: int = 6) -> list[str]:
    params = SamplingParams(temperature=1.2, max_tokens=120, seed=1, constraint=grammar)
    prompts = [[3 + number, 4] for number in range(count)]
    completions = engine.with_drafts(drafts).generate(prompts, params)
    assert {completion.finish_reason for completion in completions} == {"stop"}
    return [completion.text for completion in completions]


def test_answers_fit_the_schema_whatever_the_model_wants(engine: Engine, tokenizer: Tokenizer) -> None:
    """Catches a mask that is late by a token or lets anything through: the model is random, and sampled hot."""
    for text in answers(engine, Grammar.json_schema(tokenizer, SCHEMA), 0, count=20):
        found = json.loads(text)
        assert set(found) == {"name", "age"}
        assert len(found["name"]) <= 6
        assert 0 <= found["age"] <= 99


def test_drafts_do_not_change_what_is_written(engine: Engine, tokenizer: Tokenizer) -> None:
    """Catches a matcher that is not taken back behind the drafts, or moved by drafts that were not kept."""
    grammar = Grammar.regex(tokenizer, r"(true|false)( [0-9]{1,3}){2,20}")
    texts = [answers(engine, grammar, drafts) for drafts in (0, 1, 3)]
    assert texts[0] == texts[1] == texts[2]
    assert all(re.fullmatch(r"(true|false)( [0-9]{1,3}){2,20}", text) for text in texts[0])


def test_a_window_is_masked_as_its_tokens_one_by_one(tokenizer: Tokenizer) -> None:
    """Catches rows that assume the wrong drafts, also after a draft that the grammar refuses."""
    grammar = Grammar.regex(tokenizer, r"name age [0-9]+")
    good = tokenizer.encode("name age 7")
    stepwise, state = [], grammar.begin()
    for token in [*good, None]:
        logits_V = np.zeros((1, tokenizer.vocab_size), np.float32)
        state.apply_window(logits_V, [])
        stepwise.append(logits_V[0])
        if token is not None:
            state.add(token)
    whole = np.zeros((len(good) + 1, tokenizer.vocab_size), np.float32)
    state = grammar.begin()
    state.apply_window(whole, good)
    assert np.array_equal(whole, np.stack(stepwise))
    wrong = np.zeros((3, tokenizer.vocab_size), np.float32)
    state.apply_window(wrong, [good[0], tokenizer.encode("false")[0]])
    assert np.array_equal(wrong[:2], np.stack(stepwise[:2]))
    again = np.zeros((len(good) + 1, tokenizer.vocab_size), np.float32)
    state.apply_window(again, good)
    assert np.array_equal(again, whole)


def test_thinking_is_free_and_an_answer_follows_it(engine: Engine, tokenizer: Tokenizer) -> None:
    """Catches a grammar that binds the thoughts, or an answer that ends inside them; the token is drawn by chance."""
    after = tokenizer.special("</think>")
    grammar = Grammar.json_schema(tokenizer, {"enum": [1, 2]}, after=after)
    bias = {after: 4.0}
    params = SamplingParams(temperature=1.5, max_tokens=400, seed=2, constraint=grammar, logit_bias=bias)
    lengths: list[int] = []
    for drafts in (0, 3):
        for completion in engine.with_drafts(drafts).generate([[5], [6], [7]], params):
            thoughts, _, answer = completion.text.partition("</think>")
            assert answer in ("1", "2")
            lengths.append(len(thoughts))
    assert max(lengths) > 3


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (Grammar.json_schema, {"type": "nothing"}),
        (Grammar.json_schema, {"$ref": "#/missing"}),
        (Grammar.regex, "(unclosed"),
        (Grammar.lark, "start: missing"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(
    make: object, given: object, tokenizer: Tokenizer
) -> None:
    """Catches a grammar that fails only once an answer is under way."""
    with pytest.raises(RequestError, match="cannot be kept"):
        make(tokenizer, given)  # type: ignore[operator]
