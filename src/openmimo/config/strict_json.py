"""Reading files, and small JSON ones, with care: regular files of limited size, nothing that parsers disagree about.

Callers name the `error` that their users expect.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from openmimo.errors import CheckpointError, MimoError


def read_json_object(path: Path, *, max_bytes: int, error: type[MimoError] = CheckpointError) -> dict[str, object]:
    """The JSON object in a file that may not exceed `max_bytes`. Raises: `error`."""
    with open_regular(path, error=error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise error(f"{str(path)!r} has more than {max_bytes} bytes ({size}); is it the right file?")
        try:
            content = file.read(size)
        except OSError as cause:
            raise error(f"cannot read {str(path)!r}: {cause}; copy the file again") from cause
    return parse_json_object(content, what=repr(str(path)), error=error)


def parse_json_object(content: bytes, *, what: str, error: type[MimoError] = CheckpointError) -> dict[str, object]:
    """A JSON object, read strictly: UTF-8, no repeated keys, no NaN, no runaway nesting. Raises: `error`."""
    try:
        # ValueError covers bad UTF-8, bad JSON and numbers too long to convert.
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as cause:
        raise error(f"{what} is not valid JSON: {cause}; download or write it again") from cause
    return as_object(value, what=what, error=error)


def as_object(value: object, *, what: str, error: type[MimoError] = CheckpointError) -> dict[str, object]:
    """`value` as a JSON object. Raises: `error` for any other JSON value."""
    if not isinstance(value, dict):
        raise error(f"{what} must be a JSON object, got {type(value).__name__}; download or write the file again")
    return cast("dict[str, object]", value)


def open_regular(path: Path, *, error: type[MimoError] = CheckpointError) -> BinaryIO:
    """Open a regular file for unbuffered reading.

    Links are followed, because download caches are made of them, but devices, pipes and folders are refused
    before anything is read. Raises: `error`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as cause:
        raise error(f"{str(path)!r} does not exist; check the path") from cause
    except (OSError, ValueError) as cause:
        raise error(f"cannot open {str(path)!r}: {cause}; check the path and its permissions") from cause
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{str(path)!r} is not a regular file; put the file itself there")
    return os.fdopen(descriptor, "rb", buffering=0)


def read_exactly(file: BinaryIO, buffer: memoryview, *, what: str) -> None:
    """Fill `buffer` from the file's position. Raises: CheckpointError when the file ends early or cannot be read."""
    done = 0
    while done < len(buffer):
        try:
            count = cast("int", file.readinto(buffer[done:]))  # type: ignore[attr-defined]  # raw files have it
        except OSError as error:
            raise CheckpointError(f"cannot read {what}: {error}; copy the file again") from error
        if not count:
            raise CheckpointError(f"{what} ends after {done} of {len(buffer)} bytes; copy the file again")
        done += count


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} appears twice")
        result[key] = value
    return result


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
