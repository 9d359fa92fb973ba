"""Training state: nothing damaged or half-written is ever resumed from."""

import os
from pathlib import Path

import pytest
import torch

from openmimo.checkpoint import files
from openmimo.checkpoint.manifest import folder_writer, verify_manifest
from openmimo.checkpoint.training_state import (
    checkpoint_dirs,
    latest_valid,
    load_training_state,
    save_step,
    save_training_state,
)
from openmimo.config.strict_json import open_regular
from openmimo.errors import CheckpointError

TENSORS = {
    "rng": torch.arange(7, dtype=torch.uint8),
    "moment": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "step": torch.tensor(12, dtype=torch.int64),
    "half": torch.tensor([0.1, -2.0], dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
}


def write_weights(folder: Path) -> None:
    with folder_writer(folder) as writer:
        writer.add_bytes("config.json", b"{}")


def save(run_dir: Path, step: int) -> Path:
    return save_step(run_dir, step, write_model=write_weights, tensors=TENSORS, meta={"step": step})


def test_round_trip_is_bit_exact_for_every_dtype_and_empty_tensors(tmp_path: Path) -> None:
    save_training_state(tmp_path / "state", TENSORS, {"step": 12, "cursor": [1, 2], "note": "é"})
    tensors, meta = load_training_state(tmp_path / "state")
    assert meta == {"step": 12, "cursor": [1, 2], "note": "é"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name], tensor)


def test_every_flipped_bit_of_a_small_state_is_detected(tmp_path: Path) -> None:
    """One bit in each byte of each file, the manifest's included; the bit varies with the position."""
    folder = tmp_path / "state"
    save_training_state(folder, {"x": torch.arange(4.0)}, {"step": 1})
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for position in range(len(original)):
            damaged = bytearray(original)
            damaged[position] ^= 1 << (position * 5 % 8)
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                load_training_state(folder)
        path.write_bytes(original)
    load_training_state(folder)


@pytest.mark.parametrize("meta", [{"x": float("nan")}, {"x": object()}])
def test_metadata_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path, meta: dict) -> None:
    with pytest.raises(CheckpointError, match="plain JSON"):
        save_training_state(tmp_path / "state", {}, meta)
    assert list(tmp_path.iterdir()) == []


def test_latest_valid_falls_back_past_damaged_steps_in_numeric_order(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 100_000_001):
        save(tmp_path, step)
    newest, middle = tmp_path / "step-100000001", tmp_path / "step-100000000"
    assert [path.name for path in checkpoint_dirs(tmp_path)] == ["step-99999999", middle.name, newest.name]
    assert latest_valid(tmp_path) == newest
    (newest / "training_state" / "meta.json").unlink()
    assert latest_valid(tmp_path) == middle
    (middle / "config.json").write_bytes(b"[]")
    assert latest_valid(tmp_path).name == "step-99999999"
    os.truncate(tmp_path / "step-99999999/training_state/tensors.safetensors", 20)
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        latest_valid(tmp_path)


def test_a_crash_while_writing_leaves_the_old_folder_and_no_new_one(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)

    def crash(temporary: Path) -> None:
        write_weights(temporary)
        raise KeyboardInterrupt

    for step in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            save_step(tmp_path, step, write_model=crash, tensors={}, meta={})
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert latest_valid(tmp_path) == folder


@pytest.mark.parametrize("can_exchange", [True, False])
def test_replacing_a_folder_leaves_only_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    for step in (1, 2):
        save_training_state(tmp_path / "state", {}, {"step": step})
    assert load_training_state(tmp_path / "state")[1] == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_replacement_cut_between_its_two_renames_is_undone_on_the_next_load(tmp_path: Path) -> None:
    save_training_state(tmp_path / "state", {}, {"step": 1})
    (tmp_path / "state").rename(tmp_path / ".previous-state")
    assert load_training_state(tmp_path / "state")[1] == {"step": 1}


def test_manifest_refuses_paths_outside_the_folder(tmp_path: Path) -> None:
    save_training_state(tmp_path / "state", {}, {})
    manifest = tmp_path / "state/manifest.json"
    manifest.write_text(manifest.read_text().replace("meta.json", "../state/meta.json"))
    with pytest.raises(CheckpointError, match="malformed entry"):
        verify_manifest(tmp_path / "state")


def test_pipes_and_devices_are_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(CheckpointError, match="not a regular file"):
            open_regular(path)
