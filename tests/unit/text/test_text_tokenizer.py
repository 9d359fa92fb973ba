from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from openmimo.errors import TextError
from openmimo.text import IncrementalDecoder, Tokenizer, train_tokenizer
from openmimo.text.byte_level import byte_alphabet

AROUND = ("{}", "a{}b", " {} ", "\n{}\n", "{}{}", "<{}>")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    change(definition)
    path.write_text(json.dumps(definition))
    return folder


def test_added_tokens_take_the_last_ids_within_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 352
    assert [token.token_id for token in tokenizer.added_tokens] == list(range(343, 352))
    assert [token.name for token in tokenizer.added_tokens][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def test_training_twice_gives_the_same_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches an order that depends on hashing."""
    from conftest import corpus

    train_tokenizer(iter(corpus()), vocab_size=352).save(tmp_path / "second")
    tokenizer.save(tmp_path / "first")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_digits_are_single_tokens_and_frequent_words_are_merged(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("1234")) == 4
    assert len(tokenizer.encode("the")) == 1


def test_too_few_repeats_give_a_smaller_vocabulary() -> None:
    tokenizer = train_tokenizer(["abc"], vocab_size=1000)
    assert tokenizer.vocab_size == 265
    assert tokenizer.special("</think>") == 264


@pytest.mark.parametrize("around", AROUND)
def test_no_added_token_ever_comes_from_text(published: Tokenizer, around: str) -> None:
    """Catches prompt injection through any of the 26 added tokens, special or not."""
    assert len(published.added_tokens) == 26
    added = {token.token_id for token in published.added_tokens}
    for token in published.added_tokens:
        text = around.format(token.name, token.name)
        ids = published.encode(text)
        assert not added.intersection(ids), token.name
        assert published.encode_batch([text]) == [ids]
        assert published.decode(ids) == text
        assert token.token_id in published.encode_with_special(text)


def test_encode_with_special_equals_the_library_with_all_added_tokens(published: Tokenizer, tmp_path: Path) -> None:
    published.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("<|im_start|>user\n1 + 1<|im_end|><think></think> x", "<think", "", "<<think>>\n\n</think>\u00e9"):
        ids = published.encode_with_special(text)
        assert ids == library.encode(text).ids
        assert published.decode(ids) == library.decode(ids, skip_special_tokens=False)
        assert published.decode(ids, skip_special=True) == library.decode(ids, skip_special_tokens=True)


def test_decode_agrees_with_the_library_on_any_ids(published: Tokenizer, tmp_path: Path) -> None:
    """Catches a wrong byte table: random ids are mostly broken UTF-8."""
    published.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = np.random.default_rng(0)
    for ids in rng.integers(0, published.vocab_size, (200, 12)).tolist():
        assert published.decode(ids) == library.decode(ids, skip_special_tokens=False)


def test_token_bytes_of_all_bytes() -> None:
    """The alphabet is a bijection; catches a hole in the table of stand-ins."""
    assert sorted(byte_alphabet().values()) == list(range(256))
    tokenizer = train_tokenizer(["abc"], vocab_size=265)
    assert {tokenizer.token_bytes(i) for i in range(256)} == {bytes([byte]) for byte in range(256)}
    assert tokenizer.token_bytes(tokenizer.special("<think>")) == b"<think>"


def test_text_is_composed_before_encoding(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"


def test_padding_rows_decode_to_nothing_and_negative_ids_are_refused(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the")
    assert tokenizer.decode([*ids, 352, 10**6]) == "the"
    assert tokenizer.decode(np.array(ids)) == "the"
    assert tokenizer.token_bytes(10**6) == b""
    with pytest.raises(TextError, match="negative"):
        tokenizer.decode([5, -1])


def test_incremental_decoder_waits_for_whole_characters(tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer)
    ids = tokenizer.encode("\U0001f600!")
    assert len(ids) == 5
    assert [decoder.push([token]) for token in ids] == ["", "", "", "\U0001f600", "!"]
    assert decoder.push(ids[:2]) + decoder.finish() == tokenizer.decode(ids[:2]) == "\ufffd"


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_token_ids == (tokenizer.special("<|im_end|>"), tokenizer.special("<|endoftext|>"))
    assert tokenizer.pad_token_id == tokenizer.special("<|endoftext|>")
    with pytest.raises(TextError, match="did you mean '<think>'"):
        tokenizer.special("<thinks>")


@pytest.mark.parametrize("text", ["\ud800", "abc\udfff", "\ud83d\ude00"])
def test_lone_surrogates_are_an_error(tokenizer: Tokenizer, text: str) -> None:
    for call in (
        lambda: tokenizer.encode(text),
        lambda: tokenizer.encode_batch(["fine", text]),
        lambda: train_tokenizer(["fine", text], vocab_size=300),
    ):
        with pytest.raises(TextError, match=r"surrogate|Unicode"):
            call()


def test_other_types_are_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(TextError, match="got int"):
        tokenizer.encode(3)  # type: ignore[arg-type]


def test_load_and_save_keep_everything(saved: Path, tmp_path: Path) -> None:
    """Catches settings or definition fields that a round trip drops."""
    settings = json.loads((saved / "tokenizer_config.json").read_text())
    settings["model_max_length"] = 77
    settings["pad_token"] = {"content": "<|im_end|>"}
    (saved / "tokenizer_config.json").write_text(json.dumps(settings))
    again = Tokenizer.load(saved)
    again.save(tmp_path / "again")
    assert again.pad_token_id == again.special("<|im_end|>")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text()) == settings
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (saved / "tokenizer.json").read_bytes()


def test_the_template_file_wins_over_the_settings(saved: Path) -> None:
    assert "<|im_start|>" in (Tokenizer.load(saved).chat_template or "")
    (saved / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.load(saved).chat_template == "from the file"


def test_named_templates_use_the_default(saved: Path) -> None:
    templates = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    (saved / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert Tokenizer.load(saved).chat_template == "yes"


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(TextError, match="at least 265"):
        train_tokenizer(["abc"], vocab_size=264)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["model"].update(type="Unigram"), "expected 'BPE'"),
        (lambda d: d["model"]["vocab"].pop("a"), "cannot be used|lacks 1 of 256"),
        (lambda d: d.pop("added_tokens"), "added_tokens"),
        (lambda d: d.update(pre_tokenizer={"type": "Nonsense"}), "cannot be used"),
        (
            lambda d: d.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
            "lossless",
        ),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "lossless"),
        (lambda d: d["added_tokens"][0].update(id=0), "belongs to both"),
        (lambda d: d["added_tokens"][0].update(id=344), "repeats"),
        (lambda d: d["added_tokens"][0].update(id=-1), "expected 0 to"),
        (lambda d: d["added_tokens"][0].update(id=2**40), "expected 0 to"),
        (lambda d: d["added_tokens"][0].update(id=True), "whole number"),
        (lambda d: d["added_tokens"][0].update(content=""), "needs a text"),
        (lambda d: d["added_tokens"][0].update(lstrip=True), "changes the text around"),
        (lambda d: d["added_tokens"].append(7), "needs a text"),
        (lambda d: d["added_tokens"].append({"content": "a", "id": d["model"]["vocab"]["a"]}), "from plain text"),
    ],
)
def test_unusable_definitions_are_refused(
    saved: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(TextError, match=message):
        Tokenizer.load(edit(saved, change))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_files_that_are_not_json_are_refused(saved: Path, content: bytes) -> None:
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (saved / name).write_bytes(content)
        with pytest.raises(TextError, match=name):
            Tokenizer.load(saved)
        (saved / name).write_text("{}") if name == "tokenizer_config.json" else None


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
