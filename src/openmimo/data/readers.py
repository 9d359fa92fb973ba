"""File formats, read one record at a time from any position.

A record is a block of a plain text file, a line of a `.jsonl` file or a row of a `.parquet` file. `read(position)`
is a pure function of the file, so a saved position is enough to go on; nothing larger than a block, a line or a
slice of rows is held in memory, apart from the offsets of a `.jsonl` file's lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import numpy.typing as npt

from openmimo.errors import DataError

BLOCK_BYTES = 1 << 16
SCAN_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 26
ROWS_PER_SLICE = 256
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record: `text` or `messages`, or neither where there is nothing, and where the next one starts.

    `next_position` is None behind the last record. `ends_document` is false for a block of text that goes on in the
    next block. `num_bad` lines were left out; `problem` describes the first, at `bad_position`.
    """

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    next_position: int | None
    ends_document: bool = True
    problem: str = ""
    bad_position: int = 0
    num_bad: int = 0


class RecordFile(Protocol):
    """An open file of records.

    Where `num_records` is known, positions are the numbers below it and may be read in any order.
    """

    @property
    def num_records(self) -> int | None:
        """The number of records, or None where they must be read in turn."""
        ...

    def read(self, position: int) -> Record:
        """The record at a position that is 0 or an earlier record's `next_position`."""
        ...

    def where(self, position: int) -> str:
        """The position in words for an error message: file and line, or file and row."""
        ...

    def close(self) -> None:
        """Releases the file."""
        ...


class TextFile:
    """UTF-8 text, cut into blocks at line ends (inside a line only where one is longer than a block)."""

    num_records = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_binary(path)
        self._size = path.stat().st_size

    def read(self, position: int) -> Record:
        """The block of at most `BLOCK_BYTES` that starts at byte `position`."""
        self._file.seek(position)
        data = self._file.read(BLOCK_BYTES)
        if position + len(data) < self._size:
            data = data[: _cut(data)]
        end = position + len(data)
        next_position = end if data and end < self._size else None
        if position == 0:
            data = data.removeprefix(BYTE_ORDER_MARK)
        text, num_bad, problem, bad_offset = _decode(data)
        return Record(
            text=text if text or position else None,
            next_position=next_position,
            ends_document=next_position is None,
            problem=problem,
            bad_position=end - len(data) + bad_offset,
            num_bad=num_bad,
        )

    def where(self, position: int) -> str:
        """File and line of a byte position."""
        return f"{self._path} line {_line_number(self._file, position)}"

    def close(self) -> None:
        """Releases the file."""
        self._file.close()


class JsonLinesFile:
    """One JSON object per line, with a key `text` (a string) or `messages` (a list of objects).

    Cost: 8 bytes of memory per line, and one reading of the file to find the lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_binary(path)
        self._starts = _line_starts(self._file)
        self.num_records = len(self._starts)

    def read(self, position: int) -> Record:
        """The line number `position`, counted from 0; blank lines are records without content."""
        if position >= self.num_records:
            return Record(next_position=None)
        next_position = position + 1 if position + 1 < self.num_records else None
        self._file.seek(int(self._starts[position]))
        line = self._file.readline(MAX_LINE_BYTES + 1)
        if len(line) > MAX_LINE_BYTES:
            return _bad(f"a line of more than {MAX_LINE_BYTES} bytes", position, next_position)
        if position == 0:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line.strip():
            return Record(next_position=next_position)
        try:
            value: object = json.loads(line)
        except (ValueError, RecursionError) as error:
            return _bad(f"no JSON ({error})", position, next_position)
        return _record_of(value, position, next_position)

    def where(self, position: int) -> str:
        """File and line."""
        return f"{self._path} line {position + 1}"

    def close(self) -> None:
        """Releases the file."""
        self._file.close()


class ParquetFile:
    """Rows with a column `text` or `messages`, in turn; needs the optional dependency pyarrow."""

    num_records = None

    def __init__(self, path: Path) -> None:
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise DataError(f'{path} needs pyarrow to be read; run pip install "openmimo[data]"') from error
        self._path = path
        try:
            self._file = parquet.ParquetFile(path)
        except (ValueError, OSError) as error:
            raise DataError(f"{path} cannot be read as parquet: {error}; check or remove the file") from error
        names: list[str] = list(self._file.schema_arrow.names)
        self._columns = [name for name in ("text", "messages") if name in names]
        if not self._columns:
            raise DataError(f"{path} has columns {names}, expected 'text' or 'messages'; rename one of them")
        counts = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._group_rows: list[int] = counts
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._next_row = -1

    def read(self, position: int) -> Record:
        """The row number `position`, counted over the whole file."""
        num_rows = sum(self._group_rows)
        if position >= num_rows:
            return Record(next_position=None)
        next_position = position + 1 if position + 1 < num_rows else None
        if position != self._next_row:
            self._rows = self._rows_from(position)
        self._next_row = position + 1
        try:
            row = next(self._rows)
        except (ValueError, OSError) as error:
            raise DataError(f"{self.where(position)} cannot be read: {error}; check or remove the file") from error
        return _record_of({name: row[name] for name in row if row[name] is not None}, position, next_position)

    def _rows_from(self, row: int) -> Iterator[dict[str, Any]]:
        for group, num_rows in enumerate(self._group_rows):
            if row >= num_rows:
                row -= num_rows
                continue
            for batch in self._file.iter_batches(ROWS_PER_SLICE, row_groups=[group], columns=self._columns):
                if row < batch.num_rows:
                    yield from cast("list[dict[str, Any]]", batch.slice(row).to_pylist())
                row = max(0, row - batch.num_rows)

    def where(self, position: int) -> str:
        """File and row."""
        return f"{self._path} row {position + 1}"

    def close(self) -> None:
        """Releases the file."""
        self._file.close()


def open_records(path: Path) -> RecordFile:
    """Opens a file by its suffix; every suffix but `.jsonl` and `.parquet` is plain text."""
    match path.suffix.lower():
        case ".jsonl":
            return JsonLinesFile(path)
        case ".parquet":
            return ParquetFile(path)
        case _:
            return TextFile(path)


def open_binary(path: Path) -> BinaryIO:
    """Opens a file for reading.

    Raises: DataError if that is impossible.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}; check the path and its permissions") from error


def _cut(data: bytes) -> int:
    """Where to end a block that is not the last: behind its last line end, or before its last character."""
    if newline := data.rfind(b"\n") + 1:
        return newline
    for end in range(len(data) - 1, max(0, len(data) - 5), -1):
        if data[end] & 0xC0 != 0x80:
            return end
    return len(data)


def _decode(data: bytes) -> tuple[str, int, str, int]:
    """The text without its bad lines, their number, the first one's problem and its offset."""
    try:
        return data.decode(), 0, "", 0
    except UnicodeDecodeError as error:
        problem, bad_offset = f"no UTF-8 ({error.reason}, byte {data[error.start]:#04x})", error.start
    good: list[str] = []
    lines = data.splitlines(keepends=True)
    for line in lines:
        try:
            good.append(line.decode())
        except UnicodeDecodeError:
            continue
    return "".join(good), len(lines) - len(good), problem, bad_offset


def _record_of(value: object, position: int, next_position: int | None) -> Record:
    """A record from a JSON object with `text` or `messages`, or a bad one that says what is wrong."""
    if not isinstance(value, dict):
        return _bad(f"a JSON {type(value).__name__}, expected an object", position, next_position)
    row = cast("dict[str, Any]", value)
    messages, text = row.get("messages"), row.get("text")
    if messages is not None:
        rows = cast("list[object]", messages) if isinstance(messages, list) else []
        if not rows or not all(isinstance(message, dict) for message in rows):
            return _bad("'messages' is not a list of objects", position, next_position)
        return Record(messages=cast("list[dict[str, Any]]", rows), next_position=next_position)
    if not isinstance(text, str):
        keys = ", ".join(sorted(map(str, row))) or "none"
        return _bad(f"no key 'text' (a string) or 'messages' (a list); keys: {keys}", position, next_position)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return _bad(f"'text' is no Unicode text ({error.reason})", position, next_position)
    return Record(text=text or None, next_position=next_position)


def _bad(problem: str, position: int, next_position: int | None) -> Record:
    return Record(next_position=next_position, problem=problem, bad_position=position, num_bad=1)


def _line_starts(file: BinaryIO) -> npt.NDArray[np.int64]:
    """The offsets at which lines start; none in an empty file."""
    starts = [np.zeros(1, np.int64)]
    size = 0
    while data := file.read(SCAN_BYTES):
        starts.append(np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + size + 1)
        size += len(data)
    joined = np.concatenate(starts)
    return joined[joined < size]


def _line_number(file: BinaryIO, position: int) -> int:
    file.seek(0)
    line = 1
    while position > 0 and (data := file.read(min(position, BLOCK_BYTES))):
        line += data.count(b"\n")
        position -= len(data)
    return line
