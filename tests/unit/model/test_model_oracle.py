"""The whole model against the float64 loop oracle: windows, sinks, documents, rotary, experts, MTP heads."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from model_oracle import GLOBAL, SLIDING, Oracle, geometry, random_model, random_tokens, small_config

from openmimo.config.model import ModelConfig, MoEConfig
from openmimo.model import replicate_mtp_head

TOLERANCE = 2e-5  # fp32 against float64 on values of order 1

CONFIGS: dict[str, ModelConfig] = {
    "window of one key": small_config(window_keys=1),
    "window within a block": small_config(window_keys=5),
    "window of a whole block": small_config(window_keys=8),
    "window one past a block": small_config(window_keys=9),
    "window longer than the text": small_config(window_keys=50),
    "value heads wider than query heads": small_config(
        global_attention=geometry(v_head_dim=16), sliding={"v_head_dim": 20}
    ),
    "one KV head, no rotary": small_config(
        global_attention=geometry(num_kv_heads=1), sliding={"num_kv_heads": 1}, rope_fraction=0.0
    ),
    "sinks in global layers, none in sliding": small_config(
        global_attention=geometry(sink=True), sliding={"sink": False}
    ),
    "one expert per token, scaled, not normalised": small_config(
        moe=MoEConfig(
            num_experts=3, num_experts_per_token=1, expert_dim=12, normalize_weights=False, routed_scaling=2.5
        )
    ),
    "dense only, no value scale": small_config(moe=None, layer_is_moe=(False,) * 4, value_scale=1.0),
    "sliding only": small_config(layer_kinds=(SLIDING,) * 4),
    "global only": small_config(layer_kinds=(GLOBAL,) * 4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_routes_and_heads_match_the_loop_oracle(name: str) -> None:
    """Any error in masks, scales, rotary, sinks, routing or the MTP inputs."""
    config = CONFIGS[name]
    model = random_model(config, seed=len(name))
    tokens_BT = random_tokens(config, 2, 19, seed=3)
    positions = list(range(19))
    with torch.no_grad():
        output = model(tokens_BT)
        mtp = [output.mtp_logits(head) for head in range(config.num_mtp_heads)]
    oracle = Oracle(model)
    for row in range(2):
        tokens = tokens_BT[row].tolist()
        expected = oracle.forward(tokens, positions, [0] * 19)
        np.testing.assert_allclose(output.logits.detach()[row].numpy(), expected.logits_TV, atol=TOLERANCE)
        for layer, routes in enumerate(expected.experts):
            assert [set(chosen) for chosen in output.routed_experts[row, :, layer].tolist()] == routes
        for head, logits_BTV in enumerate(mtp):
            wanted = oracle.mtp_logits(head, expected.hidden_TD, tokens, positions, [0] * 19)
            np.testing.assert_allclose(logits_BTV[row].numpy(), wanted, atol=TOLERANCE)


def test_packed_documents_match_the_oracle_and_stay_apart_from_padding() -> None:
    """Keys of another document or of padding that leak into a sliding or global layer."""
    config = small_config()
    model = random_model(config, seed=1)
    documents_BT = torch.tensor([[0] * 3 + [1] * 1 + [2] * 9 + [-1] * 4, [0] * 7 + [1] * 10])
    positions_BT = torch.tensor([[*range(3), 0, *range(9), *range(4)], [*range(7), *range(10)]])
    tokens_BT = random_tokens(config, 2, 17, seed=2)
    with torch.no_grad():
        logits = model(tokens_BT, document_ids_BT=documents_BT, position_ids_BT=positions_BT).logits
    for row in range(2):
        expected = Oracle(model).forward(*(x[row].tolist() for x in (tokens_BT, positions_BT, documents_BT)))
        np.testing.assert_allclose(logits[row].numpy(), expected.logits_TV, atol=TOLERANCE)


@pytest.mark.parametrize("ids", [(0, 1, 2), (7, 8, 9), (20, 0, 41)])
def test_a_document_in_a_packed_row_is_computed_as_if_alone(ids: tuple[int, int, int]) -> None:
    """Packing that changes a document's numbers, MTP heads inside it included, for any numbering of documents."""
    config = small_config()
    model = random_model(config, seed=4)
    lengths = (6, 1, 12)
    tokens_BT = random_tokens(config, 2, sum(lengths), seed=5)
    documents_BT = torch.tensor([d for d, length in zip(ids, lengths, strict=True) for _ in range(length)]).expand(
        2, -1
    )
    positions_BT = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    with torch.no_grad():
        packed = model(tokens_BT, document_ids_BT=documents_BT, position_ids_BT=positions_BT)
        for start, end in pairwise(np.cumsum((0, *lengths)).tolist()):
            alone = model(tokens_BT[:, start:end])
            torch.testing.assert_close(packed.hidden_BTD[:, start:end], alone.hidden_BTD, atol=1e-5, rtol=0)
            for head in range(config.num_mtp_heads):
                inside = max(0, end - start - head - 1)
                together, single = packed.mtp_logits(head)[:, start:end], alone.mtp_logits(head)
                torch.testing.assert_close(together[:, :inside], single[:, :inside], atol=1e-5, rtol=0)


def test_document_ids_larger_than_the_row_keep_rows_apart() -> None:
    """Ids of a running counter: a document at the end of one row must not meet the first one of the next row."""
    config = small_config(layer_kinds=(SLIDING,) * 4)
    model = random_model(config, seed=6)
    tokens_BT = random_tokens(config, 2, 6, seed=7)
    small_BT = torch.tensor([[0] * 6, [1] * 6])
    with torch.no_grad():
        expected = model(tokens_BT, document_ids_BT=small_BT).logits
        for first in range(3, 12):
            ids_BT = torch.tensor([[first] * 6, [0] * 6])
            torch.testing.assert_close(model(tokens_BT, document_ids_BT=ids_BT).logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("fault", [{"post_norm": True}, {"swap": True}, {"shift": 1}, {"shift": 3}])
def test_known_mtp_faults_are_far_from_the_published_head(fault: dict[str, object]) -> None:
    """The comparison itself: hidden after the final norm, swapped halves or the wrong next token must stand out."""
    config = small_config()
    model = random_model(config, seed=8)
    tokens_BT = random_tokens(config, 1, 11, seed=9)
    tokens, positions, documents = tokens_BT[0].tolist(), list(range(11)), [0] * 11
    with torch.no_grad():
        output = model(tokens_BT)
        ours = output.mtp_logits(1)[0].numpy()
    oracle, hidden = Oracle(model), output.hidden_BTD[0].detach().double().numpy()
    right = oracle.mtp_logits(1, hidden, tokens, positions, documents)
    wrong = oracle.mtp_logits(1, hidden, tokens, positions, documents, **fault)  # type: ignore[arg-type]
    assert np.abs(ours - right).max() < TOLERANCE
    assert np.abs(ours - wrong)[:8].max() > 1e-2


def test_replicated_heads_equal_the_first_and_are_independent() -> None:
    """Replication that shares storage, forgets the configuration or changes the head."""
    model = random_model(small_config(num_mtp_heads=1), seed=2)
    tokens_BT = random_tokens(model.config, 1, 9)
    with torch.no_grad():
        before = model(tokens_BT).mtp_logits(0)
        replicate_mtp_head(model, 3)
        assert model.config.num_mtp_heads == len(model.mtp_heads) == 3
        next_ids_BT = torch.cat((tokens_BT[:, 1:], torch.zeros(1, 1, dtype=torch.int64)), dim=1)
        output = model(tokens_BT)
        for head in range(3):
            hidden = model.mtp_forward(head, output.hidden_BTD, next_ids_BT, output.plans[SLIDING])
            assert torch.equal(model.lm_head(hidden), before)
        model.mtp_heads[0].eh_proj.weight.zero_()
        assert model.mtp_heads[1].eh_proj.weight.abs().sum() > 0
