"""Careful file access: plain names, and folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from openmimo.errors import CheckpointError

_CURRENT_FOLDER = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def is_plain_name(name: str) -> bool:
    """Whether `name` is a visible file of the folder itself: no separators, no parents, no control characters."""
    return bool(name) and not name.startswith(".") and "/" not in name and "\\" not in name and name.isprintable()


@contextmanager
def atomic_folder(target: Path) -> Generator[Path]:
    """A temporary sibling folder that takes `target`'s place when the block ends without an error.

    Everything is synced to disk first. An existing target is exchanged in one step, so at every moment
    either the old or the new folder is there. Raises: CheckpointError when the folder cannot be written.
    """
    target = Path(os.path.abspath(target))
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{str(target)!r} exists and is not a folder; choose another path")
    temporary = target.parent / f".tmp-{target.name}-{uuid.uuid4().hex}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(target)
        temporary.mkdir()
        yield temporary
        _sync_tree(temporary)
        _put_in_place(temporary, target)
        _sync_path(target.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {str(target)!r}: {error}; free space or choose another path") from error
    finally:
        # Holds the unfinished folder after an error and the replaced one after an exchange.
        shutil.rmtree(temporary, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Finish a replacement that was cut short on a file system without atomic exchange."""
    previous = _previous(Path(os.path.abspath(target)))
    if previous.is_dir():
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(target)


def remove_leftovers(parent: Path) -> None:
    """Delete unfinished temporary folders that killed processes left in `parent`."""
    for path in parent.glob(".tmp-*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _previous(target: Path) -> Path:
    return target.parent / f".previous-{target.name}"


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
    elif not _exchange(temporary, target):
        # Between these renames only `.previous-*` exists; `recover_folder` brings it back.
        target.rename(_previous(target))
        temporary.rename(target)
        shutil.rmtree(_previous(target), ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders atomically; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_CURRENT_FOLDER, os.fsencode(first), _CURRENT_FOLDER, os.fsencode(second), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync_path(path)
    _sync_path(folder)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
