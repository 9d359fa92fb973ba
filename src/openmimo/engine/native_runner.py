"""The fast runner: the C++ runtime behind the `Runner` protocol, on any CPU.

Its results are batch-invariant: what else is in a step, how a prompt is cut into chunks and how many drafts are fed
change no bit of a sequence's logits.

Suffixes: S sequences, N flat tokens, M wanted rows of logits, V vocabulary, L sparse layers, k choices, K MTP heads.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openmimo.config.io import read_model_config
from openmimo.config.model import AttentionKind, ModelConfig
from openmimo.config.tensor_names import NO_HEADS, read_present_config
from openmimo.engine import packed
from openmimo.engine.runner import Int32, RowState, StepInput, StepOutput
from openmimo.errors import MimoError, RequestError, nearest

# PyTorch takes longer to import than packed weights take to open, so it is imported only where weights are packed.
if TYPE_CHECKING:
    from openmimo.engine.native_weights import NativeWeight
    from openmimo.model import MiMoModel

WEIGHTS = ("float32", "bf16", "int8", "int8_block", "fp8", "int4")
# "auto": what weights are multiplied with is fp32 with float32 weights, else bf16.
ACTIVATIONS = ("auto", "int8")
# "auto": keys and values are kept as they are multiplied, fp32 with float32 weights, else bf16.
CACHES = ("auto", "int8")
# Names a kernel table, such as "scalar" or "avx2", instead of the fastest that works here.
KERNELS_VARIABLE = "OPENMIMO_CPU"
# Packing fewer bytes than this takes a moment each time; more are packed once, into a file.
PACKED_FILE_BYTES = 256 << 20

_log = logging.getLogger(__name__)


def load_extension() -> Any:
    """The compiled module. Raises: RequestError with the reason when this installation lacks it."""
    try:
        return importlib.import_module("openmimo._native")
    except ImportError as error:
        raise RequestError(
            f"the C++ runtime is not installed ({error}); runner='torch' works without it, slower; "
            "to get it, install a C++20 compiler and run `pip install --force-reinstall --no-deps .`"
        ) from error


def default_threads() -> int:
    """PyTorch's number where it is loaded; else OMP_NUM_THREADS; else the cores that this process may use."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return torch.get_num_threads()
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})


def _siblings(cpu: int) -> str:
    """The hardware threads of a core, which gain nothing from running a thread each; Linux only."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="utf-8")
    except OSError:
        return str(cpu)


class NativeRunner:
    """Weights packed for this processor, rings and pages, and the calls of the `Runner` protocol.

    `weights` is float32, or with bf16 arithmetic bf16, int8 (one scale per output), int8_block (one per output and 32
    inputs), fp8 (E4M3, 128 x 128 blocks) or int4 (one scale per output and 32 inputs). `activations` "int8" rounds what
    8-bit weights are multiplied with to 8 bits, one scale per token and 32 inputs, and multiplies in whole numbers;
    down projections and routers stay as they are. `cache` "int8" keeps keys and values in 8 bits, one scale per
    position and key/value head for each, in about half the memory.
    A model's weights are packed in memory. Those of a folder are packed tensor by tensor, and when they have
    `packed_file_bytes` or more, once and for all into a file of the user's cache folder, which is mapped: it may be
    larger than memory. Opening it looks at samples only; `verify` checks the folder's manifest and packs anew.
    FP8 blocks of the files become fp8 weights as they are. Files without any MTP tensors give a runner without heads.
    Raises: RequestError on other words, or when the extension is missing; CheckpointError on an unusable folder.
    """

    def __init__(
        self,
        source: MiMoModel | Path,
        *,
        weights: str = "bf16",
        activations: str = "auto",
        cache: str = "auto",
        num_rows: int = 32,
        num_pages: int = 1024,
        max_step_tokens: int = 512,
        threads: int = 0,
        verify: bool = False,
        packed_file_bytes: int = PACKED_FILE_BYTES,
    ) -> None:
        native = load_extension()
        if weights not in WEIGHTS:
            raise RequestError(f"weights={weights!r} is not a format of the native runner; {nearest(weights, WEIGHTS)}")
        if activations not in ACTIVATIONS:
            raise RequestError(f"activations={activations!r} is no format; {nearest(activations, ACTIVATIONS)}")
        if cache not in CACHES:
            raise RequestError(f"cache={cache!r} is no format; {nearest(cache, CACHES)}")
        self.config = read_present_config(source) if isinstance(source, Path) else source.config
        self.num_rows, self.num_pages, self.max_step_tokens = num_rows, num_pages, max_step_tokens
        settings = _settings(native, self.config, weights)
        settings.set_activations(activations)
        settings.set_cache(cache)
        settings.num_rows, settings.num_pages, settings.max_step_tokens = num_rows, num_pages, max_step_tokens
        settings.threads = threads or default_threads()
        settings.kernels = os.environ.get(KERNELS_VARIABLE, "")
        try:
            self.runtime = native.Runtime(settings)
        except (ValueError, RuntimeError) as error:
            raise RequestError(f"the native runner cannot take this model: {error}") from error
        if isinstance(source, Path):
            self._load_folder(source, weights, activations, verify=verify, packed_file_bytes=packed_file_bytes)
        else:
            self.load_weights(source)
        moe = self.config.moe
        choices = moe.num_experts_per_token if moe and self.config.num_moe_layers else 0
        self._routes_shape = (self.config.num_moe_layers, choices)
        self._wide_routes = moe is not None and moe.num_experts > 256
        self._rows_S = np.zeros(0, np.int32)

    def load_weights(self, model: MiMoModel) -> None:
        """Pack a model's weights, in place of those there are. Caches keep what older weights computed.

        Raises: RequestError if the shapes are not this runner's, or its weights are a file that others map too.
        """
        from openmimo.engine.native_weights import weights_of_model

        self._set_all(weights_of_model(model))

    def _load_folder(
        self, folder: Path, weights: str, activations: str, *, verify: bool, packed_file_bytes: int
    ) -> None:
        """Map the packed file of a folder, after writing it if there is none; every process shares its memory."""
        if self.runtime.weight_bytes < packed_file_bytes:
            self._pack(folder, weights, verify)
            return
        fingerprint = packed.fingerprint(folder, f"{weights}, {activations}")
        path = packed.cache_path(fingerprint)

        def opened() -> bool:
            return not verify and self.runtime.open_weights(str(path), fingerprint)

        if opened():
            if self.config.num_mtp_heads < read_model_config(folder).num_mtp_heads:
                _log.warning(NO_HEADS, folder)
        else:
            with packed.turn(path.parent):
                # Whoever had the turn before may have packed the same.
                if not opened():
                    self._pack_into_file(folder, weights, verify, path, fingerprint)
        packed.mark_used(path)

    def _pack_into_file(self, folder: Path, weights: str, verify: bool, path: Path, fingerprint: str) -> None:
        """Weights go through the mapping of the new file, so they may be larger than memory."""
        num_bytes = self.runtime.weight_bytes
        try:
            packed.make_room(path, num_bytes)
            self.runtime.create_weights(str(path))
            _log.warning("packing %.1f GB of weights into %s; from then on they open at once", num_bytes / 1e9, path)
        except (OSError, RuntimeError) as error:
            _log.warning("packed weights are kept in memory only: %s", error)
        self._pack(folder, weights, verify)
        try:
            self.runtime.finish_weights(fingerprint)
        except RuntimeError as error:
            _log.warning("packed weights serve this process only: %s", error)

    def _pack(self, folder: Path, weights: str, verify: bool) -> None:
        from openmimo.engine.native_weights import weights_of_folder

        self._set_all(weights_of_folder(folder, weights, verify=verify))

    def _set_all(self, weights: Iterator[NativeWeight]) -> None:
        try:
            for weight in weights:
                place = weight.part, weight.layer, weight.expert
                if weight.scales is None:
                    self.runtime.set(*place, weight.values)
                else:
                    self.runtime.set_codes(*place, weight.values, weight.scales)
            self.runtime.check_complete()
        except MimoError:
            raise
        except ValueError as error:
            raise RequestError(f"the native runner cannot take these weights: {error}") from error

    @property
    def kernels(self) -> str:
        """The kernel table in use."""
        return self.runtime.kernels

    @property
    def row_bytes(self) -> int:
        return self.runtime.row_bytes

    @property
    def page_bytes(self) -> int:
        return self.runtime.page_bytes

    @property
    def cache_bytes(self) -> int:
        return self.num_rows * self.row_bytes + self.num_pages * self.page_bytes

    def forward(self, step: StepInput) -> StepOutput:
        tables = step.page_tables
        pages = tables[0] if len(tables) == 1 else np.concatenate(tables)
        ends = np.cumsum([len(table) for table in tables], dtype=np.int32)
        logits_MV = np.empty((len(step.logits_M), self.config.vocab_size), np.float32)
        routes_NLk = np.empty((len(step.token_ids_N), *self._routes_shape), np.int32)
        try:
            self.runtime.forward(
                step.token_ids_N,
                step.rows_S,
                step.starts_S,
                step.counts_S,
                pages,
                ends,
                step.logits_M,
                logits_MV,
                routes_NLk,
            )
        except ValueError as error:
            raise RequestError(str(error)) from error
        self._rows_S = step.rows_S.copy()
        routes = routes_NLk.astype(np.uint16) if self._wide_routes else routes_NLk.astype(np.uint8)
        return StepOutput(logits_MV=logits_MV, routed_experts_NLk=routes)

    def prefill_heads(self, rows_S: Int32, starts_S: Int32, counts_S: Int32, next_ids: tuple[Int32, ...]) -> None:
        """From now on `commit` remembers what it keeps of these rows; the heads run over it when `draft` asks."""
        self.runtime.track(rows_S)

    def commit(self, rows_S: Int32, kept_S: Int32) -> None:
        if len(rows_S) != len(self._rows_S) or (rows_S != self._rows_S).any():
            kept = dict(zip(rows_S.tolist(), kept_S.tolist(), strict=True))
            kept_S = np.array([kept.get(row, 0) for row in self._rows_S.tolist()], np.int32)
        self.runtime.commit(kept_S)

    def draft(self, rows_S: Int32, lengths_S: Int32, tokens_SW: Int32) -> Int32:
        drafts_SK = np.empty((len(rows_S), self.config.num_mtp_heads), np.int32)
        self.runtime.draft(rows_S, np.ascontiguousarray(tokens_SW[:, -1]), drafts_SK)
        return drafts_SK

    def copy_page(self, source: int, target: int) -> None:
        self.runtime.copy_page(source, target)

    def copy_row(self, source: int, target: int) -> None:
        self.runtime.copy_row(source, target)

    def read_row(self, row: int) -> RowState:
        state = np.zeros(self.runtime.row_state_bytes, np.uint8)
        self.runtime.read_row(row, state)
        return RowState((state,))

    def write_row(self, row: int, state: RowState) -> None:
        self.runtime.write_row(row, state.arrays[0])


def _settings(native: Any, config: ModelConfig, weights: str) -> Any:
    settings = native.RuntimeConfig()
    settings.set_weights(weights)
    settings.vocab, settings.hidden, settings.dense_dim = config.vocab_size, config.hidden_size, config.dense_dim
    settings.is_sliding = [int(kind is AttentionKind.SLIDING) for kind in config.layer_kinds]
    settings.is_moe = [int(sparse) for sparse in config.layer_is_moe]
    settings.global_ = _geometry(native, config, AttentionKind.GLOBAL)
    settings.sliding = _geometry(native, config, AttentionKind.SLIDING)
    if config.moe is not None:
        moe = config.moe
        settings.experts, settings.top_k, settings.expert_dim = (
            moe.num_experts,
            moe.num_experts_per_token,
            moe.expert_dim,
        )
        settings.normalize_weights, settings.routed_scaling = moe.normalize_weights, moe.routed_scaling
    settings.mtp_heads, settings.value_scale, settings.eps = config.num_mtp_heads, config.value_scale, config.norm_eps
    return settings


def _geometry(native: Any, config: ModelConfig, kind: AttentionKind) -> Any:
    attention, geometry = config.attention(kind), native.Geometry()
    geometry.heads, geometry.groups = attention.num_heads, attention.num_kv_heads
    geometry.qk, geometry.v = attention.qk_head_dim, attention.v_head_dim
    geometry.window = attention.window_keys or 0
    geometry.rotary_half = config.rotary_dim(kind) // 2
    geometry.theta, geometry.sink = attention.rope_theta, attention.sink
    return geometry
