"""Logits, MTP heads, drafts and token ids of llama.cpp, from GGUF files that this package wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from openmimo.checkpoint.gguf import save_gguf
from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig, MoEConfig
from openmimo.engine import Engine, SamplingParams
from openmimo.model.model import MiMoModel, build_model
from openmimo.text import train_tokenizer

pytest.importorskip("llama_cpp")

from openmimo.evals.llama_cpp import ContextOptions, LlamaContext, LlamaModel
from openmimo.evals.llama_drafts import HeadContext, LlamaDrafter

pytestmark = pytest.mark.parity

BAR = 2e-5  # largest difference of logits of order 1, both sides in float32
FAULT_BAR = 1e-4
NUM_TOKENS = 40
# Flash attention keeps K and V in float16 inside, so exact comparisons go without.
EXACT = ContextOptions(flash=False, cache="float32")


def small_config() -> ModelConfig:
    """Two kinds of layers, a dense and three sparse ones, a window that the text leaves, three MTP heads."""

    def attention(kv_heads: int, theta: float, window: int | None) -> AttentionConfig:
        return AttentionConfig(
            num_heads=6,
            num_kv_heads=kv_heads,
            qk_head_dim=24,
            v_head_dim=16,
            rope_theta=theta,
            sink=window is not None,
            window_keys=window,
        )

    kinds = {"g": AttentionKind.GLOBAL, "s": AttentionKind.SLIDING}
    return ModelConfig(
        vocab_size=320,
        hidden_size=64,
        dense_dim=96,
        layer_kinds=tuple(kinds[letter] for letter in "gssg"),
        layer_is_moe=(False, True, True, True),
        global_attention=attention(1, 5e5, None),
        sliding_attention=attention(3, 50.0, 7),
        moe=MoEConfig(num_experts=7, num_experts_per_token=2, expert_dim=32),
        rope_fraction=0.5,
        norm_eps=1e-4,
    )


def random_model(config: ModelConfig) -> MiMoModel:
    """All tensors random, norms, sinks and router biases too, and logits of order 1."""
    model = build_model(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.2)
            elif name.endswith("norm.weight"):
                tensor.normal_(mean=1.0, std=0.3)
            elif name.endswith("sink_bias"):
                tensor.normal_()
            else:
                tensor.normal_(std=1.0 if "embed" in name else tensor.shape[-1] ** -0.5)
    return model


@pytest.fixture
def model() -> MiMoModel:
    return random_model(small_config())


@pytest.fixture
def tokens() -> list[int]:
    return torch.randint(320, (NUM_TOKENS,)).tolist()


def our_logits(model: MiMoModel, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def their_logits(path: Path, tokens: list[int], options: ContextOptions = EXACT) -> np.ndarray:
    loaded = LlamaModel(path)
    context = LlamaContext(loaded, num_tokens=len(tokens), threads=1, options=options)
    rows = np.stack(context.prefill(0, tokens, all_outputs=True))
    context.close()
    loaded.close()
    return rows


def divergence(p_TV: np.ndarray, q_TV: np.ndarray) -> float:
    """Median KL in nats of softmax(p) from softmax(q): rounding sends a token or two to another expert altogether."""
    logs = [torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (p_TV, q_TV)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).median())


@pytest.mark.parametrize("micro_batch", [512, 16])
def test_logits_match(model: MiMoModel, tokens: list[int], tmp_path: Path, micro_batch: int) -> None:
    """Any difference of the architecture or of the export; with small micro-batches, of their window cache too."""
    save_gguf(model, tmp_path / "m.gguf", dtype="float32")
    ours = our_logits(model, tokens)
    assert 0.3 < ours.std() < 3.0
    theirs = their_logits(tmp_path / "m.gguf", tokens, dataclasses.replace(EXACT, micro_batch=micro_batch))
    print(f"greatest difference {np.abs(ours - theirs).max():.1e}, KL {divergence(ours, theirs):.1e}")
    assert np.abs(ours - theirs).max() <= BAR


def _window(config: ModelConfig, change: int) -> ModelConfig:
    window = config.sliding_attention.window_keys
    assert window is not None
    return config.replace(sliding_attention=dataclasses.replace(config.sliding_attention, window_keys=window + change))


FAULTS = {
    "window one key long": lambda config: _window(config, 1),
    "window one key short": lambda config: _window(config, -1),
    "no value scale": lambda config: config.replace(value_scale=1.0),
    "1/sqrt(2) for 0.707": lambda config: config.replace(value_scale=2**-0.5),
    "rotary fraction": lambda config: config.replace(rope_fraction=0.334),
    "norm epsilon": lambda config: config.replace(norm_eps=1e-2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_hyper_parameter_fault_is_caught(
    model: MiMoModel, tokens: list[int], tmp_path: Path, fault: str
) -> None:
    """The comparison above would miss this mistake in the file."""
    ours = our_logits(model, tokens)
    model.config = FAULTS[fault](model.config)
    save_gguf(model, tmp_path / "m.gguf", dtype="float32")
    assert np.abs(ours - their_logits(tmp_path / "m.gguf", tokens)).max() > FAULT_BAR


def test_8_bit_and_16_bit_files_stay_close(model: MiMoModel, tokens: list[int], tmp_path: Path) -> None:
    """Blocks written with the wrong scale or order; the limits are about three times what was measured."""
    ours = our_logits(model, tokens)
    for dtype, limit in (("bfloat16", 5e-5), ("q8_0", 1e-3)):
        save_gguf(model, tmp_path / "m.gguf", dtype=dtype)
        found = divergence(ours, their_logits(tmp_path / "m.gguf", tokens))
        print(f"{dtype}: KL {found:.1e}")
        assert found < limit


def test_mtp_heads_match(model: MiMoModel, tokens: list[int], tmp_path: Path) -> None:
    """A head stored in another block, swapped halves of its projection, or the wrong norm behind it."""
    save_gguf(model, tmp_path / "m.gguf", dtype="float32")
    loaded = LlamaModel(tmp_path / "m.gguf", with_mtp=True)
    main = LlamaContext(loaded, num_tokens=NUM_TOKENS, threads=1, options=EXACT)
    heads = HeadContext(main, num_tokens=NUM_TOKENS, threads=1, options=EXACT)
    with torch.no_grad():
        output = model(torch.tensor([tokens]))
        for head, end in [(0, 1), (0, 30), (1, 30), (2, 30)]:
            heads.clear()
            heads.feed_head(head, tokens[head + 1 : head + 1 + end], output.hidden_BTD[0, :end].numpy(), 0)
            ours = output.mtp_logits(head)[0, end - 1].numpy()
            assert np.abs(heads.logits(end - 1) - ours).max() <= BAR
    heads.close()
    main.close()
    loaded.close()


@pytest.fixture
def obvious_model(model: MiMoModel) -> MiMoModel:
    """Every next token follows from the last one alone, in the main model and in all heads."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                tensor.zero_()
            elif name.endswith("norm.weight"):
                tensor.fill_(1.0)
            elif name.endswith("eh_proj.weight"):
                tensor.copy_(torch.eye(*tensor.shape))
    return model


@pytest.fixture
def drafted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LlamaDrafter]:
    save_gguf(request.getfixturevalue(request.param), tmp_path / "m.gguf", dtype="float32")
    loaded = LlamaModel(tmp_path / "m.gguf", with_mtp=True)
    drafter = LlamaDrafter(loaded, num_tokens=128, num_drafts=3, threads=1, options=EXACT)
    yield drafter
    drafter.close()
    loaded.close()


@pytest.mark.parametrize(
    ("name", "drafted", "acceptance"), [("model", "model", None), ("obvious_model", "obvious_model", 4.0)],
    indirect=["drafted"],
)  # fmt: skip
def test_drafted_text_is_greedy_text(
    request: pytest.FixtureRequest, name: str, drafted: LlamaDrafter, acceptance: float | None, tokens: list[int]
) -> None:
    """Rejected drafts left in a cache; heads fed one token off, which shows as lost acceptance and not in the text."""
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    # All in float32, so that both sides differ by rounding alone, and as many drafts in every step.
    engine = Engine(request.getfixturevalue(name), weights="float32", draft_heads=3)
    ours = engine.generate([tokens], params)[0]
    text, drafts = drafted.generate(tokens, 40)
    assert tuple(text) == ours.token_ids
    assert drafts.acceptance_length == pytest.approx(ours.draft.acceptance_length if acceptance is None else acceptance)


def test_token_ids_match(model: MiMoModel, tmp_path: Path) -> None:
    """Another split rule, merges in another order, special tokens found in plain text or not found at all."""
    lines = ["Don't stop 1234, said the naïve café owner.\n\n  漢字 and 😀 it's 3.14", "def f(x):\n\treturn x**2\r\n"]
    tokenizer = train_tokenizer(lines * 3, vocab_size=310)
    save_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    loaded = LlamaModel(tmp_path / "m.gguf")
    for text in [*lines, "THEY'RE  \n\n\t?!", "<|im_start|>user", "a<|im_end|>", "", "ÀÉ ½ ² \u200b x"]:
        assert loaded.tokenize(text) == tokenizer.encode(text), text
    marked = "<|im_start|>user\n<think>1+1</think><|im_end|>"
    assert loaded.tokenize(marked, special=True) == tokenizer.encode_with_special(marked)
    loaded.close()
