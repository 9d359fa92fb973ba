"""From logits to tokens, for many rows with different options at once, in numpy.

Every row is treated by operations along its own axis alone, so what it gives does not depend on the rows beside it.
Suffixes: M rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from openmimo.engine.penalties import LogitAdjuster
from openmimo.engine.request import SamplingParams
from openmimo.engine.runner import Float32

Float64 = npt.NDArray[np.float64]
UInt64 = npt.NDArray[np.uint64]

# Weights are added up in blocks of this many.
BLOCK = 64
# In place of a token: nothing can be drawn from these logits.
BROKEN = -1
# Rows whose weights `recorded_logprobs` holds at once.
SLICE_ROWS = 128
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class RowOptions:
    """The options of every row, one array per option.

    `states_M` and `positions_M` choose each row's random number (see `uniforms`).
    """

    temperature_M: Float64
    top_k_M: npt.NDArray[np.int64]
    top_p_M: Float64
    min_p_M: Float64
    states_M: UInt64
    positions_M: UInt64

    @staticmethod
    def make(rows: list[tuple[SamplingParams, int, int, int]]) -> RowOptions:
        """From the params, the random stream and the first position of sequences, each with its number of rows."""
        counts = [count for *_, count in rows]
        positions = [position + place for _, _, position, count in rows for place in range(count)]
        return RowOptions(
            temperature_M=np.array([params.temperature for params, *_ in rows], dtype=np.float64).repeat(counts),
            top_k_M=np.array([params.top_k for params, *_ in rows], dtype=np.int64).repeat(counts),
            top_p_M=np.array([params.top_p for params, *_ in rows], dtype=np.float64).repeat(counts),
            min_p_M=np.array([params.min_p for params, *_ in rows], dtype=np.float64).repeat(counts),
            states_M=np.array([state for _, state, *_ in rows], dtype=np.uint64).repeat(counts),
            positions_M=np.array(positions, dtype=np.uint64),
        )


@dataclass
class Choices:
    """One token per row; with `weights_MV`, what its log-probability is computed from.

    Row m was drawn from weights_MV[m] / totals_M[m].
    """

    tokens_M: npt.NDArray[np.int64]
    weights_MV: Float32
    totals_M: Float64

    def logprobs(self, start: int, count: int) -> list[float]:
        """Log-probabilities of the tokens of some rows."""
        rows = np.arange(start, start + count)
        return _logarithms(self.weights_MV[rows, self.tokens_M[rows]] / self.totals_M[rows])

    def top_logprobs(self, row: int, count: int) -> dict[int, float]:
        """The most probable tokens of one row, best first; fewer than `count` if fewer are possible."""
        weights_V = self.weights_MV[row]
        count = min(count, len(weights_V))
        best = np.argpartition(-weights_V, count - 1)[:count]
        best = best[np.lexsort((best, -weights_V[best]))]
        return {int(i): math.log(float(weights_V[i]) / self.totals_M[row]) for i in best if weights_V[i] > 0}


def greedy(logits_MV: Float32) -> list[int]:
    """The most probable token of every row, the lowest id among equals; `BROKEN` where a logit is no number."""
    tokens_M = logits_MV.argmax(axis=1)
    best_M = logits_MV[np.arange(len(tokens_M)), tokens_M]  # a row's first NaN, if it has any
    if not math.isfinite(best_M.sum()):
        tokens_M[~np.isfinite(best_M)] = BROKEN
    return tokens_M.tolist()


def choose(logits_MV: Float32, options: RowOptions) -> Choices:
    """Draw one token per row by inverting the cumulative distribution, in id order, at the row's random number.

    Rows with temperature 0 take the most probable token, and weigh all tokens at temperature 1.
    """
    weights_MV, ends_MB = _weigh(logits_MV, options)
    totals_M = ends_MB[:, -1].copy()
    drawn_M = _invert(weights_MV, ends_MB, uniforms(options.states_M, options.positions_M))
    is_greedy_M = options.temperature_M == 0.0
    if is_greedy_M.any():
        drawn_M = np.where(is_greedy_M, logits_MV.argmax(axis=1), drawn_M)
    return Choices(drawn_M, weights_MV, totals_M)


def recorded_logprobs(
    logits_TV: Float32, token_ids: list[int], params: SamplingParams, prompt_ids: Iterable[int] = ()
) -> list[float]:
    """The log-probabilities that the engine records for an answer, bit for bit, from the same logits.

    `logits_TV` are what the model gave before each of the answer's tokens, cut to the ids that the engine chooses from
    (`Engine.num_tokens`). The prompt is needed for `repetition_penalty` alone. A token that the options leave out has
    minus infinity.
    """
    if params.penalized or params.logit_bias:
        logits_TV = logits_TV.copy()
        LogitAdjuster(params, prompt_ids).apply_window(logits_TV, token_ids[:-1])
    ids_T = np.array(token_ids, dtype=np.int64)
    logprobs: list[float] = []
    for start in range(0, len(ids_T), SLICE_ROWS):
        ids_M = ids_T[start : start + SLICE_ROWS]
        options = RowOptions.make([(params, 0, 0, len(ids_M))])
        weights_MV, ends_MB = _weigh(logits_TV[start : start + SLICE_ROWS], options)
        logprobs += _logarithms(weights_MV[np.arange(len(ids_M)), ids_M] / ends_MB[:, -1])
    return logprobs


def score(logits_TV: Float32, token_ids: list[int], num_top: int) -> tuple[list[float], list[dict[int, float]]]:
    """The log-probabilities of given tokens, each from its own row of logits, and the best `num_top` of every row."""
    options = RowOptions.make([(SamplingParams(), 0, 0, len(token_ids))])
    weights_MV, ends_MB = _weigh(logits_TV, options)
    found = Choices(np.array(token_ids, dtype=np.int64), weights_MV, ends_MB[:, -1])
    rows = range(len(token_ids)) if num_top else ()
    return found.logprobs(0, len(token_ids)), [found.top_logprobs(row, num_top) for row in rows]


def _weigh(logits_MV: Float32, options: RowOptions) -> tuple[Float32, Float64]:
    """What every token's probability is proportional to, and the sum up to the end of every block of tokens."""
    is_greedy_M = options.temperature_M == 0.0
    # Bounded, so that the smallest temperatures stay numbers: the most probable token is all that is left long before.
    scale_M = (1.0 / np.where(is_greedy_M, 1.0, np.maximum(options.temperature_M, 1e-20))).astype(np.float32)
    weights_MV = logits_MV - logits_MV.max(axis=1, keepdims=True)
    weights_MV *= scale_M[:, None]
    np.exp(weights_MV, out=weights_MV)
    _filter(logits_MV, weights_MV, options, is_greedy_M)
    sums_MB = np.add.reduceat(weights_MV, np.arange(0, weights_MV.shape[1], BLOCK), axis=1, dtype=np.float64)
    return weights_MV, sums_MB.cumsum(axis=1)


def _logarithms(shares: Float64) -> list[float]:
    """One number at a time: the last bit of numpy's logarithm is not the C library's."""
    return [math.log(share) if share > 0.0 else -math.inf for share in shares.tolist()]


def _invert(weights_MV: Float32, ends_MB: Float64, numbers_M: Float64) -> npt.NDArray[np.int64]:
    """The token at which the running sum of each row passes its number's share of the total.

    Sums of blocks come first, so only one block per row is added up token by token.
    """
    rows_M1 = np.arange(len(weights_MV))[:, None]
    size, totals_M = weights_MV.shape[1], ends_MB[:, -1]
    # A target below the total, and `<=`, skip what weighs 0: its sum equals its predecessor's.
    target_M1 = np.minimum(numbers_M * totals_M, np.nextafter(totals_M, 0.0))[:, None]
    block_M1 = (ends_MB <= target_M1).sum(axis=1, keepdims=True)
    before_M1 = np.where(block_M1 > 0, ends_MB[rows_M1, np.maximum(block_M1 - 1, 0)], 0.0)
    places_MC = block_M1 * BLOCK + np.arange(BLOCK)
    inside_MC = weights_MV[rows_M1, np.minimum(places_MC, size - 1)].astype(np.float64)
    inside_MC[places_MC >= size] = 0.0
    count_M = (before_M1 + inside_MC.cumsum(axis=1) <= target_M1).sum(axis=1)
    # Added in another order, the block may end a rounding error below the target: then its last possible token.
    last_M = BLOCK - 1 - (inside_MC[:, ::-1] > 0).argmax(axis=1)
    return block_M1[:, 0] * BLOCK + np.minimum(count_M, last_M)


def _filter(logits_MV: Float32, weights_MV: Float32, options: RowOptions, is_greedy_M: npt.NDArray[np.bool_]) -> None:
    """Set the weights of what top-k, top-p and min-p leave out to 0."""
    ranked_M = ((options.top_k_M > 0) | (options.top_p_M < 1.0)) & ~is_greedy_M
    for row in np.flatnonzero(ranked_M).tolist():
        top_k, top_p = int(options.top_k_M[row]), float(options.top_p_M[row])
        kept = _most_probable(logits_MV[row], weights_MV[row], top_k, top_p)
        values = weights_MV[row, kept]
        weights_MV[row] = 0.0
        weights_MV[row, kept] = values
    relative = np.flatnonzero((options.min_p_M > 0.0) & ~is_greedy_M)
    if len(relative):
        # The most probable token weighs 1 and is always kept.
        weights_RV = weights_MV[relative]
        weights_RV[weights_RV < options.min_p_M[relative][:, None]] = 0.0
        weights_MV[relative] = weights_RV


def _most_probable(logits_V: Float32, weights_V: Float32, top_k: int, top_p: float) -> npt.NDArray[np.int64]:
    """The ids that top-k and top-p keep; the lowest of equals where not all fit.

    Only ids whose weight is not small are sorted, if these suffice; the result is the same.
    """
    size = len(logits_V)
    top_k = min(top_k, size) or size
    total = float(weights_V.sum(dtype=np.float64))
    ids = np.arange(0)
    for least in (1e-3, 1e-6, 0.0):
        ids = np.flatnonzero(weights_V >= least)
        if len(ids) >= top_k or (top_k == size and weights_V[ids].sum(dtype=np.float64) > top_p * total):
            break
    ids = ids[np.argsort(-logits_V[ids], kind="stable")][:top_k]
    if top_p < 1.0:
        mass = weights_V[ids].astype(np.float64)
        within = (mass.cumsum() - mass < top_p * (total if top_k == size else mass.sum())).sum()
        ids = ids[: max(int(within), 1)]
    return ids


def random_state(seed: int, choice: int) -> int:
    """The 64-bit name of a random stream."""
    with np.errstate(over="ignore"):
        return int(
            _mix(_mix(np.array([seed & (2**64 - 1)], dtype=np.uint64) + _GOLDEN) + np.uint64(choice) * _GOLDEN)[0]
        )


def uniforms(states_M: UInt64, positions_M: UInt64) -> Float64:
    """Random numbers in [0, 1), each a function of its stream and position alone.

    Source: the generator SplitMix64, entered at any count.
    """
    with np.errstate(over="ignore"):
        return (_mix(states_M + positions_M * _GOLDEN) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: UInt64) -> UInt64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
