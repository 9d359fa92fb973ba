"""Laws of the data path over random corpora, weights and cuts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openmimo.data import Batch, BatchLoader, Document, Mixture, Packer, TextSource

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class CharTokenizer:
    """One token per character, so that blocks cannot change the tokens."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) + 1 for character in text]

    def special(self, name: str) -> int:
        return 0


class LengthSource:
    """Documents of given lengths, in turn."""

    def __init__(self, name: str, lengths: list[int]) -> None:
        self.name = name
        self._lengths = lengths
        self._made = 0

    def next_document(self) -> Document:
        length = self._lengths[self._made % len(self._lengths)]
        self._made += 1
        ids = (np.arange(length) + 1000 * self._made).astype(np.int32)
        return Document(ids, ids % 3 > 0, self.name)

    def state(self) -> dict[str, Any]:
        return {"made": self._made}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._made = state["made"]

    def close(self) -> None:
        pass


texts = st.lists(st.text(st.characters(codec="utf-8"), max_size=60), min_size=1, max_size=5)


def write_corpus(folder: Path, contents: list[str]) -> None:
    for number, text in enumerate(contents):
        (folder / f"{number}.txt").write_bytes(text.encode())
    lines = [json.dumps({"text": f"{text}!"}, ensure_ascii=number % 2 > 0) for number, text in enumerate(contents)]
    (folder / "lines.jsonl").write_text("\n".join(lines))


@quick
@given(texts, st.integers(2, 20), st.integers(5, 40))
def test_every_token_comes_out_once_per_epoch(contents: list[str], window: int, block: int) -> None:
    """Catches tokens lost or repeated at the edges of windows, blocks, records, files and epochs."""
    expected = sorted(
        [text.encode().removeprefix(b"\xef\xbb\xbf").decode() for text in contents if text.removeprefix("\ufeff")]
        + [f"{text}!" for text in contents]
    )
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("openmimo.data.readers.BLOCK_BYTES", block)
        write_corpus(Path(name), contents)
        with closing(TextSource([name], seed=1, tokenizer=CharTokenizer(), max_document_tokens=window)) as source:
            epochs: list[list[int]] = [[], [], []]
            while True:
                document = source.next_document()
                epoch = source.state()["epoch"]
                if epoch == 3:
                    break
                assert 0 < len(document) <= window
                epochs[epoch] += document.token_ids.tolist()
    for ids in epochs:
        assert sorted(split_at_end(ids)) == expected


def split_at_end(ids: list[int]) -> list[str]:
    pieces = [""]
    for token in ids:
        if token:
            pieces[-1] += chr(token - 1)
        else:
            pieces.append("")
    assert pieces.pop() == ""
    return pieces


def batches_of(loader: BatchLoader, count: int) -> list[Batch]:
    with loader:
        return [next(loader) for _ in range(count)]


def assert_equal(left: Batch, right: Batch) -> None:
    assert left.token_ids_BT.equal(right.token_ids_BT)
    assert left.document_ids_BT.equal(right.document_ids_BT)
    assert left.position_ids_BT.equal(right.position_ids_BT)
    assert left.loss_mask_BT.equal(right.loss_mask_BT)
    assert left.cursor == right.cursor


@quick
@given(
    contents=texts,
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    mode=st.sampled_from(["split", "whole"]),
    prefetch=st.integers(1, 4),
    cut=st.integers(0, 11),
    cache_bytes=st.sampled_from([0, 3_000, 1 << 20]),
)
def test_resume_at_any_batch_is_bit_identical(
    contents: list[str], lengths: list[int], mode: str, prefetch: int, cut: int, cache_bytes: int
) -> None:
    """Catches whatever a cursor forgets: prefetched batches, leftovers, cut files, the mixture's counts."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("openmimo.data.readers.BLOCK_BYTES", 16)
        write_corpus(Path(name), contents)

        def loader(cursor: Mapping[str, Any] | None, depth: int) -> BatchLoader:
            text = TextSource([name], seed=1, tokenizer=CharTokenizer(), max_document_tokens=9, cache_bytes=cache_bytes)
            packer = Packer(24, 2, mode=mode, waiting_documents=5)
            return BatchLoader(
                Mixture([text, LengthSource("lengths", lengths)], [1, 2]), packer, cursor=cursor, prefetch=depth
            )

        straight = batches_of(loader(None, prefetch), 12)
        saved = None if cut == 0 else json.loads(json.dumps(straight[cut - 1].cursor))
        resumed = batches_of(loader(saved, 5 - prefetch), 12 - cut)
    for left, right in zip(straight[cut:], resumed, strict=True):
        assert_equal(left, right)


@quick
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 20)), min_size=1, max_size=5
    ).filter(lambda sources: any(weight for _, weight in sources))
)
def test_mixture_stays_within_one_document_of_its_quotas(sources: list[tuple[list[int], int]]) -> None:
    """Catches counting documents for tokens, and weights that are not normalised."""
    mixture = Mixture(
        [LengthSource(str(number), lengths) for number, (lengths, _) in enumerate(sources)],
        [weight for _, weight in sources],
    )
    shares = [weight / sum(weight for _, weight in sources) for _, weight in sources]
    longest = max(max(lengths) for lengths, weight in sources if weight)
    counts = [0] * len(sources)
    for _ in range(200):
        document = mixture.next_document()
        counts[int(document.source)] += len(document)
        for count, share, (lengths, _) in zip(counts, shares, sources, strict=True):
            assert count - share * sum(counts) <= max(lengths)
            assert count - share * sum(counts) >= -longest * (len(sources) - 1)


@quick
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    mode=st.sampled_from(["split", "whole"]),
    sequence_length=st.integers(2, 30),
    batch_sequences=st.integers(1, 4),
)
def test_packed_rows_keep_the_contract(
    lengths: list[int], mode: str, sequence_length: int, batch_sequences: int
) -> None:
    """Each row, read back token by token: whole runs, restarting positions, targets only behind a first token."""
    source = LengthSource("s", lengths)
    taken: list[Document] = []

    def next_document() -> Document:
        taken.append(source.next_document())
        return taken[-1]

    packer = Packer(sequence_length, batch_sequences, mode=mode, waiting_documents=4)
    given_out: list[int] = []
    for _ in range(3):
        batch = packer.next_batch(next_document)
        assert batch.token_ids_BT.shape == (batch_sequences, sequence_length)
        assert batch.num_tokens == int((batch.document_ids_BT >= 0).sum())
        assert batch.num_targets == int(batch.loss_mask_BT.sum())
        for ids, documents, positions, targets in zip(
            batch.token_ids_BT.tolist(),
            batch.document_ids_BT.tolist(),
            batch.position_ids_BT.tolist(),
            batch.loss_mask_BT.tolist(),
            strict=True,
        ):
            last = -1
            for place, (token, document, position, target) in enumerate(
                zip(ids, documents, positions, targets, strict=True)
            ):
                if document == -1:
                    assert (token, position, target) == (0, 0, False)
                    assert set(documents[place:]) == {-1}
                    assert mode == "whole"
                    continue
                starts = document != last
                assert document == last + starts
                assert position == (0 if starts else positions[place - 1] + 1)
                assert starts or token == ids[place - 1] + 1
                assert target == (not starts and token % 3 > 0)
                given_out.append(token)
                last = document
    everything = [token for document in taken for token in document.token_ids[: _limit(mode, sequence_length)].tolist()]
    if mode == "split":
        assert given_out == everything[: len(given_out)]
    else:
        assert set(given_out) <= set(everything)
        assert len(set(given_out)) == len(given_out)


def _limit(mode: str, sequence_length: int) -> int | None:
    return sequence_length if mode == "whole" else None
