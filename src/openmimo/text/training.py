"""Training a small tokenizer of MiMo's kind: same split, same alphabet, same added tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from openmimo.errors import TextError
from openmimo.text.byte_level import SPLIT_PATTERN, byte_alphabet
from openmimo.text.mimo_template import MIMO_TEMPLATE
from openmimo.text.tokenizer import END_OF_TEXT, TURN_END, TURN_START, Tokenizer

# Name, and whether it is special (left out by decode(..., skip_special=True)); as published.
ADDED_TOKENS = (
    (END_OF_TEXT, True),
    (TURN_START, True),
    (TURN_END, True),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<think>", False),
    ("</think>", False),
)
MIN_VOCAB_SIZE = 256 + len(ADDED_TOKENS)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE learned from `texts`; the added tokens take the last ids.

    The result has fewer than `vocab_size` tokens when the texts repeat too little to merge that often.
    Equal texts in equal order give an equal tokenizer.
    Raises: TextError if `vocab_size` cannot hold the bytes and the added tokens, or a text is not Unicode.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise TextError(f"vocab_size={vocab_size} is too small; expected at least {MIN_VOCAB_SIZE}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED_TOKENS),
        min_frequency=2,
        initial_alphabet=list(byte_alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_checked(texts), trainer)
    backend.add_tokens(
        [tokenizers.AddedToken(name, special=special, normalized=False) for name, special in ADDED_TOKENS]
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(json.loads(backend.to_str()), settings=settings, chat_template=MIMO_TEMPLATE)


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TextError(f"training text {number} is not valid Unicode: {error}") from error
        yield text
