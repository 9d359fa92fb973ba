"""`config.json` files on disk: careful reading, layout detection, atomic writing."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from openmimo.config.fields import Json
from openmimo.config.hub import ConfigFile, Layout, read_hub, to_hub, write_hub
from openmimo.config.model import ModelConfig, preset, preset_names
from openmimo.config.native import read_native, to_native, write_native
from openmimo.config.strict_json import read_json_object
from openmimo.errors import ConfigError, nearest

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 4 << 20

_LAYOUTS = ("hub", "native")
_NATIVE_KEYS = ("layer_types", "mlp_layer_types", "rope_parameters", "rms_norm_eps")
_HUB_KEYS = ("hybrid_layer_pattern", "moe_layer_freq", "layernorm_epsilon", "swa_rope_theta")


def read_model_config(preset_or_folder: str | Path) -> ModelConfig:
    """The model of a preset ("nano", "tiny", "small", "medium", "flash") or of a folder with a `config.json`.

    A preset's name always means the preset; write `./tiny` for a folder of that name. Raises: ConfigError.
    """
    if isinstance(preset_or_folder, str) and preset_or_folder in preset_names():
        return preset(preset_or_folder)
    path = Path(preset_or_folder)
    if not path.is_dir() and not path.is_file():
        hint = nearest(str(preset_or_folder), preset_names())
        raise ConfigError(f"{str(preset_or_folder)!r} is neither a folder nor a preset; {hint}")
    return read_config_file(path).model


def read_config_file(path: str | Path) -> ConfigFile:
    """Everything in a `config.json`, or in that of a folder, in either layout. Raises: ConfigError."""
    path = Path(path)
    if path.is_dir():
        path = path / CONFIG_NAME
        if not path.exists():
            raise ConfigError(
                f"{str(path.parent)!r} has no {CONFIG_NAME}; give a checkpoint folder (of a run: its model/)"
            )
    data = read_json_object(path, max_bytes=MAX_CONFIG_BYTES, error=ConfigError)
    try:
        return read_native(data) if detect_layout(data) == "native" else read_hub(data)
    except ConfigError as error:
        raise ConfigError(f"{str(path)!r}: {error}") from error


def detect_layout(data: Mapping[str, object]) -> Layout:
    """Which layout's keys a file has. Both together mean native: transformers carries the Hub's keys along.

    Raises: ConfigError when there are keys of neither.
    """
    if any(key in data for key in _NATIVE_KEYS):
        return "native"
    if any(key in data for key in _HUB_KEYS):
        return "hub"
    raise ConfigError(
        f"this is no MiMo-V2-Flash configuration: none of {', '.join(_HUB_KEYS + _NATIVE_KEYS)} is there; "
        "give a folder with a checkpoint of that architecture"
    )


def write_model_config(
    config: ModelConfig,
    folder: str | Path,
    layout: Layout = "hub",
    *,
    quantized: bool = False,
    extra: Mapping[str, object] | None = None,
) -> None:
    """Write `config.json` into a folder, which is made if needed; readers see the old file or the new one.

    `quantized` and `extra` are those of `to_hub` and `to_native`.
    Raises: ConfigError if the layout is unknown or cannot express the model, or the file cannot be written.
    """
    if layout not in _LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}; {nearest(layout, _LAYOUTS)}")
    convert = to_hub if layout == "hub" else to_native
    _write(convert(config, quantized=quantized, extra=extra), Path(folder))


def write_config_file(file: ConfigFile, folder: str | Path) -> None:
    """Write back what `read_config_file` gave, in the same layout. Raises: ConfigError."""
    _write(write_hub(file) if file.layout == "hub" else write_native(file), Path(folder))


def _write(data: Json, folder: Path) -> None:
    scratch = folder / f".{CONFIG_NAME}.{uuid.uuid4().hex}"
    try:
        content = json.dumps(data, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(folder / CONFIG_NAME)
        finally:
            scratch.unlink(missing_ok=True)
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"cannot write {CONFIG_NAME} into {str(folder)!r}: {error}") from error
