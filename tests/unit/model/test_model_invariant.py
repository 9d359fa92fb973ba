"""The invariant mode: bits of a token's results depend on its context alone; gradients are those of the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from model_oracle import random_model, random_tokens, small_config
from torch import Tensor

from openmimo.errors import ShapeError
from openmimo.kernels import invariant, native
from openmimo.model import Cache, MiMoModel, ModelOutput, replicate_mtp_head
from openmimo.model.linear import Linear
from openmimo.train.losses import language_model_losses


@pytest.fixture(params=["C++", "PyTorch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels, and the form that runs without a compiler."""
    if request.param == "PyTorch":
        monkeypatch.setattr(invariant, "native_kernels", lambda: native.NativeKernels(None, "switched off"))
    elif native.native_kernels().library is None:
        pytest.skip(native.native_kernels().status)
    return request.param


LENGTHS = (1, 5, 16, 17, 70, 140)
Results = list[tuple[Tensor, ...]]  # of every text: logits, routes, and what the heads give


def make_texts(model: MiMoModel) -> list[Tensor]:
    return [random_tokens(model.config, 1, length)[0] for length in LENGTHS]


def run(model: MiMoModel, rows: Sequence[Sequence[int]], texts: list[Tensor], replay: Results | None = None) -> Results:
    """One training pass over rows of packed texts, named by number; what it gave for every text."""
    width = max(sum(len(texts[text]) for text in row) for row in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    positions_BT, documents_BT = torch.arange(width).repeat(len(rows), 1), torch.full_like(ids_BT, -1)
    moe = model.config.moe
    assert moe is not None
    replay_BTLk = torch.zeros(len(rows), width, model.config.num_moe_layers, moe.num_experts_per_token, dtype=int)
    places: dict[int, tuple[int, slice]] = {}
    for place, row in enumerate(rows):
        start = 0
        for text in row:
            part = slice(start, start + len(texts[text]))
            ids_BT[place, part], documents_BT[place, part] = texts[text], text
            positions_BT[place, part] = torch.arange(len(texts[text]))
            if replay is not None:
                replay_BTLk[place, part] = replay[text][1]
            places[text] = place, part
            start = part.stop
        positions_BT[place, start:] -= start
    routed = {} if replay is None else {"routed_experts_BTLk": replay_BTLk}
    output = model(ids_BT, position_ids_BT=positions_BT, document_ids_BT=documents_BT, **routed)
    return [results_of(output, *places[text]) for text in sorted(places)]


def results_of(output: ModelOutput, row: int, part: slice) -> tuple[Tensor, ...]:
    """The last positions of a head see ids of the next document."""
    heads = [
        output.mtp_logits(head)[row, part.start : max(part.start, part.stop - 1 - head)]
        for head in range(output.model.config.num_mtp_heads)
    ]
    return output.logits[row, part], output.routed_experts[row, part].long(), *heads


def assert_same_bits(found: Results, expected: Results) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        for x, y in zip(mine, theirs, strict=True):
            assert torch.equal(x, y)


PACKINGS = (
    [[0, 1, 2, 3, 4, 5]],
    [[5, 4, 3, 2, 1, 0]],
    [[3, 5], [1, 4, 0, 2]],
    [[4], [2, 0], [5], [1, 3]],
)


@torch.no_grad()
@pytest.mark.parametrize("window_keys", [5, 40])
def test_packing_and_batch_change_no_bit(form: str, window_keys: int) -> None:
    """Catches products by shape, sums over keys from a row's start, and choices that depend on neighbours."""
    model = random_model(small_config(window_keys=window_keys)).set_invariant()
    texts = make_texts(model)
    expected = [run(model, [[0]], [text])[0] for text in texts]
    for packing in PACKINGS:
        found = run(model, packing, texts)
        assert_same_bits(found, expected)
    assert_same_bits(run(model, PACKINGS[2], texts, replay=expected), expected)


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 3, 4])
def test_decoding_with_a_cache_changes_no_bit(form: str, step: int) -> None:
    """Catches sums in the order of a ring's slots, and pages whose empty slots take part."""
    model = random_model(small_config(window_keys=23)).set_invariant()
    tokens_BT = random_tokens(model.config, 3, 90)
    expected = model(tokens_BT)
    cache = Cache(model.config, batch_size=3, step_tokens=step)
    start = 0
    for size in (30, *[step] * (60 // step)):
        output = model(tokens_BT[:, start : start + size], cache=cache)
        cache.commit(output.hidden_BTD.shape[1])
        part = slice(start, start + size)
        assert torch.equal(output.logits, expected.logits[:, part])
        assert torch.equal(output.routed_experts, expected.routed_experts[:, part])
        start += size


@torch.no_grad()
def test_both_forms_and_any_threads_give_one_result() -> None:
    """Catches a trainer with a compiler and a sampler without one that disagree."""
    if native.native_kernels().library is None:
        pytest.skip(native.native_kernels().status)
    model = random_model(small_config()).set_invariant()
    texts = make_texts(model)
    expected = run(model, PACKINGS[0], texts)
    torch.set_num_threads(1)
    assert_same_bits(run(model, PACKINGS[0], texts), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(invariant, "native_kernels", lambda: native.NativeKernels(None, "switched off"))
        assert_same_bits(run(model, PACKINGS[0], texts), expected)


@torch.no_grad()
def test_one_ordinary_product_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: with the library's product in one layer it fails."""
    model = random_model(small_config()).set_invariant()
    texts = make_texts(model)
    product = model.layers[1].self_attn.o_proj
    assert isinstance(product, Linear)
    monkeypatch.setattr(product, "forward", lambda x: F.linear(x, product.weight))
    expected = [run(model, [[0]], [text])[0] for text in texts]
    found = [run(model, packing, texts) for packing in PACKINGS]
    with pytest.raises(AssertionError):
        assert_same_bits([text for each in found for text in each], expected * len(PACKINGS))


def losses_of(model: MiMoModel, ids_BT: Tensor, *, replay: Tensor | None = None) -> tuple[Tensor, ModelOutput]:
    documents_BT = torch.tensor([[0] * 30 + [1] * 27, [2] * 50 + [-1] * 7])
    positions_BT = torch.cat((torch.arange(30), torch.arange(27))), torch.cat((torch.arange(50), torch.arange(7)))
    output = model(
        ids_BT,
        position_ids_BT=torch.stack(positions_BT),
        document_ids_BT=documents_BT,
        routed_experts_BTLk=replay,
    )
    losses = language_model_losses(
        output, documents_BT, documents_BT >= 0, num_mtp_heads=1, mtp_weight=0.3, balance_weight=0.1
    )
    return losses.total + 1e-3 * output.logits.square().mean(), output


def gradients(model: MiMoModel, ids_BT: Tensor, replay: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    losses_of(model, ids_BT, replay=replay)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_loss_and_gradients_are_those_of_the_ordinary_pass(form: str) -> None:
    """Catches gradients that miss a path: the sink, the router, replayed experts, heads, the embedding twice used."""
    model = random_model(small_config())
    ids_BT = random_tokens(model.config, 2, 57)
    loss, output = losses_of(model, ids_BT)
    expected = gradients(model, ids_BT)
    model.set_invariant()
    other, found = losses_of(model, ids_BT)
    assert torch.equal(found.routed_experts, output.routed_experts)
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.logits, output.logits, rtol=0, atol=2e-5)
    for replay in (None, output.routed_experts):
        grads = gradients(model, ids_BT, replay)
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-9, name


def test_gradients_agree_with_finite_differences() -> None:
    """The backward passes against the forward itself in float64, along a random direction of every parameter."""
    model = random_model(small_config()).double().set_invariant()
    ids_BT = random_tokens(model.config, 2, 57)
    documents_BT = torch.tensor([[0] * 30 + [1] * 27, [2] * 57])
    replay = model(ids_BT, document_ids_BT=documents_BT).routed_experts

    def loss() -> Tensor:
        output = model(ids_BT, document_ids_BT=documents_BT, routed_experts_BTLk=replay)
        heads = sum(output.mtp_logits(head).sin().mean() for head in range(model.config.num_mtp_heads))
        return output.logits.log_softmax(-1).square().mean() + heads + sum(each.balance_loss for each in output.routing)

    loss().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == dict(model.named_parameters()).keys()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        direction /= direction.norm()
        values: list[float] = []
        with torch.no_grad():
            for step in (1e-4, -1e-4):
                parameter += step * direction
                with torch.enable_grad():  # without, there is no balance loss
                    values.append(loss().item())
                parameter -= step * direction
        slope = float((grads[name] * direction).sum())
        assert (values[0] - values[1]) / 2e-4 == pytest.approx(slope, rel=2e-4, abs=2e-6), name


def test_the_mode_belongs_to_the_model() -> None:
    """Catches a mode that is global, is lost by a copy or a new head, or cannot be left again."""
    model = random_model(small_config(num_mtp_heads=1))
    ids_BT = random_tokens(model.config, 1, 20)
    before = model(ids_BT).logits
    other = copy.deepcopy(model).set_invariant()
    assert other.invariant
    assert copy.deepcopy(other).layers[0].self_attn.qkv_proj.invariant
    assert replicate_mtp_head(other, 2).mtp_heads[1].eh_proj.invariant
    assert not model.invariant
    assert torch.equal(model(ids_BT).logits, before)
    assert torch.equal(other.set_invariant(False)(ids_BT).logits, before)


def test_unusable_input_is_refused() -> None:
    """bf16 would lose what the mode is for; positions that do not count up have no order to sum in."""
    model = random_model(small_config()).set_invariant()
    ids_BT = random_tokens(model.config, 1, 20)
    with pytest.raises(ShapeError, match="count up by one"):
        model(ids_BT, position_ids_BT=torch.arange(20)[None] // 2)
    with pytest.raises(ShapeError, match="fp32"):
        model.bfloat16()(ids_BT)
