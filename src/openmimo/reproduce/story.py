"""What most figures of post-training share: a base, a teacher for every domain, students. Each is made once and kept.

A `Story` is a folder of runs. A run that is finished, with the same recipe, is read instead of made; one that was
stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from openmimo.checkpoint.training_state import checkpoint_dirs
from openmimo.config.recipe import load_recipe, to_toml
from openmimo.config.rl import OWN_START, RLRecipe, TeacherRecipe
from openmimo.config.train import TrainRecipe
from openmimo.engine import Engine, resolve_model_folder
from openmimo.errors import ConfigError
from openmimo.evals.accuracy import evaluate_domains
from openmimo.rl.loop import PolicyRun
from openmimo.train.loop import train
from openmimo.train.run_folder import forget_later_metrics

DOMAINS = ("math", "code", "logic")
# In the package, so that an installed one has them; `recipes/` of the repository links there.
RECIPES = Path(__file__).parents[1] / "recipes"
PARTS = {"base": "demo.toml", "teacher": "teacher.toml", "student": "mopd.toml", "long": "long-context.toml"}
# Problems of an examination: other numbers than those that curves along a run are made of.
EXAM_SEED, CURVE_SEED = 1_000, 2_000
# At which answers are drawn: that of the rollouts, so a policy is judged by what it does.
TEMPERATURE = 1.0
MAX_TOKENS = 192
# Of a curve: steps between points, for students and for others, and problems per domain of a point.
STUDENT_EVERY, POLICY_EVERY = 5, 10
CURVE_PROBLEMS = 200
MARKER = "story.json"

Scores = Mapping[str, float]
"""The share of right answers by domain."""


@dataclass(frozen=True, kw_only=True)
class StoryRecipe:
    """The recipes of the base, of any teacher, of the student, and of the models with a long context."""

    base: TrainRecipe
    teacher: RLRecipe
    student: RLRecipe
    long: TrainRecipe


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Where a run stood after `step` steps."""

    step: int
    sampled_tokens: int
    scores: Scores


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run that is done. `seconds` are those of its last, perhaps only, sitting."""

    folder: Path
    steps: int
    sampled_tokens: int
    seconds: float
    curve: tuple[CurvePoint, ...] = ()

    @property
    def model(self) -> Path:
        return self.folder / "model"


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Held-out problems answered once each: drawn at `TEMPERATURE`, and greedily."""

    drawn: Scores
    greedy: Scores
    num_problems: int


def load_story(overrides: Sequence[str] = (), *, seed: int = 0) -> StoryRecipe:
    """The package's recipes with overrides such as `teacher.steps=50`. `seed` is that of the base and its teachers.

    Raises: ConfigError for an override that names no recipe, or does not fit it.
    """
    by_part: dict[str, list[str]] = {name: [f"seed={seed}"] for name in PARTS}
    for override in overrides:
        part, _, rest = override.partition(".")
        if part not in by_part or not rest:
            raise ConfigError(
                f"override {override!r} names no recipe; begin it with one of {', '.join(by_part)}, "
                "such as teacher.steps=50"
            )
        by_part[part].append(rest)
    return StoryRecipe(
        base=load_recipe(RECIPES / PARTS["base"], by_part["base"], TrainRecipe),
        teacher=load_recipe(RECIPES / PARTS["teacher"], by_part["teacher"], RLRecipe),
        student=load_recipe(RECIPES / PARTS["student"], by_part["student"], RLRecipe),
        long=load_recipe(RECIPES / PARTS["long"], by_part["long"], TrainRecipe),
    )


class Story:
    """The runs in `folder`. `say` is told what is made; `report` is told every record of a run."""

    def __init__(
        self,
        folder: Path,
        recipe: StoryRecipe,
        *,
        say: Callable[[str], None] = print,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.folder, self.recipe, self.say, self.report = folder, recipe, say, report

    def forget(self) -> None:
        """Remove all runs of the folder, and nothing else."""
        for marker in self.folder.glob(f"*/{MARKER}"):
            shutil.rmtree(marker.parent)

    def base(self) -> FinishedRun:
        """The model that everything starts from."""
        return self.trained("base", self.recipe.base)

    def teacher(self, domain: str) -> FinishedRun:
        """The domain's teacher."""
        return self.policy(f"{domain}-teacher", self.teacher_recipe(domain))

    def teacher_recipe(self, *domains: str) -> RLRecipe:
        """Reinforcement learning in these domains, from the base."""
        first = self.recipe.teacher.sources[0]
        return replace(
            self.recipe.teacher,
            model=str(self.base().model),
            sources=tuple(replace(first, domain=domain) for domain in domains),
        )

    def student_recipe(self, seed: int) -> RLRecipe:
        """Distillation from all teachers, from the base."""
        domains = [teacher.domain for teacher in self.recipe.student.teachers]
        teachers = tuple(TeacherRecipe(domain=d, folder=str(self.teacher(d).model)) for d in domains)
        return replace(self.recipe.student, model=str(self.base().model), teachers=teachers, seed=seed)

    def student(self, seed: int) -> FinishedRun:
        """The student of that seed."""
        return self.policy(f"mopd-{seed}", self.student_recipe(seed), every=STUDENT_EVERY)

    def trained(self, name: str, recipe: TrainRecipe) -> FinishedRun:
        """A pre-training or fine-tuning run."""
        run_dir, recipe = self.folder / name, replace(recipe, name=name)
        done = _finished(run_dir, recipe)
        if done is None:
            self.say(f"{name}: training, {sum(stage.steps for stage in recipe.stages)} steps")
            result = train(recipe, run_dir, resume=_begin(run_dir, recipe), overwrite=True)
            done = _finish(run_dir, recipe, result.steps, 0, result.seconds)
        return done

    def policy(self, name: str, recipe: RLRecipe, *, every: int = POLICY_EVERY) -> FinishedRun:
        """A reinforcement-learning or distillation run, with a point of its curve `every` so many steps."""
        run_dir, recipe = self.folder / name, replace(recipe, name=name)
        done = _finished(run_dir, recipe)
        if done is None:
            teachers = f", {len(recipe.teachers)} teachers" if recipe.teachers else ""
            self.say(f"{name}: {recipe.algorithm.value}{teachers}, {recipe.steps} steps")
            resume = _begin(run_dir, recipe)
            path = run_dir / "curve.jsonl"
            if not resume:
                path.unlink(missing_ok=True)
            run = PolicyRun(
                recipe,
                run_dir,
                resume=resume,
                overwrite=True,
                report=self.report,
                on_step=lambda step, run: _add_point(path, step, run, every),
            )
            forget_later_metrics(path, run.step)
            result = run.finish()
            done = _finish(run_dir, recipe, result.steps, result.sampled_tokens, result.seconds)
        return done

    def exam(self, model: Path, num_problems: int, *, split: str = "test") -> Exam:
        """The model's scores, from the same BF16 engine for all models; kept beside the model."""
        path = model.parent / f"exam-{split}-{num_problems}.json"
        stamp = models_mark([model])
        if path.is_file():
            kept = json.loads(path.read_text())
            if kept["model"] == stamp:
                return Exam(drawn=kept["drawn"], greedy=kept["greedy"], num_problems=num_problems)
        engine = Engine(model, max_batch=128)
        drawn, greedy = (
            _scores(engine, num_problems, split=split, seed=EXAM_SEED, temperature=temperature)
            for temperature in (TEMPERATURE, 0.0)
        )
        path.write_text(json.dumps({"model": stamp, "drawn": drawn, "greedy": greedy}) + "\n")
        return Exam(drawn=drawn, greedy=greedy, num_problems=num_problems)


def models_mark(folders: Iterable[Path | str]) -> str:
    """A hash of the models' contents, from their manifests."""
    digest = hashlib.sha256()
    for folder in folders:
        digest.update((resolve_model_folder(folder) / "manifest.json").read_bytes())
    return digest.hexdigest()


def mean(scores: Scores) -> float:
    """Over the domains."""
    return sum(scores.values()) / len(scores)


def _add_point(path: Path, step: int, run: PolicyRun, every: int) -> None:
    if step % every and not run.is_finished():
        return
    scores = _scores(run.sampler, CURVE_PROBLEMS, split="test", seed=CURVE_SEED, temperature=TEMPERATURE)
    point = CurvePoint(step=step, sampled_tokens=run.sampled_tokens, scores=scores)
    with path.open("a") as file:
        file.write(json.dumps(asdict(point)) + "\n")


def _scores(engine: Engine, num: int, *, split: str, seed: int, temperature: float) -> Scores:
    reports = evaluate_domains(
        engine,
        domains=DOMAINS,
        level=1,
        num_problems=num,
        split=split,
        seed=seed,
        temperature=temperature,
        max_tokens=MAX_TOKENS,
    )
    return {domain: report.accuracy for domain, report in reports.items()}


def _begin(run_dir: Path, recipe: TrainRecipe | RLRecipe) -> bool:
    """Put the run's mark into its folder; whether a run of the same mark was there and left checkpoints."""
    marker, mark = run_dir / MARKER, _mark(recipe)
    same = marker.is_file() and json.loads(marker.read_text())["mark"] == mark
    if same and checkpoint_dirs(run_dir / "checkpoints"):
        return True
    run_dir.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"mark": mark}) + "\n")
    return False


def _finish(run_dir: Path, recipe: TrainRecipe | RLRecipe, steps: int, tokens: int, seconds: float) -> FinishedRun:
    facts = {"mark": _mark(recipe), "steps": steps, "sampled_tokens": tokens, "seconds": seconds}
    (run_dir / MARKER).write_text(json.dumps(facts) + "\n")
    done = _finished(run_dir, recipe)
    assert done is not None
    return done


def _finished(run_dir: Path, recipe: TrainRecipe | RLRecipe) -> FinishedRun | None:
    """The run in the folder, if it came to its end and was made with this recipe from these models."""
    marker = run_dir / MARKER
    facts = json.loads(marker.read_text()) if marker.is_file() else {}
    if facts.get("mark") != _mark(recipe) or "steps" not in facts:
        return None
    curve = run_dir / "curve.jsonl"
    points = curve.read_text().splitlines() if curve.is_file() else []
    return FinishedRun(
        folder=run_dir,
        steps=facts["steps"],
        sampled_tokens=facts["sampled_tokens"],
        seconds=facts["seconds"],
        curve=tuple(CurvePoint(**json.loads(line)) for line in points),
    )


def _mark(recipe: TrainRecipe | RLRecipe) -> str:
    """A hash of the recipe and of the models that it begins with."""
    if isinstance(recipe, RLRecipe):
        folders = [recipe.model, *(teacher.folder for teacher in recipe.teachers if teacher.folder != OWN_START)]
    else:
        folders = [recipe.model.folder] if recipe.model.folder else []
    return hashlib.sha256((to_toml(recipe) + models_mark(folders)).encode()).hexdigest()
