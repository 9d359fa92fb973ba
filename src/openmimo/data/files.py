"""Which files a list of paths means, in an order that does not depend on the file system."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from openmimo.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py")
RECORD_SUFFIXES = (".jsonl", ".parquet")
PYTHON_STDLIB = "python-stdlib"

# Tests, installed packages, and tables or text that a program wrote.
_STDLIB_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}
    | {"lib-dynload", "ensurepip", "encodings", "pydoc_data", "msilib", "__phello__"}
)


@dataclass(frozen=True)
class CorpusFile:
    """A file and the name it is sorted and shuffled by: its path below the path that was asked for."""

    path: Path
    name: str
    num_bytes: int


def find_files(paths: Sequence[str | Path], *, text_suffixes: Sequence[str] = TEXT_SUFFIXES) -> list[CorpusFile]:
    """All files of the paths, sorted by name; a folder is searched recursively for known suffixes.

    A file named outright is taken whatever its suffix. Hidden files and folders are passed over, links to folders not
    followed. The word `python-stdlib` stands for the sources of the running interpreter's standard library.

    Raises: DataError if a path is missing or nothing is found.
    """
    if not paths:
        raise DataError("a text source got no paths, expected files, folders or 'python-stdlib'; name at least one")
    found: dict[Path, str] = {}
    for path in map(Path, paths):
        if str(path) == PYTHON_STDLIB and not path.exists():
            files = _stdlib_files()
        elif path.is_dir():
            files = _walk(path, suffixes=(*text_suffixes, *RECORD_SUFFIXES))
        elif path.is_file():
            files = [(path, path.name)]
        else:
            raise DataError(f"{path} is no file and no folder; name a file, a folder or '{PYTHON_STDLIB}'")
        if not files:
            suffixes = ", ".join((*text_suffixes, *RECORD_SUFFIXES))
            raise DataError(f"{path} has no file with a suffix of {suffixes}; add files or pass `text_suffixes`")
        for file, name in files:
            found.setdefault(file.resolve(), name)
    try:
        corpus = [CorpusFile(path, name, path.stat().st_size) for path, name in found.items()]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}; correct or remove it") from error
    return sorted(corpus, key=lambda file: (file.name, str(file.path)))


def fingerprint(files: Sequence[CorpusFile]) -> str:
    """Changes when a file is added, removed, renamed or resized; a moved folder keeps it."""
    listing = "\n".join(f"{file.name}\t{file.num_bytes}" for file in files)
    return hashlib.blake2b(listing.encode(errors="surrogateescape"), digest_size=8).hexdigest()


def shuffled(count: int, *key: int | str) -> npt.NDArray[np.int64]:
    """The numbers below `count` in an order that the key decides, equal on every machine and numpy release."""
    text = "\t".join(map(str, key)).encode(errors="surrogateescape")
    offset = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
    # Sorted by the splitmix64 hash, which maps 64-bit numbers one to one, so there are no ties.
    hashes = (np.arange(count, dtype=np.uint64) + np.uint64(offset)) * np.uint64(0x9E3779B97F4A7C15)
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(hashes ^ (hashes >> np.uint64(31)), kind="stable")


def _walk(folder: Path, *, suffixes: Sequence[str], skipped: frozenset[str] = frozenset()) -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
    for parent, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__")) and name not in skipped]
        for name in names:
            if name.lower().endswith(tuple(suffixes)) and not name.startswith("."):
                path = Path(parent, name)
                found.append((path, path.relative_to(folder).as_posix()))
    return found


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be listed: {error.strerror}; check its permissions") from error


def _stdlib_files() -> list[tuple[Path, str]]:
    files = _walk(Path(sysconfig.get_path("stdlib")), suffixes=(".py",), skipped=_STDLIB_SKIPPED)
    return [(path, name) for path, name in files if not name.startswith("_sysconfigdata")]
