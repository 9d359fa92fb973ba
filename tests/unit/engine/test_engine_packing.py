"""From the files of a checkpoint to packed weights: tensor by tensor, once, whatever is killed or runs beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from openmimo.checkpoint import load_model, save_model
from openmimo.checkpoint.fp8 import rank_grid
from openmimo.checkpoint.reader import CheckpointReader
from openmimo.checkpoint.safetensors_io import SafetensorsFile
from openmimo.config.io import read_model_config
from openmimo.config.model import ModelConfig, preset
from openmimo.config.tensor_names import INDEX_NAME, SINGLE_NAME
from openmimo.engine import Engine, SamplingParams, native_weights, packed
from openmimo.engine.native_runner import WEIGHTS, NativeRunner
from openmimo.errors import CheckpointError

pytest.importorskip("openmimo._native", reason="the C++ extension is not built")

from native_cases import feed, random_model, shapes

SHARD_BYTES = 60_000
PANEL = 64


@pytest.fixture(autouse=True)
def packed_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENMIMO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


def official_grid() -> ModelConfig:
    """Head sizes of the published model, whose global K and V share FP8 blocks; sizes that leave partial blocks."""
    nano = preset("nano")
    heads = {"num_heads": 4, "num_kv_heads": 2, "qk_head_dim": 192, "v_head_dim": 128}
    config = nano.replace(
        hidden_size=200,
        dense_dim=136,
        sliding_attention=type(nano.sliding_attention)(**heads, rope_theta=1e4, sink=True, window_keys=64),
        global_attention=type(nano.global_attention)(**heads, rope_theta=1e5, sink=False),
    )
    assert rank_grid(config.global_attention) is not None
    return config


def save(folder: Path, config: ModelConfig, dtype: str = "bfloat16", layout: str = "hub") -> None:
    save_model(random_model(config), folder, dtype=dtype, layout=layout, max_shard_bytes=SHARD_BYTES)  # type: ignore[arg-type]


def packed_bytes(folder: Path, packed_folder: Path, weights: str) -> bytes:
    """What a runner packs into a file, without the header, which holds the time of the files."""
    for old in packed_folder.glob("*"):
        old.unlink()
    NativeRunner(folder, weights=weights, num_rows=1, num_pages=1, threads=2, packed_file_bytes=0)
    [file] = packed_folder.iterdir()
    return file.read_bytes()[4096:]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("case", ["bfloat16 hub", "float32 native", "fp8 hub", "tied", "odd sizes"])
def test_files_pack_as_the_loaded_model_does(
    case: str, weights: str, tmp_path: Path, packed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows, experts or heads that land elsewhere, another rounding, and a model built on the way."""
    if case == "fp8 hub" and weights == "fp8":
        pytest.skip("blocks that stay as they are differ from rounded ones; see the next test")
    config = official_grid() if case == "fp8 hub" else shapes()["odd sizes" if case == "odd sizes" else "nano"]
    folder = tmp_path / "model"
    dtype, layout = case.split() if " " in case and case != "odd sizes" else ("bfloat16", "hub")
    save(folder, config.replace(tie_embeddings=case == "tied"), dtype, layout)
    assert len(list(folder.glob("*.safetensors"))) > 2
    streamed = packed_bytes(folder, packed_folder, weights)

    def whole(folder: Path, weights: str, *, verify: bool):
        model = load_model(folder, dtype="float32" if weights == "float32" else "bfloat16", verify=verify)
        return native_weights.weights_of_model(model)

    monkeypatch.setattr(native_weights, "weights_of_folder", whole)
    assert streamed == packed_bytes(folder, packed_folder, weights)


def test_fp8_blocks_stay_what_they_are(tmp_path: Path, packed_folder: Path) -> None:
    """Catches a second rounding, and scales of the wrong block: codes and scales must be in the file, bit for bit."""
    config, folder = official_grid(), tmp_path / "model"
    save(folder, config, "fp8")
    packed = packed_bytes(folder, packed_folder, "fp8")
    with CheckpointReader(folder) as reader:

        def stored(name: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
            owner = reader._owners[name]  # the bytes themselves, not the reader's way with them
            scale = reader._owners[name + "_scale_inv"].read(name + "_scale_inv")
            return owner.read(name).view(torch.uint8).numpy(), scale.numpy()

        # A global layer: K and V of each KV head were rounded as one matrix of 320 rows, whose third block of rows
        # begins with V's 64th row.
        q, k, v = (stored(f"model.layers.0.self_attn.{part}_proj.weight") for part in "qkv")
        k_scales = np.repeat(k[1].reshape(2, 2, -1), 128, axis=1)
        both = np.concatenate((k_scales, np.repeat(v[1].reshape(2, 1, -1), 64, axis=1)), axis=1)
        scales = np.concatenate(
            (
                np.repeat(q[1], 128, axis=0),
                both[:, :192].reshape(384, -1),
                both[:, 192:].reshape(256, -1),
            )
        )
        assert panels(np.concatenate((q[0], k[0], v[0])), scales) in packed
        down = stored("model.layers.1.mlp.experts.3.down_proj.weight")
        assert panels(down[0], np.repeat(down[1], 128, axis=0)[:200]) in packed


def panels(codes_RD: npt.NDArray[np.uint8], scales_RC: npt.NDArray[np.float32]) -> bytes:
    """Codes in panels of 64 rows, two columns a step, then the scales; what is missing to whole panels is zero."""
    rows, columns = codes_RD.shape
    padded = np.zeros((-(-rows // PANEL) * PANEL, -(-columns // 2) * 2), np.uint8)
    padded[:rows, :columns] = codes_RD
    table = np.zeros((padded.shape[0], scales_RC.shape[1]), np.float32)
    table[:rows] = scales_RC
    codes = padded.reshape(-1, PANEL, padded.shape[1] // 2, 2).transpose(0, 2, 1, 3).tobytes()
    return codes + table.reshape(-1, PANEL, table.shape[1]).transpose(0, 2, 1).tobytes()


def test_nan_codes_are_refused(tmp_path: Path, packed_folder: Path) -> None:
    """Catches E4M3 NaN, which the kernels would read as 480, and a file of it that stays."""
    folder = tmp_path / "model"
    save(folder, official_grid(), "fp8")
    name = "model.layers.0.mlp.down_proj.weight"
    with CheckpointReader(folder) as reader:
        path, begin = reader._owners[name].path, reader._owners[name].entries[name].begin
    content = bytearray(path.read_bytes())
    content[begin + 5] = 0xFF
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="NaN"):
        packed_bytes(folder, packed_folder, "fp8")
    assert not list(packed_folder.glob("*.packed"))


def test_one_weight_is_in_memory_at_a_time(
    tmp_path: Path, packed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a state that is gathered before it is packed: alive is what the largest weight needs, not the model."""
    folder = tmp_path / "model"
    save(folder, preset("nano"))
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, total, largest = 0, 0, 0
    original = SafetensorsFile.read

    def read(self: SafetensorsFile, name: str, *, index: int | None = None) -> torch.Tensor:
        nonlocal most, total, largest
        tensor = original(self, name, index=index)
        alive.add(tensor)
        total, largest = total + tensor.nbytes, max(largest, tensor.nbytes)
        most = max(most, sum(each.nbytes for each in alive))
        return tensor

    monkeypatch.setattr(SafetensorsFile, "read", read)
    packed_bytes(folder, packed_folder, "bf16")
    assert total > 8 * largest
    assert most <= 2 * largest


PACK = """
import sys, os, signal
from pathlib import Path
from openmimo.engine import native_weights
from openmimo.engine.native_runner import NativeRunner
original, kill_at = native_weights.weights_of_folder, int(sys.argv[2])
def weights_of_folder(*args, **options):
    for count, weight in enumerate(original(*args, **options)):
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield weight
native_weights.weights_of_folder = weights_of_folder
print("ready", flush=True)
sys.stdin.readline()
NativeRunner(Path(sys.argv[1]), weights="int8", num_rows=1, num_pages=1, packed_file_bytes=0)
print("torch", "torch" in sys.modules)
"""


def start_packing(folder: Path, kill_at: int = -1) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PACK, str(folder), str(kill_at)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_killed_packing_leaves_nothing(tmp_path: Path, packed_folder: Path) -> None:
    """Catches a half-made file that is taken for good, or that stays for ever."""
    folder = tmp_path / "model"
    save(folder, preset("nano"))
    expected = packed_bytes(folder, packed_folder, "int8")
    [file] = packed_folder.iterdir()
    file.unlink()
    killed = start_packing(folder, kill_at=20)
    killed.communicate("\n")
    assert killed.returncode == -signal.SIGKILL
    [leftover] = packed_folder.iterdir()
    assert leftover.suffix != ".packed"
    NativeRunner(folder, weights="int8", num_rows=1, num_pages=1, packed_file_bytes=0)
    assert list(packed_folder.iterdir()) == [file]
    assert file.read_bytes()[4096:] == expected


def test_two_processes_pack_once(tmp_path: Path, packed_folder: Path) -> None:
    """Catches two that write the same file, or the work done twice, or the second one failing."""
    folder = tmp_path / "model"
    save(folder, preset("nano"))
    expected = packed_bytes(folder, packed_folder, "int8")
    for file in packed_folder.iterdir():
        file.unlink()
    both = [start_packing(folder) for _ in range(2)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("packing" in errors and "into" in errors for _, errors in outputs) == 1
    [file] = packed_folder.iterdir()
    assert file.read_bytes()[4096:] == expected


OPEN = """
import sys
from pathlib import Path
import openmimo.engine.native_runner as native
native.PACKED_FILE_BYTES = 0
native.NativeRunner.__init__.__kwdefaults__["packed_file_bytes"] = 0
from openmimo.engine import Engine, SamplingParams
engine = Engine(Path(sys.argv[1]), weights="int8", runner="native")
print(engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4))[0].token_ids, "torch" in sys.modules)
"""


def test_packed_weights_open_without_torch(tmp_path: Path, packed_folder: Path) -> None:
    """Catches an import of PyTorch on the way to the first token: it takes longer than all the rest."""
    folder = tmp_path / "model"
    save(folder, preset("nano"))
    packed_bytes(folder, packed_folder, "int8")
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert done.stdout.rstrip().endswith("False"), done.stdout


@pytest.mark.parametrize("packed_file_bytes", [0, 1 << 40])
@pytest.mark.parametrize("max_shard_bytes", [SHARD_BYTES, 1 << 40])
def test_files_without_heads_run_without_drafts(
    max_shard_bytes: int, packed_file_bytes: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a native runner that wants heads which `load_model` does without, and one that says nothing of it."""
    config, folder = preset("nano"), tmp_path / "model"
    assert config.num_mtp_heads
    save_model(random_model(config), folder, max_shard_bytes=max_shard_bytes)
    remove_tensors(folder, ".mtp.", single_file=max_shard_bytes > SHARD_BYTES)
    loaded = load_model(folder)
    expected = NativeRunner(loaded, num_rows=1, num_pages=8)
    tokens = np.arange(40, dtype=np.int32)
    for _ in range(2):  # the second one opens what the first one packed
        caplog.clear()
        runner = NativeRunner(folder, num_rows=1, num_pages=8, packed_file_bytes=packed_file_bytes)
        assert runner.config == loaded.config
        assert caplog.text.count("holds no MTP heads") == 1
        assert (feed(runner, tokens, [30, 10])[0] == feed(expected, tokens, [30, 10])[0]).all()
    engine = Engine(folder, runner="native", draft_heads="auto")
    assert len(engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4


def test_the_number_of_heads_follows_the_files(tmp_path: Path) -> None:
    """Catches rules other than `load_model`'s: heads that config.json does not name, and heads that lack tensors."""
    config, folder = preset("nano"), tmp_path / "model"
    save_model(random_model(config), folder, layout="native", max_shard_bytes=SHARD_BYTES)
    settings = json.loads((folder / "config.json").read_text())
    del settings["num_nextn_predict_layers"]
    (folder / "config.json").write_text(json.dumps(settings))
    assert read_model_config(folder).num_mtp_heads == 0
    assert NativeRunner(folder).config.num_mtp_heads == load_model(folder).config.num_mtp_heads == config.num_mtp_heads
    remove_tensors(folder, ".mtp.layers.0.enorm", single_file=False)
    for load in (load_model, NativeRunner):
        with pytest.raises(CheckpointError, match=r"missing: 1\n  model.mtp.layers.0.enorm.weight"):
            load(folder)


def remove_tensors(folder: Path, part: str, *, single_file: bool) -> None:
    """Write a folder's files again without the tensors whose name holds `part`; `single_file` leaves the index out."""
    index = json.loads((folder / INDEX_NAME).read_text())
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        tensors |= load_file(folder / name)
        (folder / name).unlink()
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / SINGLE_NAME)
    if single_file:
        (folder / INDEX_NAME).unlink()
    else:
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(kept, SINGLE_NAME)}))


@pytest.mark.parametrize(
    ("num_bytes", "left"),
    [(100, ["a", "b", "c"]), (101, ["b", "c"]), (150, ["b", "c"]), (151, ["c"]), (180, []), (181, ["a", "b", "c"])],
)
def test_the_files_used_longest_ago_make_room_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int, left: list[str]
) -> None:
    """Catches files that go for nothing: while there is room, newer ones first, or where all of them would not do."""
    for age, (name, size) in enumerate([("c", 10), ("b", 20), ("a", 50)]):
        file = tmp_path / f"{name}.packed"
        file.write_bytes(bytes(size))
        os.utime(file, (1000 - age, 1000 - age))
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    packed.make_room(tmp_path / "new.packed", num_bytes)
    assert sorted(file.stem for file in tmp_path.glob("*.packed")) == left


def test_files_beyond_the_limits_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MOST_FILES", 3)
    for age in range(4):
        file = tmp_path / f"{age}.packed"
        file.touch()
        os.utime(file, (1000 - age, 1000 - age))
    packed.make_room(tmp_path / "new.packed", 1)
    assert sorted(file.stem for file in tmp_path.glob("*.packed")) == ["0", "1"]
