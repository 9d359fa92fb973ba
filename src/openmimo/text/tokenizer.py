"""The tokenizer: byte-level BPE whose added tokens can never come out of ordinary text.

The BPE backend is built without the added tokens, so `encode` has no way to produce one; they are
found by `encode_with_special` alone, which is for text that we wrote ourselves. Decoding joins bytes.
"""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tokenizers

from openmimo.errors import TextError, nearest
from openmimo.text.byte_level import byte_alphabet, piece_bytes
from openmimo.text.files import read_json, read_text, write_json

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
EOS_TOKENS = (TURN_END, END_OF_TEXT)
MAX_TOKEN_ID = 2**24
# Encoded and decoded once at load: letters, digits, space, line break, two, three and four bytes.
PROBE = "Ok 12, don't\n\n  \u00e9 \u6f22\u5b57 \U0001f600"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beside the BPE vocabulary. `special` ones can be left out when decoding."""

    name: str
    token_id: int
    special: bool


class Tokenizer:
    """Text to token ids and back.

    `definition` is the content of `tokenizer.json`, `settings` of `tokenizer_config.json`; both are
    written back by `save` as they came. `chat_template` is the folder's Jinja template, if it has one.
    Raises: TextError for a definition that is not byte-level BPE of the published kind.
    """

    def __init__(self, definition: Json, *, settings: Json | None = None, chat_template: str | None = None) -> None:
        self._definition = definition
        self._settings = dict(settings or {})
        self.chat_template = chat_template
        self._added = _added_tokens(definition)
        self._backend = _plain_backend(definition)
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        self._bytes = _byte_table(vocabulary, self._added)
        self._special_ids = frozenset(token.token_id for token in self._added.values() if token.special)
        names = sorted(self._added, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self._check()

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder. Raises: TextError if it is missing or unusable."""
        folder = Path(folder)
        definition = read_json(folder / "tokenizer.json")
        settings_file = folder / "tokenizer_config.json"
        settings = read_json(settings_file) if settings_file.is_file() else {}
        template_file = folder / "chat_template.jinja"
        template = settings.pop("chat_template", None)
        if template_file.is_file():
            template = read_text(template_file)
        elif isinstance(template, list):
            template = _default_template(cast(list[Any], template))
        if template is not None and not isinstance(template, str):
            raise TextError(f"{settings_file}: chat_template must be text, got {type(template).__name__}")
        return cls(definition, settings=settings, chat_template=template)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` (with the template); transformers loads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = dict(self._settings)
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        write_json(folder / "tokenizer.json", self._definition, indent=None)
        write_json(folder / "tokenizer_config.json", settings, indent=2)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` (NFC first). Never an added token, whatever the text says.

        Raises: TextError if the text holds a lone surrogate.   Cost: about 5 million characters a second.
        """
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise _unusable_text(text) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on several threads. Raises: TextError as `encode` does."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:
            bad = next((text for text in texts if not _is_encodable(text)), "")
            raise _unusable_text(bad) from error
        return [encoding.ids for encoding in encodings]

    def encode_with_special(self, text: str) -> list[int]:
        """Like `encode`, but names of added tokens in `text` become those tokens: for trusted text only."""
        ids: list[int] = []
        for piece in self.split_special(text):
            ids += self.encode(piece) if isinstance(piece, str) else [piece.token_id]
        return ids

    def split_special(self, text: str) -> list[str | AddedToken]:
        """`text` cut at the names of added tokens; empty pieces are left out."""
        if self._splitter is None:
            return [text] if text else []
        pieces = self._splitter.split(text)
        return [self._added[piece] if place % 2 else piece for place, piece in enumerate(pieces) if piece]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Ids at or above `vocab_size` (padding rows of a model) stand for nothing, as in transformers.
        Raises: TextError for a negative id.
        """
        return b"".join(self._pieces(ids, skip_special)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for. Raises: TextError for a negative id."""
        return self._pieces([token_id], skip_special=False)[0]

    def special(self, name: str) -> int:
        """The id of an added token such as `<|im_end|>`. Raises: TextError for another name."""
        if name not in self._added:
            raise TextError(f"the tokenizer has no added token {name!r}; {nearest(name, self._added)}")
        return self._added[name].token_id

    @property
    def definition(self) -> Json:
        """The content of `tokenizer.json`; not to be changed."""
        return self._definition

    @property
    def added_tokens(self) -> tuple[AddedToken, ...]:
        """All added tokens in the order of their ids."""
        return tuple(sorted(self._added.values(), key=lambda token: token.token_id))

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return len(self._bytes)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a turn or a document."""
        return tuple(self._added[name].token_id for name in EOS_TOKENS if name in self._added)

    @property
    def pad_token_id(self) -> int:
        """The id for padding: the folder's choice, or end of text."""
        chosen = self._settings.get("pad_token")
        name = chosen.get("content") if isinstance(chosen, dict) else chosen
        return self.special(name if isinstance(name, str) else END_OF_TEXT)

    def _pieces(self, ids: Sequence[int], skip_special: bool) -> list[bytes]:
        if len(ids) and min(ids) < 0:
            raise TextError(f"token id {min(ids)} is negative; ids start at 0")
        table, skipped = self._bytes, self._special_ids if skip_special else ()
        return [table[token] if token < len(table) and token not in skipped else b"" for token in ids]

    def _check(self) -> None:
        """Refuse what would lose text or let text become an added token."""
        added = {token.token_id for token in self._added.values()}
        for name in self._added:
            if added.intersection(self.encode(name)):
                raise TextError(f"the BPE vocabulary produces the added token {name!r} from plain text")
        back = self.decode(self.encode(PROBE))
        if back != unicodedata.normalize("NFC", PROBE):
            raise TextError(f"the tokenizer turns {PROBE!r} into {back!r}; expected lossless byte-level BPE")


class IncrementalDecoder:
    """Decodes tokens as they come: the pieces join to what `Tokenizer.decode` gives for all ids at once."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """The characters that are complete now; bytes of an unfinished one wait."""
        return self._decoder.decode(b"".join(self._tokenizer._pieces(ids, self._skip_special)))  # pyright: ignore[reportPrivateUsage]

    def finish(self) -> str:
        """U+FFFD if bytes of an unfinished character are left, else nothing."""
        return self._decoder.decode(b"", True)


def _added_tokens(definition: Json) -> dict[str, AddedToken]:
    entries = definition.get("added_tokens")
    if not isinstance(entries, list):
        raise TextError("tokenizer.json has no list `added_tokens`; expected the published layout")
    added: dict[str, AddedToken] = {}
    for entry in cast(list[Any], entries):
        fields = cast(Json, entry) if isinstance(entry, dict) else {}
        name, token_id = fields.get("content"), fields.get("id")
        if not isinstance(name, str) or not name or isinstance(token_id, bool) or not isinstance(token_id, int):
            raise TextError(f"added token {str(entry)[:100]!r} needs a text `content` and a whole number `id`")
        if not 0 <= token_id <= MAX_TOKEN_ID:
            raise TextError(f"added token {name!r} has id {token_id}; expected 0 to {MAX_TOKEN_ID}")
        if any(fields.get(flag) for flag in ("lstrip", "rstrip", "single_word", "normalized")):
            raise TextError(f"added token {name!r} changes the text around it; expected plain added tokens")
        added[name] = AddedToken(name, token_id, bool(fields.get("special")))
    if len({token.token_id for token in added.values()}) != len(entries):
        raise TextError("added_tokens repeats a name or an id; each must be its own")
    return added


def _plain_backend(definition: Json) -> tokenizers.Tokenizer:
    model = definition.get("model")
    kind = cast(Json, model).get("type") if isinstance(model, dict) else None
    if kind != "BPE":
        raise TextError(f"tokenizer.json has a model of type {kind!r}; expected 'BPE'")
    plain = {**definition, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # the library raises bare Exception for every malformed definition
        raise TextError(f"tokenizer.json cannot be used: {error}; expected byte-level BPE") from error


def _byte_table(vocabulary: dict[str, int], added: dict[str, AddedToken]) -> list[bytes]:
    alphabet = byte_alphabet()
    missing = [character for character in alphabet if character not in vocabulary]
    if missing:
        raise TextError(f"the vocabulary lacks {len(missing)} of 256 byte tokens, so text would be lost")
    owners = {token_id: piece for piece, token_id in vocabulary.items()}
    for token in added.values():
        if owners.get(token.token_id, token.name) != token.name:
            raise TextError(f"id {token.token_id} belongs to both {token.name!r} and {owners[token.token_id]!r}")
    highest = max(*owners, *(token.token_id for token in added.values()))
    if highest > MAX_TOKEN_ID:
        raise TextError(f"the vocabulary has id {highest}; expected at most {MAX_TOKEN_ID}")
    table = [b""] * (highest + 1)
    for piece, token_id in vocabulary.items():
        table[token_id] = piece_bytes(piece, alphabet)
    for token in added.values():
        table[token.token_id] = token.name.encode()
    return table


def _default_template(templates: Iterable[Any]) -> str | None:
    for entry in templates:
        if isinstance(entry, dict) and cast(Json, entry).get("name") == "default":
            return cast(Json, entry).get("template")
    return None


def _is_encodable(text: object) -> bool:
    return isinstance(text, str) and not any("\ud800" <= character <= "\udfff" for character in text)


def _unusable_text(text: object) -> TextError:
    if not isinstance(text, str):
        return TextError(f"expected text, got {type(text).__name__}; pass a str")
    place = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), 0)
    return TextError(f"character {place} is the lone surrogate {text[place : place + 1]!r}; pass valid Unicode text")
