"""Strict TOML recipes: a file plus dotted overrides becomes nested frozen dataclasses, and back.

Field types understood: bool, int, float, str, Enum, `X | None`, `tuple[X, ...]`, `tuple[X, Y]`, `dict[str, X]` and
dataclasses of these; `[[name]]` tables fill a tuple of dataclasses. TOML has no null: leave a key out for None.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
import types
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from openmimo.errors import ConfigError, nearest

MAX_RECIPE_BYTES = 4 << 20

_RecipeT = TypeVar("_RecipeT")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def load_recipe(path: str | Path, overrides: list[str], cls: type[_RecipeT]) -> _RecipeT:
    """Read a recipe file into `cls`, with overrides such as `optimizer.peak_lr=3e-4` or `stages.0.steps=5`.

    An override's value is read as TOML, and as a plain string where that fails or the field is a string.
    Raises: ConfigError naming the dotted path for an unknown key, a missing key, a wrong type or a bad value.
    """
    table = _read_table(Path(path))
    for override in overrides:
        _override(cls, table, override)
    return parse_recipe(table, cls, where=str(path))


def parse_recipe(table: dict[str, Any], cls: type[_RecipeT], *, where: str = "recipe") -> _RecipeT:
    """Build `cls` from plain tables, as `load_recipe` does. Raises: ConfigError."""
    try:
        return cast("_RecipeT", _build(cls, table, ""))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def to_toml(recipe: object) -> str:
    """TOML text that `load_recipe` reads back as an equal recipe. Raises: ConfigError for a None that would be lost."""
    lines: list[str] = []
    _write_table(lines, _plain(recipe), "")
    return "\n".join(lines).lstrip("\n") + "\n"


def _read_table(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read recipe {str(path)!r}: {error.strerror}; give the path of a TOML file"
        ) from error
    if len(content) > MAX_RECIPE_BYTES:
        raise ConfigError(f"recipe {str(path)!r} is larger than {MAX_RECIPE_BYTES} bytes; is it a TOML recipe?")
    try:
        # ValueError covers bad UTF-8, bad TOML and numbers too long to convert.
        return tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"recipe {str(path)!r} is not valid TOML: {error}") from error


# ---- tables -> dataclasses


def _build(annotation: Any, value: object, path: str) -> Any:
    """`value` as the type `annotation`. Raises: ConfigError."""
    annotation, optional = _unwrap_optional(annotation)
    if optional and value is None:
        return None
    origin, arguments = get_origin(annotation), get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        return _build_dataclass(cast("type[Any]", annotation), value, path)
    if origin is tuple:
        return _build_tuple(arguments, value, path)
    if origin is dict:
        table = _expect(value, dict, "a table", path)
        return {key: _build(arguments[1], item, _join(path, key)) for key, item in table.items()}
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _build_enum(annotation, value, path)
    if annotation in _NAMES:
        return _build_scalar(annotation, value, path)
    raise TypeError(f"{path}: recipes cannot hold {annotation!r}")


def _build_dataclass(cls: type[Any], value: object, path: str) -> Any:
    if type(value) is cls:
        return value
    table = _expect(value, dict, "a table", path)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    for key in table:
        if key not in fields:
            raise ConfigError(f"unknown key {_join(path, key)!r}; {nearest(key, fields)}")
    for name, field in fields.items():
        if name not in table and _has_no_default(field):
            raise ConfigError(f"{_join(path, name)!r} is missing; set it in the recipe or on the command line")
    values = {key: _build(hints[key], item, _join(path, key)) for key, item in table.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from error


def _build_tuple(arguments: tuple[Any, ...], value: object, path: str) -> tuple[Any, ...]:
    items = _expect(value, (list, tuple), "an array", path)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(items)
    if len(items) != len(arguments):
        raise ConfigError(f"{path}: got {len(items)} entries, expected {len(arguments)}")
    return tuple(
        _build(kind, item, f"{path}.{index}") for index, (kind, item) in enumerate(zip(arguments, items, strict=True))
    )


def _build_enum(kind: type[Enum], value: object, path: str) -> Enum:
    if isinstance(value, kind):
        return value
    words = [str(member.value) for member in kind]
    if not isinstance(value, str) or value not in words:
        hint = nearest(value, words) if isinstance(value, str) else f"known: {', '.join(words)}"
        raise ConfigError(f"{path}: got {_describe(value)}, expected one of {', '.join(words)}; {hint}")
    return kind(value)


def _build_scalar(kind: type, value: object, path: str) -> object:
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{path}: got {_describe(value)}, expected {_NAMES[kind]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: got {value}, expected a finite number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{path}: got a number of {value.bit_length()} bits, expected one of at most 64")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigError(f"{path}: got {value!r}, which is not valid Unicode text")
    return value


def _expect(value: object, kind: type | tuple[type, ...], name: str, path: str) -> Any:
    if not isinstance(value, kind):
        raise ConfigError(f"{path or 'the recipe'}: got {_describe(value)}, expected {name}")
    return value


def _describe(value: object) -> str:
    names: dict[type, str] = {str: "string", bool: "boolean", int: "whole number", float: "number"}
    names |= {list: "array", tuple: "array", dict: "table"}
    text = repr(value) if not isinstance(value, int) or value.bit_length() < 200 else "a very long number"
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({names.get(type(value), type(value).__name__)})"


def _unwrap_optional(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation, False
    members = [member for member in get_args(annotation) if member is not type(None)]
    if len(members) != 1:
        raise TypeError(f"recipes cannot hold {annotation!r}; only `X | None` unions")
    return members[0], True


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


# ---- overrides


def _override(cls: type[Any], table: dict[str, Any], text: str) -> None:
    """Put one `dotted.path=value` into the tables. Raises: ConfigError."""
    dotted, equals, raw = text.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {text!r} is not of the form dotted.key=value, such as optimizer.peak_lr=3e-4")
    try:
        node, annotation = cast("Any", table), cast("Any", cls)
        for depth, key in enumerate(keys[:-1]):
            node, annotation = _child(node, annotation, key, ".".join(keys[: depth + 1]))
        slot, annotation = _slot(node, annotation, keys[-1], dotted)
    except ConfigError as error:
        raise ConfigError(f"override {text!r}: {error}") from error
    node[slot] = _override_value(raw.strip(), _unwrap_optional(annotation)[0])


def _child(node: Any, annotation: Any, key: str, path: str) -> tuple[Any, Any]:
    """The table or array below `node`, filled from the field's default where the file has none."""
    kind = _unwrap_optional(annotation)[0]
    slot, annotation = _slot(node, annotation, key, path)
    if isinstance(node, dict) and slot not in node:
        field = next((f for f in dataclasses.fields(kind) if f.name == key), None) if _is_recipe(kind) else None
        value = None if field is None or _has_no_default(field) else _default(field)
        node[slot] = {} if value is None else _plain(value)
    child = cast("Any", node[slot])
    if not isinstance(child, dict | list):
        raise ConfigError(f"{path} is {_describe(child)} and has no parts to set")
    return cast("Any", child), annotation


def _slot(node: Any, annotation: Any, key: str, path: str) -> tuple[Any, Any]:
    """The key or index of `node` that `key` means, and the type of what is there."""
    annotation = _unwrap_optional(annotation)[0]
    if isinstance(node, list):
        items = cast("list[Any]", node)
        if not key.isdecimal() or int(key) >= len(items):
            raise ConfigError(f"{path}: {key!r} must be an index below {len(items)}")
        arguments = get_args(annotation)
        return int(key), arguments[0] if arguments[1:] == (Ellipsis,) or not arguments else arguments[int(key)]
    if _is_recipe(annotation):
        hints = get_type_hints(annotation)
        if key not in hints:
            raise ConfigError(f"unknown key {path!r}; {nearest(key, hints)}")
        return key, hints[key]
    return key, (get_args(annotation) or (str, str))[1]


def _override_value(text: str, annotation: Any) -> object:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = parsed["value"]
    if len(parsed) != 1 or (annotation is str and not isinstance(value, str)):
        return text
    return value


def _is_recipe(annotation: Any) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


# ---- dataclasses -> tables -> text


def _plain(value: Any, path: str = "") -> Any:
    """Dataclasses as dicts, tuples as lists, enums as their values, None left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        table: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            item, where = getattr(value, field.name), _join(path, field.name)
            if item is not None:
                table[field.name] = _plain(item, where)
            elif _has_no_default(field) or _default(field) is not None:
                raise ConfigError(f"{where} is None, which TOML cannot say; make None the default of the field")
        return table
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [_plain(item, f"{path}.{index}") for index, item in enumerate(cast("list[Any]", value))]
    if isinstance(value, dict):
        return {key: _plain(item, _join(path, key)) for key, item in cast("dict[str, Any]", value).items()}
    return value


def _write_table(lines: list[str], table: dict[str, Any], path: str) -> None:
    """Plain values first, then sub-tables, because TOML keys belong to the header above them."""
    nested = {key: item for key, item in table.items() if isinstance(item, dict) or _is_table_array(item)}
    lines += [f"{_key(key)} = {_inline(item)}" for key, item in table.items() if key not in nested]
    for key, item in nested.items():
        where = _join(path, _key(key))
        if isinstance(item, dict):
            lines += ["", f"[{where}]"]
            _write_table(lines, cast("dict[str, Any]", item), where)
        else:
            for entry in item:
                lines += ["", f"[[{where}]]"]
                _write_table(lines, entry, where)


def _is_table_array(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in cast("list[Any]", value))


def _inline(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, list):
        return "[" + ", ".join(_inline(item) for item in cast("list[Any]", value)) + "]"
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return "{" + ", ".join(f"{_key(key)} = {_inline(item)}" for key, item in items) + "}"
    return repr(value)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _quote(key)


def _quote(text: str) -> str:
    # JSON's escapes are TOML's, but TOML also forbids a bare DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
