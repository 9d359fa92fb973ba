"""Files of packed weights in the user's cache folder: one per checkpoint and weight format."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from openmimo.errors import CheckpointError
from openmimo.kernels.native import cache_folder

# Files not used longest go when there are more, or larger ones, than this.
MOST_FILES = 16
MOST_BYTES = 128 << 30
SUFFIX = ".packed"

_log = logging.getLogger(__name__)


def fingerprint(folder: Path, layout: str) -> str:
    """Names the weights in a folder, packed as `layout`: configuration, and every weight file's name, size and time.

    Raises: CheckpointError if the folder has no weight files.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no .safetensors files; give a checkpoint folder")
    parts = [layout, (folder / "config.json").read_text(encoding="utf-8")]
    for file in files:
        status = file.stat()
        parts.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def cache_path(name: str) -> Path:
    """Where the file of that fingerprint belongs; its folder exists if it can be made."""
    folder = cache_folder().parent / "packed"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}{SUFFIX}"


def mark_used(path: Path) -> None:
    """Let the file count as new when room is made."""
    with contextlib.suppress(OSError):  # A cache that belongs to somebody else is still readable.
        os.utime(path)


@contextlib.contextmanager
def turn(folder: Path) -> Generator[None]:
    """Be the only process that packs into `folder`: a second one of the same weights would do the work twice.

    A process that ends gives its turn back, whatever ends it; the file that it was writing is deleted by the next.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if _lock(descriptor):
            for leftover in folder.glob(f"*{SUFFIX}.*"):
                leftover.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Wait for the lock; False where the file system has none, as on some network ones: then all may pack at once."""
    import fcntl  # Unix only, as packed files are

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.warning("another process is packing weights; waiting for it")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def make_room(path: Path, num_bytes: int) -> None:
    """Delete the files that were not used longest, so that one of `num_bytes` fits the limits and the disk.

    On a disk that has no room for it even so nothing goes: the file cannot be written anyway.
    """
    others = sorted(path.parent.glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime, reverse=True)
    sizes = [file.stat().st_size for file in others]
    free = shutil.disk_usage(path.parent).free
    missing = max(0, num_bytes - free) if num_bytes <= free + sum(sizes) else 0
    used, kept, older = num_bytes, 1, sum(sizes)
    for file, size in zip(others, sizes, strict=True):
        used, kept, older = used + size, kept + 1, older - size
        if used > MOST_BYTES or kept > MOST_FILES or older < missing:
            file.unlink(missing_ok=True)
