"""`manifest.json`: size and SHA-256 of every file of a folder, and the writer that fills it while it writes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from openmimo.checkpoint.files import atomic_folder, is_plain_name
from openmimo.config.strict_json import as_object, open_regular, read_json_object
from openmimo.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
_VERSION = 1
_MAX_BYTES = 16_000_000
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a manifest says about one file."""

    size: int
    sha256: str


class HashingFile:
    """Write-only file that hashes what passes through it, so no file is read back for its manifest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    @property
    def record(self) -> FileRecord:
        return FileRecord(size=self._size, sha256=self._hash.hexdigest())


class FolderWriter:
    """Collects files for a folder under construction and remembers their records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records: dict[str, FileRecord] = {}

    @contextmanager
    def create(self, name: str) -> Generator[HashingFile]:
        """Open a new file for writing. Raises: CheckpointError when the name is taken or not a plain one."""
        if not is_plain_name(name) or name in self._records or name == MANIFEST_NAME:
            raise CheckpointError(f"cannot add a file {name!r}: use a plain file name that is not taken yet")
        with open(self.folder / name, "xb") as file:
            hashing = HashingFile(file)
            yield hashing
        self._records[name] = hashing.record

    def add_bytes(self, name: str, content: bytes) -> None:
        with self.create(name) as file:
            file.write(content)

    def add_copy(self, name: str, source: Path) -> None:
        with open_regular(source) as original, self.create(name) as file:
            while chunk := original.read(_CHUNK_BYTES):
                file.write(chunk)

    def rename(self, old: str, new: str) -> None:
        os.rename(self.folder / old, self.folder / new)
        self._records[new] = self._records.pop(old)

    def write_manifest(self) -> None:
        write_manifest(self.folder, self._records)


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """`manifest.json` with these records."""
    files = {name: {"sha256": r.sha256, "size": r.size} for name, r in sorted(records.items())}
    text = json.dumps({"files": files, "version": _VERSION}, indent=1) + "\n"
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")


def hash_file(path: Path) -> FileRecord:
    """The record of a file that is there. Cost: reads it once."""
    with open_regular(path) as file:
        return FileRecord(size=os.fstat(file.fileno()).st_size, sha256=_digest(file))


@contextmanager
def folder_writer(target: Path) -> Generator[FolderWriter]:
    """Write a folder with its manifest; it appears at `target` whole or not at all. Raises: CheckpointError."""
    with atomic_folder(target) as temporary:
        writer = FolderWriter(temporary)
        yield writer
        writer.write_manifest()


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The records of `manifest.json`. Raises: CheckpointError when it is missing or malformed."""
    path = folder / MANIFEST_NAME
    content = read_json_object(path, max_bytes=_MAX_BYTES)
    if set(content) != {"files", "version"} or content["version"] is True or content["version"] != _VERSION:
        raise CheckpointError(f"{str(path)!r} is not a version {_VERSION} manifest; save the folder again")
    files = as_object(content["files"], what=f"files of {path}")
    return {name: _file_record(name, value, path) for name, value in files.items()}


def verify_manifest(folder: Path) -> dict[str, FileRecord]:
    """Check size and SHA-256 of every listed file.

    Raises: CheckpointError naming the first file that differs.   Cost: reads every listed file once.
    """
    records = read_manifest(folder)
    for name, record in records.items():
        with open_regular(folder / name) as file:
            size = os.fstat(file.fileno()).st_size
            digest = _digest(file) if size == record.size else ""
        if digest != record.sha256:
            problem = f"{size} bytes instead of {record.size}" if size != record.size else "another SHA-256"
            raise CheckpointError(f"{str(folder / name)!r} has {problem} than its manifest says; restore the file")
    return records


def _file_record(name: str, value: object, path: Path) -> FileRecord:
    fields = as_object(value, what=f"{name!r} in {path}")
    size, sha256 = fields.get("size"), fields.get("sha256")
    right_types = isinstance(size, int) and isinstance(sha256, str) and set(fields) == {"size", "sha256"}
    if not right_types or not is_plain_name(name) or not re.fullmatch("[0-9a-f]{64}", str(sha256)):
        raise CheckpointError(f"{str(path)!r} has a malformed entry {name!r}; save the folder again")
    assert isinstance(size, int)
    return FileRecord(size=size, sha256=str(sha256))


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
