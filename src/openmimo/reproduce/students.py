"""Other ways to one model with all skills, to hold MOPD against: merged weights, imitation, and RL without teachers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from openmimo.checkpoint import load_model, save_model
from openmimo.config.train import ModelRecipe, SourceKind, SourceRecipe, StageKind, TrainRecipe
from openmimo.engine import Engine, SamplingParams
from openmimo.evals.accuracy import chat_renderer
from openmimo.reproduce.story import DOMAINS, TEMPERATURE, FinishedRun, Story, mean, models_mark
from openmimo.tasks import grade_response, sample_problem
from openmimo.text import Tokenizer

# Shares of the teachers' differences that task arithmetic adds; the best one on training problems is kept.
ARITHMETIC_SCALES = (0.4, 0.6, 0.8, 1.0)
# Problems per domain that decide between them.
TUNING_PROBLEMS = 300
PROMPTS_PER_ROUND = 96
# Times that imitation sees every answer.
EPOCHS = 3
# Steps of a run that its token budget ends.
NO_END = 100_000


def averaged(story: Story) -> Path:
    """The mean of the teachers' weights."""
    return _combined(story, "linear-merge", 1 / len(DOMAINS))


def task_arithmetic(story: Story) -> Path:
    """The base plus the sum of what each teacher changed, at the scale that does best on training problems."""
    found = [_combined(story, f"task-arithmetic-{scale:g}", scale) for scale in ARITHMETIC_SCALES]
    return max(found, key=lambda model: mean(story.exam(model, TUNING_PROBLEMS, split="train").drawn))


def mixed_rl(story: Story, seed: int, token_budget: int, *, name: str = "mixed-rl") -> FinishedRun:
    """Outcome rewards in all domains at once."""
    recipe = replace(story.teacher_recipe(*DOMAINS), seed=seed, token_budget=token_budget, steps=NO_END)
    return story.policy(f"{name}-{seed}", recipe)


def sequential_rl(story: Story, seed: int, token_budget: int) -> list[FinishedRun]:
    """Outcome rewards in one domain after the other, with equal parts of the tokens."""
    runs: list[FinishedRun] = []
    model = story.base().model
    for domain in DOMAINS:
        recipe = replace(
            story.teacher_recipe(domain),
            model=str(model),
            seed=seed,
            token_budget=token_budget // len(DOMAINS),
            steps=NO_END,
        )
        runs.append(story.policy(f"sequential-rl-{seed}-{domain}", recipe))
        model = runs[-1].model
    return runs


def imitation(story: Story, seed: int, token_budget: int, *, only_right: bool) -> FinishedRun:
    """Fine-tuning on what the teachers wrote, or on their right answers; all that they wrote counts as sampled."""
    name = f"imitation-{'right' if only_right else 'all'}-{seed}"
    path = _answers_file(story, seed, token_budget, only_right=only_right)
    base = story.recipe.base
    num_targets = sum(json.loads(line)["num_tokens"] for line in path.read_text().splitlines())
    per_step = base.data.sequence_length * base.data.batch_sequences // 2
    recipe = TrainRecipe(
        name=name,
        seed=seed,
        model=ModelRecipe(folder=str(story.base().model)),
        tokenizer=replace(base.tokenizer, path=str(story.base().model), vocab_size=0),
        data=replace(base.data, sources=(SourceRecipe(kind=SourceKind.TEXT, path=str(path)),)),
        stages=(
            replace(
                base.stages[-1],
                name="imitation",
                kind=StageKind.SFT,
                steps=max(20, EPOCHS * num_targets // per_step),
                warmup_steps=5,
                extra_sources=(),
            ),
        ),
        optimizer=base.optimizer,
        precision=base.precision,
        threads=base.threads,
    )
    return story.trained(name, recipe)


def _combined(story: Story, name: str, scale: float) -> Path:
    """base + scale * the sum of (teacher - base), in fp32, written as the base is."""
    source = story.base().model
    teachers = [story.teacher(domain).model for domain in DOMAINS]
    model = load_model(source)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for folder in teachers:
            teacher = load_model(folder).state_dict()
            for key, value in model.state_dict().items():
                value += scale * (teacher[key] - base[key])
    folder = story.folder / name / "model"
    save_model(model, folder, dtype="bfloat16")
    Tokenizer.load(source).save(folder)
    return folder


def _answers_file(story: Story, seed: int, token_budget: int, *, only_right: bool) -> Path:
    """Answers of each teacher in its domain, as many as the budget allows; of these all, or the right ones."""
    teachers = models_mark(story.teacher(domain).model for domain in DOMAINS)
    mark = f"{seed}-{token_budget}-{teachers[:12]}"
    everything, right = story.folder / f"answers-all-{mark}.jsonl", story.folder / f"answers-right-{mark}.jsonl"
    if not right.is_file():
        answers = [answer for domain in DOMAINS for answer in _drawn(story, domain, seed, token_budget // len(DOMAINS))]
        _write_lines(everything, answers)
        _write_lines(right, [answer for answer in answers if answer["right"]])
    return right if only_right else everything


def _drawn(story: Story, domain: str, seed: int, num_tokens: int) -> Iterator[dict[str, Any]]:
    sampled = 0
    for answer in _answers(story, domain, seed):
        yield answer
        sampled += answer["num_tokens"]
        if sampled >= num_tokens:
            return


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _answers(story: Story, domain: str, seed: int) -> Iterator[dict[str, Any]]:
    """What the domain's teacher writes about one problem after another."""
    rollout = story.recipe.student.rollout
    engine = Engine(story.teacher(domain).model, runner=rollout.runner, weights=rollout.weights, max_batch=128)
    render = chat_renderer(engine)
    params = SamplingParams(temperature=TEMPERATURE, max_tokens=rollout.max_tokens, seed=seed)
    for turn in count():
        indices = range(turn * PROMPTS_PER_ROUND, (turn + 1) * PROMPTS_PER_ROUND)
        problems = [sample_problem(domain, split="train", level=1, seed=seed, index=index) for index in indices]
        prompts = [render(problem.prompt) for problem in problems]
        for problem, answer in zip(problems, engine.generate(prompts, params), strict=True):
            yield {
                "messages": [
                    {"role": "user", "content": problem.prompt},
                    {"role": "assistant", "content": answer.text},
                ],
                "num_tokens": len(answer.token_ids),
                "right": grade_response(problem, answer.text) == 1.0,
            }
