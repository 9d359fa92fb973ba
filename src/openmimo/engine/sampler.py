"""From logits to tokens, for many rows with different options at once, in numpy.

Every row is treated by operations along its own axis alone, so what it gives does not depend on the rows beside it.
Suffixes: M rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from openmimo.engine.request import SamplingParams
from openmimo.engine.runner import Float32

Float64 = npt.NDArray[np.float64]
UInt64 = npt.NDArray[np.uint64]

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
    weights_MV: Float64
    totals_M: Float64

    def logprobs(self, start: int, count: int) -> list[float]:
        """Log-probabilities of the tokens of some rows."""
        rows = np.arange(start, start + count)
        return np.log(self.weights_MV[rows, self.tokens_M[rows]] / self.totals_M[rows]).tolist()

    def top_logprobs(self, row: int, count: int) -> dict[int, float]:
        """The most probable tokens of one row, best first; fewer than `count` if fewer are possible."""
        weights_V = self.weights_MV[row]
        count = min(count, len(weights_V))
        best = np.argpartition(-weights_V, count - 1)[:count]
        best = best[np.lexsort((best, -weights_V[best]))]
        return {int(i): float(np.log(weights_V[i] / self.totals_M[row])) for i in best if weights_V[i] > 0}


def greedy(logits_MV: Float32) -> list[int]:
    """The most probable token of every row, the lowest id among equals."""
    return logits_MV.argmax(axis=1).tolist()


def choose(logits_MV: Float32, options: RowOptions) -> Choices:
    """Draw one token per row by inverting the cumulative distribution, in id order, at the row's random number.

    Rows with temperature 0 take the most probable token, and weigh all tokens at temperature 1.
    """
    is_greedy_M = options.temperature_M == 0.0
    temperature_M = np.where(is_greedy_M, 1.0, options.temperature_M)
    top_M1 = logits_MV.max(axis=1, keepdims=True)
    weights_MV = np.exp((logits_MV.astype(np.float64) - top_M1) / temperature_M[:, None])
    _filter(logits_MV, weights_MV, options, ~is_greedy_M)
    cumulative_MV = weights_MV.cumsum(axis=1)
    totals_M = cumulative_MV[:, -1].copy()
    # A target below the total, and `<=`, skip tokens of weight 0, whose sum equals their predecessor's.
    target_M = np.minimum(uniforms(options.states_M, options.positions_M) * totals_M, np.nextafter(totals_M, 0.0))
    drawn_M = (cumulative_MV <= target_M[:, None]).sum(axis=1)
    tokens_M = np.where(is_greedy_M, logits_MV.argmax(axis=1), drawn_M)
    return Choices(tokens_M, weights_MV, totals_M)


def _filter(logits_MV: Float32, weights_MV: Float64, options: RowOptions, sampled_M: npt.NDArray[np.bool_]) -> None:
    """Set the weights of what top-k, top-p and min-p leave out to 0."""
    size = logits_MV.shape[1]
    ranked = np.flatnonzero(sampled_M & ((options.top_k_M > 0) | (options.top_p_M < 1.0)))
    if len(ranked):
        logits_RV, weights_RV = logits_MV[ranked], weights_MV[ranked]
        top_k_R, top_p_R = options.top_k_M[ranked], options.top_p_M[ranked]
        kept_R = np.where(top_k_R > 0, np.minimum(top_k_R, size), size)
        # Weights grow with logits, so sorting both keeps them together.
        sorted_RV, mass_RV = np.sort(logits_RV, axis=1)[:, ::-1], np.sort(weights_RV, axis=1)[:, ::-1].copy()
        mass_RV[np.arange(size) >= kept_R[:, None]] = 0.0
        before_RV = np.zeros_like(mass_RV)
        np.cumsum(mass_RV[:, :-1], axis=1, out=before_RV[:, 1:])
        total_R = before_RV[:, -1] + mass_RV[:, -1]
        within_R = (before_RV < (top_p_R * total_R)[:, None]).sum(axis=1)
        kept_R = np.where(top_p_R < 1.0, np.minimum(kept_R, np.maximum(within_R, 1)), kept_R)
        # The last kept value may occur more often than there is room for: the lowest ids stay.
        last_R1 = sorted_RV[np.arange(len(ranked)), kept_R - 1][:, None]
        above_RV, equal_RV = logits_RV > last_R1, logits_RV == last_R1
        room_R1 = (kept_R - above_RV.sum(axis=1))[:, None]
        keep_RV = above_RV | (equal_RV & (equal_RV.cumsum(axis=1) <= room_R1))
        weights_MV[ranked] = np.where(keep_RV, weights_RV, 0.0)
    relative = np.flatnonzero(sampled_M & (options.min_p_M > 0.0))
    if len(relative):
        # The most probable token weighs 1 and is always kept.
        weights_RV = weights_MV[relative]
        weights_MV[relative] = np.where(weights_RV >= options.min_p_M[relative][:, None], weights_RV, 0.0)


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
