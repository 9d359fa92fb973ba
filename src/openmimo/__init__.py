"""OpenMiMo: the MiMo-V2-Flash system in one Python package.

The public names are loaded on first use, so that `import openmimo` costs nothing and needs no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openmimo.checkpoint import load_model, save_model
    from openmimo.config import ModelConfig
    from openmimo.engine import Engine, SamplingParams
    from openmimo.model import build_model

__version__ = "0.1.0"

__all__ = ["Engine", "ModelConfig", "SamplingParams", "build_model", "load_model", "save_model"]

_HOMES = {
    "Engine": "openmimo.engine",
    "ModelConfig": "openmimo.config",
    "SamplingParams": "openmimo.engine",
    "build_model": "openmimo.model",
    "load_model": "openmimo.checkpoint",
    "save_model": "openmimo.checkpoint",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
