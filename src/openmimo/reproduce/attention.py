"""Tables 2 and 3 of the report in small: what the width of the window and the sink change, beside global layers only.

Every arm is the same recipe (`recipes/long-context.toml`: a native length, then twelve times as much with another
rotary base), the same data and the same number of tokens; only the layers' attention differs. So no stage ends by its
loss here. The report's window of 128 is a 250th of its native 32k tokens. Of a few hundred tokens that would be one
word, so windows here are a larger share.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from openmimo.checkpoint import load_model
from openmimo.config.cost import kv_cache_bytes
from openmimo.config.model import AttentionKind, ModelConfig, preset
from openmimo.config.train import TrainRecipe
from openmimo.data.build import build_loader
from openmimo.engine import PAGE_TOKENS, Engine, SamplingParams
from openmimo.evals.accuracy import evaluate_domains
from openmimo.evals.bench_target import TargetSpec, open_target
from openmimo.evals.measuring import reported_in_turns
from openmimo.evals.retrieval import RetrievalCell, measure_retrieval
from openmimo.model import cast_model
from openmimo.reproduce.story import DOMAINS, EXAM_SEED, FinishedRun, Scores, Story, StoryRecipe, mean, models_mark
from openmimo.text import ChatTemplate, Tokenizer
from openmimo.train.device import compute_dtype, pick_device, to_device
from openmimo.train.interrupt import end_with_parent
from openmimo.train.step import evaluate
from openmimo.train.tokenizer import tokenizer_for

# Retrieval at 1, 2, 4 and 8 times the text of native training.
TASKS = ("needle", "needles4")
LEVELS = (3, 4, 5, 6)
HELD_OUT_ROWS = 16
DECODED = 64  # steps of a timed pass
LONG_TOKENS = 262_144
# Overrides of the recipe, to fit twelve runs into an hour on two cores: fewer steps, and heads only where they help.
HOURLY = (
    *(f"long.stages.{stage}.steps={steps}" for stage, steps in enumerate((800, 450, 550, 120))),
    *(f"long.stages.{stage}.mtp_heads=0" for stage in (1, 2, 3)),
)
SPEED_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to attend. `window` None means that all layers are global."""

    window: int | None
    sink: bool = False

    @property
    def name(self) -> str:
        if self.window is None:
            return "all global"
        return f"window {self.window}, {'sink' if self.sink else 'no sink'}"

    @property
    def slug(self) -> str:
        """The name in a file's name."""
        return self.name.replace(", ", "-").replace(" ", "-")

    def applied(self, recipe: TrainRecipe) -> TrainRecipe:
        """The recipe with this attention."""
        if self.window is None:
            return replace(recipe, model=replace(recipe.model, all_global=True))
        return replace(recipe, model=replace(recipe.model, window_keys=self.window, sliding_sink=self.sink))


@dataclass(frozen=True, kw_only=True)
class ArmExam:
    """What one model of an arm can do: nats per target of held-out problems, domains, and retrieval by level."""

    loss: float
    domains: Scores
    retrieval: tuple[RetrievalCell, ...]

    def recalled(self, level: int, task: str = "") -> float:
        """Accuracy at a level, of one task or the mean of all."""
        found = [cell.accuracy for cell in self.retrieval if cell.level == level and task in ("", cell.task)]
        return statistics.mean(found)


@dataclass(frozen=True, kw_only=True)
class ArmSpeed:
    """Cache bytes of a sequence, as used and by formula, and speeds at `tokens`, batch 1."""

    tokens: int
    cache_bytes: int
    formula_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """An arm's exams, one for each seed, and its cost at the extended length and at a longer one."""

    arm: Arm
    exams: tuple[ArmExam, ...]
    speeds: tuple[ArmSpeed, ...]


@dataclass(frozen=True, kw_only=True)
class AttentionReport:
    """All arms. `flash` has the full-size model's bytes at 256k tokens: hybrid, and with global layers only."""

    arms: tuple[ArmResult, ...]
    native_tokens: int
    extended_tokens: int
    seeds: tuple[int, ...]
    num_problems: int
    flash: tuple[int, int]


def arms_of(windows: Sequence[int], wide: int) -> list[Arm]:
    """All global, each window without and with a sink, and a wide window with one; none of them twice."""
    pairs = [Arm(window=window, sink=sink) for window in windows for sink in (False, True)]
    return list(dict.fromkeys([Arm(window=None), *pairs, Arm(window=wide, sink=True)]))


def measure_attention(
    story: Story, *, arms: Sequence[Arm], seeds: Sequence[int], num_problems: int, rounds: int, jobs: int = 1
) -> AttentionReport:
    """Train and examine every arm with every seed, `jobs` runs at a time; time the first seed's models in turns."""
    recipe = story.recipe.long
    recipe = replace(recipe, stages=tuple(replace(stage, until_loss=None) for stage in recipe.stages))
    tokenizer = story.folder / "attention-tokenizer"
    if not tokenizer.is_dir():
        tokenizer_for(recipe, tokenizer)
    # One tokenizer for all; and as many threads for each as its share of the machine.
    shared = replace(
        recipe,
        tokenizer=replace(recipe.tokenizer, path=str(tokenizer), vocab_size=0),
        threads=max(1, torch.get_num_threads() // jobs),
    )
    wanted = {
        (arm, seed): _Job(
            folder=story.folder,
            name=f"attention-{arm.slug}-{seed}",
            recipe=arm.applied(replace(shared, seed=seed)),
            story=story.recipe,
            num_problems=num_problems,
        )
        for seed in seeds
        for arm in arms
    }
    exams: dict[tuple[Arm, int], ArmExam] = {}
    # A process for each run, so that runs do not share threads or memory.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = {pool.submit(_train_and_examine, job): key for key, job in wanted.items()}
        story.say(f"{len(waiting)} runs, {jobs} at a time; what each says is in {story.folder}/attention-*.log")
        for done in as_completed(waiting):
            arm, seed = waiting[done]
            exam = exams[arm, seed] = done.result()
            story.say(f"{arm.name}, seed {seed}: loss {exam.loss:.3f}, retrieval {_percents(exam)}")
    extended = recipe.data_of(recipe.stages[-1]).sequence_length
    story.say("speed and bytes of the cache")
    models = {arm: wanted[arm, seeds[0]].folder / wanted[arm, seeds[0]].name / "model" for arm in arms}
    speeds = _speeds(models, (extended, SPEED_TOKENS), rounds)
    flash = preset("flash")
    return AttentionReport(
        arms=tuple(
            ArmResult(arm=arm, exams=tuple(exams[arm, seed] for seed in seeds), speeds=speeds[arm]) for arm in arms
        ),
        native_tokens=recipe.data.sequence_length,
        extended_tokens=extended,
        seeds=tuple(seeds),
        num_problems=num_problems,
        flash=(kv_cache_bytes(flash, LONG_TOKENS).total, kv_cache_bytes(all_global(flash), LONG_TOKENS).total),
    )


def all_global(config: ModelConfig) -> ModelConfig:
    """The same model with global layers only; MTP heads keep their window."""
    return config.replace(layer_kinds=(AttentionKind.GLOBAL,) * config.num_layers)


def attention_rows(report: AttentionReport) -> tuple[list[str], list[list[str]]]:
    """A row per arm: means and sample deviations over the seeds."""
    factors = [f"retrieval {2**place}x" for place in range(len(LEVELS))]
    header = ["", "loss", *DOMAINS, *factors]
    rows: list[list[str]] = []
    for result in report.arms:
        columns = [[exam.loss for exam in result.exams]]
        shares = [[100 * exam.domains[domain] for exam in result.exams] for domain in DOMAINS]
        shares += [[100 * exam.recalled(level) for exam in result.exams] for level in LEVELS]
        rows.append([result.arm.name, *(_cell(column, 4) for column in columns), *(_cell(x, 1) for x in shares)])
    return header, rows


def cost_rows(report: AttentionReport) -> tuple[list[str], list[list[str]]]:
    """Bytes and speeds of every arm, and how many times fewer bytes than with global layers only."""
    header = [""]
    for speed in report.arms[0].speeds:
        at = f"at {speed.tokens:,}"
        header += [f"cache KB {at}", "by formula", "all-global / this", "prefill tokens/s", "decode tokens/s"]
    rows: list[list[str]] = []
    for result in report.arms:
        row = [result.arm.name]
        for whole, speed in zip(report.arms[0].speeds, result.speeds, strict=True):
            row += [
                f"{speed.cache_bytes / 1e3:,.0f}",
                f"{speed.cache_bytes / speed.formula_bytes - 1:+.2%}",
                f"{whole.cache_bytes / speed.cache_bytes:.2f}x",
                f"{speed.prefill_tokens_per_s:,.0f}",
                f"{speed.decode_tokens_per_s:,.0f}",
            ]
        rows.append(row)
    return header, rows


def sink_difference(report: AttentionReport, value: str = "loss") -> list[tuple[int, float, float]]:
    """For every window with and without a sink: the window, the mean difference (sink minus none), its standard error.

    `value` is `loss` or a level of retrieval. Seeds are compared pairwise; the error is 0 with one seed.
    """
    found: list[tuple[int, float, float]] = []
    by_arm = {result.arm: result.exams for result in report.arms}
    for arm, exams in by_arm.items():
        other = by_arm.get(replace(arm, sink=False))
        if arm.window is None or not arm.sink or other is None:
            continue
        pairs = [_value(a, value) - _value(b, value) for a, b in zip(exams, other, strict=True)]
        error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0
        found.append((arm.window, statistics.mean(pairs), error))
    return found


def attention_figures(report: AttentionReport) -> dict[str, Any]:
    """All figures, as JSON takes them."""
    hybrid, whole = report.flash
    return {
        **asdict(report),
        "arm_names": [result.arm.name for result in report.arms],
        "flash_cache_ratio_256k": whole / hybrid,
        "sink_minus_none": {value: sink_difference(report, value) for value in ("loss", "domains", *map(str, LEVELS))},
    }


def _value(exam: ArmExam, value: str) -> float:
    if value == "loss":
        return exam.loss
    return mean(exam.domains) if value == "domains" else exam.recalled(int(value))


def _cell(values: Sequence[float], digits: int) -> str:
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} +-{statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A run and its exam, for a process of its own."""

    folder: Path
    name: str
    recipe: TrainRecipe
    story: StoryRecipe
    num_problems: int


def _train_and_examine(job: _Job) -> ArmExam:
    end_with_parent()
    with (job.folder / f"{job.name}.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        story = Story(job.folder, job.story)
        run = story.trained(job.name, job.recipe)
        torch.set_num_threads(job.recipe.threads)
        return _examine(story, run, job.num_problems, job.recipe.threads)


def _percents(exam: ArmExam) -> str:
    return " / ".join(f"{exam.recalled(level):.0%}" for level in LEVELS)


def _examine(story: Story, run: FinishedRun, num_problems: int, threads: int) -> ArmExam:
    """The model's exam, kept beside it."""
    path, stamp = run.folder / f"attention-exam-{num_problems}.json", models_mark([run.model])
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["model"] == stamp:
            cells = tuple(RetrievalCell(**cell) for cell in kept["retrieval"])
            return ArmExam(loss=kept["loss"], domains=kept["domains"], retrieval=cells)
    story.say(f"{run.folder.name}: examined")
    engine = Engine(run.model, max_batch=64, threads=threads)
    reports = evaluate_domains(engine, domains=DOMAINS, level=1, num_problems=num_problems, seed=EXAM_SEED)
    cells = measure_retrieval(engine, names=TASKS, levels=LEVELS, num_problems=num_problems, seed=EXAM_SEED)
    exam = ArmExam(
        loss=held_out_loss(run.model, story.recipe.long),
        domains={domain: report.accuracy for domain, report in reports.items()},
        retrieval=tuple(cells),
    )
    path.write_text(json.dumps({"model": stamp, **asdict(exam)}) + "\n")
    return exam


def held_out_loss(folder: Path, recipe: TrainRecipe) -> float:
    """Nats per target of held-out problems: the last stage's sources, of which no stage sees the test problems."""
    device = pick_device(recipe.device)
    model = cast_model(load_model(folder), compute_dtype(recipe.precision, device)).to(device).eval()
    tokenizer, last = Tokenizer.load(folder), recipe.stages[-1]
    data = recipe.data_of(last)
    data = replace(data, batch_sequences=1, sources=tuple(replace(each, split="test") for each in data.sources))
    losses: list[tuple[float, int]] = []
    with build_loader(
        data, tokenizer, seed=EXAM_SEED, stage=last.kind.value, template=ChatTemplate(tokenizer)
    ) as loader:
        for _ in range(HELD_OUT_ROWS):
            found = evaluate(model, to_device(next(loader), device))
            losses.append((float(found.next_token), found.num_targets))
    return sum(loss * targets for loss, targets in losses) / sum(targets for _, targets in losses)


def _speeds(folders: Mapping[Arm, Path], lengths: Sequence[int], rounds: int) -> dict[Arm, tuple[ArmSpeed, ...]]:
    """Prompts and steps of all arms in turns, medians."""
    threads = torch.get_num_threads()
    targets = {
        arm: open_target(TargetSpec(kind="openmimo", path=path, weights="bf16", threads=threads))
        for arm, path in folders.items()
    }
    found: dict[Arm, list[ArmSpeed]] = {arm: [] for arm in folders}
    chance = random.Random(0)
    for length in lengths:
        vocab = min(ModelConfig.from_pretrained(path).vocab_size for path in folders.values())
        text = chance.choices(range(vocab), k=length)
        steps = [[token] for token in chance.choices(range(vocab), k=DECODED)]
        prompts = reported_in_turns(
            {arm.name: partial(target.prefill, text) for arm, target in targets.items()}, rounds
        )
        for target in targets.values():
            target.start([text], room=DECODED * (rounds + 2))
        decoded = reported_in_turns(
            {arm.name: partial(target.decode, steps) for arm, target in targets.items()}, rounds
        )
        for arm, path in folders.items():
            used, formula = cache_bytes(path, text)
            found[arm].append(
                ArmSpeed(
                    tokens=length,
                    cache_bytes=used,
                    formula_bytes=formula,
                    prefill_tokens_per_s=length / statistics.median(prompts[arm.name]),
                    decode_tokens_per_s=DECODED / statistics.median(decoded[arm.name]),
                )
            )
    for target in targets.values():
        target.close()
    return {arm: tuple(each) for arm, each in found.items()}


def cache_bytes(folder: Path, prompt: Sequence[int]) -> tuple[int, int]:
    """Bytes that one sequence uses in the engine, and by formula for whole pages and the heads' rings."""
    engine = Engine(
        folder, draft_heads=0, max_batch=1, cache_tokens=len(prompt) + 2 * PAGE_TOKENS, prefix_cache_bytes=0
    )
    request = engine.add_request(prompt, SamplingParams(max_tokens=2, ignore_eos=True))
    while not engine.step():
        pass
    used = engine.used_cache_bytes
    engine.abort(request)
    pages = -(-len(prompt) // PAGE_TOKENS) * PAGE_TOKENS
    config = engine.runner.config
    heads = config.num_mtp_heads
    slots = heads + 1 if heads else 0  # a ring has room for what a step verifies
    return used, kv_cache_bytes(config, pages, draft_slots=slots, mtp_heads=heads).total
