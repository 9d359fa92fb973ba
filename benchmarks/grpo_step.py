"""A step of reinforcement learning beside TRL's GRPOTrainer: same model, prompts, group size, token limit and threads.

Usage: python benchmarks/grpo_step.py [--model runs/demo/base] [--prompts 32] [--group 8] [--rounds 3]
Needs a model (`make demo`), trl and transformers (`pip install trl`). TRL samples with transformers' generate, which is
what it has without a GPU; its best of fp32 and bf16 weights counts. Both take turns; prints a table and one JSON line.
With --fixed-tokens N nothing ends an answer before N tokens, and the reward is whether its text has an odd length, so
that all groups teach: for the cost of answers longer than those of a small model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from openmimo.checkpoint.convert import convert
from openmimo.config.rl import RLRecipe
from openmimo.engine import resolve_model_folder
from openmimo.evals.measuring import describe_machine, print_result, print_table, spread
from openmimo.reproduce.story import load_story
from openmimo.rl.loop import PolicyRun
from openmimo.tasks import grade_response, sample_problem
from openmimo.text import ChatTemplate, Tokenizer

DTYPES = ("float32", "bfloat16")


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = our_recipe(options)
        convert(resolve_model_folder(options.model), folder / "theirs", layout="native", dtype="float32")
        ours = PolicyRun(recipe, folder / "ours")
        if options.fixed_tokens:
            fix_length(ours)
        seconds: dict[str, list[float]] = {"openmimo": [], **{f"trl, {dtype}": [] for dtype in DTYPES}}
        lengths: dict[str, list[float]] = {name: [] for name in seconds}
        for _ in range(options.rounds):
            for _ in range(options.steps):
                record = ours.one_step()
                seconds["openmimo"].append(record["seconds"]["all"])
                answers = options.prompts * options.group
                lengths["openmimo"].append(record["rollout"]["num_tokens"] / answers)
            for dtype in DTYPES:
                took, length = trl_steps(folder / "theirs", dtype, folder, options)
                seconds[f"trl, {dtype}"] += took
                lengths[f"trl, {dtype}"] += length
        ours.grading.pool.close()
    report(seconds, lengths, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--fixed-tokens", type=int, default=0, help="length of every answer; 0: as it comes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of each in a round")
    parser.add_argument("--model", type=Path, default=Path("runs/demo/base"), help="run folder of the model to train")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    options.max_tokens = options.fixed_tokens or options.max_tokens
    return options


def odd_length(text: str) -> float:
    return float(len(text) % 2)


def fix_length(run: PolicyRun) -> None:
    """Let end tokens end nothing, and reward what no answer is meant to have."""
    add = run.sampler.add_request
    run.sampler.add_request = lambda ids, params, **rest: add(ids, replace(params, ignore_eos=True), **rest)
    run.rollout.grade = lambda answers: [replace(one, reward=odd_length(one.text)) for one in answers]


def our_recipe(options: argparse.Namespace) -> RLRecipe:
    recipe = load_story().teacher
    rollout = replace(
        recipe.rollout, prompts=options.prompts, group_size=options.group, max_tokens=options.max_tokens, resample=0.0
    )
    return replace(recipe, model=str(options.model), rollout=rollout, token_budget=0, steps=100_000, name="ours")


def trl_steps(model: Path, dtype: str, folder: Path, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of steps after the first, which pays for what is set up, and mean tokens of an answer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = Tokenizer.load(model)
    template = ChatTemplate(tokenizer)
    count = options.prompts * (options.steps + 1)
    problems = [sample_problem("math", split="train", level=1, seed=0, index=index) for index in range(count)]
    texts = [tokenizer.decode(template.render([{"role": "user", "content": p.prompt}])) for p in problems]
    data = Dataset.from_dict({"prompt": texts, "number": list(range(count))})

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = self.began or time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.began)
            self.began = now

    def reward(completions: list[str], number: list[int], **_: Any) -> list[float]:
        if options.fixed_tokens:
            return [odd_length(text) for text in completions]
        return [grade_response(problems[index], text) for index, text in zip(number, completions, strict=True)]

    answers = options.prompts * options.group
    settings = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=answers,
        num_generations=options.group,
        max_completion_length=options.max_tokens,
        generation_kwargs={"min_new_tokens": options.fixed_tokens} if options.fixed_tokens else None,
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-4,
        max_steps=options.steps + 1,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    clock = Clock()
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    trainer = GRPOTrainer(
        model=theirs,
        reward_funcs=reward,
        args=settings,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        callbacks=[clock],
    )
    trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    return clock.seconds[1:], lengths[1:]


def report(seconds: dict[str, list[float]], lengths: dict[str, list[float]], options: argparse.Namespace) -> None:
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    mine = medians["openmimo"]
    rows = [
        (name, medians[name], f"{spread(each):.0%}", statistics.mean(lengths[name]), medians[name] / mine)
        for name, each in seconds.items()
    ]
    print_table(("trainer", "s per step", "spread", "tokens per answer", "times ours"), rows)
    best = min(medians[f"trl, {dtype}"] for dtype in DTYPES)
    figures = {
        "answers": options.prompts * options.group,
        "fixed_tokens": options.fixed_tokens,
        "seconds": medians,
        "tokens_per_answer": {name: statistics.mean(each) for name, each in lengths.items()},
        "times_faster": best / mine,
    }
    print_result("grpo_step", describe_machine(), figures)


if __name__ == "__main__":
    main()
