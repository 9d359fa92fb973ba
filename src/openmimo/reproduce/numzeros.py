"""The count of zero gradients (num-zeros) as an early warning: under a forced imbalance of experts, and over-fitting.

Three ways to go on with fine-tuning from one model: as it was; with the balance bias moved the wrong way, so that busy
experts get busier; and on a handful of conversations again and again. The model has many small experts, as large models
have, and its steps few tokens: only then do some experts get none, which is what the count sees.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from openmimo.checkpoint import load_model
from openmimo.config.train import DataRecipe, SourceKind, SourceRecipe, TrainRecipe
from openmimo.data.build import build_loader
from openmimo.data.loader import BatchLoader
from openmimo.kernels.optimizer import gradient_norm
from openmimo.model import MiMoModel, cast_model
from openmimo.reproduce.story import DOMAINS, Story
from openmimo.rl.monitors import TrendAlert
from openmimo.tasks import sample_problem
from openmimo.text import ChatTemplate, Tokenizer
from openmimo.train import monitors
from openmimo.train.device import compute_dtype, pick_device, to_device
from openmimo.train.memory import keep_freed_memory
from openmimo.train.optimizer import MasterAdamW
from openmimo.train.step import StepSettings, evaluate, train_step

CONTROL, IMBALANCE, OVERFIT = "control", "forced imbalance", "over-fitting"
ARMS = (CONTROL, IMBALANCE, OVERFIT)
# The model: as the base, but with so many experts of that width; and how it is trained.
NUM_EXPERTS, EXPERT_DIM = 64, 32
BASE_STEPS, BASE_WARMUP, BASE_RATES = 300, 20, (3e-3, 1e-3)
# Balance follows the data within tens of steps; a step of an arm is one row of so many tokens.
BIAS_RATE = 0.003
ROW_TOKENS = 64
# Steps that a trend is averaged over, and repetitions of what is timed.
WINDOW = 10
TIMED = 50


@dataclass(frozen=True, kw_only=True)
class ZerosArm:
    """Every step's count, loss on its batch, busiest expert over the mean, and the alerts that the monitor gave.

    `held_out` has the loss on held-out problems after every tenth step; `cost` is what the count adds to a step's time.
    """

    name: str
    num_zeros: tuple[int, ...]
    losses: tuple[float, ...]
    loads: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    alerts: tuple[tuple[int, str], ...]
    cost: float

    @property
    def change(self) -> float:
        """The last steps' mean count over the first steps'."""
        return self.last / max(1.0, self.first)

    @property
    def first(self) -> float:
        """Mean count of the first fifth of the steps."""
        return statistics.mean(self.num_zeros[: max(1, len(self.num_zeros) // 5)])

    @property
    def last(self) -> float:
        """Mean count of the last fifth."""
        return statistics.mean(self.num_zeros[-max(1, len(self.num_zeros) // 5) :])


@dataclass(frozen=True, kw_only=True)
class ZerosReport:
    """All arms, and the parameters that could be zero."""

    arms: tuple[ZerosArm, ...]
    num_parameters: int


def measure_numzeros(story: Story, *, steps: int, conversations: int, reverse_rate: float, seed: int) -> ZerosReport:
    """Train each arm for `steps` on a constant learning rate, that of the model's last steps.

    `conversations` are what over-fitting repeats; `reverse_rate` is how fast the balance bias moves the wrong way.
    """
    recipe = _recipe(story)
    model_dir = story.trained(recipe.name, recipe).model
    keep_freed_memory()
    few = story.folder / "few-conversations.jsonl"
    _write_conversations(few, conversations, seed)
    arms: list[ZerosArm] = []
    size = 0
    for name in ARMS:
        story.say(f"num-zeros, {name}: {steps} steps")
        arm, size = _run(recipe, model_dir, name, few, steps, reverse_rate, seed)
        arms.append(arm)
    return ZerosReport(arms=tuple(arms), num_parameters=size)


def numzeros_rows(report: ZerosReport) -> tuple[list[str], list[list[str]]]:
    """A row per arm."""
    header = ["", "num-zeros at first", "at last", "change", "busiest expert", "loss", "held out", "alert", "cost"]
    rows = [
        [
            arm.name,
            f"{arm.first:,.0f}",
            f"{arm.last:,.0f}",
            f"{arm.change:.2f}x",
            f"{arm.loads[0]:.1f} -> {arm.loads[-1]:.1f}",
            f"{arm.losses[0]:.3f} -> {arm.losses[-1]:.3f}",
            f"{arm.held_out[0][1]:.3f} -> {arm.held_out[-1][1]:.3f}",
            f"{arm.alerts[0][1]} at step {arm.alerts[0][0]}" if arm.alerts else "none",
            f"{arm.cost:.2%}",
        ]
        for arm in report.arms
    ]
    return header, rows


def numzeros_figures(report: ZerosReport) -> dict[str, Any]:
    """All figures, as JSON takes them."""
    return {**asdict(report), "changes": {arm.name: arm.change for arm in report.arms}}


def _recipe(story: Story) -> TrainRecipe:
    """The model that all arms begin with: the base's data and tokenizer, many experts, one short stage."""
    base = story.recipe.base
    start, end = BASE_RATES
    stage = replace(
        base.stages[-1],
        name="fine-tuning",
        steps=BASE_STEPS,
        warmup_steps=BASE_WARMUP,
        lr_start=start,
        lr_end=end,
        bias_update_rate=BIAS_RATE,
    )
    return replace(
        base,
        name="numzeros-base",
        model=replace(base.model, num_experts=NUM_EXPERTS, expert_dim=EXPERT_DIM),
        tokenizer=replace(base.tokenizer, path=str(story.base().model), vocab_size=0),
        stages=(stage,),
    )


def _run(
    base: TrainRecipe, model_dir: Path, name: str, few: Path, steps: int, reverse_rate: float, seed: int
) -> tuple[ZerosArm, int]:
    device = pick_device(base.device)
    model = cast_model(load_model(model_dir), compute_dtype(base.precision, device)).to(device)
    optimizer, stage = MasterAdamW.from_recipe(model, base.optimizer), base.stages[-1]
    forced = name == IMBALANCE
    settings = StepSettings(
        num_mtp_heads=model.config.num_mtp_heads,
        mtp_weight=stage.mtp_loss_weight,
        balance_weight=0.0 if forced else stage.sequence_aux_weight,
        bias_update_rate=-reverse_rate if forced else stage.bias_update_rate,
    )
    _, rate = base.learning_rates(stage)
    recipe = replace(base.data_of(stage), batch_sequences=1, sequence_length=ROW_TOKENS)
    if name == OVERFIT:
        recipe = replace(recipe, sources=(SourceRecipe(kind=SourceKind.TEXT, path=str(few)),))
    tokenizer = Tokenizer.load(model_dir)
    unseen = replace(base.data, sources=tuple(replace(source, split="test") for source in base.data.sources))
    with _loader(unseen, tokenizer, seed) as held_out:
        probe = to_device(next(held_out), device)
    zeros: list[int] = []
    losses: list[float] = []
    loads: list[float] = []
    tests: list[tuple[int, float]] = []
    alerts: list[tuple[int, str]] = []
    seconds: list[float] = []
    alert = TrendAlert(window=WINDOW)
    with _loader(recipe, tokenizer, seed) as batches:
        for step in range(steps):
            batch = to_device(next(batches), device)
            began = time.perf_counter()
            result = train_step(
                model,
                optimizer,
                batch.token_ids_BT,
                batch.document_ids_BT,
                batch.position_ids_BT,
                batch.loss_mask_BT,
                learning_rate=rate,
                settings=settings,
            )
            seconds.append(time.perf_counter() - began)
            zeros.append(monitors.num_zeros(model, optimizer.zero_counts)["all"])
            losses.append(float(result.losses.next_token.detach()))
            load_LE = result.tokens_per_expert_LE
            loads.append(1.0 if load_LE is None else monitors.expert_load(load_LE)["worst"])
            found = alert.observe(zeros[-1])
            if found:
                alerts.append((step + 1, found))
            if step % WINDOW == 0 or step == steps - 1:
                tests.append((step + 1, float(evaluate(model, probe).next_token)))
    arm = ZerosArm(
        name=name,
        num_zeros=tuple(zeros),
        losses=tuple(losses),
        loads=tuple(loads),
        held_out=tuple(tests),
        alerts=tuple(alerts),
        cost=_counting_seconds(model, optimizer) / statistics.median(seconds),
    )
    return arm, sum(parameter.numel() for parameter in model.parameters())


def _counting_seconds(model: MiMoModel, optimizer: MasterAdamW) -> float:
    """What the count adds to a step: to the pass that takes the norm, where that counts, and the sums by group."""
    slots = optimizer.slots()

    def counted() -> float:
        began = time.perf_counter()
        if slots:
            gradient_norm(slots)
        monitors.num_zeros(model, optimizer.zero_counts)
        return time.perf_counter() - began

    def plain() -> float:
        began = time.perf_counter()
        if slots:
            gradient_norm(slots, count_zeros=False)
        return time.perf_counter() - began

    pairs = [(counted(), plain()) for _ in range(TIMED)]
    return max(0.0, statistics.median(a for a, _ in pairs) - statistics.median(b for _, b in pairs))


def _loader(recipe: DataRecipe, tokenizer: Tokenizer, seed: int) -> BatchLoader:
    return build_loader(recipe, tokenizer, seed=seed, stage="sft", template=ChatTemplate(tokenizer))


def _write_conversations(path: Path, number: int, seed: int) -> None:
    """As many problems with worked answers, the domains taking turns."""
    lines: list[str] = []
    for index in range(number):
        domain = DOMAINS[index % len(DOMAINS)]
        problem = sample_problem(domain, split="train", level=1, seed=seed, index=index)
        turns = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": problem.solution}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines))
