"""config.json on disk: damaged files are named, writing is atomic, and mutated files never give a wrong model."""

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from config_samples import hub_sample

from openmimo.config.hub import IGNORED, from_hub, to_hub, write_hub
from openmimo.config.io import (
    detect_layout,
    read_config_file,
    read_model_config,
    write_config_file,
    write_model_config,
)
from openmimo.config.model import ModelConfig, preset
from openmimo.config.native import from_native, to_native, write_native
from openmimo.config.strict_json import parse_json_object
from openmimo.errors import ConfigError, MimoError

FUZZ_CASES = int(os.environ.get("OPENMIMO_FUZZ_CASES", "400"))


@pytest.mark.parametrize("layout", ["hub", "native"])
def test_written_configurations_are_read(tmp_path: Path, layout: Any) -> None:
    folder = tmp_path / "new" / "folder"
    write_model_config(preset("nano"), folder, layout)
    assert read_model_config(folder) == read_model_config(str(folder)) == preset("nano")
    assert ModelConfig.from_pretrained(folder / "config.json") == preset("nano")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert read_config_file(folder).layout == layout


@pytest.mark.parametrize("layout", ["hub", "native"])
def test_whole_files_come_back(tmp_path: Path, layout: Any) -> None:
    extra = {"torch_dtype": "bfloat16", "_name_or_path": "x"}
    write_model_config(preset("tiny"), tmp_path, layout, quantized=True, extra=extra)
    before = (tmp_path / "config.json").read_bytes()
    write_config_file(read_config_file(tmp_path), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_file_with_both_spellings_is_native() -> None:
    hub, native = to_hub(preset("nano")), to_native(preset("nano"))
    assert (detect_layout(hub), detect_layout(native), detect_layout({**hub, **native})) == ("hub", "native", "native")
    with pytest.raises(ConfigError, match="no MiMo-V2-Flash configuration"):
        detect_layout({"model_type": "llama", "hidden_size": 8})


DAMAGED = {
    "empty": (b"", "not valid JSON"),
    "cut": (json.dumps(hub_sample()).encode()[:-20], "not valid JSON"),
    "not utf-8": (b'{"a": "\xff\xfe"}', "not valid JSON"),
    "nan": (b'{"layernorm_epsilon": NaN}', "NaN is not JSON"),
    "infinity": (b'{"a": -Infinity}', "Infinity is not JSON"),
    "list": (b"[1, 2]", "got list"),
    "null": (b"null", "got NoneType"),
    "twice": (b'{"hidden_size": 1, "hidden_size": 2}', "'hidden_size' appears twice"),
    "twice inside": (b'{"a": {"b": 1, "b": 2}}', "'b' appears twice"),
    "list bomb": (b"[" * 200_000, "not valid JSON"),
    "object bomb": (b'{"a":' * 100_000, "not valid JSON"),
    "long number": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "other model": (b'{"model_type": "llama"}', "no MiMo-V2-Flash"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    content, message = DAMAGED[name]
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_model_config(tmp_path)
    assert "config.json" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_large_files_are_refused_without_parsing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": "' + b"x" * (4 << 20) + b'"}')
    with pytest.raises(ConfigError, match="more than 4194304 bytes"):
        read_model_config(tmp_path)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    """A pipe must not block the reader."""
    with pytest.raises(ConfigError, match=r"has no config\.json; give a checkpoint folder"):
        read_model_config(tmp_path)
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_model_config(tmp_path)
    for name in ("no-such-folder", "a\0b", ""):
        with pytest.raises(ConfigError):
            read_model_config(name or tmp_path / "none")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_model_config(preset("nano"), tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="cannot write"):
        write_model_config(preset("nano"), tmp_path, extra={"id2label": float("nan")})
    with pytest.raises(ConfigError, match="cannot write"):
        write_model_config(preset("nano"), tmp_path, extra={"id2label": {1, 2}})
    with pytest.raises(ConfigError, match="unknown layout 'hubb'; did you mean 'hub'"):
        write_model_config(preset("nano"), tmp_path, "hubb")  # type: ignore[arg-type]
    assert (tmp_path / "config.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "taken" / "config.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot write"):
        write_model_config(preset("nano"), tmp_path / "taken")
    assert len(list((tmp_path / "taken").iterdir())) == 1
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot write"):
        write_model_config(preset("nano"), tmp_path / "file")


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 6, 64, 128, 2**31, 2**63, 10**300, -0.0, 0.0, 0.5, 1.0, 1e-5, 1e308, 128.0),
    *("", "x", "silu", "1", "\ud800", "a\0", "full_attention", [], [0], [1] * 6, [[]], {}, {"a": 1}, "sigmoid", 1e-320),
]


def mutate(rng: random.Random, data: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """One to three changes to a parsed file, and the keys that were touched."""
    data, touched = copy.deepcopy(data), set[str]()
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(sorted(data))
        touched.add(key)
        match rng.randrange(5):
            case 0:
                del data[key]
            case 1:
                other = "".join(rng.sample(key, len(key))) if rng.random() < 0.5 else rng.choice(sorted(data))
                touched.add(other)
                data[other] = data.pop(key)
            case 2 if isinstance(data[key], list) and data[key]:
                data[key][rng.randrange(len(data[key]))] = rng.choice(VALUES)
            case 3 if isinstance(data[key], dict) and data[key]:
                data[key][rng.choice(sorted(data[key]))] = rng.choice(VALUES)
            case _:
                data[key] = rng.choice(VALUES)
    return data, touched


@pytest.mark.parametrize("layout", ["hub", "native"])
def test_mutated_files_give_an_error_or_the_right_model(tmp_path: Path, layout: Any) -> None:
    """No crash, no hang, no model that its own keys do not describe.

    A model that is read must write and read as itself, and every key of the file must come back at its value; one
    whose touched keys are all ignored must be the original. OPENMIMO_FUZZ_CASES sets the number of files.
    """
    base = hub_sample() if layout == "hub" else to_native(preset("nano"), quantized=True, extra={"use_cache": True})
    again = (to_hub, from_hub) if layout == "hub" else (to_native, from_native)
    write = write_hub if layout == "hub" else write_native
    rng = random.Random(7)
    refused: list[tuple[set[str], str]] = []
    num_models = 0
    for _ in range(FUZZ_CASES // 2):
        data, touched = mutate(rng, base)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(data))
        try:
            file = read_config_file(path)
        except MimoError as error:
            refused.append((touched, str(error)))
            continue
        num_models += 1
        assert again[1](again[0](file.model)) == file.model
        written = write(file)
        assert {key: written.get(key, "missing") for key in data} == data
        if touched <= IGNORED.keys():
            assert file.model == preset("nano")
    for touched, message in refused:
        assert touched - IGNORED.keys(), message
        assert 20 < len(message) < 600
    assert min(num_models, len(refused)) > 0.05 * FUZZ_CASES // 2


def test_mutated_bytes_give_an_error_or_the_right_model() -> None:
    """Flipped, cut, doubled and inserted bytes; whatever still parses must be a model that its keys describe."""
    text = json.dumps(hub_sample()).encode()
    rng = random.Random(8)
    messages: list[str] = []
    for _ in range(FUZZ_CASES // 2):
        content = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(content))
            stop = min(len(content), start + rng.randint(0, 12))
            content[start:stop] = rng.choice(
                (b"", rng.randbytes(2), b"[", b"}", b",", b"9", bytes(content[start:stop]) * 2)
            )
        try:
            config = from_hub(parse_json_object(bytes(content), what="x", error=ConfigError))
        except MimoError as error:
            messages.append(str(error))
            continue
        assert from_hub(to_hub(config)) == config
    assert max(map(len, messages)) < 600
