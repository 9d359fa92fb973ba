"""What a run starts from: the model and the tokenizer's sample."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from openmimo.checkpoint import save_model
from openmimo.config.model import AttentionKind, preset
from openmimo.config.train import (
    DataRecipe,
    ModelRecipe,
    SourceKind,
    SourceRecipe,
    StageRecipe,
    TokenizerRecipe,
    TrainRecipe,
)
from openmimo.errors import ConfigError
from openmimo.model import MiMoModel, build_model
from openmimo.text import Tokenizer, train_tokenizer
from openmimo.train.initial import initial_model
from openmimo.train.tokenizer import SAMPLE_CHARACTERS, tokenizer_for


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some text"], vocab_size=300)


def recipe_of(model: ModelRecipe, **changes: object) -> TrainRecipe:
    source = SourceRecipe(kind=SourceKind.TASK, domain="math")
    parts: dict[str, object] = {
        "tokenizer": TokenizerRecipe(vocab_size=300),
        "data": DataRecipe(sequence_length=8, batch_sequences=1, sources=(source,)),
        "stages": (StageRecipe(name="one", steps=1, mtp_heads=2),),
    }
    return TrainRecipe(name="x", model=model, **{**parts, **changes})  # type: ignore[arg-type]


def initial(recipe: TrainRecipe, tokenizer: Tokenizer, saved_heads: int | None = None) -> MiMoModel:
    return initial_model(recipe, tokenizer, dtype=torch.float32, device=torch.device("cpu"), saved_heads=saved_heads)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    config = preset("nano").replace(vocab_size=320, num_mtp_heads=1)
    save_model(build_model(config, seed=5), tmp_path / "saved", dtype="float32")
    return tmp_path / "saved"


def test_a_preset_takes_vocabulary_and_ends_from_the_tokenizer(tokenizer: Tokenizer) -> None:
    """Ids beyond the embedding, answers that never end, a recipe's vocab_size without effect."""
    model = initial(recipe_of(ModelRecipe(preset="nano")), tokenizer)
    assert model.config.vocab_size == 320
    assert model.config.eos_token_ids == tuple(tokenizer.eos_token_ids)
    assert model.config.num_mtp_heads == len(model.mtp_heads) == 2
    assert initial(recipe_of(ModelRecipe(preset="nano", vocab_size=512)), tokenizer).config.vocab_size == 512
    with pytest.raises(ConfigError, match="vocab_size=64 is below the tokenizer's 265"):
        initial(recipe_of(ModelRecipe(preset="nano", vocab_size=64)), tokenizer)


def test_changes_reach_a_loaded_model(folder: Path, tokenizer: Tokenizer) -> None:
    """A long-context stage that goes on with the old rotary base and window."""
    plain = initial(recipe_of(ModelRecipe(folder=str(folder))), tokenizer)
    changes = ModelRecipe(folder=str(folder), global_rope_theta=5e5, window_keys=7, value_scale=0.5)
    changed = initial(recipe_of(changes), tokenizer)
    assert changed.config.attention(AttentionKind.GLOBAL).rope_theta == 5e5
    assert changed.layers[1].self_attn.geometry.window_keys == 7
    assert all(torch.equal(value, changed.state_dict()[name]) for name, value in plain.state_dict().items())
    ids_BT = torch.arange(40)[None]
    assert not torch.allclose(plain(ids_BT).logits, changed(ids_BT).logits, atol=1e-4)


def test_what_does_not_fit_the_weights_is_refused(folder: Path, tokenizer: Tokenizer) -> None:
    """An index error in the embedding, or a size mismatch deep inside PyTorch."""
    with pytest.raises(ConfigError, match="changes do not fit the weights"):
        initial(recipe_of(ModelRecipe(folder=str(folder), vocab_size=512)), tokenizer)
    larger = train_tokenizer([" ".join(f"{a}{b}" * 3 for a in "abcdefghij" for b in "klmnopqrst")] * 3, vocab_size=400)
    with pytest.raises(ConfigError, match=r"set tokenizer\.path to that folder"):
        initial(recipe_of(ModelRecipe(folder=str(folder))), larger)


def test_a_resumed_run_from_a_folder_has_the_heads_it_had(folder: Path, tokenizer: Tokenizer) -> None:
    """A run that was killed after its head had been replicated and can never go on."""
    assert initial(recipe_of(ModelRecipe(folder=str(folder))), tokenizer).config.num_mtp_heads == 1
    assert len(initial(recipe_of(ModelRecipe(folder=str(folder))), tokenizer, saved_heads=3).mtp_heads) == 3


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_single_file_gives_the_tokenizer_more_than_its_beginning(tmp_path: Path, suffix: str) -> None:
    """A vocabulary made from the first 2,000 characters of a corpus, or without what conversations say."""
    path = tmp_path / f"corpus.{suffix}"
    if suffix == "txt":
        path.write_text("x " * SAMPLE_CHARACTERS + "rhubarb " * 200)
    else:
        lines = [{"text": "x x x"}] * 5 + [{"messages": [{"role": "user", "content": "rhubarb " * 200}]}]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataRecipe(
        sequence_length=8, batch_sequences=1, sources=(SourceRecipe(kind=SourceKind.TEXT, path=str(path)),)
    )
    recipe = recipe_of(ModelRecipe(preset="nano"), data=data)
    made = tokenizer_for(recipe, tmp_path / "tokenizer")
    assert len(made.encode(" rhubarb")) <= 2


def test_embeddings_have_a_deviation_of_their_own(tokenizer: Tokenizer) -> None:
    """Catches a scale that reaches other weights, or that the draws depend on."""
    plain = initial(recipe_of(ModelRecipe(preset="nano", init_std=0.04)), tokenizer).state_dict()
    wide = initial(recipe_of(ModelRecipe(preset="nano", init_std=0.04, embedding_std=0.4)), tokenizer).state_dict()
    torch.testing.assert_close(wide.pop("embed_tokens.weight"), 10 * plain.pop("embed_tokens.weight"))
    for name, tensor in plain.items():
        assert torch.equal(wide[name], tensor), name
    with pytest.raises(ConfigError, match="is for random weights, but folder is set"):
        ModelRecipe(folder="x", embedding_std=0.4)
