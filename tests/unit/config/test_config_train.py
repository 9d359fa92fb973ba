"""The training recipe: the report's defaults, and contradictions refused before anything runs."""

import dataclasses
from pathlib import Path

import pytest

from openmimo.config.io import write_model_config
from openmimo.config.model import AttentionKind, preset
from openmimo.config.recipe import load_recipe, to_toml
from openmimo.config.train import ModelRecipe, OptimizerRecipe, StageRecipe, TokenizerRecipe, TrainRecipe
from openmimo.errors import ConfigError

TEXT = """
name = "demo"
[model]
preset = "nano"
[tokenizer]
vocab_size = 1024
[data]
sequence_length = 256
batch_sequences = 16
[[data.sources]]
kind = "task"
domain = "arithmetic"
levels = [1, 2]
[[stages]]
name = "pretrain"
steps = 100
warmup_steps = 10
[[stages]]
name = "cooldown"
steps = 20
schedule = "constant"
lr_start = 1e-5
mtp_loss_weight = 0.1
[[stages.sources]]
kind = "text"
path = "books"
"""


def load(tmp_path: Path, *overrides: str) -> TrainRecipe:
    path = tmp_path / "recipe.toml"
    path.write_text(TEXT)
    return load_recipe(path, list(overrides), TrainRecipe)


def test_defaults_are_the_reports() -> None:
    optimizer = OptimizerRecipe()
    assert (optimizer.peak_lr, optimizer.betas, optimizer.weight_decay) == (3.2e-4, (0.9, 0.95), 0.1)
    assert (optimizer.grad_clip, optimizer.final_lr) == (1.0, 1e-5)
    stage = StageRecipe(name="x", steps=1)
    assert (stage.mtp_loss_weight, stage.bias_update_rate, stage.sequence_aux_weight) == (0.3, 0.001, 1e-5)
    assert stage.mtp_heads == 1


def test_recipe_loads_and_prints_back(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    (tmp_path / "again.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "again.toml", [], TrainRecipe) == recipe


def test_stages_take_rates_and_sources_from_the_run_unless_they_say(tmp_path: Path) -> None:
    recipe = load(tmp_path, "optimizer.peak_lr=2e-3", "optimizer.final_lr=1e-4")
    first, second = recipe.stages
    assert recipe.learning_rates(first) == (2e-3, 1e-4)
    assert recipe.learning_rates(second) == (1e-5, 1e-5)
    assert recipe.data_of(first) == recipe.data
    assert recipe.data_of(second) == dataclasses.replace(recipe.data, sources=second.sources)
    assert [recipe.global_rope_theta(stage) for stage in (0, 1)] == [None, None]


def test_stages_extend_the_context(tmp_path: Path) -> None:
    """Catches a stage that keeps the native length or rotary base, or that gives its own to the stages before it."""
    sizes = ("stages.0.global_rope_theta=1e4", "stages.1.sequence_length=512", "stages.1.batch_sequences=2")
    recipe = load(tmp_path, *sizes, "stages.1.global_rope_theta=8e4")
    first, second = (recipe.data_of(stage) for stage in recipe.stages)
    assert (first.sequence_length, first.batch_sequences) == (recipe.data.sequence_length, recipe.data.batch_sequences)
    assert (second.sequence_length, second.batch_sequences) == (512, 2)
    assert [recipe.global_rope_theta(stage) for stage in (0, 1)] == [1e4, 8e4]
    assert load(tmp_path, sizes[0]).global_rope_theta(1) == 1e4


def test_all_global_leaves_nothing_sliding_but_the_heads(tmp_path: Path) -> None:
    config = load(tmp_path, "model.all_global=true").model.resolve()
    assert set(config.layer_kinds) == {AttentionKind.GLOBAL}
    assert config.sliding_attention == preset("nano").sliding_attention


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.folder=x", "model: got preset='nano' and folder='x'"),
        ('model.preset=""', "set exactly one"),
        ("model.preset=nan0", "no preset"),
        ("tokenizer.path=x", "tokenizer: got path='x'"),
        ("tokenizer.vocab_size=0", "set exactly one"),
        ("data.sources=[]", "at least one"),
        ("data.sources.0.kind=tasks", "did you mean 'task'"),
        ("data.sources.0.weight=0", "data.sources.0: weight=0.0 must be above 0"),
        ("data.sources.0.path=x", "takes no 'path'"),
        ('data.sources.0.domain=""', "needs 'domain'"),
        ("data.sources.0.levels=[]", "levels"),
        ("data.sources.0.split=trian", "did you mean 'train'"),
        ("data.sequence_length=0", "above 0"),
        ("stages.1.sequence_length=0", "above 0"),
        ("stages.1.global_rope_theta=0", "above 0"),
        ("stages=[]", "at least one"),
        ("stages.1.name=pretrain", "its own name"),
        ("stages.0.steps=5", "warmup_steps=10 exceeds"),
        ("stages.1.lr_end=1e-6", "no effect"),
        ("stages.0.until_loss=0.5", "set schedule to 'constant'"),
        ("stages.1.until_loss=0", "above 0"),
        ("stages.0.mtp_heads=-1", "0 or more"),
        ("optimizer.betas=[0.9, 1.0]", "below 1"),
        ("optimizer.peak_lr=0", "above 0"),
        ("precision=fp16", "expected one of .*bf16, fp32"),
        ("checkpoint.keep=0", "above 0"),
        ("log.every_steps=0", "above 0"),
        ("threads=-1", "0 or more"),
        ("device=gpu", "use auto, cpu, cuda or cuda:N"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, override)


def test_a_tokenizer_folder_can_replace_a_trained_one(tmp_path: Path) -> None:
    recipe = load(tmp_path, "tokenizer.vocab_size=0", "tokenizer.path=x")
    assert recipe.tokenizer == TokenizerRecipe(path="x")


def test_model_changes_are_applied(tmp_path: Path) -> None:
    """Each field of the recipe reaches the field of the model that it names, and unset ones change nothing."""
    assert ModelRecipe(preset="tiny").resolve() == preset("tiny")
    write_model_config(preset("nano"), tmp_path)
    config = ModelRecipe(
        folder=str(tmp_path),
        vocab_size=77,
        window_keys=5,
        sliding_sink=False,
        global_rope_theta=640e3,
        value_scale=0.0,
        init_std=0.006,
        max_positions=99,
        num_experts=12,
        num_experts_per_token=3,
        expert_dim=20,
    ).resolve()
    nano = preset("nano")
    assert nano.moe is not None
    assert config == nano.replace(
        vocab_size=77,
        value_scale=0.0,
        init_std=0.006,
        max_positions=99,
        moe=dataclasses.replace(nano.moe, num_experts=12, num_experts_per_token=3, expert_dim=20),
        sliding_attention=dataclasses.replace(nano.sliding_attention, window_keys=5, sink=False),
        global_attention=dataclasses.replace(nano.global_attention, rope_theta=640e3),
    )


def test_a_dense_model_takes_no_changes_of_experts(tmp_path: Path) -> None:
    nano = preset("nano")
    write_model_config(nano.replace(moe=None, layer_is_moe=(False,) * len(nano.layer_is_moe)), tmp_path)
    assert ModelRecipe(folder=str(tmp_path), value_scale=0.5).resolve().moe is None
    with pytest.raises(ConfigError, match="has no experts"):
        ModelRecipe(folder=str(tmp_path), num_experts=4).resolve()
