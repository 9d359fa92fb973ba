"""Speculative decoding equals plain decoding for any model, prompts, drafts and batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openmimo.config.model import preset
from openmimo.engine import Engine, SamplingParams
from openmimo.engine.speculate import Drafter, count_kept
from openmimo.model import Cache, build_model


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    heads=st.integers(1, 3),
    max_batch=st.integers(1, 4),
    max_tokens=st.integers(1, 12),
)
def test_any_mix_of_right_and_wrong_drafts_gives_the_plain_text(
    lengths: list[int], seed: int, heads: int, max_batch: int, max_tokens: int
) -> None:
    """Right drafts come from a table of the true text, so every pattern of kept and rejected drafts occurs."""
    config = preset("nano").replace(vocab_size=64, hidden_size=32, dense_dim=32)
    model = build_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, 64, (length,), generator=generator).tolist() for length in lengths]
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    plain = [done.token_ids for done in Engine(model, draft_heads=0, max_batch=max_batch).generate(prompts, params)]
    follows = {
        (len(prompt) + place, text[place]): text[place + 1 :]
        for prompt, text in zip(prompts, plain, strict=True)
        for place in range(len(text))
    }
    genuine = Drafter.draft

    def draft(self: Drafter, last_B: Tensor, cache: Cache) -> Tensor:
        drafts_BK = genuine(self, last_B, cache)
        for row, key in enumerate(zip(cache.length_B.tolist(), last_B.tolist(), strict=True)):
            true = list(follows.get(key, ()))[: int(torch.randint(0, 4, (), generator=generator))]
            drafts_BK[row, : len(true)] = torch.tensor(true[: self.num_drafts], dtype=torch.int64)
        return drafts_BK

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafter, "draft", draft)
        drafted = Engine(model, draft_heads=heads, max_batch=max_batch).generate(prompts, params)
    assert [done.token_ids for done in drafted] == plain


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=6), st.integers(0, 9))
def test_count_kept_is_the_length_of_the_agreeing_prefix_plus_one(
    pairs: list[tuple[int, int]], num_drafts: int
) -> None:
    num_drafts = min(num_drafts, len(pairs))
    window_BT = torch.tensor([[0, *(drafted for drafted, _ in pairs)]])
    choices_BT = torch.tensor([[*(chosen for _, chosen in pairs), 0]])
    expected = 1
    for drafted, chosen in pairs[:num_drafts]:
        if drafted != chosen:
            break
        expected += 1
    assert count_kept(window_BT, choices_BT, num_drafts).tolist() == [expected]
