"""Text files to documents: nothing lost or repeated, clear errors for whatever cannot be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from data_fakes import ASSISTANT, END, USER, ByteTokenizer, RoleTemplate

from openmimo.data import Document, TextSource
from openmimo.data import readers as readers_module
from openmimo.data.files import find_files, shuffled
from openmimo.data.sources import CACHE_ENTRY_BYTES
from openmimo.errors import DataError


def source_of(*paths: Path | str, seed: int = 0, **options: object) -> TextSource:
    options = {"tokenizer": ByteTokenizer(), "template": RoleTemplate(), **options}
    return TextSource(paths, seed=seed, **options)  # type: ignore[arg-type]


def one_epoch(source: TextSource) -> list[Document]:
    """All documents up to the first change of epoch."""
    documents: list[Document] = []
    with closing(source):
        while True:
            document = source.next_document()
            if source.state()["epoch"] == 1:
                return documents
            documents.append(document)


def text_of(documents: list[Document]) -> list[str]:
    """The texts between end-of-text tokens."""
    ids = [token for document in documents for token in document.token_ids.tolist()]
    texts: list[list[int]] = [[]]
    for token in ids:
        if token == END:
            texts.append([])
        else:
            texts[-1].append(token)
    assert texts.pop() == [], "the last text is not closed"
    return [bytes(text).decode() for text in texts]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("first file\n" * 5)
    (tmp_path / "deep" / "b.md").write_text("# second\r\nline é\n")
    (tmp_path / "deep" / "er" / "c.py").write_text("print('third')")
    (tmp_path / "deep" / "ignored.bin").write_bytes(b"\xff\xfe")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "d.txt").write_text("secret")
    return tmp_path


def test_one_epoch_holds_every_text_once_and_the_next_starts_over(corpus: Path) -> None:
    expected = sorted(
        path.read_bytes().decode() for path in (corpus / n for n in ("a.txt", "deep/b.md", "deep/er/c.py"))
    )
    source = source_of(corpus, max_document_tokens=7)
    documents = one_epoch(source)
    assert sorted(text_of(documents)) == expected
    assert max(map(len, documents)) == 7
    assert all(document.loss_mask.all() for document in documents)
    assert source.state()["epoch"] == 1


def test_order_depends_on_seed_and_epoch_only(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"{number:02d}")

    def epochs(seed: int) -> list[list[int]]:
        with closing(source_of(tmp_path, seed=seed)) as source:
            return [[int(bytes(source.next_document().token_ids[:2].tolist())) for _ in range(30)] for _ in range(2)]

    first, second = epochs(1)
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second
    assert epochs(1) == [first, second]
    assert epochs(2)[0] != first


def test_shuffle_is_pinned() -> None:
    """A changed hash would silently move every saved cursor to other data."""
    assert shuffled(10, 7, 3).tolist() == [7, 4, 2, 0, 5, 9, 6, 1, 8, 3]
    assert sorted(shuffled(1000, "x").tolist()) == list(range(1000))


def test_large_file_is_read_in_blocks_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a block that is cut inside a character, or lost or repeated at a block's edge."""
    monkeypatch.setattr(readers_module, "BLOCK_BYTES", 64)
    lines = "".join(f"line {number} " + "é€😀" * (number % 9) + "\n" for number in range(60))
    one_line = "é€😀x" * 100
    (tmp_path / "a.txt").write_text(lines)
    (tmp_path / "b.txt").write_text(one_line)
    (tmp_path / "c.txt").write_text("\n" * 64)
    documents = one_epoch(source_of(tmp_path, max_document_tokens=50))
    assert sorted(text_of(documents)) == sorted([lines, one_line, "\n" * 64])
    (read,) = {len(block) for block in blocks(tmp_path / "c.txt")}
    assert read == 64


def blocks(path: Path) -> Iterator[str]:
    with closing(readers_module.TextFile(path)) as file:
        position: int | None = 0
        while position is not None:
            record = file.read(position)
            yield record.text or ""
            position = record.next_position


def test_blocks_end_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block cut inside a word would be tokenised differently from the whole text."""
    monkeypatch.setattr(readers_module, "BLOCK_BYTES", 32)
    (tmp_path / "a.txt").write_text("some words here\n" * 10)
    assert all(block.endswith("\n") for block in blocks(tmp_path / "a.txt"))


def test_byte_order_mark_and_empty_files_leave_no_token(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "line"}\n\n{"text": ""}\n')
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert sorted(text_of(one_epoch(source_of(tmp_path)))) == ["line", "marked"]


def test_only_empty_files_are_an_error_not_an_endless_loop(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    with closing(source_of(tmp_path)) as source, pytest.raises(DataError, match="no text in 1 file"):
        source.next_document()


def test_json_lines_are_shuffled_and_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers_module, "SCAN_BYTES", 16)
    texts = [f"text {number}" for number in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    with closing(source_of(tmp_path)) as source:
        epochs = [text_of([source.next_document() for _ in range(50)]) for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(texts)
    assert epochs[0] != texts
    assert epochs[0] != epochs[1]


def test_messages_train_on_the_assistant_only_and_stay_whole(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with closing(source_of(tmp_path, assistant_only=True, max_document_tokens=4)) as source:
        document = source.next_document()
    assert document.token_ids.tolist() == [USER, *b"hi there", ASSISTANT, *b"yes"]
    assert document.loss_mask.tolist() == [False] * 10 + [True] * 3
    with closing(source_of(tmp_path)) as source:
        assert source.next_document().loss_mask.all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', "line 3: no key 'text' .* keys: body"),
        ("{broken", "line 3: no JSON"),
        ("[1, 2]", "line 3: a JSON list, expected an object"),
        ('{"text": 5}', "line 3: no key 'text'"),
        ('{"text": "\\ud800"}', "line 3: 'text' is no Unicode text"),
        ('{"messages": []}', "line 3: 'messages' is not a list of objects"),
        ('{"messages": [{"role": "alien", "content": ""}]}', "line 3: messages cannot be rendered .*alien"),
        ("[" * 100_000, "line 3: no JSON"),
        ("\udcff", "line 3: no JSON"),
    ],
)
def test_bad_line_is_named_or_skipped_with_a_count(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line.encode(errors="surrogateescape") + b'\n{"text": "fine"}\n')
    with closing(source_of(path)) as source, pytest.raises(DataError, match=message):
        [source.next_document() for _ in range(3)]
    with closing(source_of(path, on_bad="skip")) as source:
        epochs = [text_of([source.next_document() for _ in range(2)]) for _ in range(3)]
    assert [sorted(texts) for texts in epochs] == [["fine", "good"]] * 3
    assert 2 <= source.num_skipped <= 3, "once in each epoch whose end was read"


def test_invalid_utf8_is_named_or_skipped_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo \xff\nthree\n")
    with closing(source_of(path)) as source, pytest.raises(DataError, match=r"a.txt line 2: no UTF-8 .*0xff.*on_bad"):
        source.next_document()
    assert text_of(one_epoch(source_of(path, on_bad="skip"))) == ["one\nthree\n"]


def test_overlong_json_line_is_refused_without_reading_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers_module, "MAX_LINE_BYTES", 100)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 200}) + '\n{"text": "ok"}\n')
    assert text_of(one_epoch(source_of(tmp_path, on_bad="skip"))) == ["ok"]
    with (
        closing(source_of(tmp_path)) as source,
        pytest.raises(DataError, match="line 1: a line of more than 100 bytes"),
    ):
        [source.next_document() for _ in range(2)]


def test_parquet_rows_come_in_turn_from_any_row(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"row {number}" for number in range(700)]
    parquet.write_table(arrow.table({"text": texts, "extra": [1] * 700}), tmp_path / "a.parquet", row_group_size=300)
    assert text_of(one_epoch(source_of(tmp_path))) == texts
    with closing(readers_module.ParquetFile(tmp_path / "a.parquet")) as file:
        assert [file.read(row).text for row in (299, 300, 599, 10, 11, 699)] == [
            f"row {row}" for row in (299, 300, 599, 10, 11, 699)
        ]
        assert file.read(699).next_position is None


def test_parquet_without_text_and_damaged_parquet_are_named(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"columns \['body'\], expected 'text'"):
        source_of(tmp_path).next_document()
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"a.parquet cannot be read as parquet"):
        source_of(tmp_path).next_document()


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'pip install "openmimo\[data\]"'):
        source_of(tmp_path).next_document()


def test_missing_path_empty_folder_and_no_path_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is no file and no folder"):
        source_of(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no file with a suffix of \.txt, \.md, \.py, \.jsonl, \.parquet"):
        source_of(tmp_path)
    with pytest.raises(DataError, match="no paths"):
        source_of()
    (tmp_path / "gone.txt").symlink_to(tmp_path / "target")
    with pytest.raises(DataError, match="target cannot be read"):
        source_of(tmp_path)


def test_order_of_the_file_system_does_not_matter(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (corpus / "z.txt").write_text("z")
    expected = [file.name for file in find_files([corpus])]
    walk = os.walk

    def reversed_walk(*arguments: object, **options: object) -> Iterator[tuple[str, list[str], list[str]]]:
        for parent, folders, names in walk(*arguments, **options):  # type: ignore[arg-type]
            names.reverse()
            yield parent, folders, names

    monkeypatch.setattr(os, "walk", reversed_walk)
    assert [file.name for file in find_files([corpus])] == expected == sorted(expected)


def test_named_file_is_taken_whatever_its_suffix_and_only_once(tmp_path: Path) -> None:
    path = tmp_path / "notes.rst"
    path.write_text("text")
    assert text_of(one_epoch(source_of(path, path))) == ["text"]
    assert text_of(one_epoch(source_of(tmp_path, text_suffixes=(".rst",)))) == ["text"]


def test_cached_epochs_equal_uncached_ones(corpus: Path) -> None:
    (corpus / "l.jsonl").write_text("\n".join(json.dumps({"text": f"line {number}"}) for number in range(9)))

    def documents(cache_bytes: int) -> list[list[int]]:
        with closing(source_of(corpus, cache_bytes=cache_bytes)) as source:
            return [source.next_document().token_ids.tolist() for _ in range(40)]

    assert documents(0) == documents(3000) == documents(1 << 20)


def test_cache_spares_reading_again_and_keeps_its_limit(tmp_path: Path) -> None:
    """A limit that is not kept would fill the memory on a large corpus."""
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"nine byte{number}"[-9:])

    def texts_of_later_epochs(cache_bytes: int) -> set[str]:
        encoded: list[str] = []

        class Recording(ByteTokenizer):
            def encode(self, text: str) -> list[int]:
                encoded.append(text)
                return super().encode(text)

        with closing(source_of(tmp_path, tokenizer=Recording(), cache_bytes=cache_bytes)) as source:
            [source.next_document() for _ in range(30)]
        assert len(set(encoded[:5])) == 5
        return set(encoded[5:])

    entry = CACHE_ENTRY_BYTES + 10 * 5  # ten tokens of four bytes and a mask byte each
    assert len(texts_of_later_epochs(0)) == 5
    assert len(texts_of_later_epochs(2 * entry + entry // 2)) == 3
    assert len(texts_of_later_epochs(5 * entry)) == 0


def test_changed_files_refuse_a_saved_state(corpus: Path) -> None:
    source = source_of(corpus)
    state = source.state()
    (corpus / "a.txt").write_text("other length")
    with pytest.raises(DataError, match="are not those of the saved run"):
        source_of(corpus).restore(state)
    with pytest.raises(DataError, match="position='x', expected a whole number"):
        source.restore({**state, "position": "x"})
    with pytest.raises(DataError, match="turn=3, expected one below 3"):
        source.restore({**state, "turn": 3})


def test_standard_library_is_found_without_tests_and_generated_files() -> None:
    names = [file.name for file in find_files(["python-stdlib"])]
    assert "json/decoder.py" in names
    assert len(names) > 200
    unwanted = ("test/", "idlelib/", "site-packages/", "encodings/", "lib2to3/", "_sysconfigdata")
    assert not [name for name in names if name.startswith(unwanted) or "/test" in name]


def test_same_documents_in_another_process(corpus: Path) -> None:
    """Catches an order taken from `hash()` or the file system."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from data_fakes import ByteTokenizer; from openmimo.data import TextSource\n"
        "source = TextSource([sys.argv[2]], seed=5, tokenizer=ByteTokenizer())\n"
        "print([source.next_document().token_ids.tolist() for _ in range(7)]); source.close()"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(corpus)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "123"}).stdout
    with closing(source_of(corpus, seed=5)) as source:
        assert printed.strip() == str([source.next_document().token_ids.tolist() for _ in range(7)])


def test_documents_are_int32_and_bool(corpus: Path) -> None:
    with closing(source_of(corpus)) as source:
        document = source.next_document()
    assert document.token_ids.dtype == np.int32
    assert document.loss_mask.dtype == np.bool_
