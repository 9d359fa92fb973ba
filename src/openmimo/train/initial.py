"""The model that a run starts from: random weights of a preset, or those of a checkpoint folder."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from openmimo.checkpoint import load_model
from openmimo.config.model import ModelConfig
from openmimo.config.train import TrainRecipe
from openmimo.errors import ConfigError
from openmimo.model import MiMoModel, build_model, cast_model, replicate_mtp_head
from openmimo.text import Tokenizer


def initial_model(
    recipe: TrainRecipe, tokenizer: Tokenizer, *, dtype: torch.dtype, device: torch.device, saved_heads: int | None
) -> MiMoModel:
    """The model on its device, with the MTP heads of the first stage or of the run that is resumed (`saved_heads`).

    Random weights are drawn on the CPU, so a seed means the same ones everywhere.
    Raises: ConfigError when the recipe's changes or the tokenizer do not fit the weights.
    """
    config = recipe.model.resolve()
    if recipe.model.folder:
        model = _loaded(recipe.model.folder, config, tokenizer)
        if saved_heads is not None and saved_heads != model.config.num_mtp_heads:
            replicate_mtp_head(model, saved_heads)
        return cast_model(model, dtype).to(device)
    heads = recipe.stages[0].mtp_heads if saved_heads is None else saved_heads
    config = _fitted(config, recipe.model.vocab_size, tokenizer).replace(num_mtp_heads=heads)
    model = build_model(config, seed=recipe.seed, dtype=dtype)
    if recipe.model.embedding_std is not None:
        with torch.no_grad():
            model.embed_tokens.weight.mul_(recipe.model.embedding_std / config.init_std)
    return model.to(device)


def _loaded(folder: str, config: ModelConfig, tokenizer: Tokenizer) -> MiMoModel:
    model = load_model(Path(folder))
    config = config.replace(num_mtp_heads=model.config.num_mtp_heads)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model in {folder!r} only {config.vocab_size}; "
            f"set tokenizer.path to that folder"
        )
    if config == model.config:
        return model
    changed = MiMoModel(config)
    try:
        changed.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise ConfigError(f"the recipe's [model] changes do not fit the weights in {folder!r}: {error}") from error
    return changed


def _fitted(config: ModelConfig, vocab_size: int | None, tokenizer: Tokenizer) -> ModelConfig:
    """The preset with the tokenizer's end tokens and vocabulary, rounded up to 64 for the products."""
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"model.vocab_size={vocab_size} is below the tokenizer's {tokenizer.vocab_size}; raise it")
    return config.replace(
        vocab_size=vocab_size or math.ceil(tokenizer.vocab_size / 64) * 64,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
