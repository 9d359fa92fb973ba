"""Small models whose checkpoints exercise every tensor kind."""

from collections.abc import Callable

import pytest
import torch

from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig, MoEConfig
from openmimo.model.model import MiMoModel, build_model

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING


def attention(kv_heads: int, head_dims: tuple[int, int], *, heads: int = 4, window: int | None) -> AttentionConfig:
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=kv_heads,
        qk_head_dim=head_dims[0],
        v_head_dim=head_dims[1],
        rope_theta=1e4 if window else 5e6,
        sink=window is not None,
        window_keys=window,
    )


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """One dense global, one sparse sliding, one sparse global layer, two MTP heads; no dimension fills a block."""
    return ModelConfig(
        vocab_size=40,
        hidden_size=32,
        dense_dim=48,
        layer_kinds=(GLOBAL, SLIDING, GLOBAL),
        layer_is_moe=(False, True, True),
        global_attention=attention(1, (12, 8), window=None),
        sliding_attention=attention(2, (12, 8), window=5),
        moe=MoEConfig(num_experts=3, num_experts_per_token=2, expert_dim=16),
        num_mtp_heads=2,
    )


@pytest.fixture(scope="session")
def rank_config(config: ModelConfig) -> ModelConfig:
    """As `config`, with the published head sizes, for which global K and V share FP8 blocks."""
    return config.replace(
        hidden_size=136,
        global_attention=attention(2, (192, 128), window=None),
        sliding_attention=attention(4, (192, 128), window=5),
        num_mtp_heads=1,
    )


@pytest.fixture(scope="session")
def one_rank_config(rank_config: ModelConfig) -> ModelConfig:
    """One global KV head: both FP8 grids have the same scale shapes, so only the layout tells them apart."""
    return rank_config.replace(
        global_attention=attention(1, (192, 128), heads=2, window=None),
        sliding_attention=attention(2, (192, 128), heads=2, window=5),
    )


@pytest.fixture(scope="session")
def make_model() -> Callable[[ModelConfig], MiMoModel]:
    """A model in which every tensor, norms, sinks and router biases included, has its own random values."""

    def make(config: ModelConfig) -> MiMoModel:
        model = build_model(config, seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.normal_(0.0, 0.5, generator=generator)
        return model

    return make
