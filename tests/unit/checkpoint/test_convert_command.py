"""`openmimo convert` as a command."""

from collections.abc import Callable
from pathlib import Path

import typer
from typer.testing import CliRunner

from openmimo.checkpoint.load import load_model
from openmimo.checkpoint.save import save_model
from openmimo.cli.convert import convert_command
from openmimo.config.model import ModelConfig
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
