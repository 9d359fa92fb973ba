"""Answers that fit a JSON schema, a regular expression or a Lark grammar, kept to it token by token by llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from openmimo.errors import RequestError
from openmimo.text import Tokenizer

# Bytes that no UTF-8 text has mark tokens that are no text.
SPECIAL_MARK = b"\xff"
# Between the tokens of JSON: enough to indent, but no room for a model that would write spaces for ever.
JSON_SPACE = r"\n?[ \t]{0,20}"


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """The think block at the beginning of an answer: the tokens that open and close it, and its most tokens, if any."""

    start: int
    end: int
    budget: int | None = None


@dataclass(frozen=True, eq=False)
class Grammar:
    """A compiled grammar, made by `json_schema`, `regex`, `lark` or `think`; shared by any number of answers.

    With `thinking`, everything up to the end of the think block is free, but the answer cannot end before it.
    """

    matcher: Any
    stop_ids: tuple[int, ...]
    thinking: Thinking | None = None

    @staticmethod
    def think(thinking: Thinking) -> Grammar:
        """Any answer, but a think block is closed when its budget is spent."""
        return Grammar(None, (), thinking)

    @staticmethod
    def json_schema(
        tokenizer: Tokenizer, schema: Mapping[str, Any] | bool, *, thinking: Thinking | None = None
    ) -> Grammar:
        """Raises: RequestError for a schema that cannot be kept."""
        try:
            text = json.dumps(schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the schema is not JSON: {error}") from error
        try:
            options = {"whitespace_pattern": JSON_SPACE}
            grammar = _library().LLMatcher.grammar_from_json_schema(text, options)
            return _compiled(tokenizer, grammar, "JSON schema", thinking)
        except ValueError as error:
            raise RequestError(f"the JSON schema cannot be kept: {error}") from error

    @staticmethod
    def regex(tokenizer: Tokenizer, pattern: str, *, thinking: Thinking | None = None) -> Grammar:
        """The whole answer matches `pattern`. Raises: RequestError for one that cannot be kept."""
        return _compiled(tokenizer, _library().LLMatcher.grammar_from_regex(pattern), "regular expression", thinking)

    @staticmethod
    def lark(tokenizer: Tokenizer, grammar: str, *, thinking: Thinking | None = None) -> Grammar:
        """The answer is a `start` of the grammar. Raises: RequestError for one that cannot be kept."""
        return _compiled(tokenizer, _library().LLMatcher.grammar_from_lark(grammar), "grammar", thinking)

    def begin(self) -> GrammarState:
        """The state of an answer without tokens."""
        matcher = None if self.matcher is None else self.matcher.deep_copy()
        return GrammarState(matcher, self.stop_ids, self.thinking)


class GrammarState:
    """One answer and what may follow it. Where the grammar is used up, only the end of the answer may."""

    def __init__(self, matcher: Any, stop_ids: tuple[int, ...], thinking: Thinking | None) -> None:
        self._matcher = matcher
        self._stop_ids = list(stop_ids)
        self._thinking = thinking
        # Tokens of the think block so far; None behind it.
        self._num_thoughts: int | None = None if thinking is None else 0

    def apply_window(self, logits_TV: npt.NDArray[np.float32], drafts: list[int]) -> None:
        """Set the logits of what may not follow to minus infinity, in place. Row t assumes the first t drafts."""
        before, consumed, matcher = self._num_thoughts, 0, self._matcher
        for row, logits_V in enumerate(logits_TV):
            if row:
                token = drafts[row - 1]
                if self._num_thoughts is not None:
                    self._think(token)
                elif matcher is not None:
                    if matcher.try_consume_tokens([token]) != 1:
                        break  # this draft will not be kept, so what follows it does not matter
                    consumed += 1
            self._mask(logits_V)
        if matcher is not None and consumed:
            matcher.rollback(consumed)
        self._num_thoughts = before

    def add(self, token: int) -> None:
        """The answer has one more token."""
        if self._num_thoughts is not None:
            self._think(token)
        elif self._matcher is not None:
            self._matcher.try_consume_tokens([token])

    def _think(self, token: int) -> None:
        assert self._thinking is not None
        assert self._num_thoughts is not None
        # An answer that need not fit a grammar may go without the block.
        goes_without = self._matcher is None and self._num_thoughts == 0 and token != self._thinking.start
        self._num_thoughts = None if token == self._thinking.end or goes_without else self._num_thoughts + 1

    def _mask(self, logits_V: npt.NDArray[np.float32]) -> None:
        size = len(logits_V)
        if self._num_thoughts is not None:
            assert self._thinking is not None
            budget = self._thinking.budget
            if budget is not None and self._num_thoughts >= max(budget, 1):
                end = logits_V[self._thinking.end]
                logits_V[:] = -np.inf
                logits_V[self._thinking.end] = end if np.isfinite(end) else 0.0
            elif self._matcher is not None:
                logits_V[[token for token in self._stop_ids if token < size]] = -np.inf
            return
        if self._matcher is None:
            return
        if self._matcher.is_error() or self._matcher.is_stopped():
            allowed_V = np.zeros(size, np.bool_)
            allowed_V[[token for token in self._stop_ids if token < size]] = True
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            known_V = np.unpackbits(bits, bitorder="little")[:size].astype(np.bool_)
            allowed_V = np.zeros(size, np.bool_)
            allowed_V[: len(known_V)] = known_V
        logits_V[~allowed_V] = -np.inf


class _Words:
    """A tokenizer as llguidance wants to see it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = {token.token_id for token in tokenizer.added_tokens}
        self.tokens: Sequence[bytes] = [
            (SPECIAL_MARK if token in added else b"") + tokenizer.token_bytes(token)
            for token in range(tokenizer.vocab_size)
        ]
        self.special_token_ids: Sequence[int] = sorted(added)
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.bos_token_id: int | None = None
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


@lru_cache(maxsize=4)
def _words(tokenizer: Tokenizer) -> Any:
    """Kept, because it takes seconds for a large vocabulary."""
    return _library().LLTokenizer(_Words(tokenizer), eos_token=list(tokenizer.eos_token_ids))


def _compiled(tokenizer: Tokenizer, grammar: str, what: str, thinking: Thinking | None) -> Grammar:
    library = _library()
    if not tokenizer.eos_token_ids:
        raise RequestError(f"a {what} needs a tokenizer with a token that ends answers; this one has none")
    # Bounds on work that a hostile grammar could cause: about 20 ms at first and 10 ms per token.
    limits = library.LLParserLimits(
        initial_lexer_fuel=1_000_000, step_lexer_fuel=100_000, step_max_items=50_000, verbose_errors=False
    )
    matcher = library.LLMatcher(_words(tokenizer), grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise RequestError(f"the {what} cannot be kept: {matcher.get_error()[:500]}")
    return Grammar(matcher, tuple(tokenizer.eos_token_ids), thinking)


def _library() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise RequestError("grammars need llguidance; install it with: pip install 'openmimo[server]'") from error
    return llguidance
