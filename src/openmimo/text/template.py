"""The chat template: messages to token ids, by the published rules.

Rules: ChatML without a newline after `<|im_end|>`; the first turn is always the system's; the assistant's turns are
`<think>{reasoning}</think>{content}`; with thinking off the generation prompt ends in an empty think pair.
What people write goes in as plain tokens, whatever it contains; only the template's own text makes special ones.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from openmimo.errors import TextError, nearest
from openmimo.text.tokenizer import Tokenizer

DEFAULT_SYSTEM = "You are MiMo, a helpful AI assistant engineered by Xiaomi."
ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = frozenset({"role", "content", "reasoning_content", "reasoning", "tool_calls", "tool_call_id", "name"})
MAX_OUTPUT_CHARACTERS = 16 << 20

_TOOL_RULES = (
    "\n\nTo call functions, answer with one block per call, parameter values verbatim and not quoted:\n"
    "<tool_call>\n<function=NAME>\n<parameter=KEY>VALUE</parameter>\n</function>\n</tool_call>\n"
    "IMPORTANT: give every required parameter, and DO NOT use function calls inside <think></think> tags."
)
TEMPLATE = (
    "{%- if messages[0].role == 'system' -%}{%- set first = messages[0].content -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set first = default_system -%}{%- set turns = messages -%}{%- endif -%}"
    "<|im_start|>system\n{{ first }}"
    "{%- if tools -%}{{ '\n\n# Tools\n\nYou may call these functions:\n<tools>' }}"
    "{%- for tool in tools -%}{{ '\n' ~ tool }}{%- endfor -%}{{ '\n</tools>' ~ tool_rules }}{%- endif -%}<|im_end|>"
    "{%- for message in turns -%}"
    "{%- if message.role == 'assistant' -%}"
    "<|im_start|>assistant\n<think>{{ message.reasoning }}</think>{{ message.content }}"
    "{%- for call in message.tool_calls -%}<tool_call>{{ '\n<function=' ~ call.name ~ '>\n' }}"
    "{%- for key, value in call.arguments -%}{{ '<parameter=' ~ key ~ '>' ~ value ~ '</parameter>\n' }}{%- endfor -%}"
    "{{ '</function>\n' }}</tool_call>{%- endfor -%}<|im_end|>"
    "{%- elif message.role == 'tool' -%}"
    "{%- if loop.first or turns[loop.index0 - 1].role != 'tool' -%}<|im_start|>tool{{ '\n' }}{%- endif -%}"
    "<tool_response>{{ '\n' ~ message.content ~ '\n' }}</tool_response>"
    "{%- if loop.last or turns[loop.index0 + 1].role != 'tool' -%}<|im_end|>{%- else -%}{{ '\n' }}{%- endif -%}"
    "{%- else -%}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}"
    "{%- if not enable_thinking -%}<think></think>{%- endif -%}{%- endif -%}"
)


class ChatTemplate:
    """Renders conversations with one tokenizer. `default_system` stands where a conversation brings no system turn."""

    def __init__(self, tokenizer: Tokenizer, *, default_system: str = DEFAULT_SYSTEM) -> None:
        self.tokenizer = tokenizer
        self.default_system = default_system
        environment = ImmutableSandboxedEnvironment(keep_trailing_newline=True)
        self._template = environment.from_string(TEMPLATE)
        special, encode = tokenizer.special, tokenizer.encode
        self._start, self._end = special("<|im_start|>"), special("<|im_end|>")
        self._think = [special("<think>"), special("</think>")]
        self._system_turn = [self._start, *encode("system\n"), *encode(default_system), self._end]
        self._user_head = [self._start, *encode("user\n")]
        self._assistant_head = [self._start, *encode("assistant\n")]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation. Raises: TextError on a malformed message or tool."""
        nonce = secrets.token_hex(16)
        inserted: list[str] = []

        def hold(text: str) -> str:
            inserted.append(text)
            return f"\ue000{nonce}:{len(inserted) - 1}\ue001"

        turns = [_checked_message(message, index, hold) for index, message in enumerate(messages)]
        if not turns:
            raise TextError("got no messages; give at least one")
        try:
            text = self._template.render(
                messages=turns,
                tools=[hold(describe_tool(tool)) for tool in tools or ()],
                tool_rules=hold(_TOOL_RULES),
                default_system=hold(self.default_system),
                enable_thinking=enable_thinking,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            raise TextError(f"the chat template failed: {error}") from error
        if len(text) + sum(map(len, inserted)) > MAX_OUTPUT_CHARACTERS:
            raise TextError(f"the conversation is longer than {MAX_OUTPUT_CHARACTERS} characters; shorten it")
        return self._encode(text, nonce, inserted)

    def render_training(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation with thinking off, and which of them the assistant writes.

        The mask is true from behind the generation prompt up to and with `<|im_end|>`, so what is learned is what is
        asked for later. Fast: no template is run; tests hold it equal to `render`.
        """
        ids: list[int] = []
        mask: list[bool] = []

        def put(tokens: list[int], *, learned: bool = False) -> None:
            ids.extend(tokens)
            mask.extend([learned] * len(tokens))

        encode = self.tokenizer.encode
        for index, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if index == 0 and role != "system":
                put(self._system_turn)
            if role == "assistant" and not message.get("tool_calls"):
                reasoning = _reasoning_of(message)
                put(self._assistant_head)
                head = [self._think[0], *encode(reasoning), self._think[1]]
                put(head, learned=bool(reasoning))
                put([*encode(content), self._end], learned=True)
            elif role in ("user", "system"):
                put([*(self._user_head if role == "user" else [self._start, *encode("system\n")]), *encode(content)])
                put([self._end])
            else:
                raise TextError(f"message {index}: role {role!r} with tools cannot be used for training yet")
        return ids, mask

    def _encode(self, text: str, nonce: str, inserted: Sequence[str]) -> list[int]:
        """Template text with special tokens, what it was given without."""
        ids: list[int] = []
        seen = 0
        for part in text.split(f"\ue000{nonce}:"):
            number, mark, rest = part.partition("\ue001") if seen else ("", "", part)
            if mark:
                ids += self.tokenizer.encode(inserted[int(number)])
            seen += 1
            ids += self.tokenizer.encode_with_special(rest)
        return ids


def recommended_system_prompt(today: date) -> str:
    """The system prompt that the publishers of the model recommend, with the date."""
    return (
        "You are MiMo, an AI assistant developed by Xiaomi.\n\n"
        f"Today's date: {today:%Y-%m-%d} {today:%A}. Your knowledge cutoff date is December 2024."
    )


def describe_tool(tool: Mapping[str, Any]) -> str:
    """One tool as the XML block of the system turn. Accepts OpenAI's shape, with or without the outer `function`."""
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TextError(f"tool {tool!r} has no name; give {{'name': ..., 'description': ..., 'parameters': ...}}")
    schema = function.get("parameters") or {}
    lines = ["<function>", f"<name>{function['name']}</name>"]
    if function.get("description"):
        lines.append(f"<description>{function['description']}</description>")
    lines.append("<parameters>")
    for name, about in (schema.get("properties") or {}).items():
        lines += ["<parameter>", f"<name>{name}</name>"]
        for key, value in about.items():
            shown = value if key in ("type", "description") and isinstance(value, str) else _json(value)
            lines.append(f"<{key}>{shown}</{key}>")
        lines.append("</parameter>")
    lines += [f"<{key}>{_json(value)}</{key}>" for key, value in schema.items() if key not in ("type", "properties")]
    return "\n".join([*lines, "</parameters>", "</function>"])


def _checked_message(message: Mapping[str, Any], index: int, hold: Any) -> dict[str, Any]:
    role = message.get("role")
    if role not in ROLES:
        raise TextError(f"message {index} has role {role!r}; {nearest(str(role), ROLES)}")
    if role == "system" and index:
        raise TextError(f"message {index} is a system message; only the first may be one")
    for key in message:
        if key not in MESSAGE_KEYS:
            raise TextError(f"message {index} has the unknown key {key!r}; {nearest(key, MESSAGE_KEYS)}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise TextError(f"message {index} has content of type {type(content).__name__}; expected text")
    calls = [_checked_call(call, index, hold) for call in message.get("tool_calls") or ()]
    if calls and role != "assistant":
        raise TextError(f"message {index} is of role {role!r} and has tool_calls; only the assistant calls tools")
    return {"role": role, "content": hold(content), "reasoning": hold(_reasoning_of(message)), "tool_calls": calls}


def _checked_call(call: Mapping[str, Any], index: int, hold: Any) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise TextError(f"message {index}: tool arguments are not JSON: {error}") from error
    if not isinstance(function.get("name"), str) or not isinstance(arguments, Mapping):
        raise TextError(f"message {index}: a tool call needs a name and an object of arguments")
    pairs = [(hold(key), hold(value if isinstance(value, str) else _json(value))) for key, value in arguments.items()]
    return {"name": hold(function["name"]), "arguments": pairs}


def _reasoning_of(message: Mapping[str, Any]) -> str:
    return message.get("reasoning_content") or message.get("reasoning") or ""


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
