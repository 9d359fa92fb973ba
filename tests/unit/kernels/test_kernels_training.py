"""The C++ training kernels against float64 written from the equations, once per kind of matrix product.

Bars are a few roundings to bf16 (2^-9 each) of the result's norm.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openmimo.errors import ShapeError
from openmimo.kernels import native
from openmimo.kernels import training as kernels
from openmimo.kernels.experts import experts
from openmimo.kernels.router import route

TOLERANCE = 6e-3

pytestmark = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler on this machine")


@dataclasses.dataclass(frozen=True)
class Build:
    """Flags, what then multiplies matrices (see `native.PRODUCTS`), and what the processor needs for it."""

    flags: tuple[str, ...]
    product_kind: int
    needs: tuple[str, ...] = ()


BUILDS = {
    "any processor": Build((), 0),
    "AVX2": Build(("-mavx2", "-mfma"), 3, ("avx2", "fma")),
    "AVX-512 without BF16": Build(("-march=skylake-avx512",), 3, ("avx512f", "avx512bw", "avx512vl", "avx512dq")),
    "AMX in software": Build(("-march=native", "-DOPENMIMO_EMULATE_AMX"), 2),
}


def processor_words() -> set[str]:
    path = Path("/proc/cpuinfo")
    return set(path.read_text().split()) if path.is_file() else set()


@pytest.fixture(params=["this processor", *BUILDS])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The library as built here, once per way to multiply that runs here, and once on tiles that software imitates."""
    if request.param == "this processor":
        assert native.native_kernels().library is not None, native.native_kernels().status
        yield
        return
    compiler = native.find_compiler()
    assert compiler is not None
    build = BUILDS[request.param]
    if not processor_words().issuperset(build.needs):
        pytest.skip(f"this processor lacks one of {', '.join(build.needs)}")
    path, _ = native.build(compiler, tmp_path_factory.getbasetemp() / "kernels", (build.flags,))
    built = native.NativeKernels(ctypes.CDLL(str(path)), request.param)
    assert built.library is not None
    assert built.library.openmimo_product_kind() == build.product_kind
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "native_kernels", lambda: built)
        yield


def relative_error(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def attention_loop(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    first: Tensor,
    sink: Tensor | None,
    shape: kernels.AttentionShape,
    scale: float,
    hole: Tensor | None = None,
) -> Tensor:
    """The full square of scores in float64."""
    heads, groups, half = shape.num_heads, shape.num_kv_heads, shape.rotary_half
    sizes = [heads * shape.qk_head_dim, groups * shape.qk_head_dim, groups * shape.v_head_dim]
    q, k, v = (x.unflatten(-1, (n, -1)) for x, n in zip(qkv.split(sizes, -1), (heads, groups, groups), strict=True))

    def rotated(x: Tensor) -> Tensor:
        a, b, c, s = x[..., :half], x[..., half : 2 * half], cos[:, :, None], sin[:, :, None]
        return torch.cat([a * c - b * s, b * c + a * s, x[..., 2 * half :]], -1)

    k, v = (x.repeat_interleave(heads // groups, 2) for x in (rotated(k), v * scale))
    scores = torch.einsum("bthk,bshk->bhts", rotated(q), k) * shape.qk_head_dim**-0.5
    keys = torch.arange(qkv.shape[1])
    visible = (keys <= keys[:, None]) & (keys >= first[:, :, None])
    if hole is not None:
        visible &= ~((keys >= hole[:, :, :1]) & (keys < hole[:, :, 1:]))
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    if sink is not None:
        scores = torch.cat([scores, sink[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1)[..., : qkv.shape[1]], v)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("batch", "num_tokens", "sizes", "window", "document", "sink", "holes"),
    [
        (2, 200, (8, 4, 48, 32, 8), 128, 37, True, False),
        (1, 130, (4, 1, 24, 20, 4), 1000, 1000, False, False),  # dims that are no multiple of 16; global
        (3, 64, (2, 2, 192, 128, 32), 17, 64, True, False),  # the large presets' dims; exactly one tile
        (1, 1, (2, 1, 8, 8, 2), 5, 1, True, False),
        (2, 321, (6, 2, 40, 24, 6), 128, 500, False, False),
        (2, 321, (8, 2, 40, 24, 6), 1000, 1000, True, True),  # holes that hide whole blocks of keys
        (1, 150, (4, 2, 24, 16, 4), 1000, 40, False, True),  # and some inside of blocks
    ],
)
def test_attention_matches_float64(
    batch: int,
    num_tokens: int,
    sizes: tuple[int, int, int, int, int],
    window: int,
    document: int,
    sink: bool,
    holes: bool,
) -> None:
    """Catches wrong masks, tiles, rotation, normaliser, value scale or sink, forward and backward; and a block of keys
    that is skipped although one query sees it, or that is not although none does."""
    generator = torch.Generator().manual_seed(num_tokens)
    shape = kernels.AttentionShape(*sizes)
    qkv = torch.randn(batch, num_tokens, shape.width, generator=generator).bfloat16().requires_grad_()
    angles = 3 * torch.randn(batch, num_tokens, shape.rotary_half, generator=generator)
    positions = torch.arange(num_tokens).expand(batch, -1)
    first = torch.maximum(positions - window + 1, positions // document * document).int()
    hole = None
    if holes:
        # Between a document's first ten keys and stretches of twenty, which are branches.
        shared, branch = positions // document * document + 10, positions // 20 * 20
        hole = (torch.stack([shared, branch], 2) * (branch > shared)[:, :, None]).int()
    sink_H = torch.randn(shape.num_heads, generator=generator).requires_grad_() if sink else None
    options = {"shape": shape, "value_scale": 0.7, "hole_BT2": hole}
    out = kernels.attention(qkv, angles.cos(), angles.sin(), first, sink_H, **options)
    upstream = torch.randn(out.shape, generator=generator).bfloat16()
    out.backward(upstream)

    qkv64 = qkv.detach().double().requires_grad_()
    sink64 = None if sink_H is None else sink_H.detach().double().requires_grad_()
    tables = angles.cos().double(), angles.sin().double()
    expected = attention_loop(qkv64, *tables, first, sink64, shape, 0.7, hole)
    expected.backward(upstream.double())
    assert relative_error(out, expected) < TOLERANCE
    assert relative_error(qkv.grad, qkv64.grad) < TOLERANCE
    if sink_H is not None and sink64 is not None:
        assert relative_error(sink_H.grad, sink64.grad) < TOLERANCE


@pytest.mark.usefixtures("library")
def test_attention_survives_extreme_scores() -> None:
    """Catches an exponential that overflows, or a normaliser that starts at 0 / 0."""
    shape = kernels.AttentionShape(1, 1, 16, 16, 2)
    qkv = (200 * torch.randn(1, 150, shape.width, generator=torch.Generator().manual_seed(0))).bfloat16()
    tables = torch.ones(1, 150, 2), torch.zeros(1, 150, 2)
    first = torch.zeros(1, 150, dtype=torch.int32)
    for sink in (None, torch.full((1,), -1e4), torch.full((1,), 1e4)):
        qkv.grad = None
        x = qkv.clone().requires_grad_()
        out = kernels.attention(x, *tables, first, sink, shape=shape, value_scale=1.0)
        out.sum().backward()
        expected = attention_loop(qkv.double(), *(t.double() for t in tables), first, sink, shape, 1.0)
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        torch.testing.assert_close(out.double(), expected.double(), rtol=0.02, atol=0.02 * float(qkv.abs().max()))


@pytest.mark.usefixtures("library")
def test_what_is_no_number_is_not_hidden() -> None:
    """Minimum and maximum keep one operand where the other is NaN: the wrong one, and a run that came apart goes on."""
    shape = kernels.AttentionShape(1, 1, 16, 16, 2)
    qkv = torch.randn(1, 70, shape.width, generator=torch.Generator().manual_seed(0)).bfloat16()
    qkv[0, 40, :16] = torch.nan  # one query
    tables = torch.ones(1, 70, 2), torch.zeros(1, 70, 2)
    first = torch.zeros(1, 70, dtype=torch.int32)
    out = kernels.attention(qkv, *tables, first, None, shape=shape, value_scale=1.0)
    assert out[0, 40].isnan().all()
    assert not out[0, :40].isnan().any()
    gate_up = torch.randn(3, 64).bfloat16()
    gate_up[1, 5] = torch.nan
    assert kernels.swiglu(gate_up).isnan().nonzero().tolist() == [[1, 5]]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("rows", "dim"), [(700, 256), (1, 24), (257, 40)])
def test_norm_and_swiglu_match_float64(rows: int, dim: int) -> None:
    """Catches a wrong formula or a row that is left out, forward and backward."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, dim, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(dim, generator=generator).bfloat16().requires_grad_()
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    upstream = torch.randn(rows, dim, generator=generator).bfloat16()
    y, y64 = kernels.rms_norm(x, weight, 1e-5), F.rms_norm(x64, (dim,), weight64, 1e-5)
    y.backward(upstream)
    y64.backward(upstream.double())
    assert relative_error(y, y64) < TOLERANCE
    assert relative_error(x.grad, x64.grad) < TOLERANCE
    assert relative_error(weight.grad, weight64.grad) < TOLERANCE

    x.grad = x64.grad = None
    half = upstream[:, : dim // 2]
    z, z64 = kernels.swiglu(x), F.silu(x64[:, : dim // 2]) * x64[:, dim // 2 :]
    z.backward(half)
    z64.backward(half.double())
    assert relative_error(z, z64) < TOLERANCE
    assert relative_error(x.grad, x64.grad) < TOLERANCE


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("used", ["sum", "norm", "both"])
def test_add_and_norm_match_float64(used: str) -> None:
    """Catches a gradient that misses the way past the norm, or one of the two summands."""
    generator = torch.Generator().manual_seed(3)
    x, added, grad_sum, grad_norm = (torch.randn(300, 40, generator=generator).bfloat16() for _ in range(4))
    weight = torch.randn(40, generator=generator).bfloat16().requires_grad_()
    x.requires_grad_()
    added.requires_grad_()
    x64, added64, weight64 = (t.detach().double().requires_grad_() for t in (x, added, weight))
    found = kernels.add_rms_norm(x, added, weight, 1e-5)
    total = x64 + added64
    expected = (total, F.rms_norm(total, (40,), weight64, 1e-5))
    kept = {"sum": [0], "norm": [1], "both": [0, 1]}[used]
    upstream = (grad_sum, grad_norm)
    torch.autograd.backward([found[i] for i in kept], [upstream[i] for i in kept])
    torch.autograd.backward([expected[i] for i in kept], [upstream[i].double() for i in kept])
    for a, b in ((found[0], expected[0]), (found[1], expected[1]), (x.grad, x64.grad), (added.grad, added64.grad)):
        assert relative_error(a, b) < TOLERANCE
    if used != "sum":
        assert relative_error(weight.grad, weight64.grad) < TOLERANCE


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("tokens", "choices", "num_experts", "hidden", "width"),
    [(700, 2, 3, 64, 32), (5, 3, 8, 32, 96), (130, 1, 1, 96, 160), (1300, 2, 2, 32, 32)],
)
def test_experts_match_float64(tokens: int, choices: int, num_experts: int, hidden: int, width: int) -> None:
    """Catches rows at the wrong expert or token, lost blocks, a wrong weight; experts without tokens get gradient 0."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().requires_grad_()

    x, gate_up, down = (
        normal(tokens, hidden),
        normal(num_experts, 2 * width, hidden),
        normal(num_experts, hidden, width),
    )
    # Uneven loads: the first experts are chosen most.
    chance = torch.tensor([0.5**i for i in range(num_experts)]).expand(tokens, -1)
    chosen = chance.multinomial(choices, generator=generator)
    weights = torch.rand(tokens, choices, generator=generator).requires_grad_()
    out, load = experts(x, chosen, weights, gate_up, down)
    upstream = torch.randn(out.shape, generator=generator).bfloat16()
    out.backward(upstream)

    x64, gate_up64, down64, weights64 = (t.detach().double().requires_grad_() for t in (x, gate_up, down, weights))
    gate, up = torch.einsum("nd,nkfd->nkf", x64, gate_up64[chosen]).chunk(2, -1)
    each = torch.einsum("nkf,nkdf->nkd", F.silu(gate) * up, down64[chosen])
    out64 = (each * weights64[..., None]).sum(1)
    out64.backward(upstream.double())
    assert torch.equal(load, chosen.flatten().bincount(minlength=num_experts))
    for found, expected in (
        (out, out64),
        *(
            (a.grad, b.grad)
            for a, b in zip((x, gate_up, down, weights), (x64, gate_up64, down64, weights64), strict=True)
        ),
    ):
        assert relative_error(found, expected) < TOLERANCE
    unused = load == 0
    assert gate_up.grad is not None
    assert not gate_up.grad[unused].any()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "hidden", "num_experts", "choices", "normalize"), [(1100, 48, 21, 3, True), (3, 16, 5, 1, False)]
)
def test_router_matches_float64(
    tokens: int, hidden: int, num_experts: int, choices: int, normalize: bool, replayed: bool
) -> None:
    """Catches bias in the weights, a wrong choice, and a gradient that misses the scores, the weights or a slice."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(num_experts, hidden, generator=generator) / 4).requires_grad_()
    bias = torch.randn(num_experts, generator=generator) / 10
    replay = torch.rand(tokens, num_experts, generator=generator).topk(choices).indices if replayed else None
    found = route(x, weight, bias, replay, num_choices=choices, normalize=normalize, scaling=2.5)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    scores = (x64 @ weight64.T).sigmoid()
    chosen = (scores.detach() + bias).topk(choices).indices if replay is None else replay
    weights = scores.gather(1, chosen)
    weights = 2.5 * (weights / weights.sum(-1, keepdim=True) if normalize else weights)
    assert torch.equal(found[1], chosen)
    assert relative_error(found[0], scores) < 1e-6
    assert relative_error(found[2], weights) < 1e-6
    upstream = [torch.randn(t.shape, generator=generator) for t in (scores, weights)]
    sum(((a * b).sum() for a, b in zip((found[0], found[2]), upstream, strict=True)), torch.zeros(())).backward()
    sum(((a * b).sum() for a, b in zip((scores, weights), upstream, strict=True)), torch.zeros(())).backward()
    assert relative_error(x.grad, x64.grad) < TOLERANCE
    assert relative_error(weight.grad, weight64.grad) < 1e-5


@pytest.mark.usefixtures("library")
def test_cross_entropy_matches_float64() -> None:
    """Catches a wrong target, weight or maximum."""
    generator = torch.Generator().manual_seed(2)
    logits = (20 * torch.randn(33, 301, generator=generator)).bfloat16()
    targets, weights = torch.randint(301, (33,), generator=generator), torch.rand(33, generator=generator)
    logits64 = logits.double().requires_grad_()
    losses64 = F.cross_entropy(logits64, targets, reduction="none") * weights
    losses64.sum().backward()
    losses = kernels.cross_entropy_(logits, targets, weights)
    assert relative_error(losses, losses64) < 1e-5
    assert relative_error(logits, logits64.grad) < TOLERANCE


def test_a_wrong_size_is_refused() -> None:
    """Catches reads past the end of a tensor."""
    shape = kernels.AttentionShape(2, 1, 8, 8, 2)
    qkv, tables = torch.zeros(1, 4, shape.width, dtype=torch.bfloat16), torch.zeros(1, 4, 2)
    first = torch.zeros(1, 4, dtype=torch.int32)
    good = {"shape": shape, "value_scale": 1.0}
    with pytest.raises(ShapeError, match="columns"):
        kernels.attention(qkv[..., 1:], tables, tables, first, None, **good)
    with pytest.raises(ShapeError, match="int32"):
        kernels.attention(qkv, tables, tables, first.long(), None, **good)
    with pytest.raises(ShapeError, match="hole must be int32"):
        kernels.attention(qkv, tables, tables, first, None, hole_BT2=first, **good)
    odd = dataclasses.replace(shape, num_heads=3, num_kv_heads=2)
    with pytest.raises(ShapeError, match="divide"):
        kernels.attention(qkv.new_zeros(1, 4, odd.width), tables, tables, first, None, shape=odd, value_scale=1.0)


def test_a_source_that_does_not_compile_is_an_error_with_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a broken build that leaves a half-written library behind or hides the compiler's words."""
    source = tmp_path / "broken.cpp"
    source.write_text("int f( {")
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    compiler = native.find_compiler()
    assert compiler is not None
    with pytest.raises(native.BuildError, match=r"broken\.cpp"):
        native.build(compiler, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
