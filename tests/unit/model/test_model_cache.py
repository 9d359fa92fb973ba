"""Decoding with a cache: equal to the whole-sequence pass, the promised size, clear errors."""

from __future__ import annotations

import pytest
import torch
from model_oracle import GLOBAL, SLIDING, random_model, random_tokens, small_config

from openmimo.config.model import AttentionConfig, ModelConfig, preset
from openmimo.errors import ShapeError
from openmimo.model import Cache, MiMoModel
from openmimo.model.cache import PAGE_TOKENS


@torch.no_grad()
def decode(model: MiMoModel, tokens_BT: torch.Tensor, prompt: int, step: int) -> torch.Tensor:
    """Hidden states of a prompt and then of steps of `step` tokens, all kept."""
    cache = Cache(model.config, batch_size=tokens_BT.shape[0], step_tokens=step)
    hidden = [model(tokens_BT[:, :prompt], cache=cache).hidden_BTD]
    cache.commit(prompt)
    for start in range(prompt, tokens_BT.shape[1], step):
        hidden.append(model(tokens_BT[:, start : start + step], cache=cache).hidden_BTD)
        cache.commit(hidden[-1].shape[1])
    return torch.cat(hidden, dim=1)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize("prompt", [1, 21])
def test_chunked_decoding_equals_the_whole_pass(prompt: int, step: int) -> None:
    """A ring slot that is overwritten too early, a page that is not grown, a wrong position."""
    model = random_model(small_config())
    tokens_BT = random_tokens(model.config, 2, 70)
    with torch.no_grad():
        expected = model(tokens_BT).hidden_BTD
    torch.testing.assert_close(decode(model, tokens_BT, prompt, step), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window_keys", [1, 128, 129])
def test_training_prefill_and_decoding_count_the_window_alike(window_keys: int) -> None:
    """128 keys in one path and 129 in another: the token just outside the window must change nothing in any path."""
    config = small_config(window_keys=window_keys, layer_kinds=(SLIDING,), layer_is_moe=(False,), num_mtp_heads=0)
    model = random_model(config)
    tokens_BT = random_tokens(config, 1, 140)
    last = tokens_BT.shape[1] - 1
    documents_BT = torch.zeros_like(tokens_BT)
    outside_BT, inside_BT = tokens_BT.clone(), tokens_BT.clone()
    outside_BT[0, last - window_keys] = (outside_BT[0, last - window_keys] + 1) % config.vocab_size
    inside_BT[0, last - window_keys + 1] = (inside_BT[0, last - window_keys + 1] + 1) % config.vocab_size

    @torch.no_grad()
    def last_hidden(ids_BT: torch.Tensor) -> list[torch.Tensor]:
        cache = Cache(config, step_tokens=4)
        passes = [
            model(ids_BT, document_ids_BT=documents_BT).hidden_BTD,
            model(ids_BT, cache=cache).hidden_BTD,
            decode(model, ids_BT, last - 3, 1),
            decode(model, ids_BT, 2, 3),
        ]
        return [hidden_BTD[0, -1] for hidden_BTD in passes]

    same, changed = last_hidden(outside_BT), last_hidden(inside_BT)
    for path, hidden_D in enumerate(last_hidden(tokens_BT)):
        torch.testing.assert_close(same[path], hidden_D, atol=1e-6, rtol=0)
        assert (changed[path] - hidden_D).abs().max() > 1e-4


def geometry_bytes(geometry: AttentionConfig, slots: int) -> int:
    return 4 * slots * geometry.num_kv_heads * (geometry.qk_head_dim + geometry.v_head_dim)


@pytest.mark.parametrize("length", [1, 100, 1024, 4000, 8192])
def test_cache_bytes_follow_the_formula(length: int) -> None:
    """V padded to the QK dim, sliding layers that grow, or pages that grow by doubling."""
    config = preset("tiny")
    cache = Cache(config, batch_size=2, step_tokens=4)
    cache.begin_step(length)
    pages = -(-length // PAGE_TOKENS) * PAGE_TOKENS
    num_global = sum(kind is GLOBAL for kind in config.layer_kinds)
    num_rings = config.num_layers - num_global + config.num_mtp_heads
    expected = num_global * geometry_bytes(config.global_attention, pages)
    expected += num_rings * geometry_bytes(config.sliding_attention, 128 - 1 + 4)
    assert cache.num_bytes == 2 * expected
    if length >= 1024:
        exact = num_global * geometry_bytes(config.global_attention, length)
        exact += num_rings * geometry_bytes(config.sliding_attention, 128)
        assert cache.num_bytes == pytest.approx(2 * exact, rel=0.02)


def test_sliding_layers_stay_constant_while_text_grows() -> None:
    """A ring that grows with the text."""
    cache = Cache(small_config(), step_tokens=4)
    rings = [*cache.layers[1:3], *cache.mtp_heads]
    before = [ring.num_bytes for ring in rings]
    for _ in range(50):
        cache.begin_step(4)
        cache.commit(4)
    assert [ring.num_bytes for ring in rings] == before
    assert cache.layers[0].num_slots == 256


def test_rows_of_unequal_length_share_a_cache() -> None:
    """One row's position or mask used for another: rows copied in at different lengths, then decoded together."""
    model = random_model(small_config())
    lengths = (3, 30, 11)
    tokens_BT = random_tokens(model.config, 3, 50)
    shared = Cache(model.config, batch_size=3, step_tokens=3)
    with torch.no_grad():
        expected = model(tokens_BT).hidden_BTD
        for row, length in enumerate(lengths):
            single = Cache(model.config, step_tokens=3)
            model(tokens_BT[row : row + 1, :length], cache=single)
            single.commit(length)
            shared.copy_row(row, single)
        for _ in range(4):
            starts = shared.length_B.tolist()
            step_BT = torch.stack([tokens_BT[row, start : start + 3] for row, start in enumerate(starts)])
            hidden_BTD = model(step_BT, cache=shared).hidden_BTD
            for row, start in enumerate(starts):
                torch.testing.assert_close(hidden_BTD[row], expected[row, start : start + 3], atol=1e-5, rtol=0)
            shared.commit(torch.tensor([3, 1, 2]))
    assert shared.length_B.tolist() == [15, 34, 19]


@pytest.mark.parametrize("prompt", [2, 7, 30])
def test_short_prompts_padded_on_the_right_decode_as_if_alone(prompt: int) -> None:
    """Ragged prompts in one pass: either the short row's keys survive or the cache refuses to drop them silently."""
    model = random_model(small_config(num_mtp_heads=0))
    tokens_BT = random_tokens(model.config, 2, 40)
    cache = Cache(model.config, batch_size=2, step_tokens=4)
    kept_B = torch.tensor([prompt, 30])
    with torch.no_grad():
        model(tokens_BT[:, :30], cache=cache)
        if prompt < 30 - 4:
            with pytest.raises(ShapeError, match="at least 26 tokens of this step"):
                cache.commit(kept_B)
            return
        cache.commit(kept_B)
        next_B1 = tokens_BT.gather(1, kept_B[:, None])
        hidden_BTD = model(next_B1, cache=cache).hidden_BTD
        for row, length in enumerate(kept_B.tolist()):
            alone = model(tokens_BT[row : row + 1, : length + 1]).hidden_BTD[0, -1]
            torch.testing.assert_close(hidden_BTD[row, 0], alone, atol=1e-5, rtol=0)


def test_truncating_forgets_the_last_tokens() -> None:
    """Keys of forgotten tokens that are still seen, or older keys that are lost with them."""
    model = random_model(small_config())
    tokens_BT = random_tokens(model.config, 1, 30)
    cache = Cache(model.config, step_tokens=4)
    with torch.no_grad():
        model(tokens_BT[:, :25], cache=cache)
        cache.commit(25)
        cache.truncate(21)
        other_BT = (tokens_BT[:, 21:24] + 1) % 40
        hidden_BTD = model(other_BT, cache=cache).hidden_BTD
        expected = model(torch.cat((tokens_BT[:, :21], other_BT), dim=1)).hidden_BTD[:, 21:]
    torch.testing.assert_close(hidden_BTD, expected, atol=1e-5, rtol=0)


def test_one_token_alone_and_in_a_cache() -> None:
    """A sequence axis of 1 that is squeezed or broadcast."""
    model = random_model(small_config())
    tokens_BT = random_tokens(model.config, 3, 1)
    with torch.no_grad():
        output = model(tokens_BT)
        cached = model(tokens_BT, cache=Cache(model.config, batch_size=3))
        assert output.logits.shape == (3, 1, 40)
        assert output.mtp_logits(2).shape == (3, 1, 40)
        torch.testing.assert_close(cached.logits, output.logits, atol=1e-6, rtol=0)
        torch.testing.assert_close(model(tokens_BT[1:2]).logits, output.logits[1:2], atol=1e-5, rtol=0)


def test_writing_to_the_cache_keeps_no_graph() -> None:
    """A cache that holds on to every activation when used outside no_grad."""
    model = random_model(small_config())
    cache = Cache(model.config)
    model(random_tokens(model.config, 1, 6), cache=cache)
    assert not any(layer.k_BSGK.requires_grad or layer.v_BSGV.requires_grad for layer in cache.layers)


IDS = torch.zeros(2, 6, dtype=torch.int64)
BAD_CALLS = {
    "one axis": (lambda m: m(IDS[0]), r"input_ids has shape \(6,\)"),
    "no tokens": (lambda m: m(IDS[:, :0]), "at least one token"),
    "documents": (lambda m: m(IDS, document_ids_BT=IDS[:, :5]), r"document_ids \(2, 5\) must have the shape"),
    "positions": (lambda m: m(IDS, position_ids_BT=IDS[:1]), r"position_ids has shape \(1, 6\); expected \(2, 6\)"),
    "positions and cache": (lambda m: m(IDS, position_ids_BT=IDS, cache=Cache(m.config, batch_size=2)), "with a cache"),
    "cache of another batch": (lambda m: m(IDS, cache=Cache(m.config, batch_size=3)), "cache for 3 .* batch of 2"),
    "documents and cache": (lambda m: m(IDS, document_ids_BT=IDS, cache=Cache(m.config, batch_size=2)), "unpacked"),
    "routes": (lambda m: m(IDS, routed_experts_BTLk=IDS[..., None, None]), r"expected \(2, 6, 3, 2\)"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_inputs_that_do_not_fit_are_shape_errors(name: str) -> None:
    """An input that is broadcast, ignored or fails deep inside with another message."""
    call, message = BAD_CALLS[name]
    with pytest.raises(ShapeError, match=message):
        call(random_model(small_config()))


def test_routes_of_a_dense_model_are_an_error() -> None:
    """An empty or made-up record of routes."""
    model = random_model(small_config(moe=None, layer_is_moe=(False,) * 4))
    with pytest.raises(ShapeError, match="no sparse layers"):
        _ = model(IDS).routed_experts


def grown_cache(config: ModelConfig, tokens: int) -> Cache:
    cache = Cache(config, step_tokens=4)
    cache.begin_step(tokens)
    cache.commit(tokens)
    return cache


def test_a_step_wider_than_the_cache_was_made_for_is_an_error() -> None:
    """Drafts that overwrite keys which are still needed."""
    with pytest.raises(ShapeError, match="5 tokens in one step on a cache made for 4"):
        grown_cache(small_config(), 10).begin_step(5)


@pytest.mark.parametrize(("length", "message"), [(25, "at most its last 4"), (31, "31 tokens: .*holds .30")])
def test_truncating_too_far_or_forwards_is_an_error(length: int, message: str) -> None:
    """Forgetting more than the ring still has, or a length that was never reached."""
    with pytest.raises(ShapeError, match=message):
        grown_cache(small_config(), 30).truncate(length)
