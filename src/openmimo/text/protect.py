"""Text from outside while a template handles it: the template sees a placeholder, never the text.

After rendering, each placeholder marks a stretch in which no special token is recognised. A `Protected`
string still answers questions (`in`, `startswith`, `length`) and cuts (`strip`, `split`) by its true text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any, SupportsIndex, cast

from openmimo.errors import TextError


class Vault:
    """Keeps the true texts of one rendering.

    `sources` says for each text where it came from, so that a template that drops a message is noticed.
    """

    def __init__(self) -> None:
        # Unguessable, so that no text can contain a placeholder.
        self._nonce = secrets.token_hex(12)
        self._pattern = re.compile(f"q{self._nonce}n([0-9]+)z")
        parts = (self._nonce[start : start + 12] for start in range(13))
        self._remains = re.compile("|".join(parts), re.IGNORECASE)
        self._texts: list[str] = []
        self._sources: list[str | None] = []

    @property
    def num_characters(self) -> int:
        """The length of all texts together."""
        return sum(map(len, self._texts))

    @property
    def num_texts(self) -> int:
        """How many texts are kept."""
        return len(self._texts)

    def protect(self, text: str, source: str | None = None) -> Protected:
        """A placeholder for `text`."""
        number = len(self._texts)
        self._texts.append(text)
        self._sources.append(source)
        return Protected.make(self, f"q{self._nonce}n{number}z", text, source)

    def protect_all(self, value: Any) -> Any:
        """`value` with every text inside protected, keys included."""
        if isinstance(value, str):
            return self.protect(value)
        if isinstance(value, Mapping):
            return {self.protect_all(key): self.protect_all(item) for key, item in cast(Any, value).items()}
        if isinstance(value, list | tuple):
            return [self.protect_all(item) for item in cast(Any, value)]
        return value

    def restore(self, value: Any) -> Any:
        """`value` with every placeholder replaced by its text."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: self._texts[int(found[1])], str(value))
        if isinstance(value, Mapping):
            return {self.restore(key): self.restore(item) for key, item in cast(Any, value).items()}
        if isinstance(value, list | tuple):
            return [self.restore(item) for item in cast(Any, value)]
        return value

    def to_json(self, value: Any, indent: int | None = None) -> Protected:
        """JSON of the true value, itself protected: the `tojson` filter."""
        return self.protect(json.dumps(self.restore(value), ensure_ascii=False, indent=indent))

    def stretches(self, rendered: str) -> tuple[list[tuple[str, bool]], set[str]]:
        """`rendered` as (text, written by the template?) in order, and the sources that appear in it.

        Raises: TextError if the template changed a placeholder.
        """
        stretches: list[tuple[str, bool]] = []
        seen: set[str] = set()
        for place, piece in enumerate(self._pattern.split(rendered)):
            if place % 2 == 0:
                if self._remains.search(piece):
                    raise TextError("the chat template changes message text; expected it to insert text as it is")
                stretches.append((piece, True))
            else:
                number = int(piece)
                stretches.append((self._texts[number], False))
                source = self._sources[number]
                seen.update(() if source is None else (source,))
        return stretches, seen


class Protected(str):
    """A placeholder that behaves like its text where templates look at or cut text."""

    _vault: Vault
    _text: str
    _source: str | None

    @classmethod
    def make(cls, vault: Vault, placeholder: str, text: str, source: str | None) -> Protected:
        """The placeholder of `vault` for `text`."""
        made = cls(placeholder)
        made._vault, made._text, made._source = vault, text, source
        return made

    def _derived(self, text: str) -> Protected:
        return self._vault.protect(text, self._source)

    def __len__(self) -> int:
        return len(self._text)

    def __eq__(self, other: object) -> bool:
        return self._text == _true(other)

    def __ne__(self, other: object) -> bool:
        return self._text != _true(other)

    def __hash__(self) -> int:
        return hash(self._text)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and _true(key) in self._text

    def __getitem__(self, key: SupportsIndex | slice) -> Protected:
        return self._derived(self._text[key])

    def startswith(self, prefix: Any, *bounds: Any) -> bool:
        return self._text.startswith(_true(prefix), *bounds)

    def endswith(self, suffix: Any, *bounds: Any) -> bool:
        return self._text.endswith(_true(suffix), *bounds)

    def find(self, sub: str, *bounds: Any) -> int:
        return self._text.find(_true(sub), *bounds)

    def count(self, sub: str, *bounds: Any) -> int:
        return self._text.count(_true(sub), *bounds)

    def strip(self, chars: str | None = None) -> Protected:
        return self._derived(self._text.strip(_true(chars)))

    def lstrip(self, chars: str | None = None) -> Protected:
        return self._derived(self._text.lstrip(_true(chars)))

    def rstrip(self, chars: str | None = None) -> Protected:
        return self._derived(self._text.rstrip(_true(chars)))

    def removeprefix(self, prefix: str) -> Protected:
        return self._derived(self._text.removeprefix(_true(prefix)))

    def removesuffix(self, suffix: str) -> Protected:
        return self._derived(self._text.removesuffix(_true(suffix)))

    def lower(self) -> Protected:
        return self._derived(self._text.lower())

    def upper(self) -> Protected:
        return self._derived(self._text.upper())

    def capitalize(self) -> Protected:
        return self._derived(self._text.capitalize())

    def title(self) -> Protected:
        return self._derived(self._text.title())

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Protected:
        return self._derived(self._text.replace(_true(old), _true(new), count))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        return [self._derived(part) for part in self._text.split(_true(sep), maxsplit)]

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        return [self._derived(part) for part in self._text.rsplit(_true(sep), maxsplit)]

    def splitlines(self, keepends: bool = False) -> list[Any]:
        return [self._derived(part) for part in self._text.splitlines(keepends)]


def _true(value: Any) -> Any:
    """The true text of a placeholder, anything else unchanged."""
    return value._text if isinstance(value, Protected) else value  # pyright: ignore[reportPrivateUsage]
