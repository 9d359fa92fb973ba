"""From a folder or a model to a runner: which kind, which weights, how much cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from openmimo.config.io import read_model_config
from openmimo.config.model import AttentionKind, ModelConfig
from openmimo.engine.runner import PAGE_TOKENS, Runner
from openmimo.engine.text import TextCodec
from openmimo.errors import RequestError, nearest

if TYPE_CHECKING:
    from openmimo.model import MiMoModel

RUNNERS = ("auto", "native", "torch")
TORCH_WEIGHTS = ("bf16", "float32")
# Without `cache_tokens`, pages take at most this much memory, and are touched only as they are used.
DEFAULT_PAGE_BYTES = 1 << 30

_log = logging.getLogger(__name__)
_noted: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """What to open, see `Engine`. Raises: RequestError on values that make no sense."""

    kind: str
    weights: str
    activations: str = "auto"
    cache: str = "auto"
    verify: bool
    max_batch: int
    step_tokens: int
    cache_tokens: int | None
    prefix_cache_bytes: int
    threads: int | None
    graphs: str = "auto"

    def __post_init__(self) -> None:
        if self.kind not in RUNNERS:
            raise RequestError(f"no runner {self.kind!r}; {nearest(self.kind, RUNNERS)}")
        if not 1 <= self.max_batch <= self.step_tokens:
            raise RequestError(
                f"max_batch={self.max_batch} must be at least 1 and at most step_tokens={self.step_tokens}"
            )
        if self.cache_tokens is not None and self.cache_tokens < 2:
            raise RequestError(f"cache_tokens={self.cache_tokens} must be at least 2")

    def num_pages(self, config: ModelConfig) -> int:
        """Pages for `cache_tokens`, or for all that answers and prefix cache could use, within DEFAULT_PAGE_BYTES."""
        if self.cache_tokens is not None:
            return -(-self.cache_tokens // PAGE_TOKENS)
        full = config.global_attention
        layers = sum(kind is AttentionKind.GLOBAL for kind in config.layer_kinds)
        value_bytes = 1 if self.cache == "int8" else 4 if self.weights == "float32" else 2
        per_token = full.num_kv_heads * (full.qk_head_dim + full.v_head_dim) * value_bytes
        page_bytes = max(1, layers * PAGE_TOKENS * per_token)
        useful = self.max_batch * -(-config.max_positions // PAGE_TOKENS) + self.prefix_cache_bytes // page_bytes
        return max(1, min(useful, DEFAULT_PAGE_BYTES // page_bytes))


def open_runner(source: Path | MiMoModel | Runner, options: RunnerOptions) -> Runner:
    """A runner for a checkpoint folder or a model; one that exists already is used as it is."""
    if not isinstance(source, Path) and hasattr(source, "prefill_heads"):
        return cast(Runner, source)
    source = cast("Path | MiMoModel", source)
    on_cpu = isinstance(source, Path) or source.embed_tokens.weight.device.type == "cpu"
    wants_graphs = options.graphs not in ("auto", "off")
    if not isinstance(source, Path) and source.invariant:
        if options.kind == "native":
            raise RequestError("an invariant model keeps its bits with runner='torch' alone; leave runner out")
        return _open_torch(source, options)
    if options.kind == "native" and wants_graphs:
        raise RequestError(f"graphs={options.graphs!r} needs runner='torch'; the native runner has none, leave it out")
    if options.kind == "native" or (options.kind == "auto" and on_cpu and not wants_graphs):
        runner = _open_native(source, options)
        if runner is not None:
            return runner
    return _open_torch(source, options)


def resolve_model_folder(path: str | Path) -> Path:
    """The folder that holds the checkpoint: `path` itself, or `path/model` of a run folder."""
    folder = Path(path)
    inner = folder / "model"
    return inner if not (folder / "config.json").is_file() and (inner / "config.json").is_file() else folder


def load_tokenizer(folder: Path) -> TextCodec | None:
    """The tokenizer beside the weights; None for a folder without one, which then takes token ids only."""
    from openmimo.text import Tokenizer

    return Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None


def _open_native(source: Path | MiMoModel, options: RunnerOptions) -> Runner | None:
    """The C++ runner; None, with a note, if "auto" asked for it and it is not installed."""
    try:
        from openmimo.engine.native_runner import NativeRunner, load_extension

        load_extension()
    except (ImportError, RequestError) as error:
        if options.kind == "native":
            raise RequestError(f"the native runner cannot be used: {error}") from error
        if "slower" not in _noted:
            _noted.add("slower")
            _log.warning("the native runner is not installed; decoding with PyTorch, which is slower")
        return None
    config = read_model_config(source) if isinstance(source, Path) else source.config
    return NativeRunner(
        source,
        weights=options.weights,
        activations=options.activations,
        cache=options.cache,
        num_rows=options.max_batch,
        num_pages=options.num_pages(config),
        max_step_tokens=options.step_tokens,
        threads=options.threads or 0,
        verify=options.verify,
    )


def _open_torch(source: Path | MiMoModel, options: RunnerOptions) -> Runner:
    """The PyTorch runner. On the CPU bf16 is how weights are rounded; arithmetic and cache are fp32 there."""
    import torch

    from openmimo.engine.torch_runner import TorchRunner
    from openmimo.model import cast_model

    for name, value in (("activations", options.activations), ("cache", options.cache)):
        if value != "auto":
            raise RequestError(f"{name}={value!r} needs the native runner; leave it out")
    if isinstance(source, Path):
        if options.weights not in TORCH_WEIGHTS:
            hint = nearest(options.weights, TORCH_WEIGHTS)
            raise RequestError(f"weights={options.weights!r} needs the native runner; with PyTorch, {hint}")
        source = cast_model(_load(source, options), torch.float32)
    return TorchRunner(
        source,
        num_rows=options.max_batch,
        num_pages=options.num_pages(source.config),
        max_step_tokens=options.step_tokens,
        graphs=options.graphs,
    )


def _load(folder: Path, options: RunnerOptions) -> MiMoModel:
    from openmimo.checkpoint.load import load_model

    return load_model(folder, dtype="float32" if options.weights == "float32" else "bfloat16", verify=options.verify)
