"""The chat template: a conversation to token ids, and to a training target.

How text becomes ids: what stands between two special tokens of the TEMPLATE, its own words and message
text alike, is encoded in one go. So the ids equal those of encoding the rendered text as a whole, except
that the name of a special token inside a message stays ordinary text.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from openmimo.errors import TextError
from openmimo.text.messages import Message, MessageLike, read_messages, read_tools
from openmimo.text.mimo_template import DEFAULT_SYSTEM, MIMO_TEMPLATE
from openmimo.text.protect import Vault
from openmimo.text.sandbox import GuardedEnvironment
from openmimo.text.tokenizer import TURN_END, TURN_START, AddedToken, Tokenizer

MAX_CHARACTERS = 16 * 2**20
# What a template may do beyond its fixed allowance for each character and each text of its input.
WORK_PER_CHARACTER = 32
WORK_PER_TEXT = 50_000
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_PLAIN_ROLES = frozenset(("system", "user", "assistant"))
_PLAIN_KEYS = frozenset(("role", "content"))


def recommended_system_prompt(date: datetime.date) -> str:
    """The system prompt that MiMo-V2-Flash's README recommends, for the given day."""
    return (
        "You are MiMo, an AI assistant developed by Xiaomi.\n\n"
        f"Today's date: {date.isoformat()} {WEEKDAYS[date.weekday()]}. Your knowledge cutoff date is December 2024."
    )


class ChatTemplate:
    """Renders conversations: by MiMo's own format, or by `template`, the Jinja text of a model's folder.

    `max_characters` limits what one rendering may yield. Safe to share between threads.
    Raises: TextError for a template that cannot be used or needs special tokens the tokenizer lacks.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, template: str | None = None, max_characters: int = MAX_CHARACTERS
    ) -> None:
        self._tokenizer = tokenizer
        self._max_characters = max_characters
        self._environment = GuardedEnvironment()
        self._template = self._environment.compile_template(MIMO_TEMPLATE if template is None else template)
        self._lock = threading.Lock()
        self._mimo = _MimoTurns(tokenizer) if template in (None, MIMO_TEMPLATE) else None

    def render(
        self,
        messages: Sequence[MessageLike],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = False,
        add_generation_prompt: bool = True,
        system: str | None = None,
    ) -> list[int]:
        """Token ids of a conversation, by default ready for the assistant's answer.

        `system` is the system text of a conversation that does not begin with its own.
        Message text never becomes a special token.
        Raises: TextError for unusable messages or tools, or a template that fails or loses a message.
        """
        if self._mimo is not None and not tools:
            turns = _plain_turns(messages)
            if turns is not None and _fits(turns, self._max_characters):
                ids = self._mimo.encode(turns, system)
                return ids + self._mimo.prompt(enable_thinking) if add_generation_prompt else ids
        checked = read_messages(messages)
        if system is not None and checked[0].role != "system":
            checked = (Message("system", system), *checked)
        return self._render(checked, tools, enable_thinking, add_generation_prompt)

    def render_training(
        self,
        messages: Sequence[MessageLike],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        system: str | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, and for each whether the assistant produced it.

        True from the end of what `render` would have given as the prompt (the empty think block
        included when the turn has no reasoning) up to and including `<|im_end|>`.
        Raises: TextError as `render` does, and for a template other than MiMo's.
        """
        if self._mimo is None:
            raise TextError("training needs MiMo's own chat template; leave out `template`")
        ids = self.render(messages, tools=tools, add_generation_prompt=False, system=system)
        return ids, self._mimo.assistant_mask(ids)

    def _render(
        self,
        messages: tuple[Message, ...],
        tools: Sequence[Mapping[str, Any]] | None,
        enable_thinking: bool,
        add_generation_prompt: bool,
    ) -> list[int]:
        vault = Vault()
        functions = [{"type": "function", "function": function} for function in read_tools(tools)]
        variables: dict[str, Any] = {
            "messages": [_protected(message, vault, str(place)) for place, message in enumerate(messages)],
            "enable_thinking": enable_thinking,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": "",
            "eos_token": TURN_END,
        }
        if functions:
            variables["tools"] = vault.protect_all(functions)
        with self._lock:
            rendered = self._environment.run(
                self._template,
                variables,
                to_json=vault.to_json,
                extra_work=WORK_PER_CHARACTER * vault.num_characters + WORK_PER_TEXT * vault.num_texts,
            )
        stretches, seen = vault.stretches(rendered)
        for place, message in enumerate(messages):
            if message.content.strip() and str(place) not in seen:
                raise TextError(f"the chat template leaves out the text of message {place} ({message.role})")
        num_characters = sum(len(text) for text, _ in stretches)
        if num_characters > self._max_characters:
            raise TextError(f"the prompt has {num_characters} characters; expected at most {self._max_characters}")
        return self._encode(stretches)

    def _encode(self, stretches: Iterable[tuple[str, bool]]) -> list[int]:
        ids: list[int] = []
        run: list[str] = []
        for text, by_template in stretches:
            for piece in self._tokenizer.split_special(text) if by_template else [text]:
                if isinstance(piece, AddedToken):
                    ids += self._tokenizer.encode("".join(run))
                    ids.append(piece.token_id)
                    run.clear()
                else:
                    run.append(piece)
        return ids + self._tokenizer.encode("".join(run))


class _MimoTurns:
    """MiMo's format for turns without reasoning and tools, written out; the tokenizer takes nearly all of the time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._start = tokenizer.special(TURN_START)
        self._end = tokenizer.special(TURN_END)
        self._assistant = tokenizer.encode("assistant\n")
        self._no_thoughts = [tokenizer.special("<think>"), tokenizer.special("</think>")]
        self._default_system = self._turn("system", DEFAULT_SYSTEM)

    def encode(self, turns: list[tuple[str, str]], system: str | None) -> list[int]:
        """Ids of all turns, with a system turn in front where they have none."""
        ids: list[int] = []
        if turns[0][0] != "system":
            ids += self._default_system if system is None else self._turn("system", system)
        for role, content in turns:
            ids += self._turn(role, content)
        return ids

    def prompt(self, enable_thinking: bool) -> list[int]:
        """Ids that ask for the assistant's turn."""
        return [self._start, *self._assistant, *(() if enable_thinking else self._no_thoughts)]

    def assistant_mask(self, ids: list[int]) -> list[bool]:
        """Which of `ids` an assistant produced. Turn marks never come from text, so they can be searched for."""
        mask = [False] * len(ids)
        stop = 0
        for _ in range(ids.count(self._start)):
            start = ids.index(self._start, stop)
            stop = ids.index(self._end, start) + 1
            body = start + 1 + len(self._assistant)
            if ids[start + 1 : body] == self._assistant:
                body += 2 * (ids[body : body + 2] == self._no_thoughts)
                mask[body:stop] = [True] * (stop - body)
        return mask

    def _turn(self, role: str, content: str) -> list[int]:
        if role == "assistant":
            return [*self.prompt(enable_thinking=False), *self._tokenizer.encode(content), self._end]
        return [self._start, *self._tokenizer.encode(f"{role}\n{content}"), self._end]


def _plain_turns(messages: Sequence[MessageLike]) -> list[tuple[str, str]] | None:
    """(role, content) of each message, or None if any has more than `_MimoTurns` can write."""
    turns: list[tuple[str, str]] = []
    for message in messages:
        if not isinstance(message, dict) or message.keys() != _PLAIN_KEYS:
            return None
        role, content = message["role"], message["content"]
        if not isinstance(content, str) or not isinstance(role, str) or role not in _PLAIN_ROLES:
            return None
        if role == "assistant" and content.startswith("<think>"):
            return None
        turns.append((role, content))
    return turns or None


def _fits(turns: list[tuple[str, str]], max_characters: int) -> bool:
    return sum(len(content) for _, content in turns) <= max_characters // 2


def _protected(message: Message, vault: Vault, source: str) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "role": message.role,
        "content": vault.protect(message.content, source) if message.content else "",
    }
    if message.reasoning_content:
        fields["reasoning_content"] = vault.protect(message.reasoning_content)
    if message.tool_calls:
        calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
        fields["tool_calls"] = [{"type": "function", "function": vault.protect_all(call)} for call in calls]
    for key, value in (("name", message.name), ("tool_call_id", message.tool_call_id)):
        if value is not None:
            fields[key] = vault.protect(value)
    return fields
