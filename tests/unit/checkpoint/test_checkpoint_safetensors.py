"""Hostile safetensors files and indexes: each is refused with a reason, before memory is allocated."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openmimo.checkpoint.load import load_model
from openmimo.checkpoint.safetensors_io import SafetensorsFile
from openmimo.checkpoint.save import save_model
from openmimo.checkpoint.training_state import save_training_state
from openmimo.config.model import ModelConfig
from openmimo.config.strict_json import parse_json_object
from openmimo.config.tensor_names import INDEX_NAME
from openmimo.errors import CheckpointError
from openmimo.model.model import MiMoModel


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def write(path: Path, header: object, data_bytes: int, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data_bytes))
    return path


GOOD = {"a": entry(0, 8), "b": entry(8, 12)}


def test_a_well_formed_file_reads(tmp_path: Path) -> None:
    """The base that each bad case below changes in one place."""
    with SafetensorsFile(write(tmp_path / "f", {"__metadata__": {"x": "y"}, **GOOD}, 12)) as file:
        assert file.metadata == {"x": "y"}
        assert torch.equal(file.read("a"), torch.zeros(2))


@pytest.mark.parametrize(
    ("header", "data_bytes", "reason"),
    [
        ({"a": entry(0, 8), "b": entry(4, 8)}, 8, "overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "gap"),
        ({"a": entry(4, 8)}, 8, "gap"),
        (GOOD, 11, "tensors end at"),
        (GOOD, 13, "tensors end at"),
        ({"a": entry(0, 8, [3])}, 8, "need 12"),
        ({"a": entry(0, 8, [2**40, 2**40])}, 8, "need"),
        ({"a": entry(0, 8, dtype="F64")}, 8, "need 16"),
        ({"a": entry(0, 8, dtype="F99")}, 8, "expected one of"),
        ({"a": entry(0, 8, dtype=["F32"])}, 8, "expected one of"),
        ({"a": entry(8, 0, [-2])}, 8, "whole numbers"),
        ({"a": entry(0, 8, [2.0])}, 8, "whole numbers"),
        ({"a": entry(0, 4, [True])}, 4, "whole numbers"),
        ({"a": entry(0, 8, "2")}, 8, "whole numbers"),
        ({"a": entry(0, 4, [1] * 9)}, 4, "9 dimensions"),
        ({"a": {**entry(0, 8), "data_offsets": [0, 4, 8]}}, 8, "3 offsets|needs? "),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "needs exactly"),
        ({"a": [1]}, 8, "must be a JSON object"),
        ({"__metadata__": {"x": 1}}, 0, "strings only"),
        ([GOOD], 12, "must be a JSON object"),
        (b'{"a":%s,"a":%s}' % (2 * (json.dumps(entry(0, 8)).encode(),)), 8, "appears twice"),
        (b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', 8, "appears twice"),
        (b'{"a":' + b"[" * 100_000, 8, "not valid JSON"),
        (b'{"a": NaN}', 8, "NaN is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", 8, "not valid JSON"),
        (b'{"\xff": 1}', 8, "not valid JSON"),
        (b"\0" * 64, 8, "not valid JSON"),
        (b"", 8, "not valid JSON"),
    ],
)
def test_malformed_headers_are_refused(tmp_path: Path, header: object, data_bytes: int, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        SafetensorsFile(write(tmp_path / "f", header, data_bytes))


@pytest.mark.parametrize("length", [10**6, 2**63, 2**64 - 1])
def test_a_huge_header_length_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match="announces a header"):
        SafetensorsFile(write(tmp_path / "f", GOOD, 12, length=length))


def test_a_header_above_the_cap_is_refused_even_if_the_file_is_long_enough(tmp_path: Path) -> None:
    path = write(tmp_path / "f", GOOD, 12, length=200_000_000)
    os.truncate(path, 200_000_100)  # sparse: takes no space
    with pytest.raises(CheckpointError, match="limit 100000000"):
        SafetensorsFile(path)


@pytest.mark.parametrize("size", [0, 7])
def test_files_shorter_than_a_header_are_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "f").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match="too few"):
        SafetensorsFile(tmp_path / "f")


def test_a_file_that_shrinks_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    with SafetensorsFile(write(tmp_path / "f", GOOD, 12)) as file:
        os.truncate(tmp_path / "f", file.entries["a"].begin + 3)
        with pytest.raises(CheckpointError, match="ends after 3 of 8 bytes"):
            file.read("a")


def test_written_tensors_start_at_multiples_of_their_item_size(tmp_path: Path) -> None:
    """Other readers view the bytes in place; an odd number of one-byte items before a float would break them."""
    tensors = {"a": torch.zeros(7, dtype=torch.uint8), "b": torch.ones(3), "c": torch.ones(1, dtype=torch.bfloat16)}
    save_training_state(tmp_path / "s", tensors, {})
    path = tmp_path / "s" / "tensors.safetensors"
    with SafetensorsFile(path) as file:
        assert all(entry.begin % entry.dtype.itemsize == 0 for entry in file.entries.values())
    assert load_file(path).keys() == tensors.keys()


def test_strict_json_accepts_plain_objects() -> None:
    assert parse_json_object(b'{"a": [1, 2.5, null, "\xc3\xa9"]}', what="x") == {"a": [1, 2.5, None, "é"]}


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("../c/model_mtp.safetensors", "only files of the folder itself"),
        ("/etc/passwd", "only files of the folder itself"),
        ("..", "only files of the folder itself"),
        (".hidden.safetensors", "only files of the folder itself"),
        ("a\\b", "only files of the folder itself"),
        ("a\0b", "only files of the folder itself"),
        ("", "only files of the folder itself"),
        (7, "only files of the folder itself"),
        ("absent.safetensors", "does not exist"),
        ("x" * 5000, "cannot open"),
        ("config.json", "announces a header"),
        ("model_mtp.safetensors", "the index names model_mtp"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(
    tmp_path: Path, config: ModelConfig, make_model: Callable[[ModelConfig], MiMoModel], place: object, reason: str
) -> None:
    save_model(make_model(config), tmp_path / "c")
    path = tmp_path / "c" / INDEX_NAME
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = place
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=reason):
        load_model(tmp_path / "c")


def test_links_to_weights_are_followed_and_links_to_devices_are_not(
    tmp_path: Path, config: ModelConfig, make_model: Callable[[ModelConfig], MiMoModel]
) -> None:
    """Download caches consist of links to files; a link to /dev/zero would never end."""
    save_model(make_model(config), tmp_path / "c")
    weights = tmp_path / "c" / "model_mtp.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    load_model(tmp_path / "c", verify=True)
    weights.unlink()
    weights.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_model(tmp_path / "c")
