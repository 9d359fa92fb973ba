"""Decode steps in fixed shapes beside the eager ones: results, caches, what may depend on values, number of shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from engine_fakes import VOCAB, awkward_prompts, generate_ids, plain_tokens, small_config, small_model
from native_cases import random_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openmimo.config.model import ModelConfig, preset
from openmimo.engine import Engine, torch_static
from openmimo.engine.runner import PAGE_TOKENS, Int32, StepInput
from openmimo.engine.torch_cache import TorchCache
from openmimo.engine.torch_runner import TorchRunner
from openmimo.engine.torch_static import Function, StaticDecoder, bucket_sizes
from openmimo.errors import RequestError
from openmimo.model import MiMoModel
from openmimo.model.model import cast_model

NUM_ROWS, TABLE_PAGES = 5, 6
ROOM = {"num_rows": NUM_ROWS, "num_pages": NUM_ROWS * TABLE_PAGES, "max_step_tokens": 2048}
# What PyTorch does itself while it compiles.
COMPILER_WARNINGS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def as_it_is(function: Function, tensors: Sequence[Tensor]) -> Callable[[], None]:
    return lambda: function(*tensors)


def traced(function: Function, tensors: Sequence[Tensor]) -> Callable[[], None]:
    """As `compiled`, but what was traced runs as it is: seconds instead of minutes."""
    run = torch.compile(function, fullgraph=True, dynamic=False, backend="eager")
    return lambda: run(*tensors)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_static, "compiled", as_it_is)


def odd_config() -> ModelConfig:
    """Global layers first and last, sinks everywhere, so many experts that few tokens copy their weights."""
    config = small_config(num_mtp_heads=1)
    assert config.moe is not None
    return config.replace(
        layer_kinds=tuple(reversed(config.layer_kinds)),
        moe=dataclasses.replace(config.moe, num_experts=30, num_experts_per_token=2),
        global_attention=dataclasses.replace(config.global_attention, sink=True),
    )


CONFIGS = {"three heads": small_config(), "odd": odd_config(), "no heads": small_config(num_mtp_heads=0)}


def ints(values: Sequence[int]) -> Int32:
    return np.array(values, dtype=np.int32)


def make_step(texts: dict[int, list[int]], starts: dict[int, int], counts: dict[int, int], wanted: Int32) -> StepInput:
    """`counts` of every row's text from its start on; row r has pages r, r + 5, r + 10, ..."""
    rows = list(counts)
    ids = [token for row in rows for token in texts[row][starts[row] : starts[row] + counts[row]]]
    return StepInput(
        token_ids_N=ints(ids),
        rows_S=ints(rows),
        starts_S=ints([starts[row] for row in rows]),
        counts_S=ints([counts[row] for row in rows]),
        page_tables=tuple(ints(range(row, NUM_ROWS * TABLE_PAGES, NUM_ROWS)) for row in rows),
        logits_M=wanted,
    )


class Pair:
    """An eager runner and another one that is fed the same; everything that they give is compared."""

    def __init__(self, model: MiMoModel, graphs: str, tolerance: float = 1e-5) -> None:
        self.eager = TorchRunner(model, **ROOM, graphs="off")
        self.other = TorchRunner(model, **ROOM, graphs=graphs)
        self.heads, self.tolerance = model.config.num_mtp_heads, tolerance
        random = np.random.default_rng(0)
        self.texts = {row: random.integers(VOCAB, size=500).tolist() for row in range(NUM_ROWS)}
        self.starts = dict.fromkeys(range(NUM_ROWS), 0)

    def run(self, rounds: int, lengths: Sequence[int]) -> None:
        """Prompts of `lengths` in chunks, the last of 2 tokens, which a static step takes; then decode steps of any
        rows, counts and kept tokens, with drafts between them."""
        random = np.random.default_rng(1)
        for row, length in enumerate(lengths):
            if length > 2:
                self.step({row: length - 2}, {row: length - 2}, ints([]), prompt=True)
            count = min(length, 2)
            self.step({row: count}, {row: count}, ints([count - 1]), prompt=True)
        for number in range(rounds):
            rows = random.permutation(len(lengths))[: number % len(lengths) + 1].tolist()
            most = 1 if number % 4 == 3 else 1 + self.heads
            counts = {row: int(random.integers(1, most + 1)) for row in rows}
            kept = {row: int(random.integers(0, counts[row] + 1)) for row in reversed(rows[: max(1, len(rows) - 1)])}
            wanted = np.flatnonzero(random.random(sum(counts.values())) < (number != 7) * 0.8)
            self.step(counts, kept, wanted.astype(np.int32))
            if self.heads:
                self.draft(random.permutation(rows)[: number % 3 + 1].tolist())
        pairs = zip(tensors_of(self.eager), tensors_of(self.other), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(theirs[: len(ours)], ours, rtol=0, atol=10 * self.tolerance)

    def step(self, counts: dict[int, int], kept: dict[int, int], wanted: Int32, *, prompt: bool = False) -> None:
        step = make_step(self.texts, self.starts, counts, wanted)
        eager, other = (runner.forward(step) for runner in (self.eager, self.other))
        assert other.logits_MV.shape == eager.logits_MV.shape
        np.testing.assert_allclose(other.logits_MV, eager.logits_MV, rtol=0, atol=self.tolerance)
        assert other.routed_experts_NLk.dtype == eager.routed_experts_NLk.dtype
        assert (other.routed_experts_NLk == eager.routed_experts_NLk).all()
        for runner in (self.eager, self.other):
            if prompt:
                # Once more over the end of the chunk before, whose hidden states are in the history by now.
                starts_S = np.maximum(step.starts_S - 2 * self.heads, 0)
                counts_S = step.starts_S + step.counts_S - starts_S
                known = zip(counts, starts_S.tolist(), counts_S.tolist(), strict=True)
                ids = tuple(ints(self.texts[row][start + 1 : start + n + self.heads]) for row, start, n in known)
                runner.prefill_heads(step.rows_S, starts_S, counts_S, ids)
            runner.commit(ints(list(kept)), ints(list(kept.values())))
        for row, count in kept.items():
            self.starts[row] += count

    def draft(self, rows: Sequence[int]) -> None:
        lengths_S, window_SW = drafting(self.texts, self.starts, rows, 2 * self.heads)
        eager, other = (runner.draft(ints(rows), lengths_S, window_SW) for runner in (self.eager, self.other))
        assert other.dtype == eager.dtype
        assert (other == eager).all()


def drafting(
    texts: dict[int, list[int]], starts: dict[int, int], rows: Sequence[int], width: int
) -> tuple[Int32, Int32]:
    """Lengths and windows of `Runner.draft`."""
    window_SW = np.zeros((len(rows), width), dtype=np.int32)
    for place, row in enumerate(rows):
        last = texts[row][: starts[row] + 1][-width:]
        window_SW[place, width - len(last) :] = last
    return ints([starts[row] for row in rows]), window_SW


def tensors_of(runner: TorchRunner) -> tuple[Tensor, ...]:
    return (*runner.cache.row_tensors, *runner.cache.page_tensors)


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.usefixtures("uncompiled")
def test_padded_steps_give_what_eager_ones_give(name: str) -> None:
    """Catches wrong masks, slots, pages or places of padded tokens, short texts and rings that wrap; hidden states
    that `commit` or the heads take from elsewhere; experts that differ in the static form."""
    pair = Pair(random_model(CONFIGS[name]), "compile")
    pair.run(60, lengths=[250, 1, 62, 190, 7])
    assert {key[0] for key in decoder_of(pair.other).programs} >= {"_forward", "_commit"}
    assert max(pair.starts.values()) > 4 * PAGE_TOKENS


def decoder_of(runner: TorchRunner) -> StaticDecoder:
    assert runner._static is not None
    return runner._static


@pytest.mark.parametrize("num_tokens", [1, 3, 4])
@pytest.mark.parametrize("size", range(1, NUM_ROWS + 1))
@pytest.mark.usefixtures("uncompiled")
def test_padding_touches_no_other_place(size: int, num_tokens: int) -> None:
    """Catches padding that writes into a row or page of somebody, or over the keys of the token that it repeats, and
    tokens that write nowhere, to the bit."""
    runner, random = TorchRunner(small_model(), **ROOM, graphs="compile"), np.random.default_rng(size)
    cache = runner.cache
    with torch.inference_mode():
        for tensor in tensors_of(runner):
            tensor.normal_()
    texts = {row: random.integers(VOCAB, size=400).tolist() for row in range(NUM_ROWS)}
    starts = {row: int(random.integers(0, 5 * PAGE_TOKENS)) for row in range(NUM_ROWS)}
    rows = random.permutation(NUM_ROWS)[:size].tolist()
    # One sequence is as long as the bucket, others may be shorter.
    counts = {row: num_tokens if row == rows[0] else int(random.integers(1, num_tokens + 1)) for row in rows}
    step = make_step(texts, starts, counts, ints([0]))
    rings, pages, history = (
        torch.zeros(t.shape[:n], dtype=torch.bool) for t, n in zip(ring_page_history(cache), (3, 3, 2), strict=True)
    )
    main = cache.num_main_rings
    for row, table in zip(rows, step.page_tables, strict=True):
        positions = torch.arange(starts[row], starts[row] + counts[row])
        rings[row, :main, positions % cache.num_slots] = True
        pages[torch.from_numpy(table)[positions // PAGE_TOKENS].long(), :, positions % PAGE_TOKENS] = True
        begun = positions[positions % PAGE_TOKENS == 0] // PAGE_TOKENS  # forgotten whole
        pages[torch.from_numpy(table)[begun].long()] = True
    num_sequences = min(n for n in (1, 2, 4, 5) if n >= size)
    rings[-1, :main] = pages[-1] = num_sequences * (1 if num_tokens == 1 else 4) > len(step.token_ids_N)
    assert_changed(runner, lambda: runner.forward(step), rings, pages, history)

    kept = {row: int(random.integers(0, counts[row] + 1)) for row in rows}
    rings[:], pages[:] = False, False
    for row in rows:
        history[row, torch.arange(starts[row], starts[row] + kept[row]) % history.shape[1]] = True
    history[-1] = True
    commit = lambda: runner.commit(ints(list(kept)), ints(list(kept.values())))  # noqa: E731
    assert_changed(runner, commit, rings, pages, history)

    history[:], width = False, 2 * runner.config.num_mtp_heads
    for row in rows:
        starts[row] += kept[row] or 1
        rings[row, main:, torch.arange(max(0, starts[row] - width), starts[row]) % cache.num_slots] = True
    rings[-1, main:] = num_sequences > size or min(starts[row] for row in rows) < width
    lengths_S, window_SW = drafting(texts, starts, rows, width)
    assert_changed(runner, lambda: runner.draft(ints(rows), lengths_S, window_SW), rings, pages, history)


def ring_page_history(cache: TorchCache) -> tuple[Tensor, Tensor, Tensor]:
    return cache.ring_k_RLCGK, cache.page_k_PLTGK, cache.history_RWD


def assert_changed(
    runner: TorchRunner, call: Callable[[], object], rings: Tensor, pages: Tensor, history: Tensor
) -> None:
    """Everything marked, and nothing else, differs after `call`; of the spare row and page something does."""
    before = [tensor.clone() for tensor in tensors_of(runner)]
    call()
    marks = (rings, rings, history, pages, pages)
    for old, new, marked in zip(before, tensors_of(runner), marks, strict=True):
        changed = (old != new).flatten(marked.ndim).any(-1)
        assert (changed[:-1] == marked[:-1]).all()
        assert not (changed & ~marked).any()
        assert changed[-1].any() or not marked[-1].any() or marked is history


def test_shapes_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a shape that follows the step: each costs a compilation or a graph."""
    prepared: list[str] = []

    def prepare(function: Function, tensors: Sequence[Tensor]) -> Callable[[], None]:
        prepared.append(function.__name__)
        return as_it_is(function, tensors)

    monkeypatch.setattr(torch_static, "compiled", prepare)
    runner = TorchRunner(small_model(), **ROOM, graphs="compile")
    texts = {row: [1] * 400 for row in range(NUM_ROWS)}
    for size in range(1, NUM_ROWS + 1):
        for count in range(1, 5):
            for start in range(3, 5 * PAGE_TOKENS, PAGE_TOKENS):
                starts, rows = dict.fromkeys(texts, start), list(range(size))
                runner.forward(make_step(texts, starts, dict.fromkeys(rows, count), ints([0])))
                runner.commit(ints(rows), ints([count] * size))
                runner.draft(ints(rows), *drafting(texts, starts, rows, 6))
    # Sequences in 1, 2, 4, 5; tokens of each in 1, 4; pages in 4, 8.
    counts = [prepared.count(name) for name in ("_forward", "_commit", "_draft")]
    assert counts == [4 * 2 * 2, 4 * 2, 4]
    assert sum(counts) == decoder_of(runner).max_programs
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(100, 4) == [4, 8, 16, 32, 64, 100]


@COMPILER_WARNINGS
def test_nothing_of_a_step_depends_on_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches Python control flow on values, and results that change when PyTorch traces the step as a whole."""
    monkeypatch.setattr(torch_static, "compiled", traced)
    Pair(random_model(CONFIGS["odd"]), "compile").run(3, lengths=[70])


@COMPILER_WARNINGS
@pytest.mark.slow
def test_compiled_steps_give_what_eager_ones_give() -> None:
    """Catches what goes wrong only in generated code: writes to caches that are lost, stale inputs."""
    Pair(random_model(preset("nano").replace(vocab_size=VOCAB)), "compile").run(4, lengths=[70])


class NoHost(TorchDispatchMode):
    """Refuses operations that have a tensor off the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            assert not isinstance(leaf, Tensor) or leaf.is_meta, f"{func} has a tensor on {leaf.device}"
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["three heads", "odd"])
def test_a_step_stays_on_its_device(name: str, dtype: torch.dtype) -> None:
    """Catches what a CUDA graph cannot hold, without CUDA: tensors made on the host, values read back. On the meta
    device a tensor has no values, so that reading any raises."""
    device = torch.device("meta")
    with torch.inference_mode():
        model = cast_model(random_model(CONFIGS[name]), dtype).to(device)
        cache = TorchCache(model.config, num_rows=4, num_pages=32, dtype=dtype, device=device, spare=True)
        decoder = StaticDecoder(model, cache, graphs="cuda", num_rows=4, num_pages=32)
        for size, num_tokens, num_pages in ((1, 1, 4), (4, 1 + model.config.num_mtp_heads, 8)):
            shapes = ((size, num_tokens), (size,), (size,), (size,), (size, num_pages), (size * num_tokens,))
            inputs = [torch.ones(shape, dtype=torch.int64, device=device) for shape in shapes]
            tokens_SW = torch.ones(size, 2 * model.config.num_mtp_heads, dtype=torch.int64, device=device)
            with NoHost():
                decoder._forward(*inputs)
                decoder._commit(inputs[1], inputs[2], inputs[0])
                decoder._draft(inputs[1], inputs[2], tokens_SW)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", list(CONFIGS))
def test_cuda_graphs_give_what_eager_steps_give(name: str) -> None:
    """Catches captures that miss an operation, keep an old input, or share memory that must not be shared."""
    pair = Pair(random_model(CONFIGS[name]).cuda(), "auto", tolerance=1e-4)
    assert pair.other.graphs == "cuda"
    pair.run(60, lengths=[250, 1, 62, 190, 7])


@pytest.mark.usefixtures("uncompiled")
def test_the_engine_writes_the_same_text() -> None:
    """Catches steps that the engine makes and the tests above do not: forks, prefix cache, chunks of a few tokens."""
    model, prompts = small_model(), awkward_prompts(9, longest=80)
    engine = Engine(model, runner="torch", graphs="compile", max_batch=4, chunk_tokens=20)
    expected = plain_tokens(model, prompts, 20)
    for _ in range(2):  # the second time from the prefix cache
        assert generate_ids(engine, prompts, 20) == expected
    assert decoder_of(engine.runner).programs  # type: ignore[arg-type]


def test_unusable_options_are_refused() -> None:
    """Catches graphs that are silently left out, and errors that do not say what to do."""
    model = small_model()
    with pytest.raises(RequestError, match=r"graphs='cuda' needs a model on a CUDA device, got one on cpu; use 'comp"):
        TorchRunner(model, **ROOM, graphs="cuda")
    with pytest.raises(RequestError, match=r"graphs='compiled' is no way .* did you mean 'compile'"):
        Engine(model, graphs="compiled")
    with pytest.raises(RequestError, match="graphs='compile' needs runner='torch'"):
        Engine(model, runner="native", graphs="compile")
    runner = TorchRunner(model, **ROOM)
    assert runner.graphs == "off"
    assert len(runner.cache.history_RWD) == NUM_ROWS
