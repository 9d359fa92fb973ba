"""What all routes share: the model, its tokenizer and template, the worker, and how requests come to an answer."""

from __future__ import annotations

import asyncio
import datetime
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from openmimo.config.model import ModelConfig
from openmimo.engine import PAGE_TOKENS, Engine, Thinking
from openmimo.errors import MimoError, RequestError
from openmimo.server.errors import ApiError, bad_request
from openmimo.server.metrics import ServerMetrics
from openmimo.server.options import ServerOptions
from openmimo.server.worker import EngineWorker, Ticket
from openmimo.text import ChatTemplate, Message, Tokenizer, recommended_system_prompt

T = TypeVar("T")

# Longer texts are tokenized outside the event loop: this many take about two milliseconds.
INLINE_CHARACTERS = 10_000
THINK_START, THINK_END = b"<think>", b"</think>"
# From this size of the vocabulary on, a model is taken for a published one, which wants the recommended system prompt.
FULL_VOCABULARY = 150_000


class Service:
    """One engine behind one set of options. `open` and `close` belong to the event loop that serves it.

    Raises: RequestError if the engine has no tokenizer.
    """

    def __init__(self, engine: Engine, options: ServerOptions) -> None:
        if not isinstance(engine.tokenizer, Tokenizer):
            raise RequestError("the model's folder has no tokenizer.json, without which it cannot be served; add it")
        self.options = options
        self.engine = engine
        self.config: ModelConfig = engine.config
        self.tokenizer: Tokenizer = engine.tokenizer
        self.template = ChatTemplate(self.tokenizer, template=self.tokenizer.chat_template)
        self.metrics = ServerMetrics(num_heads=engine.draft_heads)
        self.worker = EngineWorker(
            engine,
            max_open=engine.max_batch + options.max_waiting,
            buffer_tokens=options.buffer_tokens,
            on_close=self._closed,
        )
        self.weights_lock = asyncio.Lock()
        self.created = int(time.time())
        self.max_tokens = min(self.config.max_positions, engine.runner.num_pages * PAGE_TOKENS)
        longest = max(len(self.tokenizer.token_bytes(token)) for token in range(self.tokenizer.vocab_size))
        # No text with more characters than this fits, whatever its tokens are.
        self._max_characters = longest * self.max_tokens
        self.stop_ids = frozenset((*self.config.eos_token_ids, *self.tokenizer.eos_token_ids))

    def open(self) -> None:
        """Begin to work for the running event loop."""
        self.worker.start()

    async def close(self) -> None:
        """Finish what was begun, as far as the time to drain allows."""
        await self.worker.close(self.options.drain_seconds)

    def check_model(self, name: str | None) -> str:
        """The name that an answer bears. Raises: ApiError 404 for a model that is not served."""
        if name is not None and name != self.options.model_name:
            raise ApiError(
                404,
                f"the model {name[:100]!r} is not served here; {self.options.model_name!r} is",
                param="model",
                code="model_not_found",
            )
        return self.options.model_name

    def room(self, num_prompt: int) -> int:
        """How many tokens fit behind a prompt. Raises: ApiError 400 if none does."""
        if num_prompt >= self.max_tokens:
            raise bad_request(
                f"the prompt has {num_prompt} tokens; prompt and answer together may have {self.max_tokens}",
                code="context_length_exceeded",
            )
        if num_prompt == 0:
            raise bad_request("the prompt is empty; give at least one token")
        return self.max_tokens - num_prompt

    async def encode(self, text: str) -> list[int]:
        """Token ids of a plain text. Raises: ApiError 400 if it cannot fit or is no text."""
        self._check_length(len(text))
        return await self._compute(len(text), lambda: self.tokenizer.encode(text))

    async def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None,
        thinking: bool,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation. Raises: ApiError 400 if it cannot fit or the template refuses it."""
        size = sum(len(message.content) + len(message.reasoning_content) for message in messages)
        self._check_length(size)
        system = self.options.system_prompt
        if system is None and self.config.vocab_size >= FULL_VOCABULARY:
            system = recommended_system_prompt(datetime.date.today())
        return await self._compute(
            size,
            lambda: self.template.render(
                messages,
                tools=tools or None,
                enable_thinking=thinking,
                system=system,
                add_generation_prompt=add_generation_prompt,
            ),
        )

    def check_ids(self, ids: Sequence[int]) -> list[int]:
        """Token ids of a prompt. Raises: ApiError 400 for those outside the vocabulary."""
        self.room(len(ids))
        if max(ids) >= self.config.vocab_size:
            raise bad_request(
                f"the prompt has the token id {max(ids)}; ids are below {self.config.vocab_size}", param="prompt"
            )
        return list(ids)

    def check_heads(self, draft_heads: int | str | None) -> int | str | None:
        """The number of drafts per step. Raises: ApiError 400 if the model has fewer heads."""
        most = self.engine.draft_heads
        if isinstance(draft_heads, int) and not 0 <= draft_heads <= most:
            raise bad_request(f"draft_heads is {draft_heads}; give 0 to {most}, or 'auto'", param="draft_heads")
        return draft_heads

    def think_block(self, budget: int | None) -> Thinking:
        """The tokens around a think block, with its most tokens."""
        start, end = (self.tokenizer.special(tag.decode()) for tag in (THINK_START, THINK_END))
        return Thinking(start=start, end=end, budget=budget)

    def num_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """How many tokens at the beginning of an answer belong to a think block, however it is spelled."""
        text, seen = bytearray(), 0
        for place, token in enumerate(token_ids):
            text += self.tokenizer.token_bytes(token)
            if not text.startswith(THINK_START[: len(text)]):
                return 0
            if text.find(THINK_END, seen) >= 0:
                return place + 1
            seen = max(0, len(text) - len(THINK_END) + 1)
        return len(token_ids)

    async def _compute(self, num_characters: int, function: Callable[[], T]) -> T:
        try:
            if num_characters < INLINE_CHARACTERS:
                return function()
            return await asyncio.to_thread(function)
        except ApiError:
            raise
        except MimoError as error:
            raise bad_request(str(error)) from error

    def _check_length(self, num_characters: int) -> None:
        if num_characters > self._max_characters:
            raise bad_request(
                f"the prompt has {num_characters} characters; at most {self.max_tokens} tokens fit, which are fewer",
                code="context_length_exceeded",
            )

    def _closed(self, ticket: Ticket) -> None:
        self.metrics.observe(ticket)


def new_id(prefix: str) -> str:
    """A name that no other answer has."""
    return prefix + secrets.token_hex(12)
