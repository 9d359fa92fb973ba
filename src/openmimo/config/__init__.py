"""Model configurations and recipes: frozen dataclasses, standard library only."""

from openmimo.config.io import read_model_config, write_model_config
from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig, MoEConfig, preset, preset_names
from openmimo.config.recipe import load_recipe, to_toml
from openmimo.config.train import TrainRecipe

__all__ = [
    "AttentionConfig",
    "AttentionKind",
    "MoEConfig",
    "ModelConfig",
    "TrainRecipe",
    "load_recipe",
    "preset",
    "preset_names",
    "read_model_config",
    "to_toml",
    "write_model_config",
]
