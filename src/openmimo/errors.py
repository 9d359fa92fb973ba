"""The exception tree: every error a user can cause derives from `MimoError`.

The text of an error says what was got, what was expected and what to do. Each child also
subclasses the standard exception a Python programmer would catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MimoError(Exception):
    """Root of all errors raised on purpose by OpenMiMo."""


class ConfigError(MimoError, ValueError):
    """A configuration value, key or recipe that cannot be used."""


class ShapeError(MimoError, ValueError):
    """A tensor whose shape, dtype or size does not fit."""


class CheckpointError(MimoError, ValueError):
    """A checkpoint that is missing, incomplete, malformed or corrupted."""


class DataError(MimoError, ValueError):
    """A data source that cannot be read or used."""


class TextError(MimoError, ValueError):
    """A tokenizer, template or message that cannot be used."""


class TaskError(MimoError, ValueError):
    """A task, domain or level that does not exist."""


class SandboxError(MimoError, RuntimeError):
    """A program that cannot be run, or not as safely as was asked for."""


class TrainingError(MimoError, RuntimeError):
    """A training run that cannot start or go on."""


class RequestError(MimoError, ValueError):
    """A generation request with unusable options."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known word closest to `name`, or lists all of them."""
    words = sorted(known)
    match = difflib.get_close_matches(name, words, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(words)}"
