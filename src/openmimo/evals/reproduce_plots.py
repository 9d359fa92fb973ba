"""The pictures of `openmimo reproduce`, drawn with matplotlib (extra `plots`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from openmimo.errors import RequestError
from openmimo.evals.acceptance_curve import REPORT_CURVE
from openmimo.evals.reproduce_figure7 import Figure7
from openmimo.evals.reproduce_table10 import SpeedCell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def demand_matplotlib() -> None:
    """Raises: RequestError with the extra's name, before anything was measured in vain."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(
            "the picture needs matplotlib, which is not installed; run `pip install 'openmimo[plots]'`, "
            "or pass --no-plot for table and JSON alone"
        )


def plot_figure7(figure: Figure7, path: Path) -> None:
    """Acceptance length against cross-entropy: a colour per domain, the fit, and the report's curve."""
    drawing, axes = _new_figure()
    for group in dict.fromkeys(point.group for point in figure.points):
        points = [point for point in figure.points if point.group == group]
        axes.scatter([p.cross_entropy for p in points], [p.acceptance_length for p in points], s=18, label=group)
    x_N = np.linspace(0.0, max(point.cross_entropy for point in figure.points), 400)
    label = f"y = {figure.curve}, R2 = {figure.r_squared:.3f}"
    axes.plot(x_N, [figure.curve.at(float(x)) for x in x_N], color="black", label=label)
    report = [max(1.0, REPORT_CURVE.at(float(x))) for x in x_N]
    axes.plot(x_N, report, color="grey", linestyle="--", label=f"report: y = {REPORT_CURVE}")
    axes.set_xlabel("next-token cross-entropy (nats)")
    axes.set_ylabel("tokens per step")
    axes.legend()
    drawing.savefig(path, dpi=120)


def plot_table10(cells: Sequence[SpeedCell], path: Path) -> None:
    """Speed-up over batch: a line per acceptance length, dashed for the heads' own drafts."""
    drawing, axes = _new_figure()
    for prompts, wanted in dict.fromkeys((cell.prompts, cell.wanted) for cell in cells):
        line = [cell for cell in cells if (cell.prompts, cell.wanted) == (prompts, wanted)]
        label = f"own heads, {prompts}" if wanted is None else f"{wanted:g} tokens per step"
        batches, gains = [cell.batch for cell in line], [cell.speedup for cell in line]
        axes.plot(batches, gains, marker="o", linestyle="--" if wanted is None else "-", label=label)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch")
    axes.set_ylabel("speed-up over no drafts")
    axes.legend()
    drawing.savefig(path, dpi=120)


def _new_figure() -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes
