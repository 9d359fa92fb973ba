"""`openmimo convert` as a command."""

from collections.abc import Callable
from pathlib import Path

import typer
from typer.testing import CliRunner

from openmimo.checkpoint.load import load_model
from openmimo.checkpoint.save import save_model
from openmimo.cli.convert import convert_command
from openmimo.config.model import ModelConfig
from openmimo.errors import CheckpointError
from openmimo.model.model import MiMoModel


def test_options_reach_the_conversion(
    tmp_path: Path, config: ModelConfig, make_model: Callable[[ModelConfig], MiMoModel]
) -> None:
    """Catches a layout, format or shard size that the command swallows."""
    app = typer.Typer()
    app.command("convert")(convert_command)
    save_model(make_model(config), tmp_path / "a", dtype="float32")
    arguments = [str(tmp_path / "a"), str(tmp_path / "b"), "--layout", "native", "--dtype", "fp8", "--verify"]
    result = CliRunner().invoke(app, [*arguments, "--max-shard-gib", "0.001"])
    assert result.exit_code == 0, result.output
    assert '"layer_types"' in (tmp_path / "b" / "config.json").read_text()
    assert b"_scale_inv" in (tmp_path / "b" / "model-00001-of-00001.safetensors").read_bytes()
    assert load_model(tmp_path / "b", verify=True).config == config
    (tmp_path / "a" / "config.json").write_text("{}")
    assert CliRunner().invoke(app, arguments).exit_code == 1


def test_gguf_is_a_layout_of_its_own_formats(
    tmp_path: Path, config: ModelConfig, make_model: Callable[[ModelConfig], MiMoModel]
) -> None:
    """Catches a number format that is dropped on the way, or one that GGUF lacks and that is quietly replaced."""
    app = typer.Typer()
    app.command("convert")(convert_command)
    save_model(make_model(config), tmp_path / "a")
    sizes = {}
    for dtype in ("float32", "bfloat16", "q8_0"):
        target = tmp_path / f"{dtype}.gguf"
        result = CliRunner().invoke(app, [str(tmp_path / "a"), str(target), "--layout", "gguf", "--dtype", dtype])
        assert result.exit_code == 0, result.output
        assert target.read_bytes()[:4] == b"GGUF"
        sizes[dtype] = target.stat().st_size
    assert sizes["float32"] > 1.5 * sizes["bfloat16"] > 1.5 * sizes["q8_0"]
    for layout, dtype in (("gguf", "fp8"), ("hub", "q8_0")):
        arguments = [str(tmp_path / "a"), str(tmp_path / "b"), "--layout", layout, "--dtype", dtype]
        assert isinstance(CliRunner().invoke(app, arguments).exception, CheckpointError)
