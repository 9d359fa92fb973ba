"""The training loop: stages of steps, with metrics, checkpoints and an exit that saves first."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from openmimo.checkpoint import save_model
from openmimo.config.cost import training_flops
from openmimo.config.recipe import to_toml
from openmimo.config.train import DataRecipe, ParallelRecipe, Precision, StageRecipe, TrainRecipe
from openmimo.data.build import build_loader
from openmimo.data.packing import Batch
from openmimo.errors import ConfigError, TrainingError
from openmimo.model import MiMoModel, replicate_mtp_head
from openmimo.text import ChatTemplate, Tokenizer
from openmimo.train import monitors
from openmimo.train.device import compute_dtype, pick_device, to_device
from openmimo.train.initial import initial_model
from openmimo.train.interrupt import TrainingInterruptedError, interrupt_flag
from openmimo.train.memory import keep_freed_memory
from openmimo.train.optimizer import MasterAdamW
from openmimo.train.report import Reporter
from openmimo.train.run_folder import forget_later_metrics, make_folder, write_start
from openmimo.train.schedule import learning_rate
from openmimo.train.state import Progress, load_progress, restore_from, save_progress
from openmimo.train.step import StepResult, StepSettings, train_step
from openmimo.train.tokenizer import tokenizer_for

if TYPE_CHECKING:
    from openmimo.parallel.ranks import Ranks

# After this many updates in a row with a non-finite gradient the run stops instead of idling.
MAX_SKIPPED_STEPS = 20
# What `until_loss` compares is a moving average of about so many steps.
RECENT_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run leaves behind. `is_first`: whether this process is the one that writes and reports."""

    model: MiMoModel
    tokenizer: Tokenizer
    model_dir: Path
    steps: int
    tokens: int
    seconds: float
    is_first: bool = True


def train(
    recipe: TrainRecipe,
    run_dir: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Run a recipe from nothing or, with `resume`, from its newest intact checkpoint.

    Writes recipe.toml, run.json, metrics.jsonl, checkpoints/ and model/ into `run_dir`. Checkpoints that an earlier run
    left there are removed with `overwrite`. Under `torchrun` all processes train one model together, and the first one
    writes.
    Raises: TrainingError when gradients stay non-finite or the folder cannot be used, TrainingInterruptedError after
    Ctrl-C (which saves first).
    """
    with _all_ranks(recipe) as ranks:
        if reporter is None or (ranks is not None and not ranks.is_first):
            reporter = Reporter(Console(quiet=ranks is not None and not ranks.is_first))
        run = _Run(recipe, run_dir, resume, overwrite, reporter, ranks)
        with run.reporter, interrupt_flag() as interrupted:
            return run.finish(interrupted)


def _all_ranks(recipe: TrainRecipe) -> AbstractContextManager[Ranks | None]:
    """The processes that `torchrun` started, or None for one that is alone."""
    expert_ranks = recipe.parallel.expert_ranks
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from openmimo.parallel.ranks import joined

        return joined(expert_ranks, recipe.device)
    if expert_ranks != 1:
        raise ConfigError(
            f"parallel.expert_ranks={expert_ranks} needs a multiple of as many processes; start them with torchrun"
        )
    return nullcontext()


class _Run:
    """One run's parts; the order of work is in `finish`."""

    def __init__(
        self,
        recipe: TrainRecipe,
        run_dir: Path,
        resume: bool,
        overwrite: bool,
        reporter: Reporter,
        ranks: Ranks | None,
    ) -> None:
        self.recipe, self.run_dir, self.reporter, self.ranks = recipe, run_dir, reporter, ranks
        self.num_ranks = 1 if ranks is None else ranks.size
        self.is_first = ranks is None or ranks.is_first
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        keep_freed_memory()
        # How many processes there are is no part of what is trained.
        alone = replace(recipe, parallel=ParallelRecipe())
        self.fingerprint = hashlib.sha256(to_toml(alone).encode()).hexdigest()
        self.device = pick_device(recipe.device) if ranks is None else ranks.device
        self.dtype = compute_dtype(recipe.precision, self.device)
        self.progress = Progress()
        saved = load_progress(run_dir, self.fingerprint, ranks) if resume else None
        if saved is None:
            self._by_first(lambda: self._prepare(overwrite))
        self.tokenizer = Tokenizer.load(run_dir / "tokenizer")
        self.template = ChatTemplate(self.tokenizer)
        self.model = initial_model(
            recipe,
            self.tokenizer,
            dtype=self.dtype,
            device=self.device,
            saved_heads=None if saved is None else saved[2],
        )
        self.model.recompute = recipe.recompute
        self._set_rope_theta(0 if saved is None else min(saved[0].stage, len(recipe.stages) - 1))
        self._divide()
        self.optimizer = MasterAdamW.from_recipe(self.model, self.recipe.optimizer, ranks)
        if saved is not None:
            self.progress = saved[0]
            restore_from(saved[1], self.model, self.optimizer, ranks)
            self._by_first(lambda: forget_later_metrics(run_dir / "metrics.jsonl", self.progress.step))
        else:
            self._by_first(lambda: write_start(run_dir, recipe, self.model))
        self.peak_flops = monitors.matmul_peak(self.dtype, self.device)
        self.skipped = 0
        self.started = time.perf_counter()

    def _by_first(self, work: Callable[[], None]) -> None:
        """Have the first rank do something, and wait for it."""
        if self.ranks is None:
            work()
        else:
            self.ranks.by_first(work)

    def _prepare(self, overwrite: bool) -> None:
        make_folder(self.run_dir, overwrite)
        tokenizer_for(self.recipe, self.run_dir / "tokenizer")

    def _divide(self) -> None:
        """Make a whole model's products FP8 if the recipe says so, and divide it among the ranks."""
        if self.recipe.precision is Precision.FP8:
            from openmimo.train.fp8 import use_fp8

            use_fp8(self.model, self.device)
        if self.ranks is not None:
            from openmimo.parallel.sharding import shard_model

            shard_model(self.model, self.ranks)

    def finish(self, interrupted: Callable[[], bool]) -> TrainResult:
        progress = self.progress
        left = sum(stage.steps for stage in self.recipe.stages[progress.stage :]) - progress.step_in_stage
        self.reporter.start(progress.step + left, progress.step)
        for index, stage in enumerate(self.recipe.stages):
            if index < self.progress.stage:
                continue
            self._enter_stage(index, stage)
            self._run_stage(stage, interrupted)
            self.reporter.leave_out(stage.steps - self.progress.step_in_stage)
            self.progress = replace(self.progress, stage=index + 1, step_in_stage=0, cursor=None, recent_loss=None)
        self._save_checkpoint()
        model_dir = self.run_dir / "model"
        self._write_model(model_dir)
        if self.ranks is not None:
            self.ranks.wait()
        seconds = time.perf_counter() - self.started
        return TrainResult(
            model=self.model,
            tokenizer=self.tokenizer,
            model_dir=model_dir,
            steps=self.progress.step,
            tokens=self.progress.tokens,
            seconds=seconds,
            is_first=self.is_first,
        )

    def _run_stage(self, stage: StageRecipe, interrupted: Callable[[], bool]) -> None:
        lr_start, lr_end = self.recipe.learning_rates(stage)
        settings = StepSettings(
            num_mtp_heads=stage.mtp_heads,
            mtp_weight=stage.mtp_loss_weight,
            balance_weight=stage.sequence_aux_weight,
            bias_update_rate=stage.bias_update_rate,
        )
        data = self._share(self.recipe.data_of(stage))
        every = self.recipe.checkpoint.every_steps
        with build_loader(
            data,
            self.tokenizer,
            # Each stage draws problems and orders of its own.
            seed=self.recipe.seed * len(self.recipe.stages) + self.progress.stage,
            stage=stage.kind.value,
            template=self.template,
            cursor=self.progress.cursor,
            rank=0 if self.ranks is None else self.ranks.rank,
            world_size=self.num_ranks,
        ) as loader:
            while not self._is_done(stage):
                step = self.progress.step_in_stage
                rate = learning_rate(
                    stage.schedule.value, step, steps=stage.steps, warmup=stage.warmup_steps, start=lr_start, end=lr_end
                )
                waited = time.perf_counter()
                batch = to_device(next(loader), self.device)
                begun = time.perf_counter()
                result = train_step(
                    self.model,
                    self.optimizer,
                    batch.token_ids_BT,
                    batch.document_ids_BT,
                    batch.position_ids_BT,
                    batch.loss_mask_BT,
                    learning_rate=rate,
                    settings=settings,
                    ranks=self.ranks,
                )
                num_tokens = batch.num_tokens
                if self.ranks is not None:
                    num_tokens = int(self.ranks.sums(num_tokens)[0])
                self._advance(batch, num_tokens)
                self._guard(result)
                if stage.until_loss is not None:
                    self._watch(float(result.losses.next_token))
                self._log(stage, batch, result, rate, num_tokens, begun - waited, time.perf_counter() - begun)
                if interrupted() if self.ranks is None else self.ranks.any(interrupted()):
                    folder = self._save_checkpoint()
                    raise TrainingInterruptedError(
                        f"stopped at step {self.progress.step}; saved {folder}; continue with --resume"
                    )
                if every and self.progress.step % every == 0:
                    self._save_checkpoint()

    def _share(self, data: DataRecipe) -> DataRecipe:
        """What one rank gets of each batch."""
        rows, rest = divmod(data.batch_sequences, self.num_ranks)
        if rest:
            raise ConfigError(
                f"data.batch_sequences={data.batch_sequences} cannot be divided among {self.num_ranks} processes; "
                "choose a multiple"
            )
        return replace(data, batch_sequences=rows)

    def _advance(self, batch: Batch, num_tokens: int) -> None:
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            step_in_stage=self.progress.step_in_stage + 1,
            tokens=self.progress.tokens + num_tokens,
            cursor=batch.cursor,
        )

    def _watch(self, loss: float) -> None:
        mean = self.progress.recent_loss
        if math.isfinite(loss):
            self.progress = replace(
                self.progress, recent_loss=loss if mean is None else mean + (loss - mean) / RECENT_STEPS
            )

    def _is_done(self, stage: StageRecipe) -> bool:
        steps, mean = self.progress.step_in_stage, self.progress.recent_loss
        is_found = stage.until_loss is not None and mean is not None and mean < stage.until_loss
        return steps >= stage.steps or (is_found and steps >= RECENT_STEPS)

    def _guard(self, result: StepResult) -> None:
        self.skipped = 0 if result.applied else self.skipped + 1
        if self.skipped >= MAX_SKIPPED_STEPS:
            raise TrainingError(
                f"{self.skipped} steps in a row had a non-finite gradient "
                f"(last loss {float(result.losses.total.detach())}); the weights are those before them: "
                "lower the learning rate or use precision fp32"
            )

    def _log(
        self,
        stage: StageRecipe,
        batch: Batch,
        result: StepResult,
        rate: float,
        num_tokens: int,
        waited: float,
        seconds: float,
    ) -> None:
        self.reporter.step(self.progress.step, num_tokens, seconds + waited)
        every = self.recipe.log.every_steps
        if self.progress.step % every and self.progress.step_in_stage != 1 and not self._is_done(stage):
            return
        watch = time.perf_counter()
        zeros = monitors.num_zeros(self.model, self.optimizer.zero_counts, self.ranks)
        monitor_share = (time.perf_counter() - watch) / every / seconds
        if not self.is_first:
            return
        flops = training_flops(self.model.config, batch.token_ids_BT.shape[1], mtp_heads=stage.mtp_heads)
        losses, load_LE = result.losses, result.tokens_per_expert_LE
        record = {
            "step": self.progress.step,
            "stage": stage.name,
            "loss": float(losses.next_token),
            "mtp_losses": [float(loss) for loss in losses.mtp],
            "balance_loss": float(losses.balance),
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "applied": result.applied,
            "num_zeros": zeros,
            "monitor_share_of_step": monitor_share,
            "expert_load": None if load_LE is None else monitors.expert_load(load_LE),
            "tokens": self.progress.tokens,
            "tokens_per_second": num_tokens / (seconds + waited),
            "data_wait_share": waited / (seconds + waited),
            "flops_utilisation": flops * batch.token_ids_BT.numel() / seconds / self.peak_flops,
            "padding_share": batch.padding_share,
        }
        with (self.run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.reporter.metrics(record)

    def _enter_stage(self, index: int, stage: StageRecipe) -> None:
        """Replicate the MTP head when the stage trains more than there are; only the heads lose their moments."""
        if stage.mtp_heads > self.model.config.num_mtp_heads:
            known = {n: x for n, x in self.optimizer.state_tensors().items() if ".mtp_heads." not in n}
            if self.ranks is not None:
                from openmimo.parallel.sharding import whole_model

                self.model = whole_model(self.model).to(self.device)
            replicate_mtp_head(self.model, stage.mtp_heads)
            self._divide()
            self.optimizer = MasterAdamW.from_recipe(self.model, self.recipe.optimizer, self.ranks)
            self.optimizer.load_state_tensors(known, partial=True)
        self._set_rope_theta(index)
        self.progress = replace(self.progress, stage=index)

    def _set_rope_theta(self, index: int) -> None:
        """The global layers' rotary base is what the stages so far say; passes read it from the configuration."""
        theta, config = self.recipe.global_rope_theta(index), self.model.config
        if theta is not None:
            self.model.config = config.replace(global_attention=replace(config.global_attention, rope_theta=theta))

    def _save_checkpoint(self) -> Path:
        return save_progress(
            self.run_dir,
            self.progress,
            self.model,
            self.optimizer,
            fingerprint=self.fingerprint,
            write_model=self._write_model,
            keep=self.recipe.checkpoint.keep,
            ranks=self.ranks,
        )

    def _write_model(self, folder: Path) -> None:
        """Weights for anyone, by the first rank; the others give it what they have of them."""
        model = self.model
        if self.ranks is not None:
            from openmimo.parallel.sharding import whole_model

            model = whole_model(model)
        if not self.is_first:
            return
        dtype = "bfloat16" if self.dtype is torch.bfloat16 else "float32"
        tokenizer_files = {path.name: path for path in (self.run_dir / "tokenizer").iterdir() if path.is_file()}
        save_model(model, folder, dtype=dtype, extra_files=tokenizer_files)
