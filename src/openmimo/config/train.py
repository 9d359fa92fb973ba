"""The training recipe: frozen dataclasses that `recipe.py` fills from TOML. Defaults are the report's values.

Not defaults, because they belong to the report's scale: three stages of 22 T, 4 T and 1 T tokens, sequences of 32,768
tokens (262,144 in the last stage), 2,048 sequences per batch (256 in the last), weights drawn with std 0.006.
Source: MiMo-V2-Flash report, pre-training and MTP.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig, MoEConfig, preset
from openmimo.errors import ConfigError, nearest

_Config = TypeVar("_Config", ModelConfig, AttentionConfig, MoEConfig, "DataRecipe")

SPLITS = ("train", "test")


class SourceKind(StrEnum):
    """Where a source's documents come from."""

    TASK = "task"
    TEXT = "text"


class StageKind(StrEnum):
    """Plain text with every token a target, or conversations with the assistant's tokens as targets."""

    PRETRAIN = "pretrain"
    SFT = "sft"


class Packing(StrEnum):
    """How documents fill rows: cut at row ends, or kept whole with some padding. `auto` cuts in pre-training only."""

    AUTO = "auto"
    SPLIT = "split"
    WHOLE = "whole"


class Schedule(StrEnum):
    """How the learning rate moves from `lr_start` to `lr_end` after the warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"


class Precision(StrEnum):
    """Number format of the forward and backward pass; master weights are fp32 either way.

    `auto` is bf16 where the processor multiplies it in hardware or the C++ kernels do in its vector units, fp32
    elsewhere. `fp8` is bf16 with FP8 products (extra `fp8`); what the report keeps in bf16 stays so.
    """

    AUTO = "auto"
    BF16 = "bf16"
    FP32 = "fp32"
    FP8 = "fp8"


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Which model to train: random weights of a `preset`, or the weights in a checkpoint `folder` (one of the two).

    The other fields change the model when they are set; without `vocab_size` a preset takes the tokenizer's. With
    `all_global` no layer slides (MTP heads still do). How many MTP heads there are is up to the stages. The report
    trains with `init_std` 0.006, a global `global_rope_theta` of 640,000 before the long-context stage and 5,000,000
    in it, and one MTP head until post-training, where it is copied to three. `embedding_std` is the deviation of random
    embeddings where it is not `init_std`: larger, layers find the tokens themselves in what reaches them.
    """

    preset: str = ""
    folder: str = ""
    vocab_size: int | None = None
    all_global: bool = False
    window_keys: int | None = None
    sliding_sink: bool | None = None
    global_rope_theta: float | None = None
    value_scale: float | None = None
    init_std: float | None = None
    embedding_std: float | None = None
    max_positions: int | None = None
    num_experts: int | None = None
    num_experts_per_token: int | None = None
    expert_dim: int | None = None

    def __post_init__(self) -> None:
        if bool(self.preset) == bool(self.folder):
            raise ConfigError(f"got preset={self.preset!r} and folder={self.folder!r}; set exactly one of them")
        demand_numbers(self, positive=("embedding_std",))
        if self.embedding_std is not None and self.folder:
            raise ConfigError(f"embedding_std={self.embedding_std} is for random weights, but folder is set; remove it")
        if self.preset:
            preset(self.preset)

    def resolve(self) -> ModelConfig:
        """The model's configuration with the changes applied. Raises: ConfigError."""
        config = ModelConfig.from_pretrained(self.preset or self.folder)
        sliding = {"window_keys": self.window_keys, "sink": self.sliding_sink}
        changes: dict[str, object] = {
            "global_attention": _changed(config.global_attention, rope_theta=self.global_rope_theta),
            "sliding_attention": _changed(config.sliding_attention, **sliding),
        }
        experts = {name: getattr(self, name) for name in ("num_experts", "num_experts_per_token", "expert_dim")}
        if config.moe is not None:
            changes["moe"] = _changed(config.moe, **experts)
        elif any(value is not None for value in experts.values()):
            raise ConfigError(f"{self.preset or self.folder!r} has no experts, but the recipe changes {experts}")
        if self.all_global:
            changes["layer_kinds"] = (AttentionKind.GLOBAL,) * config.num_layers
        names = ("vocab_size", "value_scale", "init_std", "max_positions")
        return _changed(config, **changes, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class SourceRecipe:
    """One stream of documents and its share of the tokens, `weight` over the sum of all weights.

    `task` sources need `domain` and may name one `task` of it, `levels`, `split`, and `guess_share`, the share of the
    problems that are answered with a guess instead of being worked out. `text` sources need `path`.
    """

    kind: SourceKind
    weight: float = 1.0
    domain: str = ""
    task: str = ""
    levels: tuple[int, ...] = (1,)
    split: str = "train"
    guess_share: float = 0.0
    path: str = ""

    def __post_init__(self) -> None:
        demand_numbers(self, positive=("weight",), not_negative=("guess_share",))
        needed, foreign = ("domain", "path") if self.kind is SourceKind.TASK else ("path", "domain")
        if not getattr(self, needed) or getattr(self, foreign):
            raise ConfigError(f"a {self.kind.value} source needs {needed!r} and takes no {foreign!r}")
        if self.task and self.kind is not SourceKind.TASK:
            raise ConfigError(f"a {self.kind.value} source takes no task={self.task!r}; remove it")
        if not self.levels or min(self.levels) < 0:
            raise ConfigError(f"levels={self.levels} must be one or more whole numbers of at least 0")
        if self.split not in SPLITS:
            raise ConfigError(f"split={self.split!r} is unknown; {nearest(self.split, SPLITS)}")
        if self.guess_share > 1:
            raise ConfigError(f"guess_share={self.guess_share} must be a share of at most 1")


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """A tokenizer from a folder (`path`), or a new one of `vocab_size` trained on `train_documents` documents.

    Without `sources` the new one is trained on the documents of the run's own sources.
    """

    path: str = ""
    vocab_size: int = 0
    train_documents: int = 2000
    sources: tuple[SourceRecipe, ...] = ()

    def __post_init__(self) -> None:
        demand_numbers(self, positive=("train_documents",), not_negative=("vocab_size",))
        if bool(self.path) == bool(self.vocab_size):
            raise ConfigError(f"got path={self.path!r} and vocab_size={self.vocab_size}; set exactly one of them")


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Batches of `batch_sequences` rows of `sequence_length` tokens, mixed from the sources."""

    sequence_length: int
    batch_sequences: int
    sources: tuple[SourceRecipe, ...]
    packing: Packing = Packing.AUTO

    def __post_init__(self) -> None:
        demand_numbers(self, positive=("sequence_length", "batch_sequences"))
        if not self.sources:
            raise ConfigError("sources is empty; add at least one [[data.sources]]")


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """AdamW. `peak_lr` and `final_lr` are the stages' `lr_start` and `lr_end` where those are not set."""

    peak_lr: float = 3.2e-4
    final_lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    eps: float = 1e-8
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        demand_numbers(self, positive=("peak_lr", "eps", "grad_clip"), not_negative=("final_lr", "weight_decay"))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={self.betas} must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class StageRecipe:
    """A run of steps with one learning-rate schedule and one set of loss weights.

    `warmup_steps` rise linearly from 0 to `lr_start`. `mtp_heads` heads are trained, their mean loss weighted by
    `mtp_loss_weight` (report: 0.3, then 0.1). `bias_update_rate` moves the routers' balance bias (report: 0.001,
    1e-5 in the last stage). `sources`, when given, replace those of the data recipe; `extra_sources` join them.

    `sequence_length` and `batch_sequences` replace those of the data recipe for this stage; `global_rope_theta` is that
    of this stage and those after it (report: 640,000, and 5,000,000 from the long-context stage on).

    With `until_loss` the stage ends as soon as the mean loss of its last steps (a moving average of about fifty) is
    below it, and after `steps` at the latest: for what a model learns all at once, and by chance sooner or later.
    """

    name: str
    steps: int
    until_loss: float | None = None
    kind: StageKind = StageKind.PRETRAIN
    schedule: Schedule = Schedule.COSINE
    warmup_steps: int = 0
    lr_start: float | None = None
    lr_end: float | None = None
    mtp_heads: int = 1
    mtp_loss_weight: float = 0.3
    bias_update_rate: float = 0.001
    sequence_aux_weight: float = 1e-5
    sources: tuple[SourceRecipe, ...] = ()
    extra_sources: tuple[SourceRecipe, ...] = ()
    sequence_length: int | None = None
    batch_sequences: int | None = None
    global_rope_theta: float | None = None

    def __post_init__(self) -> None:
        weights = ("mtp_loss_weight", "bias_update_rate", "sequence_aux_weight")
        sizes = ("sequence_length", "batch_sequences", "global_rope_theta")
        demand_numbers(
            self,
            positive=("steps", "lr_start", "until_loss", *sizes),
            not_negative=("warmup_steps", "lr_end", "mtp_heads", *weights),
        )
        if not self.name:
            raise ConfigError("name is empty; give the stage a name")
        if self.warmup_steps > self.steps:
            raise ConfigError(f"warmup_steps={self.warmup_steps} exceeds steps={self.steps}; lower it")
        if self.until_loss is not None and self.schedule is not Schedule.CONSTANT:
            raise ConfigError(
                f"until_loss={self.until_loss} may end a stage anywhere in its {self.schedule.value} schedule; "
                "set schedule to 'constant'"
            )
        if self.schedule is Schedule.CONSTANT and self.lr_end is not None:
            raise ConfigError(f"lr_end={self.lr_end} has no effect with a constant schedule; remove it")


@dataclass(frozen=True, kw_only=True)
class CheckpointRecipe:
    """Save every `every_steps` steps (0: only at the end) and keep the last `keep`."""

    every_steps: int = 500
    keep: int = 3

    def __post_init__(self) -> None:
        demand_numbers(self, positive=("keep",), not_negative=("every_steps",))


@dataclass(frozen=True, kw_only=True)
class LogRecipe:
    """Write a line of metrics every `every_steps` steps."""

    every_steps: int = 10

    def __post_init__(self) -> None:
        demand_numbers(self, positive=("every_steps",))


@dataclass(frozen=True, kw_only=True)
class ParallelRecipe:
    """How the processes that `torchrun` starts divide the work; one process alone divides nothing.

    Rows of a batch and all weights are divided among all of them. A layer's experts are divided among `expert_ranks`
    first, so that between these only tokens move. A run may go on with other numbers than it began with.
    """

    expert_ranks: int = 1

    def __post_init__(self) -> None:
        demand_numbers(self, positive=("expert_ranks",))


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """One training run. `device` is cpu, cuda, cuda:N, or auto: cuda where PyTorch sees a GPU, else cpu.

    `threads` of 0 leaves the number of CPU threads to the library. With `recompute` layers keep their input only and
    run again in the backward pass: a third more products for a fraction of the memory.
    """

    name: str
    model: ModelRecipe
    tokenizer: TokenizerRecipe
    data: DataRecipe
    stages: tuple[StageRecipe, ...]
    seed: int = 0
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)
    precision: Precision = Precision.AUTO
    recompute: bool = False
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)
    device: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        demand_numbers(self, not_negative=("seed", "threads"))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device={self.device!r} is unknown; use auto, cpu, cuda or cuda:N")
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"stages are named {names}; give at least one, each with its own name")

    def learning_rates(self, stage: StageRecipe) -> tuple[float, float]:
        """Start and end of a stage's schedule, from the optimiser where the stage does not say."""
        start = self.optimizer.peak_lr if stage.lr_start is None else stage.lr_start
        if stage.schedule is Schedule.CONSTANT:
            return start, start
        return start, self.optimizer.final_lr if stage.lr_end is None else stage.lr_end

    def data_of(self, stage: StageRecipe) -> DataRecipe:
        """The data recipe with the sources and sizes that the stage trains on."""
        return _changed(
            self.data,
            sources=(stage.sources or self.data.sources) + stage.extra_sources,
            sequence_length=stage.sequence_length,
            batch_sequences=stage.batch_sequences,
        )

    def global_rope_theta(self, stage: int) -> float | None:
        """The global layers' rotary base in a stage (an index): what it or the last one before it says, or None."""
        said = [each.global_rope_theta for each in self.stages[: stage + 1] if each.global_rope_theta is not None]
        return said[-1] if said else None


def _changed(config: _Config, **changes: object) -> _Config:
    return dataclasses.replace(config, **{key: value for key, value in changes.items() if value is not None})


def demand_numbers(recipe: object, *, positive: tuple[str, ...] = (), not_negative: tuple[str, ...] = ()) -> None:
    """Raises: ConfigError unless the named fields are None or finite and above, or at least, 0."""
    for name in (*positive, *not_negative):
        value = getattr(recipe, name)
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (name in positive and value == 0):
            expected = "above 0" if name in positive else "0 or more"
            raise ConfigError(f"{name}={value} must be {expected}")
