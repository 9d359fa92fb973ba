"""The grammar of one tool call, read as far as its text has arrived.

`<tool_call>` `<function=NAME>` (`<parameter=KEY>` VALUE `</parameter>`)* `</function>` `</tool_call>`, with
white space allowed between the tags. A value is taken as it stands, with nothing trimmed or unescaped. It ends
at the first `</parameter>` that is followed by another parameter or by `</function>`, so that it may hold
markup itself.
"""

from __future__ import annotations

import re
from enum import Enum

OPEN = "<tool_call>"
THINK_END = "</think>"
SPACE = " \t\r\n"
MAX_NAME_CHARACTERS = 256
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
CLOSE = "</tool_call>"
_NAME = re.compile(rf"([^<>\r\n]{{1,{MAX_NAME_CHARACTERS}}})>")
_PARTIAL_NAME = re.compile(rf"[^<>\r\n]{{0,{MAX_NAME_CHARACTERS}}}\Z")


class Verdict(Enum):
    """What is known about a block so far."""

    WAIT = "more text is needed"
    DONE = "a complete call"
    FAILED = "not a call: ordinary text"


class ToolBlock:
    """One block being read. `text` is always the whole text from `<tool_call>` on.

    A block that began inside a think block fails at `</think>`: the model was only talking about calls.
    After DONE, `name`, `parameters` and `end` (where the block ends in the text) are set.
    """

    def __init__(self, *, in_thinking: bool) -> None:
        self.name = ""
        self.parameters: list[tuple[str, str]] = []
        self.end = len(OPEN)
        self._in_thinking = in_thinking
        self._step = self._read_function
        self._key = ""
        self._scan = 0

    def advance(self, text: str, *, final: bool) -> Verdict:
        """Read on. `final` says that no more text will come; a call that lacks only its last tag counts then."""
        while True:
            verdict = self._step(text)
            if verdict is Verdict.WAIT and final:
                if self._step != self._read_close:
                    return Verdict.FAILED
                self.end = len(text)
                return Verdict.DONE
            if verdict is not None:
                return verdict

    @property
    def has_begun(self) -> bool:
        """Whether the function's first parameter, or its end, has been seen."""
        return bool(self.parameters) or self._step in (self._read_value, self._read_close)

    @property
    def has_ended(self) -> bool:
        """Whether only the last tag is missing."""
        return self._step == self._read_close

    def open_value(self, text: str) -> tuple[str, str] | None:
        """The parameter that is being written, with as much of its value as is sure; None between parameters."""
        if self._step != self._read_value:
            return None
        found = text.find(_PARAMETER_END, self._scan)
        return self._key, text[self.end : found if found >= 0 else len(text) - unfinished_tag(text, _PARAMETER_END)]

    def _read_function(self, text: str) -> Verdict | None:
        start = _skip_space(text, self.end)
        if not text.startswith(_FUNCTION, start):
            return _wait_for(text, start, _FUNCTION)
        name = _NAME.match(text, start + len(_FUNCTION))
        if name is None:
            return _wait_for_name(text, start + len(_FUNCTION))
        self.name, self.end = name[1], name.end()
        self._step = self._read_tag
        return None

    def _read_tag(self, text: str) -> Verdict | None:
        start = _skip_space(text, self.end)
        if text.startswith(_FUNCTION_END, start):
            self.end = start + len(_FUNCTION_END)
            self._step = self._read_close
            return None
        if not text.startswith(_PARAMETER, start):
            return _wait_for(text, start, _PARAMETER, _FUNCTION_END)
        key = _NAME.match(text, start + len(_PARAMETER))
        if key is None:
            return _wait_for_name(text, start + len(_PARAMETER))
        self._key, self.end, self._scan = key[1], key.end(), key.end()
        self._step = self._read_value
        return None

    def _read_value(self, text: str) -> Verdict | None:
        found = text.find(_PARAMETER_END, self._scan)
        if self._in_thinking and text.find(THINK_END, self._scan, None if found < 0 else found) >= 0:
            return Verdict.FAILED
        if found < 0:
            # Either tag may have arrived in part.
            self._scan = max(self._scan, len(text) - len(_PARAMETER_END))
            return Verdict.WAIT
        after = _skip_space(text, found + len(_PARAMETER_END))
        if text.startswith((_PARAMETER, _FUNCTION_END), after):
            self.parameters.append((self._key, text[self.end : found]))
            self.end = after
            self._step = self._read_tag
            return None
        if _wait_for(text, after, _PARAMETER, _FUNCTION_END) is Verdict.WAIT:
            self._scan = found
            return Verdict.WAIT
        self._scan = found + 1
        return None

    def _read_close(self, text: str) -> Verdict | None:
        start = _skip_space(text, self.end)
        if text.startswith(CLOSE, start):
            self.end = start + len(CLOSE)
            return Verdict.DONE
        return _wait_for(text, start, CLOSE)


def unfinished_tag(text: str, *tags: str) -> int:
    """How many characters at the end of `text` may be the start of one of `tags`."""
    longest = min(len(text), max(map(len, tags)) - 1)
    for length in range(longest, 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return length
    return 0


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start] in SPACE:
        start += 1
    return start


def _wait_for(text: str, start: int, *tags: str) -> Verdict:
    rest = text[start : start + max(map(len, tags))]
    return Verdict.WAIT if any(tag.startswith(rest) for tag in tags) else Verdict.FAILED


def _wait_for_name(text: str, start: int) -> Verdict:
    return Verdict.WAIT if _PARTIAL_NAME.match(text, start) else Verdict.FAILED
