"""The byte-level alphabet and the split rule that MiMo's tokenizer shares with GPT-2 and Qwen2."""

from __future__ import annotations

# Contractions, words with one leading mark, SINGLE digits, marks, line breaks, other space.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte, in byte order.

    Source: the GPT-2 encoder: printable Latin-1 bytes stand for themselves, the rest follow from U+0100.
    """
    alphabet: dict[str, int] = {}
    next_stand_in = 0x100
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            alphabet[chr(byte)] = byte
        else:
            alphabet[chr(next_stand_in)] = byte
            next_stand_in += 1
    return alphabet


def piece_bytes(piece: str, alphabet: dict[str, int]) -> bytes:
    """The bytes that a vocabulary entry stands for; an entry outside the alphabet stands for its UTF-8."""
    try:
        return bytes([alphabet[character] for character in piece])
    except KeyError:
        return piece.encode()
