"""An invariant model in the PyTorch runner: the bits of a training pass, however texts are cut, kept and drafted."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from itertools import chain
from typing import NamedTuple

import numpy as np
import pytest
import torch
from engine_fakes import awkward_prompts, make_engine, plant_drafts, small_config, small_model
from torch import Tensor

from openmimo.engine import PAGE_TOKENS, Engine, SamplingParams, StepInput
from openmimo.engine.sampler import recorded_logprobs
from openmimo.engine.torch_cache import FlatTokens
from openmimo.engine.torch_runner import TorchRunner
from openmimo.errors import RequestError
from openmimo.kernels import invariant, native
from openmimo.model import MiMoModel


@pytest.fixture(params=["C++", "PyTorch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels, and the form that runs without a compiler."""
    if request.param == "PyTorch":
        monkeypatch.setattr(invariant, "native_kernels", lambda: native.NativeKernels(None, "switched off"))
    elif native.native_kernels().library is None:
        pytest.skip(native.native_kernels().status)
    return request.param


class Trained(NamedTuple):
    """What one training pass over all texts in one row gave for one of them."""

    logits_TV: Tensor
    routes_TLk: Tensor
    heads_TV: list[Tensor]  # of head k the first T - 1 - k positions hold


@torch.no_grad()
def train_pass(model: MiMoModel, texts: list[list[int]]) -> list[Trained]:
    ids_1T = torch.tensor([list(chain(*texts))])
    documents_1T = torch.tensor([[number for number, text in enumerate(texts) for _ in text]])
    positions_1T = torch.tensor([[place for text in texts for place in range(len(text))]])
    output = model(ids_1T, position_ids_BT=positions_1T, document_ids_BT=documents_1T)
    sizes = [len(text) for text in texts]
    heads = [output.mtp_logits(head)[0].split(sizes) for head in range(model.config.num_mtp_heads)]
    split = (output.logits[0].split(sizes), output.routed_experts[0].split(sizes), zip(*heads, strict=True))
    return [Trained(logits, routes, list(each)) for logits, routes, each in zip(*split, strict=True)]


class WatchedRunner(TorchRunner):
    """Keeps the last output of every head at every position of every row, as far as it saw true ids."""

    seen: dict[tuple[int, int, int], Tensor]
    known: dict[int, int]

    def _run_head(self, head: int, hidden_ND: Tensor, ids_N: np.ndarray, tokens: FlatTokens) -> Tensor:
        out_ND = super()._run_head(head, hidden_ND, ids_N, tokens)
        rows_N = tokens.rows_S[tokens.sequence_N]
        for row, position, out_D in zip(rows_N.tolist(), tokens.positions_N.tolist(), out_ND, strict=True):
            if position + 1 + head < self.known[row]:
                self.seen[row, head, position] = out_D
        return out_ND


class Answer:
    """A text that is fed as prompt in chunks up to `prompt`, then in steps of true and wrong drafts."""

    def __init__(self, row: int, text: list[int], prompt: int) -> None:
        self.row, self.text, self.prompt = row, text, prompt
        self.fed = self.head_start = 0

    @property
    def in_prompt(self) -> bool:
        return self.fed < self.prompt

    @property
    def known(self) -> int:
        """Ids that a sampler knows: the prompt's, or those fed and the newest."""
        return self.prompt if self.in_prompt else min(self.fed + 1, len(self.text))

    def next_ids(self, rng: np.random.Generator) -> list[int]:
        """The ids to feed, wrong ones behind true ones."""
        if self.in_prompt:
            return self.text[self.fed : min(self.prompt, self.fed + int(rng.integers(1, 40)))]
        true = self.text[self.fed : self.fed + int(rng.integers(1, 5))]
        wrong = rng.integers(0, 4 - len(true) + 1)
        return true + [int(x) for x in rng.integers(0, 256, wrong)]


@torch.no_grad()
def drive(runner: WatchedRunner, answers: list[Answer], rng: np.random.Generator) -> tuple[dict, dict]:
    """Feed all texts in random company; logits and routes of every kept position, by row and position."""
    num_pages = runner.num_pages // runner.num_rows
    pages_RP = rng.permutation(runner.num_pages).reshape(runner.num_rows, num_pages).astype(np.int32)
    logits: dict[tuple[int, int], np.ndarray] = {}
    routes: dict[tuple[int, int], np.ndarray] = {}
    heads, width = runner.config.num_mtp_heads, 2 * runner.config.num_mtp_heads
    while unfinished := [answer for answer in answers if answer.fed < len(answer.text)]:
        chosen = [unfinished[i] for i in rng.permutation(len(unfinished))[: rng.integers(1, len(unfinished) + 1)]]
        fed = [answer.next_ids(rng) for answer in chosen]
        rows_S = np.array([answer.row for answer in chosen], dtype=np.int32)
        starts_S = np.array([answer.fed for answer in chosen], dtype=np.int32)
        counts_S = np.array([len(ids) for ids in fed], dtype=np.int32)
        for answer in chosen:
            runner.known[answer.row] = answer.known
        output = runner.forward(
            StepInput(
                token_ids_N=np.array(list(chain(*fed)), dtype=np.int32),
                rows_S=rows_S,
                starts_S=starts_S,
                counts_S=counts_S,
                page_tables=tuple(pages_RP[row] for row in rows_S),
                logits_M=np.arange(counts_S.sum(), dtype=np.int32),
            )
        )
        kept_S = []
        offset = 0
        for answer, ids in zip(chosen, fed, strict=True):
            kept = 0
            while kept < len(ids) and answer.text[answer.fed + kept : answer.fed + kept + 1] == [ids[kept]]:
                place = answer.row, answer.fed + kept
                logits[place] = output.logits_MV[offset + kept].copy()
                routes[place] = output.routed_experts_NLk[offset + kept].copy()
                kept += 1
            offset += len(ids)
            kept_S.append(kept)
        prompts = [answer for answer in chosen if answer.in_prompt]
        if prompts:
            kept_of = dict(zip(rows_S.tolist(), kept_S, strict=True))
            ends = [answer.fed + kept_of[answer.row] for answer in prompts]
            runner.prefill_heads(
                np.array([answer.row for answer in prompts], dtype=np.int32),
                np.array([answer.head_start for answer in prompts], dtype=np.int32),
                np.array([end - a.head_start for a, end in zip(prompts, ends, strict=True)], dtype=np.int32),
                tuple(
                    np.array(a.text[: a.prompt][a.head_start + 1 : end + heads], dtype=np.int32)
                    for a, end in zip(prompts, ends, strict=True)
                ),
            )
            for answer, end in zip(prompts, ends, strict=True):
                answer.head_start = max(0, min(end, answer.prompt - heads))
        runner.commit(rows_S, np.array(kept_S, dtype=np.int32))
        for answer, kept in zip(chosen, kept_S, strict=True):
            answer.fed += kept
        drafting = [a for a in chosen if not a.in_prompt and a.fed < len(a.text)]
        if drafting:
            for answer in drafting:
                runner.known[answer.row] = answer.known
            windows = [([0] * width + a.text[: a.fed + 1])[-width:] for a in drafting]
            runner.draft(
                np.array([a.row for a in drafting], dtype=np.int32),
                np.array([a.fed for a in drafting], dtype=np.int32),
                np.array(windows, dtype=np.int32),
            )
    return logits, routes


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_any_way_of_sampling_gives_the_bits_of_a_training_pass(form: str, seed: int) -> None:
    """Random chunks, company, rows, scattered pages, true and wrong drafts; rings of 8 or 40 keys wrap many times.

    Catches sums in the order of slots, keys of rejected drafts, masked keys that take part, products by batch, heads
    that keep entries made of drafts: in the logits, the routes and the logits of every head.
    """
    rng = np.random.default_rng(seed)
    sliding = small_config().sliding_attention
    sliding = dataclasses.replace(sliding, window_keys=40 if seed % 2 else 8)
    model = small_model(seed=seed, sliding_attention=sliding).set_invariant()
    lengths = (1, 2, 9, 30, 64, 65, int(rng.integers(66, 200)))
    texts = [rng.integers(0, 256, length).tolist() for length in lengths]
    expected = train_pass(model, texts)
    runner = WatchedRunner(model, num_rows=len(texts), num_pages=4 * len(texts), max_step_tokens=512)
    runner.seen, runner.known = {}, {}
    answers = [Answer(row, text, int(rng.integers(1, len(text) + 1))) for row, text in enumerate(texts)]
    logits, routes = drive(runner, answers, rng)
    for row, (text, trained) in enumerate(zip(texts, expected, strict=True)):
        assert np.array_equal(np.stack([logits[row, i] for i in range(len(text))]), trained.logits_TV.numpy())
        assert np.array_equal(np.stack([routes[row, i] for i in range(len(text))]), trained.routes_TLk.numpy())
    checked: dict[int, int] = defaultdict(int)
    for (row, head, position), out_D in runner.seen.items():
        assert torch.equal(model.lm_head(out_D), expected[row].heads_TV[head][position]), (row, head, position)
        checked[head] += 1
    assert all(checked[head] > 150 for head in range(model.config.num_mtp_heads))


OPTIONS = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1},
    {"temperature": 1.3, "top_k": 40, "min_p": 0.01, "frequency_penalty": 0.3, "logit_bias": {5: 1.5}},
)


def assert_records_are_reproduced(engine: Engine, model: MiMoModel, prompts: list[list[int]], **options) -> int:
    """Log-probabilities and routes of the engine's answers from one training pass; returns the drafts kept."""
    params = SamplingParams(max_tokens=12, seed=7, logprobs=True, routed_experts=True, ignore_eos=True, **options)
    done = engine.generate(prompts, params)
    asked = [prompt for prompt in prompts for _ in range(params.n)]
    texts = [[*prompt, *each.token_ids] for prompt, each in zip(asked, done, strict=True)]
    for prompt, each, trained in zip(asked, done, train_pass(model, texts), strict=True):
        logits_TV = trained.logits_TV.numpy()[len(prompt) - 1 : -1, : engine.num_tokens]
        assert recorded_logprobs(logits_TV, list(each.token_ids), params, prompt) == list(each.logprobs)
        assert each.routed_experts is not None
        assert np.array_equal(each.routed_experts, trained.routes_TLk.numpy()[: len(each.routed_experts)])
    return sum(kept * count for each in done for kept, count in enumerate(each.draft.histogram))


def reproduce_everywhere(model: MiMoModel, options: dict[str, object]) -> None:
    """Alone and together, in chunks, with drafts, after prefix hits, with several answers to a prompt."""
    prompts = [awkward_prompts(11, longest=90)[i] for i in (0, 8, 10)]
    for draft_heads, batch, chunk, cache in ((0, 5, None, 0), (3, 1, 9, 1 << 24), (3, 4, 7, 1 << 24)):
        engine = make_engine(
            model, draft_heads, max_batch=batch, chunk_tokens=chunk, prefix_cache_bytes=cache, snapshot_tokens=32
        )
        for _ in range(2 if cache else 1):
            assert_records_are_reproduced(engine, model, prompts, n=2, **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_trainer_reproduces_the_recorded_logprobs(options: dict[str, object]) -> None:
    """Catches any difference between what was sampled and what is trained on."""
    reproduce_everywhere(small_model(seed=3).set_invariant(), options)


def test_so_it_does_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the form in PyTorch."""
    monkeypatch.setattr(invariant, "native_kernels", lambda: native.NativeKernels(None, "switched off"))
    reproduce_everywhere(small_model(seed=3).set_invariant(), OPTIONS[1])


def test_drafts_that_are_kept_change_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verified drafts share a step with the token before them; a random model's own are never right."""
    model = small_model(seed=4).set_invariant()
    prompts = awkward_prompts(11, longest=90)[8:]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    texts = [each.token_ids for each in make_engine(model, 0).generate(prompts, params)]
    plant_drafts(monkeypatch, prompts, texts, lambda step, true_SK: np.where(np.arange(3) < step % 4, true_SK, 7))
    assert assert_records_are_reproduced(make_engine(model, 3, max_batch=3), model, prompts) > 10


def test_a_sequence_that_is_computed_again_keeps_its_records() -> None:
    """Too few pages for all: the youngest answer is stopped, and its text becomes a prompt."""
    model = small_model(seed=5).set_invariant()
    prompts = [list(range(1, 55)), list(range(2, 60)), list(range(3, 62))]
    engine = make_engine(model, 2, max_batch=3, cache_tokens=4 * PAGE_TOKENS, prefix_cache_bytes=0)
    assert_records_are_reproduced(engine, model, prompts, temperature=1.0)


def test_an_invariant_model_chooses_its_runner() -> None:
    """Catches the mode that is silently lost to the native runner or to graphs."""
    model = small_model().set_invariant()
    assert isinstance(Engine(model).runner, TorchRunner)
    with pytest.raises(RequestError, match="torch"):
        Engine(model, runner="native")
    with pytest.raises(RequestError, match="bits"):
        Engine(model, runner="torch", graphs="compile")
