"""Sparse layers: dispatch, router, replay, balance."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_oracle import random_model, random_tokens, small_config
from torch import Tensor

from openmimo.config.model import MoEConfig
from openmimo.model import build_model, cast_model
from openmimo.model.moe import Experts, Router, SparseMLP, sequence_balance_loss, update_balance_bias


def make_experts(num_experts: int, *, hidden: int = 12, width: int = 8) -> Experts:
    experts = Experts(hidden, MoEConfig(num_experts=num_experts, num_experts_per_token=1, expert_dim=width))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.shape[1]))
    return experts


def loop_experts(experts: Experts, x_ND: Tensor, chosen_Nk: Tensor, weights_Nk: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Expert by expert in float64, differentiable: output and the copies of the two weights."""
    gate_up, down = (p.detach().double().requires_grad_() for p in (experts.gate_up_proj, experts.down_proj))
    y_ND = torch.zeros_like(x_ND)
    for expert in range(len(experts.down_proj)):
        for column in range(chosen_Nk.shape[1]):
            rows = (chosen_Nk[:, column] == expert).nonzero()[:, 0]
            gate, up = (x_ND[rows] @ gate_up[expert].T).chunk(2, dim=-1)
            y_ND = y_ND.index_add(0, rows, weights_Nk[rows, column, None] * ((F.silu(gate) * up) @ down[expert].T))
    return y_ND, [gate_up, down]


ROUTES = {
    "random": lambda n, k, e: torch.stack([torch.randperm(e)[:k] for _ in range(n)]),
    "all tokens to one expert": lambda n, k, e: torch.full((n, k), e - 2),
    "last expert unused": lambda n, k, e: torch.randint(e - 1, (n, k)),
}


@pytest.mark.parametrize("num_used", [3, 30])
@pytest.mark.parametrize("num_tokens", [1, 4, 40])
def test_static_experts_are_the_same(num_tokens: int, num_used: int) -> None:
    """Catches either static form that takes a wrong weight, expert or count; 1 and 4 tokens copy weights here."""
    experts = make_experts(30)
    x_ND, weights_Nk = torch.randn(num_tokens, 12), torch.rand(num_tokens, 2)
    chosen_Nk = torch.stack([torch.randperm(num_used)[:2] for _ in range(num_tokens)])
    expected_ND, _ = loop_experts(experts, x_ND.double(), chosen_Nk, weights_Nk.double())
    with torch.inference_mode():
        y_ND, tokens_per_expert_E = experts(x_ND, chosen_Nk, weights_Nk, static=True)
    torch.testing.assert_close(y_ND.double(), expected_ND, rtol=0, atol=1e-5)
    assert torch.equal(tokens_per_expert_E, chosen_Nk.flatten().bincount(minlength=30))


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("sizes", [(12, 8), (10, 7)], ids=["whole 16 bytes", "any width"])
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), [(1, 1, 4), (29, 3, 5), (700, 2, 3)])
def test_experts_match_a_loop_with_gradients(
    routes: str, sizes: tuple[int, int], num_tokens: int, top_k: int, num_experts: int
) -> None:
    """A dropped, doubled or misplaced token, few rows and rows padded to a multiple; stray weight gradients."""
    torch.manual_seed(num_tokens)
    hidden, width = sizes
    experts = make_experts(num_experts, hidden=hidden, width=width)
    chosen_Nk = ROUTES[routes](num_tokens, top_k, num_experts)
    x_ND, weights_Nk = (
        torch.randn(num_tokens, hidden, requires_grad=True),
        torch.rand(num_tokens, top_k, requires_grad=True),
    )
    direction_ND = torch.randn(num_tokens, hidden)
    y_ND, load_E = experts(x_ND, chosen_Nk, weights_Nk)
    (y_ND * direction_ND).sum().backward()

    x64_ND, weights64_Nk = (x.detach().double().requires_grad_() for x in (x_ND, weights_Nk))
    expected_ND, parameters = loop_experts(experts, x64_ND, chosen_Nk, weights64_Nk)
    (expected_ND * direction_ND.double()).sum().backward()
    pairs = [(y_ND, expected_ND), (x_ND.grad, x64_ND.grad), (weights_Nk.grad, weights64_Nk.grad)]
    pairs += [(experts.gate_up_proj.grad, parameters[0].grad), (experts.down_proj.grad, parameters[1].grad)]
    for ours, exact in pairs:
        assert ours is not None
        assert exact is not None
        torch.testing.assert_close(
            ours.double(), exact, atol=2e-6 * max(1.0, float(exact.detach().abs().max())), rtol=0
        )
    assert load_E.tolist() == torch.bincount(chosen_Nk.flatten(), minlength=num_experts).tolist()


def test_a_sequence_in_which_all_tokens_choose_one_expert_drops_none() -> None:
    """A capacity limit: with the same token everywhere all choices fall on the same experts."""
    model = random_model(small_config())
    tokens_BT = torch.full((1, 64), 7)
    with torch.no_grad():
        many, one = model(tokens_BT), model(tokens_BT[:, :1])
    assert many.routing[0].tokens_per_expert_E.sum() == 128
    assert int((many.routing[0].tokens_per_expert_E > 0).sum()) == 2
    torch.testing.assert_close(many.hidden_BTD[:, :1], one.hidden_BTD, atol=1e-5, rtol=0)
    torch.testing.assert_close(many.hidden_BTD[:, 63:], many.hidden_BTD[:, 62:63], atol=1.0, rtol=0)


def test_replaying_the_own_routes_gives_the_same_logits_and_other_routes_others() -> None:
    """Replay that reorders layers or columns, or that is ignored."""
    model = random_model(small_config())
    tokens_BT = random_tokens(model.config, 2, 9)
    with torch.no_grad():
        free = model(tokens_BT)
        routes = free.routed_experts
        assert routes.dtype == torch.uint8
        assert routes.shape == (2, 9, 3, 2)
        assert torch.equal(model(tokens_BT, routed_experts_BTLk=routes).logits, free.logits)
        swapped = model(tokens_BT, routed_experts_BTLk=routes.flip(-1))
        torch.testing.assert_close(swapped.logits, free.logits, atol=1e-5, rtol=0)
        shifted = model(tokens_BT, routed_experts_BTLk=(routes + 1) % 5)
        assert torch.equal(shifted.routed_experts, (routes + 1) % 5)
        assert (shifted.logits - free.logits).abs().max() > 0.1
        other_layer = model(tokens_BT, routed_experts_BTLk=routes.flip(2))
        assert (other_layer.logits - free.logits).abs().max() > 0.1


def test_replay_trains_the_router_for_experts_that_it_would_not_choose() -> None:
    """Weights of replayed experts that are masked, detached or taken from the local top-k."""
    router = Router(8, MoEConfig(num_experts=6, num_experts_per_token=2, expert_dim=4))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x_ND = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        worst_Nk = router(x_ND).scores_NE.argsort(dim=1)[:, :2]
    routing = router(x_ND, worst_Nk)
    scores = torch.sigmoid(x_ND @ router.weight.detach().T).gather(1, worst_Nk)
    torch.testing.assert_close(routing.weights_Nk.detach(), scores / scores.sum(1, keepdim=True))
    routing.weights_Nk[:, 0].sum().backward()
    assert router.weight.grad is not None
    touched = router.weight.grad.abs().sum(1) > 0
    assert set(touched.nonzero()[:, 0].tolist()) == set(worst_Nk.flatten().tolist())


def test_router_weights_get_the_gradient_of_the_loss() -> None:
    """A router that is cut off from the loss, or a balance bias that takes a gradient."""
    layer = SparseMLP(8, MoEConfig(num_experts=4, num_experts_per_token=2, expert_dim=4))
    for index, parameter in enumerate(layer.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    x_BTD = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(9))
    direction_BTD = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(10))

    def loss() -> Tensor:
        return (layer(x_BTD)[0] * direction_BTD).sum()

    loss().backward()
    gradient = layer.gate.weight.grad
    assert gradient is not None
    numeric = torch.zeros_like(gradient)
    with torch.no_grad():
        for index in range(gradient.numel()):
            step = torch.zeros(gradient.numel()).index_fill_(0, torch.tensor([index]), 1e-3).view_as(gradient)
            layer.gate.weight += step
            high = loss()
            layer.gate.weight -= 2 * step
            numeric.view(-1)[index] = (high - loss()) / 2e-3
            layer.gate.weight += step
    torch.testing.assert_close(gradient, numeric, atol=2e-2, rtol=2e-2)
    assert not layer.gate.e_score_correction_bias.requires_grad


def test_balance_bias_raises_unused_and_lowers_overused_experts() -> None:
    """A sign error, which would make a popular expert more popular."""
    router = Router(4, MoEConfig(num_experts=4, num_experts_per_token=1, expert_dim=4))
    update_balance_bias(router, torch.tensor([10, 0, 5, 5]), 0.25)
    assert router.e_score_correction_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]


def test_balance_bias_spreads_the_load() -> None:
    """The whole loop of choice and update: repeated updates must lower the greatest load."""
    router = Router(8, MoEConfig(num_experts=6, num_experts_per_token=2, expert_dim=4))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x_ND = torch.randn(300, 8, generator=torch.Generator().manual_seed(1)) + 1.0

    def load() -> Tensor:
        return torch.bincount(router(x_ND).experts_Nk.flatten(), minlength=6)

    before = load()
    for _ in range(200):
        update_balance_bias(router, load(), 0.01)
    assert before.max() > 150
    assert load().max() < 120


def test_sequence_balance_loss_is_one_when_even_and_matches_a_loop() -> None:
    """A wrong normaliser, or a mean over the batch before the product, which hides per-sequence imbalance."""
    even_BTE = torch.full((2, 6, 4), 0.3)
    experts_BTk = torch.tensor([[[0, 1], [2, 3]] * 3] * 2)
    torch.testing.assert_close(sequence_balance_loss(even_BTE, experts_BTk), torch.tensor(1.0))

    scores_BTE = torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(0))
    chosen_BTk = scores_BTE.topk(2, dim=-1).indices
    total = 0.0
    for scores_TE, chosen_Tk in zip(scores_BTE.tolist(), chosen_BTk.tolist(), strict=True):
        for expert in range(5):
            fraction = 5 / (2 * 7) * sum(chosen.count(expert) for chosen in chosen_Tk)
            total += fraction * sum(scores[expert] / sum(scores) for scores in scores_TE) / 7
    assert float(sequence_balance_loss(scores_BTE, chosen_BTk)) == pytest.approx(total / 3, rel=1e-5)

    apart_BTE = torch.tensor([[[0.9, 0.1]] * 4, [[0.1, 0.9]] * 4])
    assert float(sequence_balance_loss(apart_BTE, apart_BTE.topk(1, dim=-1).indices)) == pytest.approx(1.8)


def test_casting_the_model_keeps_every_bit_of_the_router() -> None:
    """Router weights or biases rounded to bfloat16 on the way, which changes the choice of experts."""
    model = random_model(small_config())
    expected = [(router.weight.clone(), router.e_score_correction_bias.clone()) for router in model.routers()]
    cast_model(model, torch.bfloat16)
    assert model.layers[1].mlp.experts.down_proj.dtype == model.embed_tokens.weight.dtype == torch.bfloat16
    for router, (weight, bias) in zip(model.routers(), expected, strict=True):
        assert torch.equal(router.weight, weight)
        assert torch.equal(router.e_score_correction_bias, bias)


def test_tied_embeddings_stay_tied_through_casts() -> None:
    """A cast that gives the output head its own copy."""
    model = build_model(small_config(tie_embeddings=True), dtype=torch.bfloat16)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_more_than_256_experts_are_reported_in_sixteen_bits() -> None:
    """Expert 256 and above wrapping round in the record of routes."""
    moe = MoEConfig(num_experts=300, num_experts_per_token=2, expert_dim=4)
    model = random_model(small_config(moe=moe))
    for router in model.routers():
        router.e_score_correction_bias.zero_()[298:] = 5.0
    with torch.no_grad():
        routes = model(random_tokens(model.config, 1, 3)).routed_experts
        assert routes.dtype == torch.uint16
        assert set(routes.flatten().tolist()) == {298, 299}
        again = model(random_tokens(model.config, 1, 3), routed_experts_BTLk=routes)
    assert torch.equal(again.routed_experts.int(), routes.int())
