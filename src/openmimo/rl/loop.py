"""The post-training loop: sample, grade, ask the teachers, update, hand the new weights to the sampler."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openmimo.checkpoint import load_model, save_model
from openmimo.config.recipe import to_toml
from openmimo.config.rl import Algorithm, RLRecipe
from openmimo.engine import Engine
from openmimo.engine.loading import resolve_model_folder
from openmimo.errors import TrainingError
from openmimo.kernels import training as kernels
from openmimo.model import MiMoModel, cast_model
from openmimo.rl.batching import MicroBatch, pack
from openmimo.rl.grading import Grading
from openmimo.rl.losses.ratios import group_advantages
from openmimo.rl.monitors import Mismatch, TrendAlert, native_mismatch
from openmimo.rl.rollout import RolloutWorker
from openmimo.rl.scheduler import PromptScheduler
from openmimo.rl.state import RunState, load_run, save_run
from openmimo.rl.step_record import step_record
from openmimo.rl.teachers import Teachers, warn_about_origin
from openmimo.rl.trajectory import Group, Trajectory
from openmimo.rl.update import AnswerTargets, PolicyUpdater, UpdateStats
from openmimo.text import ChatTemplate, Tokenizer
from openmimo.train import monitors
from openmimo.train.device import compute_dtype, pick_device
from openmimo.train.interrupt import TrainingInterruptedError, interrupt_flag
from openmimo.train.memory import keep_freed_memory
from openmimo.train.optimizer import MasterAdamW
from openmimo.train.run_folder import forget_later_metrics, make_folder, write_start
from openmimo.train.schedule import learning_rate
from openmimo.train.state import restore

# Places of a step that are also run without replay, for the monitors.
PROBE_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class RLResult:
    """What a finished run leaves behind."""

    model: MiMoModel
    tokenizer: Tokenizer
    model_dir: Path
    steps: int
    sampled_tokens: int
    seconds: float


class PolicyRun:
    """One run's parts; `finish` has the order of work.

    `on_step(step, run)` is called before the first step and after every one, with the new weights in `run.sampler`.
    Raises: TrainingError, CheckpointError, ConfigError when the model, the teachers or the run's folder cannot be used.
    """

    def __init__(
        self,
        recipe: RLRecipe,
        run_dir: Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        report: Callable[[dict[str, Any]], None] | None = None,
        on_step: Callable[[int, PolicyRun], None] | None = None,
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise TrainingError("post-training runs in one process; start it without torchrun")
        self.recipe, self.run_dir, self.report, self.on_step = recipe, run_dir, report, on_step
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        keep_freed_memory()
        self.fingerprint = hashlib.sha256(to_toml(recipe).encode()).hexdigest()
        self.device = pick_device(recipe.device)
        exact = recipe.rollout.exact
        self.dtype = torch.float32 if exact else compute_dtype(recipe.precision, self.device)
        start = resolve_model_folder(recipe.model)
        saved = load_run(run_dir, self.fingerprint) if resume else None
        if saved is None:
            make_folder(run_dir, overwrite)
        self.tokenizer = Tokenizer.load(start)
        template = ChatTemplate(self.tokenizer)
        self.model = cast_model(load_model(start), self.dtype).to(self.device)
        self.model.set_invariant(exact)
        self.model.recompute = recipe.recompute
        self.optimizer = MasterAdamW.from_recipe(self.model, recipe.optimizer)
        self.teachers = Teachers(recipe.teachers, start=start, dtype=self.dtype, device=self.device)
        self.scheduler = PromptScheduler(recipe, lambda text: template.render([{"role": "user", "content": text}]))
        self.step = self.sampled_tokens = 0
        if saved is not None:
            self.step, self.sampled_tokens = saved.step, saved.sampled_tokens
            restore(self.model, self.optimizer, saved.tensors)
            self.scheduler.restore(saved.scheduler)
            forget_later_metrics(run_dir / "metrics.jsonl", self.step)
        self.sampler = self._new_sampler()
        self.grading = Grading(recipe.grader)
        self.rollout = RolloutWorker(self.sampler, self.scheduler, recipe, self.grading.grade)
        if saved is not None:
            # Versions count on, so that parked answers keep their age.
            self.sampler.update_weights(self.model, version=self.step)
            self.rollout.restore(saved.rollout)
        else:
            write_start(run_dir, recipe, self.model)
        self.updater = PolicyUpdater(
            self.model,
            self.optimizer,
            recipe.loss,
            recipe.algorithm,
            rollout=recipe.rollout,
            num_tokens=self.sampler.num_tokens,
        )
        self.alert = TrendAlert()
        self.probe_tokens = PROBE_TOKENS

    def finish(self) -> RLResult:
        """Run all steps that are left, save, and write the model."""
        began = time.perf_counter()
        with interrupt_flag() as interrupted, self.grading:
            if self.on_step is not None and self.step == 0:
                self.on_step(0, self)
            while not self.is_finished():
                self.one_step()
                # Before the step is saved: what is told twice after a kill can be dropped, what is not told is lost.
                if self.on_step is not None:
                    self.on_step(self.step, self)
                every = self.recipe.checkpoint.every_steps
                if interrupted():
                    folder = self.save()
                    raise TrainingInterruptedError(
                        f"stopped at step {self.step}; saved {folder}; continue with --resume"
                    )
                if every and self.step % every == 0:
                    self.save()
        self.save()
        model_dir = self.run_dir / "model"
        self.write_model(model_dir)
        return RLResult(
            model=self.model,
            tokenizer=self.tokenizer,
            model_dir=model_dir,
            steps=self.step,
            sampled_tokens=self.sampled_tokens,
            seconds=time.perf_counter() - began,
        )

    def one_step(self) -> dict[str, Any]:
        """Sample, update, hand over the weights, log; returns the step's record."""
        recipe, began = self.recipe, time.perf_counter()
        groups, rolled = self.rollout.collect(keeps_uniform=recipe.algorithm is Algorithm.MOPD)
        sampled = time.perf_counter()
        rate = self._learning_rate()
        updates, native, divergence = self._update(groups, rate)
        updated = time.perf_counter()
        self.sampler.update_weights(self.model)
        handed_over = time.perf_counter()
        self.step += 1
        self.sampled_tokens += rolled.num_tokens
        record = step_record(groups, rolled, updates, native)
        record |= self._watch(handed_over - began)
        record |= {
            "step": self.step,
            "progress": self.progress(),
            "learning_rate": rate,
            "sampled_tokens": self.sampled_tokens,
            "divergence": divergence,
            "seconds": {
                "rollout": sampled - began,
                "grading": self.grading.take_seconds(),
                "update": updated - sampled,
                "weights": handed_over - updated,
                "all": handed_over - began,
            },
        }
        if self.step == 1 and divergence:
            record["far_teachers"] = warn_about_origin(divergence, recipe.warn_teacher_kl)
        if self.step % recipe.log.every_steps == 0 or self.step == 1 or self.is_finished():
            with (self.run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            if self.report is not None:
                self.report(record)
        return record

    def is_finished(self) -> bool:
        """Whether all steps are done, or the budget of tokens is spent."""
        return self.progress() >= 1.0

    def progress(self) -> float:
        """The part of the run that is done: of its steps, or of its budget of tokens where that is more."""
        budget = self.recipe.token_budget
        return max(self.step / self.recipe.steps, self.sampled_tokens / budget if budget else 0.0)

    def _learning_rate(self) -> float:
        """Linear over the steps, or over the budget of tokens where there is one."""
        recipe, step = self.recipe, self.step
        if recipe.token_budget and step >= recipe.warmup_steps:
            step = max(recipe.warmup_steps, round(recipe.steps * self.sampled_tokens / recipe.token_budget))
        return learning_rate(
            "linear",
            step,
            steps=recipe.steps,
            warmup=recipe.warmup_steps,
            start=recipe.optimizer.peak_lr,
            end=recipe.optimizer.final_lr,
        )

    def save(self) -> Path:
        """Write a checkpoint; returns its folder."""
        return save_run(
            self.run_dir,
            RunState(
                step=self.step,
                sampled_tokens=self.sampled_tokens,
                scheduler=self.scheduler.state(),
                rollout=self.rollout.state(),
            ),
            self.model,
            self.optimizer,
            fingerprint=self.fingerprint,
            write_model=self.write_model,
            keep=self.recipe.checkpoint.keep,
        )

    def write_model(self, folder: Path) -> None:
        """The weights and the tokenizer, for the engine and everyone else."""
        save_model(self.model, folder, dtype="bfloat16" if self.dtype is torch.bfloat16 else "float32")
        self.tokenizer.save(folder)

    def _update(
        self, groups: Sequence[Group], rate: float
    ) -> tuple[list[UpdateStats], Mismatch | None, dict[str, float]]:
        """All minibatches' updates; the mismatch without replay; and the divergence from each domain's teacher."""
        updates: list[UpdateStats] = []
        native: Mismatch | None = None
        gaps: dict[str, float] = {}
        counts: dict[str, int] = {}
        version, loss = self.sampler.weights_version, self.recipe.loss
        for part in range(self.recipe.minibatches):
            chosen = self._worth_learning(groups[part :: self.recipe.minibatches])
            if not chosen:
                continue
            answers = [one for group in chosen for one in group]
            targets = self._targets(chosen)
            self.updater.begin()
            for domain, batch in self._micro_batches(answers):
                if native is None:
                    native = native_mismatch(self.model, batch, self.probe_tokens, self.sampler.num_tokens)
                teacher = self.teachers.view(domain, batch, loss.signal, loss.top_k) if domain else None
                gap = self.updater.add(batch, targets, version=version, teacher=teacher)
                if domain:
                    gaps[domain] = gaps.get(domain, 0.0) + gap
                    counts[domain] = counts.get(domain, 0) + len(batch.rows_N)
            updates.append(self.updater.step(rate, self.recipe.bias_update_rate))
        return updates, native, {domain: gap / counts[domain] for domain, gap in gaps.items()}

    def _micro_batches(self, answers: Sequence[Trajectory]) -> Iterator[tuple[str, MicroBatch]]:
        """Packed answers; with teachers each has those of one domain, and the domains come one after another."""
        moe = self.model.config.moe
        # Only the fused kernel leaves out the other answers' keys; masks would cost more than prompts.
        share_prompts = kernels.available(self.dtype, self.device)
        by_domain: dict[str, list[int]] = {}
        for index, one in enumerate(answers):
            by_domain.setdefault(one.domain if self.recipe.algorithm is Algorithm.MOPD else "", []).append(index)
        for domain, chosen in sorted(by_domain.items()):
            batches = pack(
                answers,
                chosen=chosen,
                max_tokens=self.recipe.micro_batch_tokens,
                num_experts=moe.num_experts if moe else 0,
                share_prompts=share_prompts,
                num_heads=self.model.config.num_mtp_heads,
            )
            for batch in batches:
                yield domain, batch.to(self.device)

    def _worth_learning(self, groups: Sequence[Group]) -> list[Group]:
        """Without a teacher, equal rewards give no gradient, so such groups need no pass through the model."""
        if self.recipe.algorithm is Algorithm.MOPD:
            return list(groups)
        return [group for group in groups if len({one.reward for one in group}) > 1]

    def _targets(self, groups: Sequence[Group]) -> AnswerTargets:
        answers = [one for group in groups for one in group]
        rewards_PG = torch.tensor([[one.reward for one in group] for group in groups], dtype=torch.float64)
        share_S = torch.full((len(answers),), 1.0 / len(answers))
        if self.recipe.loss.balance_domains:
            wanted = self.scheduler.shares()
            counts = Counter(one.domain for one in answers)
            total = sum(wanted[domain] for domain in counts)
            share_S = torch.tensor([wanted[one.domain] / total / counts[one.domain] for one in answers])
        return AnswerTargets(
            lengths_S=torch.tensor([len(one.token_ids) for one in answers], device=self.device),
            share_S=share_S.to(self.device),
            advantages_S=group_advantages(rewards_PG).flatten().float().to(self.device),
        )

    def _new_sampler(self) -> Engine:
        rollout = self.recipe.rollout
        return Engine(
            self.model,
            tokenizer=self.tokenizer,
            runner="torch" if rollout.exact else rollout.runner,
            weights="float32" if rollout.exact else rollout.weights,
            draft_heads="auto" if rollout.draft_heads < 0 else rollout.draft_heads,
            max_batch=rollout.max_batch,
            threads=self.recipe.threads or None,
        )

    def _watch(self, step_seconds: float) -> dict[str, Any]:
        """num-zeros of the last update's gradients, what counting them cost, and whether they moved."""
        began = time.perf_counter()
        zeros = monitors.num_zeros(self.model, self.optimizer.zero_counts)
        seconds = time.perf_counter() - began
        return {
            "num_zeros": zeros,
            "num_zeros_alert": self.alert.observe(zeros["all"]),
            "monitor_share_of_step": seconds / step_seconds,
        }
