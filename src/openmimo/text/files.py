"""Reading and writing the tokenizer's files, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openmimo.config.strict_json import parse_json_object
from openmimo.errors import TextError

# The published tokenizer.json has 11 MB.
MAX_FILE_BYTES = 256 * 2**20


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises: TextError if it is missing, far too large or not UTF-8."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise TextError(f"{path} has {size} bytes; expected at most {MAX_FILE_BYTES}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise TextError(f"{path} does not exist; pass a folder with a tokenizer") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file whose top is an object. Raises: TextError if it is anything else."""
    return parse_json_object(read_text(path).encode(), what=str(path), error=TextError)


def write_json(path: Path, value: dict[str, Any], *, indent: int | None) -> None:
    """Write `value` as UTF-8 JSON in its own key order."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
