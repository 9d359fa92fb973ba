"""Acceptance of a trained model's drafts, and faults that lower it without ever changing the text.

The measure: teacher forcing with the plain PyTorch model in fp32 says, for every position of the text, which heads are
right, and so how many drafts every step must keep. An engine that feeds its heads the right tokens, states and keys has
exactly that histogram; planted faults are far from it. The model is trained here, in a minute, with sinks and a final
norm far from what they begin with elsewhere, so that leaving them out or applying them twice matters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from openmimo import tasks
from openmimo.config.model import ModelConfig, preset
from openmimo.config.train import DataRecipe, SourceKind, SourceRecipe
from openmimo.data.build import build_loader
from openmimo.engine import DraftStats, Engine, Runner, SamplingParams
from openmimo.engine.native_runner import NativeRunner, load_extension
from openmimo.engine.runner import Int32
from openmimo.engine.torch_cache import FlatTokens
from openmimo.engine.torch_runner import TorchRunner
from openmimo.errors import RequestError
from openmimo.model import MiMoModel, build_model
from openmimo.text import Tokenizer, train_tokenizer
from openmimo.train.optimizer import MasterAdamW
from openmimo.train.step import StepSettings, train_step

TASKS, NUM_PROMPTS, NUM_STEPS, NUM_HEADS = ("add", "subtract"), 40, 300, 3
# Shares of steps by which a head's acceptance may be off (near ties), and by which every fault must move one head.
TOLERANCE, SHIFT = 0.01, 0.08
ROOM = {"num_rows": 9, "num_pages": 64, "max_step_tokens": 256}


@dataclass(frozen=True)
class Trained:
    """A model with three heads, prompts, its greedy answers to them, and what every step of an engine must keep."""

    model: MiMoModel
    prompts: list[list[int]]
    params: SamplingParams
    texts: list[tuple[int, ...]]
    expected: DraftStats


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(0)
    tokenizer = train_tokenizer([text for index in range(300) for text in worked(index)], vocab_size=288)
    model = trained_model(tokenizer)
    prompts = [
        tokenizer.encode(problem(index, task, "test").prompt + "\n")
        for index in range(NUM_PROMPTS // len(TASKS))
        for task in TASKS
    ]
    params = SamplingParams(max_tokens=48, stop_token_ids=(tokenizer.special("<|endoftext|>"),))
    plain = Engine(TorchRunner(model, **ROOM), draft_heads=0, max_batch=8, prefix_cache_bytes=0)
    texts = [completion.token_ids for completion in plain.generate(prompts, params)]
    return Trained(model, prompts, params, texts, teacher_forced(model, prompts, texts))


def problem(index: int, task: str, split: str) -> tasks.Problem:
    return tasks.sample_problem("math", split=split, level=1, seed=0, index=index, task=task)


def worked(index: int) -> list[str]:
    return [f"{each.prompt}\n{each.solution}" for each in (problem(index, task, "train") for task in TASKS)]


def small_config(vocab_size: int) -> ModelConfig:
    nano = preset("nano")
    assert nano.moe is not None
    return nano.replace(
        vocab_size=vocab_size,
        hidden_size=64,
        dense_dim=128,
        num_mtp_heads=NUM_HEADS,
        init_std=0.06,
        layer_kinds=nano.layer_kinds[:3],
        layer_is_moe=nano.layer_is_moe[:3],
        moe=replace(nano.moe, num_experts=4, expert_dim=64),
        sliding_attention=replace(nano.sliding_attention, window_keys=16),
    )


def trained_model(tokenizer: Tokenizer) -> MiMoModel:
    """Additions and subtractions, worked digit by digit; all heads learn from the first step on."""
    model = build_model(small_config(tokenizer.vocab_size), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sink" in name:
                parameter.fill_(5.0)  # e^5 is ten windows of even keys: attention without it is another one
        model.norm.weight.copy_(torch.randn(model.config.hidden_size).exp())
    sources = tuple(SourceRecipe(kind=SourceKind.TASK, domain="math", task=task) for task in TASKS)
    recipe = DataRecipe(sequence_length=64, batch_sequences=16, sources=sources)
    optimizer = MasterAdamW(model.named_parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, grad_clip=1.0)
    settings = StepSettings(num_mtp_heads=NUM_HEADS, mtp_weight=1.0, balance_weight=1e-4, bias_update_rate=0.003)
    with build_loader(recipe, tokenizer, seed=0, stage="pretrain") as loader:
        for step in range(NUM_STEPS):
            batch = next(loader)
            rate = min(1.0, (step + 1) / 20) * (0.525 + 0.475 * math.cos(math.pi * step / NUM_STEPS))
            train_step(
                model,
                optimizer,
                batch.token_ids_BT,
                batch.document_ids_BT,
                batch.position_ids_BT,
                batch.loss_mask_BT,
                learning_rate=4e-3 * rate,
                settings=settings,
            )
    return model.eval()


def teacher_forced(model: MiMoModel, prompts: Sequence[list[int]], texts: Sequence[tuple[int, ...]]) -> DraftStats:
    """What drafting must give on these texts: heads see the true tokens, and a step goes on from where one ended."""
    histogram = [0] * (NUM_HEADS + 1)
    for prompt, text in zip(prompts, texts, strict=True):
        ids_T = torch.tensor([*prompt, *text])
        with torch.inference_mode():
            output = model(ids_T[None])
            right = [output.mtp_logits(k)[0, : -2 - k].argmax(-1) == ids_T[2 + k :] for k in range(NUM_HEADS)]
        newest = len(prompt)  # the prompt's own pass gave this place; the state before it drafts
        while newest < len(ids_T) - 1:
            kept, left = 0, len(ids_T) - 1 - newest
            while kept < min(NUM_HEADS, left) and right[kept][newest - 1]:
                kept += 1
            taken = min(kept + 1, left)
            histogram[taken - 1] += 1
            newest += taken
    return DraftStats(tuple(histogram))


def measure(trained: Trained, runner: Runner) -> tuple[list[tuple[int, ...]], DraftStats]:
    engine = Engine(runner, draft_heads=NUM_HEADS, max_batch=8, prefix_cache_bytes=0)
    done = engine.generate(trained.prompts, trained.params)
    return [each.token_ids for each in done], DraftStats.merge(each.draft for each in done)


def largest_shift(stats: DraftStats, expected: DraftStats) -> float:
    """How far the acceptance of the head that is furthest off is from what it must be."""
    shares = [
        np.cumsum(each.histogram[:0:-1])[::-1] / each.num_steps  # of head k: steps that kept more than k drafts
        for each in (stats, expected)
    ]
    return float(np.abs(shares[0] - shares[1]).max())


def open_runner(kind: str, model: MiMoModel) -> Runner:
    if kind == "torch":
        return TorchRunner(model, **ROOM)
    return native(NativeRunner, model)


def native(cls: type[NativeRunner], model: MiMoModel, weights: str = "float32") -> Runner:
    try:
        load_extension()
    except RequestError as error:
        pytest.skip(str(error))
    return cls(model, weights=weights, **ROOM)


@pytest.mark.parametrize("kind", ["torch", "native"])
def test_drafts_are_kept_as_teacher_forcing_says(trained: Trained, kind: str) -> None:
    """Wrong tokens, states, positions or keys of any head, in drafting, in prompts, after kept or rejected drafts."""
    texts, stats = measure(trained, open_runner(kind, trained.model))
    assert texts == trained.texts
    assert stats.num_steps == pytest.approx(trained.expected.num_steps, rel=TOLERANCE)
    assert largest_shift(stats, trained.expected) <= TOLERANCE
    # Heads that know something, or faults could not take it from them; and not everything, or no draft was rejected.
    assert min(trained.expected.per_head) > 0.4
    assert max(trained.expected.per_head) < 0.995


def test_bf16_heads_are_as_good(trained: Trained) -> None:
    """A loss of precision that only drafts feel. The text may be another one, so it is judged by its own forcing."""
    texts, stats = measure(trained, native(NativeRunner, trained.model, "bf16"))
    assert largest_shift(stats, teacher_forced(trained.model, trained.prompts, texts)) <= 0.03


def swap_first_heads(model: MiMoModel) -> None:
    exchange(model, 0, 1)


def swap_last_heads(model: MiMoModel) -> None:
    exchange(model, 1, 2)


def exchange(model: MiMoModel, one: int, other: int) -> None:
    state = copy.deepcopy(model.mtp_heads[one].state_dict())
    model.mtp_heads[one].load_state_dict(model.mtp_heads[other].state_dict())
    model.mtp_heads[other].load_state_dict(state)


def use_one_head_three_times(model: MiMoModel) -> None:
    for head in model.mtp_heads[1:]:
        head.load_state_dict(model.mtp_heads[0].state_dict())


def swap_the_concatenation(model: MiMoModel) -> None:
    """[hidden, embedding] in place of [embedding, hidden] is the same as exchanging the halves of the projection."""
    for head in model.mtp_heads:
        head.eh_proj.weight.copy_(head.eh_proj.weight.roll(model.config.hidden_size, dims=1))


def take_states_after_the_norm(model: MiMoModel) -> None:
    """Heads norm what they get, so the final norm's weight is all that comes on top, but for each token's scale."""
    weight_D = model.norm.weight
    for head in model.mtp_heads:
        head.hnorm.weight.mul_(weight_D / weight_D.square().mean().sqrt())


def leave_out_the_sinks(model: MiMoModel) -> None:
    for head in model.mtp_heads:
        head.self_attn.attention_sink_bias.fill_(-1e4)


@pytest.mark.parametrize("kind", ["torch", "native"])
@pytest.mark.parametrize(
    "fault",
    [
        swap_first_heads,
        swap_last_heads,
        use_one_head_three_times,
        swap_the_concatenation,
        take_states_after_the_norm,
        leave_out_the_sinks,
    ],
)
def test_faults_in_the_heads_are_caught(trained: Trained, fault: Callable[[MiMoModel], None], kind: str) -> None:
    """An acceptance check too loose to see the fault, or a fault in drafts that reaches the text."""
    model = copy.deepcopy(trained.model)
    with torch.no_grad():
        fault(model)
    assert_caught(trained, open_runner(kind, model))


class StatesAfterTheNorm(TorchRunner):
    """The heads get what the output head gets, exactly."""

    def _run_head(self, head: int, hidden_ND: Tensor, ids_N: np.ndarray, tokens: FlatTokens) -> Tensor:
        return super()._run_head(head, self.model.norm(hidden_ND), ids_N, tokens)


class NeighboursRow(TorchRunner):
    """Every sequence drafts from the rings and states of another."""

    def draft(self, rows_S: Int32, lengths_S: Int32, tokens_SW: Int32) -> Int32:
        return super().draft(np.roll(rows_S, 1), lengths_S, tokens_SW)


class StaleStates(TorchRunner):
    """Drafts from the states of one token before."""

    def draft(self, rows_S: Int32, lengths_S: Int32, tokens_SW: Int32) -> Int32:
        return super().draft(rows_S, np.maximum(lengths_S - 1, 1), tokens_SW)


class NativeNeighboursRow(NativeRunner):
    """As `NeighboursRow`."""

    def draft(self, rows_S: Int32, lengths_S: Int32, tokens_SW: Int32) -> Int32:
        return super().draft(np.roll(rows_S, 1), lengths_S, tokens_SW)


@pytest.mark.parametrize("cls", [StatesAfterTheNorm, NeighboursRow, StaleStates, NativeNeighboursRow])
def test_faults_in_what_heads_read_are_caught(trained: Trained, cls: type[TorchRunner] | type[NativeRunner]) -> None:
    """The same of faults that no weights can stand for."""
    runner = cls(trained.model, **ROOM) if issubclass(cls, TorchRunner) else native(cls, trained.model)
    assert_caught(trained, runner)


def assert_caught(trained: Trained, runner: Runner) -> None:
    texts, stats = measure(trained, runner)
    assert texts == trained.texts
    assert largest_shift(stats, trained.expected) >= SHIFT
    assert stats.acceptance_length < trained.expected.acceptance_length
