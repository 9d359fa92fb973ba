"""Laws of the model: rejected drafts leave nothing behind, and packing changes nothing."""

from __future__ import annotations

from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig
from openmimo.model import Cache, MiMoModel
from openmimo.model.masks import branch_biases, visible_keys

VOCABULARY, STEP_TOKENS = 20, 4


@cache
def random_model(window_keys: int) -> MiMoModel:
    """Two dense layers, one of each kind, with weights of unit gain."""

    def attention(window: int | None) -> AttentionConfig:
        return AttentionConfig(
            num_heads=2,
            num_kv_heads=1,
            qk_head_dim=8,
            v_head_dim=4,
            rope_theta=50.0,
            sink=window is not None,
            window_keys=window,
        )

    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        dense_dim=8,
        layer_kinds=(AttentionKind.SLIDING, AttentionKind.GLOBAL),
        layer_is_moe=(False, False),
        global_attention=attention(None),
        sliding_attention=attention(window_keys),
        moe=None,
        num_mtp_heads=1,
        rope_fraction=0.5,
    )
    model = MiMoModel(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.detach().normal_(generator=generator)
        if parameter.ndim == 2:
            parameter.detach().mul_(parameter.shape[1] ** -0.5)
    return model


steps = st.lists(
    st.integers(1, STEP_TOKENS).flatmap(lambda n: st.tuples(st.just(n), *[st.integers(0, n)] * 2)), max_size=8
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(window_keys=st.sampled_from([1, 2, 3, 6, 9]), prompt=st.integers(1, 14), steps=steps, seed=st.integers(0, 99))
def test_any_sequence_of_accepted_and_rejected_drafts_equals_clean_decoding(
    window_keys: int, prompt: int, steps: list[tuple[int, int, int]], seed: int
) -> None:
    """A ring slot of a rejected draft that is seen later, or that overwrote a key still in the window."""
    model, generator = random_model(window_keys), torch.Generator().manual_seed(seed)
    text_BT = torch.randint(VOCABULARY, (2, prompt + STEP_TOKENS * (len(steps) + 1)), generator=generator)
    cache = Cache(model.config, batch_size=2, step_tokens=STEP_TOKENS)
    with torch.no_grad():
        expected = model(text_BT)
        model(text_BT[:, :prompt], cache=cache)
        cache.commit(prompt)
        for width, *kept in steps:
            starts = cache.length_B.tolist()
            drafts_BT = torch.randint(VOCABULARY, (2, width), generator=generator)
            for row, keep in enumerate(kept):
                drafts_BT[row, :keep] = text_BT[row, starts[row] : starts[row] + keep]
            output = model(drafts_BT, cache=cache)
            for row, keep in enumerate(kept):
                wanted = expected.hidden_BTD[row, starts[row] : starts[row] + keep]
                torch.testing.assert_close(output.hidden_BTD[row, :keep], wanted, atol=1e-5, rtol=0)
            cache.commit(torch.tensor(kept))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    window_keys=st.sampled_from([1, 2, 8, 9, 40]),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    padding=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_any_packing_equals_the_documents_alone(window_keys: int, lengths: list[int], padding: int, seed: int) -> None:
    """A document that sees its neighbour, padding that gives NaN, or an MTP head that sees past the window's start."""
    model, generator = random_model(window_keys), torch.Generator().manual_seed(seed)
    text_BT = torch.randint(VOCABULARY, (1, sum(lengths) + padding), generator=generator)
    ids_BT = torch.tensor([[i for i, length in enumerate(lengths) for _ in range(length)] + [-1] * padding])
    positions_BT = torch.tensor([[p for length in (*lengths, padding) for p in range(length)]])
    with torch.no_grad():
        packed = model(text_BT, document_ids_BT=ids_BT, position_ids_BT=positions_BT)
        assert bool(packed.logits.isfinite().all())
        start = 0
        for length in lengths:
            alone = model(text_BT[:, start : start + length])
            together = packed.hidden_BTD[:, start : start + length]
            # fp32 sums in another order: a few units in the last place of values around 3.
            torch.testing.assert_close(together, alone.hidden_BTD, atol=1e-5, rtol=1e-5)
            inside = packed.mtp_logits(0)[:, start : start + length - 1]
            torch.testing.assert_close(inside, alone.mtp_logits(0)[:, : length - 1], atol=1e-5, rtol=1e-5)
            start += length


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    window_keys=st.sampled_from([1, 2, 8, 9, 40]),
    documents=st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(1, 9), max_size=4)), min_size=1, max_size=3),
    padding=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_branches_equal_their_texts_alone(
    window_keys: int, documents: list[tuple[int, list[int]]], padding: int, seed: int
) -> None:
    """A branch that sees another, a window that counts places instead of positions, a beginning that is not seen whole;
    and a fused form (first keys and holes) whose keys are not those of the masks."""
    model, generator = random_model(window_keys), torch.Generator().manual_seed(seed)
    ids: list[int] = []
    branches: list[int] = []
    positions: list[int] = []
    texts: list[list[int]] = []  # the places of each text
    for document, (shared, lengths) in enumerate(documents):
        beginning = list(range(len(ids), len(ids) + shared))
        ids += [document] * shared
        branches += [0] * shared
        positions += range(shared)
        for branch, length in enumerate(lengths):
            texts.append(beginning + list(range(len(ids), len(ids) + length)))
            ids += [document] * length
            branches += [branch + 1] * length
            positions += range(shared, shared + length)
        texts += [] if lengths else [beginning]
    ids_BT, branches_BT = torch.tensor([ids + [-1] * padding]), torch.tensor([branches + [0] * padding])
    positions_BT = torch.tensor([positions + list(range(padding))])
    text_BT = torch.randint(VOCABULARY, ids_BT.shape, generator=generator)
    with torch.no_grad():
        packed = model(text_BT, document_ids_BT=ids_BT, branch_ids_BT=branches_BT, position_ids_BT=positions_BT)
        for places in texts:
            alone = model(text_BT[:, places])
            torch.testing.assert_close(packed.hidden_BTD[:, places], alone.hidden_BTD, atol=1e-5, rtol=1e-5)
    for window in (None, window_keys):
        (mask_BTS,) = branch_biases(ids_BT, branches_BT, positions_BT, window, torch.float32, sink=False)
        first_BT, hole_BT2 = visible_keys(ids_BT, branches_BT, window)
        assert hole_BT2 is not None
        keys, queries = torch.arange(ids_BT.shape[1]), torch.arange(ids_BT.shape[1])[:, None]
        seen_BTS = (keys >= first_BT[:, :, None]) & (keys <= queries)
        seen_BTS &= (keys < hole_BT2[:, :, :1]) | (keys >= hole_BT2[:, :, 1:])
        assert torch.equal(seen_BTS, mask_BTS == 0)
        holes_BT = hole_BT2[:, :, 0] < hole_BT2[:, :, 1]
        assert bool((first_BT < hole_BT2[:, :, 0])[holes_BT].all())  # what the kernel relies on
