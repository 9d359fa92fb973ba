"""The pictures of `openmimo reproduce`, drawn with matplotlib (extra `plots`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from openmimo.errors import RequestError
from openmimo.evals.retrieval import RetrievalCell, prompt_lengths, retrieval_grid
from openmimo.reproduce.acceptance_curve import REPORT_CURVE
from openmimo.reproduce.attention import LEVELS, AttentionReport
from openmimo.reproduce.figure6 import Figure6
from openmimo.reproduce.figure7 import Figure7
from openmimo.reproduce.numzeros import ZerosReport
from openmimo.reproduce.r3 import R3Report
from openmimo.reproduce.seesaw import Seesaw
from openmimo.reproduce.story import DOMAINS, CurvePoint, Scores, mean
from openmimo.reproduce.table7 import Table7
from openmimo.reproduce.table10 import SpeedCell

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


def plot_table7(table: Table7, path: Path) -> None:
    """Bars by domain: before, best teacher, and every student."""
    drawing, axes = _new_figure()
    bars: list[tuple[str, Scores, Scores | None]] = [
        ("before", table.base.drawn, None),
        ("best teacher", table.best, None),
    ]
    bars += [(student.name, student.scores, student.spread) for student in table.students]
    width = 0.8 / len(bars)
    for number, (name, scores, spread) in enumerate(bars):
        x = [place - 0.4 + (number + 0.5) * width for place in range(len(DOMAINS))]
        heights = [100 * scores[domain] for domain in DOMAINS]
        errors = None if spread is None else [100 * spread[domain] for domain in DOMAINS]
        axes.bar(x, heights, width, yerr=errors, label=name)
    axes.set_xticks(range(len(DOMAINS)), DOMAINS)
    axes.set_ylabel("right answers (%)")
    axes.set_ylim(0, 140)  # room for the legend
    axes.set_yticks(range(0, 101, 20))
    axes.legend(fontsize=8, ncols=3, loc="upper center")
    drawing.savefig(path, dpi=120)


def plot_figure6(figure: Figure6, path: Path) -> None:
    """Score over steps: a band from the worst to the best seed and the mean, for every way to learn."""
    drawing, axes = _new_figure()
    for arm in figure.arms:
        points = arm.mean_curve()
        steps, scores = [step for step, _ in points], [100 * score for _, score in points]
        (line,) = axes.plot(steps, scores, label=arm.name)
        by_step = {point.step: [] for curve in arm.curves for point in curve}
        for curve in arm.curves:
            for point in curve:
                by_step[point.step].append(100 * mean(point.scores))
        low, high = [min(by_step[step]) for step in steps], [max(by_step[step]) for step in steps]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
    axes.axhline(
        100 * figure.teachers, color="black", linestyle="--", linewidth=0.9, label="teachers, each in its domain"
    )
    axes.axhline(100 * figure.base, color="grey", linestyle=":", linewidth=0.9, label="before")
    axes.set_xlabel("step")
    axes.set_ylabel("right answers, mean over the domains (%)")
    axes.legend()
    drawing.savefig(path, dpi=120)


def plot_student(curve: Sequence[CurvePoint], teachers: Scores, path: Path) -> None:
    """One student's way in every domain, and where the domain's teacher is."""
    drawing, axes = _new_figure()
    for domain in DOMAINS:
        steps, scores = [point.step for point in curve], [100 * point.scores[domain] for point in curve]
        (line,) = axes.plot(steps, scores, marker="o", markersize=3, label=f"{domain}: student")
        axes.axhline(100 * teachers[domain], color=line.get_color(), linestyle="--", label=f"{domain}: its teacher")
    axes.set_xlabel("step")
    axes.set_ylabel("right answers (%)")
    axes.legend()
    drawing.savefig(path, dpi=120)


def plot_seesaw(seesaw: Seesaw, path: Path) -> None:
    """Each domain over the tokens of sequential learning, stages shaded in turn; MOPD's end as dashed lines."""
    drawing, axes = _new_figure()
    points = [point for stage in seesaw.stages for point in stage.curve]
    for domain in DOMAINS:
        x, y = [p.sampled_tokens / 1e6 for p in points], [100 * p.scores[domain] for p in points]
        (line,) = axes.plot(x, y, label=domain)
        end = 100 * seesaw.mopd[-1].scores[domain]
        axes.axhline(end, color=line.get_color(), linestyle="--", linewidth=0.9, label=f"{domain}: MOPD")
    for number, stage in enumerate(seesaw.stages):
        low, high = (stage.curve[place].sampled_tokens / 1e6 for place in (0, -1))
        axes.axvspan(low, high, color="grey", alpha=0.06 + 0.06 * (number % 2))
        axes.text((low + high) / 2, 2, f"RL in {stage.domain}", ha="center")
    axes.set_ylim(0, 100)
    axes.set_xlabel("sampled tokens (millions)")
    axes.set_ylabel("right answers (%)")
    axes.legend(fontsize=8)
    drawing.savefig(path, dpi=120)


def plot_r3(report: R3Report, path: Path) -> None:
    """Rewards and gradient norms of learning with and without replay: a thin line per seed."""
    drawing, (left, right, far) = _new_figures(3)
    for arm in report.learning:
        name, color = ("with replay", "tab:blue") if arm.replay else ("without", "tab:red")
        for axes, lines in ((left, arm.rewards), (right, arm.kls), (far, arm.grad_norms)):
            for number, line in enumerate(lines):
                axes.plot(line, color=color, alpha=0.7, linewidth=0.9, label=None if number else name)
    for axes, title in ((left, "reward"), (right, "KL(sampler || trainer)"), (far, "gradient norm")):
        axes.set_title(title)
        axes.set_xlabel("step")
    right.set_yscale("log")
    far.set_yscale("log")
    left.legend()
    drawing.savefig(path, dpi=120)


def plot_numzeros(report: ZerosReport, path: Path) -> None:
    """The count over the steps of every arm, and losses on the batch and on held-out problems."""
    drawing, (left, right) = _new_figures(2)
    for arm in report.arms:
        (line,) = left.plot(arm.num_zeros, label=arm.name)
        right.plot(*zip(*arm.held_out, strict=True), color=line.get_color(), label=f"{arm.name}: held out")
        right.plot(arm.losses, color=line.get_color(), alpha=0.4, linewidth=0.8)
    for axes, title in ((left, "num-zeros"), (right, "loss")):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.legend()
    right.set_yscale("log")
    drawing.savefig(path, dpi=120)


def plot_retrieval(cells: Sequence[RetrievalCell], path: Path, native_tokens: int = 0) -> None:
    """A heat map: tasks down, lengths across."""
    names, levels, shares = retrieval_grid(cells)
    drawing, axes = _new_figure()
    axes.grid(visible=False)
    axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            axes.text(column, row, f"{share:.1%}", ha="center", va="center", color="black" if share > 0.6 else "white")
    lengths = prompt_lengths(cells)
    times = [f"\n{length / native_tokens:.1f}x" if native_tokens else "" for length in lengths]
    axes.set_xticks(range(len(levels)), [f"{n:,.0f}{x}" for n, x in zip(lengths, times, strict=True)])
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("tokens of a prompt" + (", times the native length" if native_tokens else ""))
    drawing.savefig(path, dpi=120)


def plot_attention(report: AttentionReport, path: Path) -> None:
    """Loss, domains and retrieval of every arm, means over the seeds.

    Whiskers are sample deviations; those of retrieval go from the worst seed to the best, because seeds find all or
    nothing there.
    """
    drawing, (left, middle, right) = _new_figures(3)
    for place, result in enumerate(report.arms):
        losses = [exam.loss for exam in result.exams]
        left.errorbar(np.mean(losses), place, xerr=_deviation(losses), fmt="o", capsize=4)
        shares_DS = np.array([[100 * exam.domains[domain] for exam in result.exams] for domain in DOMAINS])
        width = 0.8 / len(report.arms)
        x_D = np.arange(len(DOMAINS)) - 0.4 + (place + 0.5) * width
        middle.bar(x_D, shares_DS.mean(1), width, yerr=[_deviation(line) for line in shares_DS.tolist()])
        recalled_LS = np.array([[100 * exam.recalled(level) for exam in result.exams] for level in LEVELS])
        mean_L = recalled_LS.mean(1)
        errors = [mean_L - recalled_LS.min(1), recalled_LS.max(1) - mean_L]
        x_L = np.arange(len(LEVELS)) + 0.06 * (place - (len(report.arms) - 1) / 2)
        right.errorbar(x_L, mean_L, yerr=errors, marker="o", capsize=4)
    left.set_yticks(range(len(report.arms)), [result.arm.name for result in report.arms])
    left.set_xlabel("held-out text, nats per token")
    middle.set_xticks(range(len(DOMAINS)), DOMAINS)
    middle.set_ylabel("right answers (%)")
    right.set_xticks(range(len(LEVELS)), [f"{2**step}x" for step in range(len(LEVELS))])
    right.set_xlabel("the native length")
    right.set_ylabel("retrieval (%)")
    right.set_ylim(-2, 102)
    drawing.savefig(path, dpi=120)


def _deviation(values: Sequence[float]) -> float:
    """Sample deviation, 0 of one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _new_figure() -> tuple[Figure, Axes]:
    figure, (axes,) = _new_figures(1)
    return figure, axes


def _new_figures(number: int) -> tuple[Figure, list[Axes]]:
    """As many axes side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5) if number == 1 else (12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    many = list(figure.subplots(1, number, squeeze=False)[0])
    for axes in many:
        axes.grid(alpha=0.3)
    return figure, many
