"""The incremental way from token ids back to text, and stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

INCOMPLETE = "\ufffd"
# Bytes that never become a character (a model gone astray) are shown after this many tokens.
MOST_PENDING = 32


class TextCodec(Protocol):
    """The part of `openmimo.text.Tokenizer` that the engine needs."""

    @property
    def eos_token_ids(self) -> Sequence[int]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str: ...


class Detokenizer:
    """Text of a growing token list, token by token, without ever showing half a character."""

    def __init__(self, codec: TextCodec | None) -> None:
        self.codec = codec
        self.pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes."""
        if self.codec is None:
            return ""
        self.pending.append(token)
        text = self.codec.decode(self.pending)
        if text.endswith(INCOMPLETE) and len(self.pending) < MOST_PENDING:
            return ""
        self.pending.clear()
        return text

    def flush(self) -> str:
        """The text of tokens still held back."""
        text = "" if self.codec is None or not self.pending else self.codec.decode(self.pending)
        self.pending.clear()
        return text


class AnswerText:
    """Finds stop texts in an answer, and gives out its text in pieces that no stop text can take back.

    Only an answer with stop texts is decoded as it grows; `push` is for those, `piece` for streams.
    """

    def __init__(self, codec: TextCodec | None, stop: tuple[str, ...]) -> None:
        self.codec, self.stop = codec, stop
        self.watches = bool(stop)
        self._watcher = Detokenizer(codec)
        self._longest = max(map(len, stop), default=0)
        self._text = ""
        self._end: int | None = None
        self.stopped_by: str | None = None
        self._stream = Detokenizer(codec)
        self._held = ""
        self._shown = 0

    def push(self, token: int) -> bool:
        """Add a token; True when a stop text is complete. The earliest place wins, then the longest text."""
        seen = max(0, len(self._text) - self._longest + 1)
        self._text += self._watcher.push(token)
        found = [(place, stop) for stop in self.stop if (place := self._text.find(stop, seen)) >= 0]
        if found:
            self._end, self.stopped_by = min(found, key=lambda each: (each[0], -len(each[1])))
        return bool(found)

    def piece(self, token: int | None) -> str:
        """The text that is safe to show after this token; None for a final stop token, which has no text."""
        self._held += self._stream.push(token) if token is not None else ""
        if not self.watches:
            text, self._held = self._held, ""
            return text
        safe = len(self._held) - max(_overlap(self._held, stop) for stop in self.stop)
        return self._show(safe)

    def flush(self) -> str:
        """What was held back, once the answer has ended."""
        self._held += self._stream.flush()
        return self._show(len(self._held))

    def final(self, ids: list[int]) -> str:
        """The whole answer's text, without its stop text."""
        if self.codec is None:
            return ""
        return self.codec.decode(ids) if self._end is None else self._text[: self._end]

    def _show(self, count: int) -> str:
        if self._end is not None:
            count = min(count, max(0, self._end - self._shown))
        text, self._held = self._held[:count], self._held[count:]
        self._shown += len(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
