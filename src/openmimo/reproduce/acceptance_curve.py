"""The curve of the MiMo-V2-Flash report's Figure 7: acceptance length against next-token cross-entropy, and its fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from openmimo.errors import RequestError

# Different points that fix a curve with something left to judge it by.
LEAST_POINTS = 3
# Exponents that a fit may have.
LEAST_EXPONENT, GREATEST_EXPONENT = 0.05, 5.0


@dataclass(frozen=True, kw_only=True)
class AcceptanceCurve:
    """y = most (1 - scale x^exponent): `most` is 1 + heads, which a text without any entropy reaches."""

    most: float
    scale: float
    exponent: float

    def at(self, cross_entropy: float) -> float:
        """Tokens per step at a cross-entropy in nats."""
        return self.most * (1.0 - self.scale * cross_entropy**self.exponent)

    def r_squared(self, cross_entropies: Sequence[float], lengths: Sequence[float]) -> float:
        """The share of the lengths' variance that the curve explains; below 0 it is worse than their mean.

        Lengths that are all equal leave nothing to explain: 0.
        """
        lengths_N = np.asarray(lengths, dtype=np.float64)
        left_N = lengths_N - np.array([self.at(x) for x in cross_entropies])
        total = float(((lengths_N - lengths_N.mean()) ** 2).sum())
        return 1.0 - float((left_N**2).sum()) / total if total > 0 else 0.0

    def __str__(self) -> str:
        return f"{self.most:g}(1 - {self.scale:.3f} x^{self.exponent:.3f})"


# Fitted by the report over its datasets, with three heads.
REPORT_CURVE = AcceptanceCurve(most=4.0, scale=0.58, exponent=0.58)
REPORT_R_SQUARED = 0.995


def fit_curve(cross_entropies: Sequence[float], lengths: Sequence[float], *, num_heads: int) -> AcceptanceCurve:
    """Least squares in y over scale and exponent; the maximum stays at 1 + `num_heads`.

    For a given exponent the best scale is a quotient, so one number is searched.
    Raises: RequestError on fewer than LEAST_POINTS different points.
    """
    if len(set(cross_entropies)) < LEAST_POINTS:
        raise RequestError(
            f"{len(set(cross_entropies))} different cross-entropies do not fix a curve of two parameters; "
            f"measure at least {LEAST_POINTS} datasets"
        )
    most = 1.0 + num_heads
    x_N = np.asarray(cross_entropies, dtype=np.float64)
    missing_N = 1.0 - np.asarray(lengths, dtype=np.float64) / most

    def scale_of(exponent: float) -> float:
        powers_N = x_N**exponent
        return float(missing_N @ powers_N / (powers_N @ powers_N))

    def error_of(exponent: float) -> float:
        return float(((missing_N - scale_of(exponent) * x_N**exponent) ** 2).sum())

    exponent = _least(error_of, LEAST_EXPONENT, GREATEST_EXPONENT)
    return AcceptanceCurve(most=most, scale=scale_of(exponent), exponent=exponent)


def _least(error_of: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of one number is least: a grid around its best point, again and again."""
    for _ in range(20):
        grid = np.linspace(low, high, 41)
        best = int(np.argmin([error_of(float(x)) for x in grid]))
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    return (low + high) / 2
