"""The post-training recipe, for reinforcement learning and multi-teacher on-policy distillation (MOPD).

Source: MiMo-V2-Flash report, sections on MOPD (equations 5-9), R3 and the rollout scheduler. The report gives neither
the mask's bounds nor the weight of the outcome reward; the defaults here were found on small models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from openmimo.config.train import CheckpointRecipe, LogRecipe, OptimizerRecipe, Precision, demand_numbers
from openmimo.errors import ConfigError, nearest

SPLITS = ("train", "test")
# A teacher of this folder is the model that the run starts from.
OWN_START = "self"


class Algorithm(StrEnum):
    """Outcome rewards alone, or teachers' logits with outcome rewards beside them."""

    GRPO = "grpo"
    MOPD = "mopd"


class Signal(StrEnum):
    """How a teacher's distribution becomes a gradient.

    The advantage of the sampled token (the report's), the exact reverse KL over the vocabulary, or the reverse KL over
    the teacher's most probable tokens and one bucket for all others.
    """

    SAMPLED = "sampled"
    FULL = "full"
    TOP_K = "top_k"


@dataclass(frozen=True, kw_only=True)
class PromptSourceRecipe:
    """Problems of a domain. `weight` is the source's share of the sampled tokens.

    Of the sources that are short of their share, those of the highest `priority` go first. `num_prompts` repeats that
    many problems (0: every problem is new). Answers have at most `max_tokens` tokens and are drawn at `temperature`,
    where these are set, instead of the rollout's.
    """

    domain: str
    weight: float = 1.0
    priority: int = 0
    task: str = ""
    levels: tuple[int, ...] = (1,)
    split: str = "train"
    num_prompts: int = 0
    max_tokens: int | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        demand_numbers(self, positive=("weight", "max_tokens", "temperature"), not_negative=("num_prompts",))
        if not self.domain:
            raise ConfigError("domain is empty; name the domain that the problems come from")
        if not self.levels or min(self.levels) < 0:
            raise ConfigError(f"levels={self.levels} must be one or more whole numbers of at least 0")
        if self.split not in SPLITS:
            raise ConfigError(f"split={self.split!r} is unknown; {nearest(self.split, SPLITS)}")


@dataclass(frozen=True, kw_only=True)
class RolloutRecipe:
    """How answers are sampled: `prompts` groups of `group_size` answers to one prompt make a step.

    `weights` is the format that the sampler computes with, one of its runner's. `replay` (R3) records the experts of
    every token and uses them again in training. `draft_heads` is the number of MTP drafts, or -1 for what pays.
    With `partial`, a step begins its update as soon as it has its groups; what is unfinished is parked and goes on
    under the new weights, until an answer would be older than `max_staleness` updates or more than
    `max_partial_share` of a step's answers would be parked: then the step waits. `resample` groups in which all answers
    are equally right may be replaced per step, as a multiple of `prompts`.
    """

    prompts: int = 32
    group_size: int = 8
    max_tokens: int = 192
    temperature: float = 1.0
    top_p: float = 1.0
    runner: str = "auto"
    weights: str = "int8"
    draft_heads: int = -1
    max_batch: int = 128
    replay: bool = True
    exact: bool = False
    partial: bool = False
    max_staleness: int = 2
    max_partial_share: float = 0.5
    resample: float = 0.0

    def __post_init__(self) -> None:
        counts = ("prompts", "group_size", "max_tokens", "max_batch", "max_staleness")
        shares = ("max_partial_share", "resample")
        demand_numbers(self, positive=(*counts, "temperature", "top_p"), not_negative=shares)
        if self.top_p > 1 or self.max_partial_share > 1:
            raise ConfigError(f"top_p={self.top_p} and max_partial_share={self.max_partial_share} must be at most 1")
        if self.draft_heads < -1:
            raise ConfigError(f"draft_heads={self.draft_heads} must be a number of heads, or -1 for what pays")


@dataclass(frozen=True, kw_only=True)
class PolicyLossRecipe:
    """Weights and bounds of the loss.

    Tokens whose ratio of policy to sampling probability leaves [`ratio_low`, `ratio_high`] do not count (equation 8).
    GRPO clips the ratio to 1 - `clip_low`, 1 + `clip_high`; 0 switches that off. `outcome_weight` is alpha of equation
    9, the weight of the outcome advantage beside the teacher's (MOPD); `teacher_weight` 0 leaves the outcome alone.
    `top_k` is for the signal of that name. With `balance_domains` every domain weighs its sources' share, however many
    of its answers a step has. `mtp_weight` trains the MTP heads on the sampled answers; the rest of the model does not
    see that gradient.
    """

    ratio_low: float = 0.5
    ratio_high: float = 2.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    stale_ratio_cap: float = 1.0
    outcome_weight: float = 0.1
    teacher_weight: float = 1.0
    signal: Signal = Signal.SAMPLED
    top_k: int = 32
    balance_domains: bool = True
    mtp_weight: float = 0.1

    def __post_init__(self) -> None:
        weights = ("clip_low", "clip_high", "outcome_weight", "teacher_weight", "mtp_weight", "ratio_low")
        demand_numbers(self, positive=("ratio_high", "stale_ratio_cap", "top_k"), not_negative=weights)
        if not self.ratio_low < 1 < self.ratio_high:
            raise ConfigError(
                f"ratio_low={self.ratio_low} and ratio_high={self.ratio_high} must lie on both sides of 1"
            )


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    """The checkpoint `folder` that teaches a `domain`; "self" is the model that the run starts from."""

    domain: str
    folder: str

    def __post_init__(self) -> None:
        if not self.domain or not self.folder:
            raise ConfigError(f"a teacher needs a domain and a folder, got {self.domain!r} and {self.folder!r}")


@dataclass(frozen=True, kw_only=True)
class GraderRecipe:
    """Answers are graded in `workers` processes (0: in this one), each answer within `timeout_s` seconds."""

    workers: int = 0
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        demand_numbers(self, positive=("timeout_s",), not_negative=("workers",))


@dataclass(frozen=True, kw_only=True)
class RLRecipe:
    """One post-training run from the checkpoint in `model`.

    It ends after `steps`, or with the step that brings the sampled tokens to `token_budget` (0: no limit). A step
    samples, grades and, with `minibatches` above 1, updates that many times, each time on its part of the answers. The
    learning rate rises for `warmup_steps` to `optimizer.peak_lr`, then moves linearly, over the steps or the budget, to
    `optimizer.final_lr`. `micro_batch_tokens` go through the model at once. `warn_teacher_kl` is the divergence from a
    teacher, in nats per token at step 0, above which the teacher is reported as not of the same origin. `recompute` is
    that of a `TrainRecipe`.
    """

    name: str
    algorithm: Algorithm
    model: str
    steps: int
    sources: tuple[PromptSourceRecipe, ...]
    teachers: tuple[TeacherRecipe, ...] = ()
    token_budget: int = 0
    seed: int = 0
    rollout: RolloutRecipe = field(default_factory=RolloutRecipe)
    loss: PolicyLossRecipe = field(default_factory=PolicyLossRecipe)
    grader: GraderRecipe = field(default_factory=GraderRecipe)
    optimizer: OptimizerRecipe = field(default_factory=lambda: OptimizerRecipe(peak_lr=1e-4, final_lr=1e-4))
    warmup_steps: int = 5
    minibatches: int = 1
    micro_batch_tokens: int = 16_384
    bias_update_rate: float = 0.0
    warn_teacher_kl: float = 0.2
    checkpoint: CheckpointRecipe = field(default_factory=lambda: CheckpointRecipe(every_steps=50, keep=2))
    log: LogRecipe = field(default_factory=lambda: LogRecipe(every_steps=1))
    precision: Precision = Precision.AUTO
    recompute: bool = False
    device: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        counts = ("steps", "minibatches", "micro_batch_tokens", "warn_teacher_kl")
        demand_numbers(
            self, positive=counts, not_negative=("token_budget", "seed", "warmup_steps", "bias_update_rate", "threads")
        )
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device={self.device!r} is unknown; use auto, cpu, cuda or cuda:N")
        if not self.sources:
            raise ConfigError("sources is empty; add at least one [[sources]]")
        if self.precision is Precision.FP8:
            raise ConfigError("precision='fp8' is for pre-training and fine-tuning; post-training takes bf16 or fp32")
        if self.rollout.exact and self.precision is Precision.BF16:
            raise ConfigError("rollout.exact=true needs precision 'fp32' (or 'auto'), got 'bf16'")
        self._check_teachers()

    def _check_teachers(self) -> None:
        taught = [teacher.domain for teacher in self.teachers]
        asked = {source.domain for source in self.sources}
        if self.algorithm is Algorithm.GRPO:
            if taught:
                raise ConfigError(f"algorithm 'grpo' takes no teachers, got some for {taught}; use 'mopd'")
            return
        if len(set(taught)) != len(taught):
            raise ConfigError(f"teachers are for the domains {taught}; give each domain one")
        if asked - set(taught):
            raise ConfigError(
                f"the sources' domains {sorted(asked - set(taught))} have no teacher; add [[teachers]] for them, "
                f"those there are teach {sorted(taught)}"
            )
