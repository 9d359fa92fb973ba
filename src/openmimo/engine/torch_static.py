"""Decode steps of `TorchRunner` in a few fixed shapes, for CUDA graphs and `torch.compile`.

A step in which no sequence feeds more than 1 + K tokens is padded to a grid of S sequences with T tokens each, and its
page tables to P pages; S, T and P take few values. Sequences that are not there lie in the spare row and page; tokens
that are not there repeat their sequence's last one and write their keys to the spare ones. All whole numbers of a step
lie in one buffer, all results go into buffers too, and nothing between them depends on values.

Suffixes as in `runner.py` and `torch_cache.py`; here S, T, P and N = S * T are the padded sizes, X a text's places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from openmimo.config.model import ModelConfig
from openmimo.engine.runner import PAGE_TOKENS, Int32, Routes, StepInput, StepOutput
from openmimo.engine.torch_cache import CachedTokens, TorchCache, ring_positions, visible_bias
from openmimo.errors import RequestError, nearest
from openmimo.model import MiMoModel

GRAPHS = ("auto", "off", "compile", "cuda")
# The smallest bucket of pages.
MIN_PAGES = 4
WARM_UP_RUNS = 2

Int64 = npt.NDArray[np.int64]
# A shape, and what stands in it where there is nothing.
Input = tuple[tuple[int, ...], int]
Function = Callable[..., None]
# Makes a function of given tensors, which stay where they are, fast to call again.
Prepare = Callable[[Function, Sequence[Tensor]], Callable[[], None]]


def choose_graphs(graphs: str, device: torch.device) -> str:
    """ "off", "compile" or "cuda". Raises: RequestError on other words, or for "cuda" on another device."""
    if graphs not in GRAPHS:
        raise RequestError(f"graphs={graphs!r} is no way to run decode steps; {nearest(graphs, GRAPHS)}")
    if graphs == "cuda" and device.type != "cuda":
        raise RequestError(f"graphs='cuda' needs a model on a CUDA device, got one on {device}; use 'compile' or 'off'")
    if graphs == "auto":
        return "cuda" if device.type == "cuda" else "off"
    return graphs


def bucket_sizes(most: int, least: int = 1) -> list[int]:
    """`least`, doubled while it is below `most`, and `most`."""
    sizes = [min(least, most)]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


class StaticDecoder:
    """The static forms of `forward`, `commit` and `draft`, each prepared for a bucket when that first occurs.

    At most `max_programs` are prepared. They hold on to the model's weights: these may change, not be replaced.
    """

    def __init__(self, model: MiMoModel, cache: TorchCache, *, graphs: str, num_rows: int, num_pages: int) -> None:
        config, device = model.config, cache.device
        self.model, self.config, self.cache = model, config, cache
        self.sequence_sizes = bucket_sizes(num_rows)
        self.token_sizes = sorted({1, 1 + config.num_mtp_heads})
        self.page_sizes = bucket_sizes(min(num_pages, -(-config.max_positions // PAGE_TOKENS)), MIN_PAGES)
        most_tokens = num_rows * self.token_sizes[-1]
        moe, layers = config.moe, config.num_moe_layers
        self.hidden_ND = torch.zeros(most_tokens, config.hidden_size, dtype=cache.dtype, device=device)
        self.logits_NV = torch.zeros(most_tokens, config.vocab_size, device=device)
        choices = (layers, moe.num_experts_per_token) if moe and layers else (0, 0)
        wide = moe is not None and moe.num_experts > 256
        self.routes_NLk = torch.zeros(most_tokens, *choices, dtype=torch.int32 if wide else torch.uint8, device=device)
        self.drafts_SK = torch.zeros(num_rows, config.num_mtp_heads, dtype=torch.int32, device=device)
        self.programs: dict[tuple[object, ...], _Program] = {}
        self._prepare: Prepare = {"compile": compiled, "cuda": _Capture(device)}[graphs]
        window = max(2 * config.num_mtp_heads, 1)
        numbers = num_rows * (3 + self.page_sizes[-1] + 2 * self.token_sizes[-1] + window)
        self._buffer = _Buffer(numbers, device)

    @property
    def max_programs(self) -> int:
        forwards = len(self.sequence_sizes) * len(self.token_sizes)
        return forwards * len(self.page_sizes) + forwards + len(self.sequence_sizes)

    def takes(self, step: StepInput) -> bool:
        """Whether a step fits the buckets; prompts and what is longer than the model allows do not."""
        num_pages = -(-int((step.starts_S + step.counts_S).max()) // PAGE_TOKENS)
        return bool(step.counts_S.max() <= self.token_sizes[-1]) and num_pages <= self.page_sizes[-1]

    def forward(self, step: StepInput) -> tuple[StepOutput, Int64, int]:
        """The step's output, where in `hidden_ND` each sequence's tokens begin, and how many places each has."""
        size, counts_S1 = len(step.rows_S), step.counts_S[:, None]
        num_pages_S = -(-(step.starts_S + step.counts_S) // PAGE_TOKENS)
        num_sequences = _fitting(self.sequence_sizes, size)
        num_tokens = _fitting(self.token_sizes, int(step.counts_S.max()))
        num_pages = _fitting(self.page_sizes, int(num_pages_S.max()))
        program = self._program(
            self._forward,
            ((num_sequences, num_tokens), 0),
            ((num_sequences,), self.cache.spare_row),
            ((num_sequences,), 0),
            ((num_sequences,), 1),
            ((num_sequences, num_pages), self.cache.spare_page),
            ((num_sequences * num_tokens,), 0),
        )
        ids_ST, rows_S, starts_S, counts_S, pages_SP, wanted_N = program.inputs()
        steps_T = np.arange(num_tokens)
        offsets_S1 = np.cumsum(counts_S1, axis=0) - counts_S1
        ids_ST[:size] = step.token_ids_N[offsets_S1 + np.minimum(steps_T, counts_S1 - 1)]
        rows_S[:size], starts_S[:size], counts_S[:size] = step.rows_S, step.starts_S, step.counts_S
        for place, (table, count) in enumerate(zip(step.page_tables, num_pages_S.tolist(), strict=True)):
            pages_SP[place, :count] = table[:count]
            pages_SP[place, count:] = table[0]  # masked, and as finite as the sequence itself
        places_N = np.flatnonzero(steps_T < counts_S1)
        num_wanted = len(step.logits_M)
        wanted_N[:num_wanted] = places_N[step.logits_M]
        program.run()
        logits_MV = self.logits_NV[:num_wanted].cpu().numpy()
        routes_NLk: Routes = self.routes_NLk[: size * num_tokens].cpu().numpy()[places_N]
        if routes_NLk.dtype != np.uint8:
            routes_NLk = routes_NLk.astype(np.uint16)
        output = StepOutput(logits_MV=logits_MV, routed_experts_NLk=routes_NLk)
        return output, np.arange(size) * num_tokens, num_tokens

    def commit(self, rows_of_S: Int32, starts_of_S: Int32, kept_of_S: Int32, num_tokens: int) -> None:
        """What `Runner.commit` does, for all sequences of the last `forward`, which had `num_tokens` places each."""
        size = len(rows_of_S)
        num_sequences = _fitting(self.sequence_sizes, size)
        shape = (num_sequences,)
        inputs = (shape, self.cache.spare_row), (shape, 0), ((num_sequences, num_tokens), 0)
        program = self._program(self._commit, *inputs)
        rows_S, starts_S, kept_ST = program.inputs()
        rows_S[:size], starts_S[:size] = rows_of_S, starts_of_S
        kept_ST[:size] = np.arange(num_tokens) < kept_of_S[:, None]
        program.run()

    def draft(self, rows_of_S: Int32, lengths_of_S: Int32, tokens_of_SW: Int32) -> Int32:
        """What `Runner.draft` does."""
        size, width = tokens_of_SW.shape
        num_sequences = _fitting(self.sequence_sizes, size)
        shape = (num_sequences,)
        program = self._program(self._draft, (shape, self.cache.spare_row), (shape, 1), ((num_sequences, width), 0))
        rows_S, lengths_S, tokens_SW = program.inputs()
        rows_S[:size], lengths_S[:size], tokens_SW[:size] = rows_of_S, lengths_of_S, tokens_of_SW
        program.run()
        return self.drafts_SK[:size].to("cpu", copy=True).numpy()

    def _program(self, function: Function, *inputs: Input) -> _Program:
        key = (function.__name__, *(shape for shape, _ in inputs))
        if key not in self.programs:
            self.programs[key] = _Program(self._buffer, inputs, function, self._prepare)
        return self.programs[key]

    def _forward(
        self, ids_ST: Tensor, rows_S: Tensor, starts_S: Tensor, counts_S: Tensor, pages_SP: Tensor, wanted_N: Tensor
    ) -> None:
        grid = GridTokens(self.config, self.cache, rows_S, starts_S, counts_S, ids_ST.shape[1], pages_SP)
        hidden_ND, experts = grid.run_layers(self.model, ids_ST.flatten())
        size = hidden_ND.shape[0]
        self.hidden_ND[:size].copy_(hidden_ND)
        self.logits_NV[:size].copy_(self.model.lm_head(self.model.norm(hidden_ND[wanted_N])))
        if experts:
            self.routes_NLk[:size].copy_(torch.stack(experts, dim=1))

    def _commit(self, rows_S: Tensor, starts_S: Tensor, kept_ST: Tensor) -> None:
        num_tokens, width = kept_ST.shape[1], self.cache.history_RWD.shape[1]
        places_ST = (starts_S[:, None] + torch.arange(num_tokens, device=rows_S.device)) % width
        rows_ST = rows_S[:, None].expand_as(kept_ST).masked_fill(kept_ST == 0, self.cache.spare_row)
        self.cache.history_RWD[rows_ST, places_ST] = self.hidden_ND[: kept_ST.numel()].unflatten(0, kept_ST.shape)

    def _draft(self, rows_S: Tensor, lengths_S: Tensor, tokens_SW: Tensor) -> None:
        num_sequences, width = tokens_SW.shape
        counts_S = lengths_S.clamp(max=width)
        grid = GridTokens(self.config, self.cache, rows_S, lengths_S - counts_S, counts_S, width)
        places_ST = grid.positions_ST % self.cache.history_RWD.shape[1]
        hidden_ND = self.cache.history_RWD[rows_S[:, None], places_ST].flatten(0, 1)
        # Column of the id right after each position: the last column holds the id at position `length`.
        columns_ST = grid.positions_ST + width - lengths_S[:, None]
        text_SX = tokens_SW
        for head in range(self.config.num_mtp_heads):
            ids_N = text_SX.gather(1, columns_ST + head).flatten()
            out_ND = grid.run_head(self.model, head, hidden_ND, ids_N)
            last_SD = out_ND.unflatten(0, (num_sequences, width))[:, -1]  # the last token, or its repetition
            text_SX = torch.cat((text_SX, self.model.lm_head(last_SD).argmax(-1, keepdim=True)), dim=1)
        self.drafts_SK[:num_sequences].copy_(text_SX[:, width:])


class GridTokens(CachedTokens):
    """Tokens of a padded grid; everything about them is computed on the device from a few whole numbers."""

    static = True

    def __init__(
        self,
        config: ModelConfig,
        cache: TorchCache,
        rows_S: Tensor,
        starts_S: Tensor,
        counts_S: Tensor,
        num_tokens: int,
        pages_SP: Tensor | None = None,
    ) -> None:
        super().__init__(config, cache)
        steps_T = torch.arange(num_tokens, device=rows_S.device)
        missing_ST = steps_T >= counts_S[:, None]
        self.rows_S, self.pages_SP = rows_S, pages_SP
        self.positions_ST = positions_ST = starts_S[:, None] + torch.minimum(steps_T, counts_S[:, None] - 1)
        self.write_rows_ST = rows_S[:, None].expand_as(missing_ST).masked_fill(missing_ST, cache.spare_row)
        self.write_slots_ST = positions_ST % cache.num_slots
        keys_SC = torch.cat(
            (ring_positions(starts_S, cache.num_slots), positions_ST.masked_fill(missing_ST, -1)), dim=1
        )
        self.ring_bias_STC = visible_bias(positions_ST, keys_SC, config.sliding_attention.window_keys, cache.dtype)
        if pages_SP is not None:
            pages_ST = pages_SP.gather(1, positions_ST // PAGE_TOKENS)
            self.write_pages_ST = pages_ST.masked_fill(missing_ST, cache.spare_page)
            keys_1C = torch.arange(pages_SP.shape[1] * PAGE_TOKENS, device=rows_S.device)[None]
            self.page_bias_STC = visible_bias(positions_ST, keys_1C, None, cache.dtype)
        self.make_plans(positions_ST.flatten())

    def attend_ring(self, ring: int, q_NHK: Tensor, k_NGK: Tensor, v_NGV: Tensor, sink_H: Tensor | None) -> Tensor:
        q, k, v = (x.unflatten(0, self.positions_ST.shape) for x in (q_NHK, k_NGK, v_NGV))
        out_STHV = self.cache.attend_ring(ring, self.rows_S, q, k, v, self.ring_bias_STC, sink_H)
        self.cache.write_ring(ring, self.write_rows_ST, self.write_slots_ST, k, v)
        return out_STHV.flatten(0, 1)

    def attend_pages(self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGV: Tensor, sink_H: Tensor | None) -> Tensor:
        assert self.pages_SP is not None
        q, k, v = (x.unflatten(0, self.positions_ST.shape) for x in (q_NHK, k_NGK, v_NGV))
        self.cache.write_pages(layer, self.write_pages_ST, self.positions_ST % PAGE_TOKENS, k, v)
        return self.cache.attend_pages(layer, self.pages_SP, q, self.page_bias_STC, sink_H).flatten(0, 1)


def compiled(function: Function, tensors: Sequence[Tensor]) -> Callable[[], None]:
    """`torch.compile` of the whole function: control flow that depends on values is an error."""
    run = torch.compile(function, fullgraph=True, dynamic=False)
    # All buckets of a function share what PyTorch counts as recompilations; here their number is bounded.
    limits = torch._dynamo.config  # pyright: ignore[reportPrivateUsage]
    with limits.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20):
        run(*tensors)
    return lambda: run(*tensors)


class _Capture:
    """CUDA graphs, which share one pool of memory: they run one after the other and keep nothing in it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def __call__(self, function: Function, tensors: Sequence[Tensor]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            # Libraries set themselves up at first use, which a capture does not allow.
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_RUNS):
                    function(*tensors)
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                function(*tensors)
            self._pool = graph.pool()
        return graph.replay


class _Buffer:
    """Whole numbers on the host, pinned for CUDA, and on the device; elsewhere both are the same memory."""

    def __init__(self, size: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self.host = torch.zeros(size, dtype=torch.int64, pin_memory=on_cuda)
        self.device = torch.zeros(size, dtype=torch.int64, device=device) if device.type != "cpu" else self.host
        self._sent = torch.cuda.Event() if on_cuda else None

    def wait(self) -> None:
        """Until the last numbers were copied, so that others may be written."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, count: int) -> None:
        if self.device is not self.host:
            self.device[:count].copy_(self.host[:count], non_blocking=True)
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self.device.device))


class _Program:
    """One function for one bucket. Its inputs start as padding alone, so that preparing it changes no cache."""

    def __init__(self, buffer: _Buffer, inputs: Sequence[Input], function: Function, prepare: Prepare) -> None:
        self._buffer, self._inputs = buffer, inputs
        sizes = [prod(shape) for shape, _ in inputs]
        self._num_numbers = sum(sizes)

        def views(memory: Tensor) -> list[Tensor]:
            parts = memory[: self._num_numbers].split(sizes)
            return [part.view(shape) for part, (shape, _) in zip(parts, inputs, strict=True)]

        self._arrays: list[Int64] = [view.numpy() for view in views(buffer.host)]
        self.inputs()
        buffer.send(self._num_numbers)
        self._run = prepare(function, views(buffer.device))

    def inputs(self) -> list[Int64]:
        """Arrays to fill before `run`; they hold padding."""
        self._buffer.wait()
        for array, (_, padding) in zip(self._arrays, self._inputs, strict=True):
            array.fill(padding)
        return self._arrays

    def run(self) -> None:
        self._buffer.send(self._num_numbers)
        self._run()


def _fitting(sizes: list[int], size: int) -> int:
    return next(each for each in sizes if each >= size)
