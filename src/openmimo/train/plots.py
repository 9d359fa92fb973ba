"""The curves of a run as one PNG."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line cut short by a crash is left out."""
    records: list[dict[str, Any]] = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def plot_run(run_dir: Path) -> Path | None:
    """Write `curves.png` beside the metrics; None when matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(run_dir)
    steps = [r["step"] for r in records]
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).flatten()
    axes[0].plot(steps, [r["loss"] for r in records], label="next token")
    for head in range(max((len(r["mtp_losses"]) for r in records), default=0)):
        points = [(r["step"], r["mtp_losses"][head]) for r in records if len(r["mtp_losses"]) > head]
        axes[0].plot(*zip(*points, strict=True), label=f"MTP head {head + 1}")
    axes[0].legend()
    axes[1].plot(steps, [r["learning_rate"] for r in records])
    axes[2].plot(steps, [r["grad_norm"] for r in records])
    axes[3].plot(steps, [r["num_zeros"]["all"] for r in records])
    axes[4].plot(steps, [r["expert_load"]["worst"] if r["expert_load"] else 1.0 for r in records])
    axes[5].plot(steps, [r["tokens_per_second"] for r in records])
    titles = ("loss", "learning rate", "gradient norm", "num-zeros", "busiest expert / mean", "tokens per second")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=110)
    return path
