"""llama.cpp through the low-level bindings of llama-cpp-python: token ids in, logits out, no Python sampling loop.

The package belongs to the extra `bench` and is built from source on this machine, so that it uses all its CPU has.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openmimo.errors import CheckpointError, RequestError

Floats = npt.NDArray[np.float32]

_F32, _F16 = 0, 1  # ggml_type
_CACHE_TYPES = {"float32": _F32, "float16": _F16}
_keep_alive: list[Any] = []


@cache
def bindings() -> Any:
    """The module with llama.cpp's C functions, silenced. Raises: RequestError when it is not installed."""
    try:
        library = importlib.import_module("llama_cpp.llama_cpp")
    except ImportError as error:
        raise RequestError(
            f"llama.cpp cannot be used: {error}; build it here with "
            'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python "openmimo[bench]"'
        ) from error
    _keep_alive.append(library.llama_log_callback(lambda level, text, data: None))
    library.llama_log_set(_keep_alive[0], None)
    library.llama_backend_init()
    return library


@dataclass(frozen=True, kw_only=True)
class ContextOptions:
    """How a context computes. `micro_batch` tokens go through the graph at once; `unified` shares one cache buffer."""

    flash: bool = True
    micro_batch: int = 512
    unified: bool = False
    cache: str = "float16"

    def __str__(self) -> str:
        flags = ("flash" if self.flash else "no flash", f"ubatch {self.micro_batch}")
        return ", ".join(flags + (("unified",) if self.unified else ()))


class LlamaModel:
    """A GGUF file, memory-mapped. Raises: CheckpointError when llama.cpp refuses it."""

    def __init__(self, path: str | Path, *, with_mtp: bool = False) -> None:
        self.library = bindings()
        parameters = self.library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.load_mtp = with_mtp
        self.handle: Any = None
        if Path(path).is_file():
            self.handle = self.library.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.handle:
            raise CheckpointError(f"llama.cpp cannot load {str(path)!r}; convert the model with --layout gguf")
        self.hidden_size: int = self.library.llama_model_n_embd(self.handle)
        self.vocabulary = self.library.llama_model_get_vocab(self.handle)
        self.vocab_size: int = self.library.llama_vocab_n_tokens(self.vocabulary)
        self.num_mtp_heads: int = self.library.llama_model_n_layer_nextn(self.handle) if with_mtp else 0

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids; with `special`, names of control tokens in `text` become those tokens."""
        content = text.encode()
        room = (self.library.llama_token * (len(content) + 8))()
        count = self.library.llama_tokenize(self.vocabulary, content, len(content), room, len(room), False, special)
        assert count >= 0, "no text has more tokens than bytes"
        return list(room[:count])

    def close(self) -> None:
        if self.handle:
            self.library.llama_model_free(self.handle)
            self.handle = None


class LlamaContext:
    """A cache and a compute graph for `num_sequences` sequences of at most `num_tokens` tokens each.

    `feed` takes at most `MAX_FEED` tokens. With `heads_of` it holds the caches of that context's MTP heads instead.
    """

    MAX_FEED = 2048

    def __init__(
        self,
        model: LlamaModel,
        *,
        num_tokens: int,
        num_sequences: int = 1,
        threads: int,
        options: ContextOptions,
        heads_of: LlamaContext | None = None,
    ) -> None:
        self.model, self.library = model, model.library
        self.shape = (num_tokens, num_sequences, options)
        parameters = self.library.llama_context_default_params()
        padded = -(-num_tokens // 256) * 256
        parameters.n_ctx = padded * num_sequences
        parameters.n_seq_max = num_sequences
        parameters.n_batch = self.MAX_FEED
        parameters.n_ubatch = options.micro_batch
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = int(options.flash)
        parameters.kv_unified = options.unified
        parameters.swa_full = False
        parameters.type_k = parameters.type_v = _CACHE_TYPES[options.cache]
        parameters.offload_kqv = parameters.op_offload = False
        parameters.no_perf = True
        if heads_of is not None:
            parameters.ctx_type = self.library.LLAMA_CONTEXT_TYPE_MTP
            parameters.ctx_other = heads_of.handle
        self.handle: Any = self.library.llama_init_from_model(model.handle, parameters)
        if not self.handle:
            raise RequestError(f"llama.cpp cannot make a context of {num_sequences} x {num_tokens} tokens ({options})")
        self.batch: Any = self.library.llama_batch_init(self.MAX_FEED, 0, 1)
        shape = (self.MAX_FEED,)
        self._tokens = np.ctypeslib.as_array(self.batch.token, shape=shape)
        self._positions = np.ctypeslib.as_array(self.batch.pos, shape=shape)
        self._outputs = np.ctypeslib.as_array(self.batch.logits, shape=shape)
        np.ctypeslib.as_array(self.batch.n_seq_id, shape=shape)[:] = 1

    def prepare(self, positions: Sequence[int], sequences: Sequence[int], outputs: Sequence[bool]) -> None:
        """Say where the tokens of the next `feed` stand, and which of them get logits."""
        count = len(positions)
        self.batch.n_tokens = count
        self._positions[:count] = positions
        self._outputs[:count] = outputs
        for place, sequence in enumerate(sequences):
            self.batch.seq_id[place][0] = sequence

    def feed(self, token_ids: Sequence[int] | npt.NDArray[np.int32]) -> None:
        """Compute one token for each prepared place and append it to its sequence. Raises: RequestError."""
        self._tokens[: len(token_ids)] = token_ids
        status = self.library.llama_decode(self.handle, self.batch)
        if status != 0:
            raise RequestError(f"llama_decode returned {status} for {len(token_ids)} tokens; make a larger context")

    def advance(self, count: int) -> None:
        """Move all prepared places on by one position."""
        self._positions[:count] += 1

    def prefill(self, sequence: int, token_ids: Sequence[int], *, all_outputs: bool = False) -> list[Floats]:
        """Append a prompt; returns the logits of its last token, or with `all_outputs` of every token."""
        rows: list[Floats] = []
        for start in range(0, len(token_ids), self.MAX_FEED):
            chunk = token_ids[start : start + self.MAX_FEED]
            places = range(start, start + len(chunk))
            outputs = [all_outputs or place == len(token_ids) - 1 for place in places]
            self.prepare(places, [sequence] * len(chunk), outputs)
            self.feed(chunk)
            rows += [self.logits(place).copy() for place, wanted in enumerate(outputs) if wanted]
        return rows

    def logits(self, place: int) -> Floats:
        """The logits of one token of the last `feed`; valid until the next. Waits for the computation."""
        pointer = self.library.llama_get_logits_ith(self.handle, place)
        return np.ctypeslib.as_array(pointer, shape=(self.model.vocab_size,))

    def truncate(self, sequence: int, length: int) -> bool:
        """Forget a sequence's tokens from `length` on; False when the window's cache no longer holds what is needed."""
        memory = self.library.llama_get_memory(self.handle)
        return bool(self.library.llama_memory_seq_rm(memory, sequence, length, -1))

    def clear(self) -> None:
        """Forget all sequences."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.handle), False)

    def close(self) -> None:
        if self.handle:
            self.library.llama_batch_free(self.batch)
            self.library.llama_free(self.handle)
            self.handle = None
