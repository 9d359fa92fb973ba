"""Drafting must change how fast a text comes and never the text."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from engine_fakes import (
    awkward_prompts,
    generate_ids,
    make_engine,
    plain_tokens,
    plant_drafts,
    small_config,
    small_model,
)

from openmimo.engine import SamplingParams


def test_text_of_random_models_does_not_depend_on_the_number_of_heads() -> None:
    """The hardest model: near-uniform logits. Catches caches, positions or rows mixed up by rejected drafts."""
    model, prompts = small_model(), awkward_prompts(20)
    plain = generate_ids(make_engine(model, 0), prompts, 64)
    for draft_heads in (1, 2, 3, "auto"):
        assert generate_ids(make_engine(model, draft_heads), prompts, 64) == plain, draft_heads


def test_engine_equals_a_whole_forward_pass_per_token() -> None:
    """Catches what plain and drafted decoding could get wrong together: the cached path itself."""
    model, prompts = small_model(seed=3), awkward_prompts(9)
    assert generate_ids(make_engine(model), prompts, 20) == plain_tokens(model, prompts, 20)


def test_perfect_drafts_give_four_tokens_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a verifier that judges a draft against the wrong position or loses the bonus token."""
    model, prompts = small_model(), awkward_prompts(6)
    texts = generate_ids(make_engine(model, 0), prompts, 41)
    plant_drafts(monkeypatch, prompts, texts, lambda step, true_SK: true_SK)
    done = make_engine(model).generate(prompts, SamplingParams(max_tokens=41, ignore_eos=True))
    assert [each.token_ids for each in done] == texts
    assert all(each.draft.histogram == (0, 0, 0, 10) and each.draft.acceptance_length == 4.0 for each in done)
    assert done[0].draft.per_head == (1.0, 1.0, 1.0)


def test_wrong_drafts_give_one_token_per_step_and_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rejected drafts that leave a trace."""
    model, prompts = small_model(), awkward_prompts(6)
    texts = generate_ids(make_engine(model, 0), prompts, 30)
    plant_drafts(monkeypatch, prompts, texts, lambda step, true_SK: (true_SK + 1) % 256)
    done = make_engine(model).generate(prompts, SamplingParams(max_tokens=30, ignore_eos=True))
    assert [each.token_ids for each in done] == texts
    assert all(each.draft.histogram == (29, 0, 0, 0) and each.draft.acceptance_length == 1.0 for each in done)


def _sometimes_wrong(step: int, true_SK: np.ndarray) -> np.ndarray:
    """Keeps 0, 1, 2 or 3 drafts, differently in every row and step."""
    rows, drafts = true_SK.shape
    first_wrong_S1 = np.random.default_rng(step).integers(0, drafts + 1, (rows, 1))
    return np.where(np.arange(drafts) == first_wrong_S1, (true_SK + 1) % 256, true_SK)


def test_rows_that_keep_different_numbers_of_drafts_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches commits that move all rows alike, and ring slots overwritten by neighbours' drafts."""
    model, prompts = small_model(), awkward_prompts(10)
    texts = generate_ids(make_engine(model, 0), prompts, 50)
    plant_drafts(monkeypatch, prompts, texts, _sometimes_wrong)
    done = make_engine(model).generate(prompts, SamplingParams(max_tokens=50, ignore_eos=True))
    assert [each.token_ids for each in done] == texts
    assert all(count > 0 for count in done[0].draft.histogram)


@pytest.mark.parametrize("draft_heads", [1, 2, 3])
def test_heads_draft_exactly_what_a_teacher_forced_pass_predicts(
    monkeypatch: pytest.MonkeyPatch, draft_heads: int
) -> None:
    """Head k at the last position must equal `mtp_logits(k)` of a pass over the text and the earlier drafts.

    Catches the wrong hidden state, a wrong shift or position, heads that skip positions, and cache entries made
    from rejected drafts: acceptance would fall without any wrong text.
    """
    model, prompts = small_model(seed=1), awkward_prompts(12)[::3]
    with torch.no_grad():  # make every cached key of a head count
        for head in model.mtp_heads:
            head.self_attn.qkv_proj.weight.mul_(8)
            head.self_attn.o_proj.weight.mul_(8)
    texts = generate_ids(make_engine(model, 0), prompts, 24)
    record = plant_drafts(monkeypatch, prompts, texts, _sometimes_wrong)
    generate_ids(make_engine(model, draft_heads), prompts, 24)
    assert len(record) >= 24
    for (row, position), drafts in record:
        known = [*prompts[row], *texts[row]][: position + 1]
        if position + 1 > len(prompts[row]) + len(texts[row]) - 1:
            continue  # the row had finished and idles
        with torch.inference_mode():
            output = model(torch.tensor([known + drafts]))
            for head, drafted in enumerate(drafts):
                logits_V = output.mtp_logits(head)[0, position - 1]
                assert logits_V[drafted] >= logits_V.max() - 1e-5, (row, position, head)


@pytest.mark.parametrize("sink", [True, False])
def test_prompts_shorter_than_the_head_window(monkeypatch: pytest.MonkeyPatch, sink: bool) -> None:
    """Head passes reach below position 0 there; without a sink those rows see no key. Catches a leak of NaN."""
    sliding = dataclasses.replace(small_config().sliding_attention, sink=sink)
    model, prompts = small_model(sliding_attention=sliding), [[5], [6, 7], [8, 9, 10]]
    texts = plain_tokens(model, prompts, 12)
    plant_drafts(monkeypatch, prompts, texts, _sometimes_wrong)
    assert generate_ids(make_engine(model), prompts, 12) == texts
