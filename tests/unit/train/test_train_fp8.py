"""FP8 training: the operands' bits, what stays in bf16, and that it learns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchao")

from openmimo.config.model import preset
from openmimo.config.recipe import load_recipe
from openmimo.config.train import TrainRecipe
from openmimo.errors import ConfigError
from openmimo.model import MiMoModel, build_model
from openmimo.model.moe import Experts
from openmimo.train import fp8
from openmimo.train.fp8 import use_fp8
from openmimo.train.loop import train
from openmimo.train.plots import read_metrics

CPU = torch.device("cpu")
# All numbers of e4m3 that are not negative: 3 bits of mantissa, subnormal below 2^-6, 448 at most.
E4M3 = sorted({m * 2.0**-9 for m in range(8)} | {(8 + m) * 2.0 ** (e - 3) for e in range(-6, 9) for m in range(8)})[:-1]


def rounded(value: float) -> float:
    """The nearest number of e4m3; of two equally near ones that with an even mantissa."""
    size = min(abs(value), E4M3[-1])
    best = min(range(len(E4M3)), key=lambda i: (abs(E4M3[i] - size), i % 2))
    return math.copysign(E4M3[best], value)


def as_seen(rows: Tensor) -> Tensor:
    """Each row's values after rounding with its scale, in float64: what a product really multiplies."""
    seen: list[list[float]] = []
    for row in rows.double().tolist():
        scale = 2.0 ** math.floor(math.log2(448 / max(map(abs, row))))
        seen.append([rounded(value * scale) / scale for value in row])
    return torch.tensor(seen, dtype=torch.float64)


def converted(name: str = "nano") -> MiMoModel:
    model = build_model(preset(name), seed=1, dtype=torch.bfloat16)
    use_fp8(model, CPU)
    return model


def test_all_numbers_of_the_format_are_there() -> None:
    assert len(E4M3) == 127
    finite = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert finite.tolist() == E4M3


def test_products_multiply_what_was_rounded() -> None:
    """Catches operands in bf16, scales of whole tensors or of the other dim, and a gradient of unrounded operands."""
    linear = converted().layers[1].self_attn.qkv_proj
    generator = torch.Generator().manual_seed(0)
    x_ND = (torch.randn(24, linear.in_features, generator=generator) * torch.logspace(-3, 3, 24)[:, None]).bfloat16()
    grad_NF = torch.randn(24, linear.out_features, generator=generator).bfloat16()
    y_NF = linear(x_ND.requires_grad_())
    y_NF.backward(grad_NF)
    assert x_ND.grad is not None
    grad_ND, x_ND, weight_FD = x_ND.grad, x_ND.detach(), linear.weight.detach()
    close = {"rtol": 2**-8, "atol": 1e-6}  # the result is rounded to bf16
    want = as_seen(x_ND) @ as_seen(weight_FD).T
    torch.testing.assert_close(y_NF.double(), want, **close)
    assert not torch.allclose(y_NF.double(), x_ND.double() @ weight_FD.double().T, **close)
    want = as_seen(grad_NF) @ as_seen(weight_FD.T).T
    torch.testing.assert_close(grad_ND.double(), want, rtol=2**-8, atol=1e-4)
    grad_FD = as_seen(grad_NF.T) @ as_seen(x_ND.T).T
    assert linear.weight.grad is not None
    torch.testing.assert_close(linear.weight.grad.double(), grad_FD, rtol=2**-8, atol=1e-4)


def test_experts_multiply_what_was_rounded() -> None:
    """Catches an expert that is left in bf16, rows that meet another expert's weights, and one without rows."""
    experts = next(module for module in converted().modules() if isinstance(module, Experts))
    assert experts.product is not None
    num_experts, hidden, width = experts.down_proj.shape
    x_ND = torch.randn(9, hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    choices_Nk = torch.tensor([[0, 3]] * 4 + [[3, 5]] * 5)
    weights_Nk = torch.full((9, 2), 0.5)
    y_ND, counts_E = experts(x_ND, choices_Nk, weights_Nk)
    assert counts_E.tolist() == [4, 0, 0, 9, 0, 5, *[0] * (num_experts - 6)]
    want_ND = torch.zeros(9, hidden, dtype=torch.float64)
    for token, choices in enumerate(choices_Nk.tolist()):
        for expert in choices:
            gate_up = as_seen(x_ND[token, None]) @ as_seen(experts.gate_up_proj[expert].detach()).T
            gate, up = gate_up.bfloat16()[0].float().split(width)
            hidden_F = (torch.nn.functional.silu(gate).bfloat16() * up.bfloat16())[None]
            want_ND[token] += 0.5 * (as_seen(hidden_F) @ as_seen(experts.down_proj[expert].detach()).T)[0]
    torch.testing.assert_close(y_ND.double(), want_ND, rtol=0.02, atol=0.02 * want_ND.abs().max().item())


def test_what_the_report_keeps_in_bf16_stays() -> None:
    """Catches an output projection or head in FP8, a layer or MTP head left out, and parameters that are replaced."""
    model = build_model(preset("nano"), seed=1, dtype=torch.bfloat16)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    use_fp8(model, CPU)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "in_features")}
    kept = {name.rpartition(".")[2] for name, kind in kinds.items() if kind != "Float8Linear"}
    assert kept == {"o_proj", "lm_head"}
    assert {name.rpartition(".")[2] for name, kind in kinds.items() if kind == "Float8Linear"} == {
        "qkv_proj",
        "gate_up_proj",
        "down_proj",
        "eh_proj",
    }
    assert all(module.product is not None for module in model.modules() if isinstance(module, Experts))


def test_it_learns_as_bf16_does_and_goes_on(tmp_path: Path) -> None:
    """Catches a run that forgets its FP8 products when heads are added or when it is resumed, and one that diverges."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'name = "fp8"\nseed = 1\nthreads = 1\n[model]\npreset = "nano"\n[tokenizer]\nvocab_size = 320\n'
        "train_documents = 40\n[data]\nsequence_length = 64\nbatch_sequences = 4\n[[data.sources]]\n"
        'kind = "task"\ndomain = "math"\n[log]\nevery_steps = 1\n[optimizer]\npeak_lr = 3e-3\n'
        '[[stages]]\nname = "one"\nsteps = 20\n[[stages]]\nname = "two"\nkind = "sft"\nsteps = 4\nmtp_heads = 3\n'
    )
    losses: dict[str, list[float]] = {}
    for precision in ("bf16", "fp8"):
        out = tmp_path / precision
        result = train(load_recipe(recipe, [f"precision={precision}"], TrainRecipe), out)
        losses[precision] = [record["loss"] for record in read_metrics(out)]
        found = {type(head.eh_proj).__name__ for head in result.model.mtp_heads}
        assert found == ({"Float8Linear"} if precision == "fp8" else {"Linear"})
    assert losses["fp8"] != losses["bf16"]
    assert losses["fp8"][19] < losses["fp8"][0] - 1.0
    assert losses["fp8"][19] == pytest.approx(losses["bf16"][19], rel=0.05)
    again = train(load_recipe(recipe, ["precision=fp8"], TrainRecipe), tmp_path / "fp8", resume=True)
    assert type(again.model.layers[0].self_attn.qkv_proj).__name__ == "Float8Linear"


def test_what_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a library's own error for a missing package or an odd size."""
    odd = build_model(preset("nano").replace(dense_dim=40), dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"multiples of 16, but layers.0.mlp.down_proj has \(128, 40\)"):
        use_fp8(odd, CPU)
    monkeypatch.setattr(fp8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'openmimo"):
        use_fp8(build_model(preset("nano"), dtype=torch.bfloat16), CPU)
