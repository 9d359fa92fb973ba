"""Answers under a grammar: always in its language, the same with and without drafts, freed by the end of thinking."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from engine_fakes import small_config

from openmimo.engine import Engine, Grammar, SamplingParams, Thinking
from openmimo.errors import RequestError
from openmimo.model import build_model
from openmimo.text import Tokenizer, parse_response, train_tokenizer
from openmimo.text.call_grammar import call_grammar

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
    thinking = Thinking(start=tokenizer.special("<think>"), end=after)
    grammar = Grammar.json_schema(tokenizer, {"enum": [1, 2]}, thinking=thinking)
    bias = {after: 4.0}
    params = SamplingParams(temperature=1.5, max_tokens=400, seed=2, constraint=grammar, logit_bias=bias)
    lengths: list[int] = []
    for drafts in (0, 3):
        for completion in engine.with_drafts(drafts).generate([[5], [6], [7]], params):
            thoughts, _, answer = completion.text.partition("</think>")
            assert answer in ("1", "2")
            lengths.append(len(thoughts))
    assert max(lengths) > 3


def test_white_space_in_json_has_an_end(engine: Engine, tokenizer: Tokenizer) -> None:
    """Catches a model that writes spaces until its room is used up."""
    grammar = Grammar.json_schema(tokenizer, {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]})
    (space,), (line,) = tokenizer.encode(" "), tokenizer.encode("\n")
    params = SamplingParams(temperature=0, max_tokens=200, constraint=grammar, logit_bias={space: 50.0, line: 40.0})
    (completion,) = engine.generate([[5]], params)
    assert completion.finish_reason == "stop"
    assert json.loads(completion.text)["a"] == 1


@pytest.mark.parametrize("bound", [True, False])
def test_a_spent_budget_ends_the_thoughts(engine: Engine, tokenizer: Tokenizer, bound: bool) -> None:
    """Catches thoughts that go on, drafts that reach past the budget, and answers without thoughts that are cut."""
    start, end = tokenizer.special("<think>"), tokenizer.special("</think>")
    thinking = Thinking(start=start, end=end, budget=7)
    schema = {"enum": [1, 2]}
    grammar = Grammar.json_schema(tokenizer, schema, thinking=thinking) if bound else Grammar.think(thinking)
    params = SamplingParams(temperature=1.5, max_tokens=40, seed=2, constraint=grammar, logit_bias={start: 30.0})
    answers = [engine.with_drafts(drafts).generate([[5], [6]], params) for drafts in (0, 3)]
    assert [each.token_ids for each in answers[0]] == [each.token_ids for each in answers[1]]
    for completion in answers[0]:
        assert completion.token_ids[0] == start
        assert completion.token_ids.index(end) <= 7
    without = SamplingParams(temperature=0.0, max_tokens=40, constraint=grammar, logit_bias={start: -90.0, end: -90.0})
    (completion,) = engine.generate([[5]], without)
    assert (end in completion.token_ids) == bound


FUNCTIONS = [
    {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "unit": {"enum": ["C", "F"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
                "note": {"type": ["integer", "null"], "minimum": 0, "maximum": 99},
            },
            "required": ["unit", "days"],
            "$defs": {"tag": {"type": "boolean"}},
        },
    },
    {"name": "stop"},
]


def test_forced_calls_fit_their_schemas(engine: Engine, tokenizer: Tokenizer) -> None:
    """Catches calls that the parser reads as others, values of the wrong type, and text beside the calls."""
    grammar = Grammar.lark(tokenizer, call_grammar(tokenizer, FUNCTIONS, forced=True))
    end = tokenizer.special("<|im_end|>")
    called: set[str] = set()
    for seed in range(6):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=150, constraint=grammar, logit_bias={end: 3.0})
        (completion,) = engine.generate([[5]], params)
        parsed = parse_response(completion.text, FUNCTIONS)
        if completion.finish_reason == "length":
            continue
        assert parsed.content == ""
        assert parsed.tool_calls
        for call in parsed.tool_calls:
            called.add(call.name)
            if call.name == "weather":
                assert set(call.arguments) >= {"unit", "days"}
                assert call.arguments["unit"] in ("C", "F")
                assert call.arguments["days"] in range(1, 10)
                assert all(isinstance(tag, bool) for tag in call.arguments.get("tags", ()))
    assert called == {"weather", "stop"}


def test_at_most_one_call_stands_behind_text(engine: Engine, tokenizer: Tokenizer) -> None:
    """Catches a second call, and text that spells a call outside of the grammar's."""
    grammar = Grammar.lark(tokenizer, call_grammar(tokenizer, FUNCTIONS[1:], forced=False, parallel=False))
    opening = tokenizer.special("<tool_call>")
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=300, constraint=grammar, logit_bias={opening: 8.0})
    for completion in engine.generate([[5], [6], [7]], params):
        parsed = parse_response(completion.text, FUNCTIONS[1:])
        assert completion.finish_reason == "stop"
        assert len(parsed.tool_calls) == 1
        assert completion.token_ids.count(opening) == 1


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
