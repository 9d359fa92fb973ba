"""The engine: prompts in, completions out, all at once, as a stream, or step by step beside other requests."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from openmimo.config.model import ModelConfig
from openmimo.engine.core import Emission, EngineCore
from openmimo.engine.loading import RunnerOptions, load_tokenizer, open_runner, resolve_model_folder
from openmimo.engine.request import Completion, EngineLoad, PartialAnswer, SamplingParams, StreamEvent
from openmimo.engine.runner import PAGE_TOKENS, Runner
from openmimo.engine.sampler import random_state
from openmimo.engine.sequence import Sequence as Answer
from openmimo.engine.text import TextCodec
from openmimo.errors import RequestError

if TYPE_CHECKING:
    from openmimo.model import MiMoModel

Prompt = str | Sequence[int]


class Engine:
    """Decode with a model, drafting with its MTP heads.

    Drafts are verified, so what is written does not depend on them. `draft_heads` is the number of drafts per step,
    0 for none, or "auto": 0 to all heads, as measured acceptance and cost suggest for every answer.
    `runner` is "native" (C++), "torch", or "auto": native where its extension is installed. `weights` is the format of
    the weights in memory, one of the runner's; a model given as an object keeps its own in the torch runner.
    `graphs` is how the torch runner runs decode steps: "cuda" (CUDA graphs), "compile" (`torch.compile`), "off", or
    "auto": "cuda" for a model on CUDA, else "off".
    `activations` "int8" lets the native runner multiply 8-bit weights in whole numbers: faster, less exact.
    `cache` "int8" keeps keys and values in 8 bits there, in about half the memory.
    At most `max_batch` answers are written at once; a step feeds at most `step_tokens` tokens, of prompts at most
    `chunk_tokens`. `cache_tokens` positions of global layers are kept, by default as many as answers and prefix cache
    could use, within 1 GiB. `prefix_cache_bytes` is the limit of the prefix cache, 0 for none; it takes copies at the
    ends of prompts and answers and every `snapshot_tokens` of a prompt. `verify` checks every file against the folder's
    sha256 manifest before loading.
    Raises: RequestError on unusable options, CheckpointError when the folder cannot be loaded.
    """

    def __init__(
        self,
        folder_or_model: str | Path | MiMoModel | Runner,
        *,
        tokenizer: TextCodec | None = None,
        runner: str = "auto",
        weights: str = "bf16",
        activations: str = "auto",
        cache: str = "auto",
        draft_heads: int | str = "auto",
        verify: bool = False,
        max_batch: int = 32,
        step_tokens: int = 512,
        chunk_tokens: int | None = None,
        cache_tokens: int | None = None,
        prefix_cache_bytes: int = 256 << 20,
        snapshot_tokens: int = 512,
        threads: int | None = None,
        graphs: str = "auto",
    ) -> None:
        options = RunnerOptions(
            kind=runner,
            weights=weights,
            activations=activations,
            cache=cache,
            verify=verify,
            max_batch=max_batch,
            step_tokens=step_tokens,
            cache_tokens=cache_tokens,
            prefix_cache_bytes=prefix_cache_bytes,
            threads=threads,
            graphs=graphs,
        )
        if snapshot_tokens < 1 or prefix_cache_bytes < 0 or (chunk_tokens is not None and chunk_tokens < 1):
            raise RequestError(
                f"snapshot_tokens={snapshot_tokens}, prefix_cache_bytes={prefix_cache_bytes} and "
                f"chunk_tokens={chunk_tokens} must be at least 1, 0 and 1"
            )
        if isinstance(folder_or_model, str | Path):
            folder_or_model = resolve_model_folder(folder_or_model)
            tokenizer = tokenizer or load_tokenizer(folder_or_model)
        self.runner = open_runner(folder_or_model, options)
        self.config: ModelConfig = self.runner.config
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.draft_heads, self.adaptive = _checked_heads(draft_heads, self.config.num_mtp_heads)
        self._core = EngineCore(
            self.runner,
            max_batch=max_batch,
            num_tokens=min(self.config.vocab_size, getattr(tokenizer, "vocab_size", None) or self.config.vocab_size),
            chunk_tokens=chunk_tokens or step_tokens,
            snapshot_tokens=snapshot_tokens,
            prefix_cache_bytes=prefix_cache_bytes,
        )
        # Requests that are not finished, with their answers, and what steps gave that nobody has fetched yet.
        self._answers: dict[int, list[Answer]] = {}
        self._unfetched: list[Emission] = []
        self._next_id = iter(range(1 << 62))
        self._version = [0]  # shared with the views that `with_drafts` gives

    @property
    def num_tokens(self) -> int:
        """How many ids, from 0 on, can be chosen: rows of the vocabulary behind the tokenizer's never are."""
        return self._core.num_tokens

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._answers)

    @property
    def load(self) -> EngineLoad:
        """How busy the engine is now."""
        blocks, scheduler, prefix = self._core.blocks, self._core.scheduler, self._core.prefix
        return EngineLoad(
            num_running=len(scheduler.running),
            num_waiting=sum(1 + len(sequence.siblings) for sequence in scheduler.waiting),
            num_preemptions=scheduler.num_preemptions,
            ring_bytes=(blocks.num_rows - len(blocks.free_rows)) * blocks.row_bytes,
            ring_bytes_total=blocks.num_rows * blocks.row_bytes,
            page_bytes=(blocks.num_pages - len(blocks.free_pages)) * blocks.page_bytes,
            page_bytes_total=blocks.num_pages * blocks.page_bytes,
            prefix_bytes=0 if prefix is None else prefix.num_bytes,
        )

    def is_open(self, request_id: int) -> bool:
        """Whether a request has answers that are not finished."""
        return request_id in self._answers

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        index: int = 0,
        parts: Sequence[PartialAnswer] | None = None,
    ) -> int:
        """Queue a prompt and return the request's number; `index` is added to the seed.

        With `parts` the request has these answers, which go on where they stopped; prompt and options must be those
        that they were begun with.
        Raises: RequestError on a prompt that is empty, too long or outside the vocabulary, or options that do not fit.
        """
        params = params or SamplingParams()
        ids = self._prompt_ids(prompt, index)
        self._check_params(params)
        choices = range(params.n) if parts is None else [self._checked_part(part, ids, params) for part in parts]
        request_id = next(self._next_id)
        self._answers[request_id] = answers = self._make_answers(request_id, ids, params, index, choices)
        for answer, part in zip(answers, parts or (None,) * len(answers), strict=True):
            if part is not None:
                answer.restore(part)
            answer.note_version(self.weights_version)
        if parts is None:
            self._core.add(answers)
        else:
            for answer in answers:
                self._core.add([answer])
        return request_id

    def unfinished(self, request_id: int) -> tuple[PartialAnswer, ...]:
        """The answers of a request that are not finished, as they are now; none if there is no such request."""
        return tuple(each.partial() for each in self._answers.get(request_id, ()) if each.finish_reason is None)

    def update_weights(self, model: MiMoModel, *, version: int | None = None) -> int:
        """Put a model's weights in place of those there are, and return their version, by default one more.

        Answers in progress go on under the new weights with the caches they have; no later request starts from what
        older weights computed. Raises: RequestError if the model is of another shape or the runner's weights are fixed.
        """
        changes = {name: getattr(self.config, name) for name in ("init_std", "max_positions")}
        if model.config.replace(**changes) != self.config:
            raise RequestError("the engine cannot take these weights: their model has another config than its own")
        self._core.runner.load_weights(model)
        self._core.scheduler.forget_texts()
        self._version[0] = self._version[0] + 1 if version is None else version
        for answers in self._answers.values():
            for answer in answers:
                if answer.finish_reason is None:
                    answer.note_version(self.weights_version)
        return self.weights_version

    @property
    def weights_version(self) -> int:
        """The version that `update_weights` last gave, 0 before."""
        return self._version[0]

    def step(self) -> list[StreamEvent]:
        """Run one step for all requests; every answer that got tokens has one event."""
        return [self._event(emission) for emission in self._step(None)]

    def step_to_completions(self) -> list[tuple[int, Completion]]:
        """`step` for those who do not stream: the answers that it finished, with their requests, no pieces of text."""
        return [
            (sequence.request_id, sequence.complete())
            for sequence, end, *_ in self._step(None)
            if sequence.finish_reason is not None and end == len(sequence.ids)
        ]

    def abort(self, request_id: int) -> None:
        """Drop a request and free what it holds; one that is finished or unknown is let be."""
        answers = self._answers.pop(request_id, None)
        if answers is not None:
            self._core.abort(answers)
            self._unfetched[:] = [each for each in self._unfetched if each.sequence.request_id != request_id]

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> list[Completion]:
        """Continue every prompt (text or token ids); the order is kept, a prompt's `n` answers follow each other.

        Raises: RequestError on a prompt that is empty, too long or outside the vocabulary, or options that do not fit.
        """
        requests: list[int] = []
        done: dict[tuple[int, int], Completion] = {}
        params = params or SamplingParams()
        try:
            for index, prompt in enumerate(prompts):
                requests.append(self.add_request(prompt, params, index=index))
            mine = set(requests)
            while len(done) < len(requests) * params.n:
                for emission in self._step(mine):
                    sequence = emission.sequence
                    if sequence.finish_reason is not None:
                        done[sequence.request_id, sequence.choice] = sequence.complete()
        finally:
            for request_id in requests:
                self.abort(request_id)
        return [done[request_id, choice] for request_id in requests for choice in range(params.n)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[StreamEvent]:
        """Continue one prompt and hand out the tokens of every step as they come; closing the iterator stops it."""
        request_id = self.add_request(prompt, params)
        try:
            while request_id in self._answers:
                for emission in self._step({request_id}):
                    yield self._event(emission)
        finally:
            self.abort(request_id)

    def with_drafts(self, draft_heads: int | str) -> Engine:
        """The same engine, drafting otherwise: it shares the model, the caches and the queue."""
        other = copy.copy(self)
        other.draft_heads, other.adaptive = _checked_heads(draft_heads, self.config.num_mtp_heads)
        return other

    def clear_prefix_cache(self) -> None:
        """Forget all texts."""
        self._core.scheduler.forget_texts()

    @property
    def used_cache_bytes(self) -> int:
        """Bytes of rows and pages in use, by answers and by the prefix cache; a shared page counts once."""
        return self._core.blocks.used_bytes

    def _step(self, mine: set[int] | None) -> list[Emission]:
        """One step's emissions, of some requests or of all; those of others wait for whoever asks for them."""
        emissions, self._unfetched[:] = [*self._unfetched], []
        if not any(mine is None or each.sequence.request_id in mine for each in emissions):
            emissions += self._core.step()
        if mine is not None:
            self._unfetched += [each for each in emissions if each.sequence.request_id not in mine]
            emissions = [each for each in emissions if each.sequence.request_id in mine]
        for request_id in {sequence.request_id for sequence, *_ in emissions if sequence.finish_reason is not None}:
            if all(answer.finish_reason is not None for answer in self._answers.get(request_id, ())):
                self._answers.pop(request_id, None)
        return emissions

    def _event(self, emission: Emission) -> StreamEvent:
        sequence, end, count, num_drafted, rejected = emission
        params = sequence.params
        records = slice(end - count - sequence.num_prompt, end - sequence.num_prompt)
        tokens, is_last = sequence.ids[end - count : end], end == len(sequence.ids)
        is_last &= sequence.finish_reason is not None
        if not tokens:
            return StreamEvent(
                token_ids=(),
                pieces=(),
                drafted=(),
                completion=sequence.complete(),
                request_id=sequence.request_id,
                choice=sequence.choice,
            )
        pieces = [sequence.text.piece(token) for token in tokens[:-1]]
        pieces.append(sequence.text.piece(None if is_last and tokens[-1] in sequence.stop_ids else tokens[-1]))
        if is_last:
            pieces[-1] += sequence.text.flush()
        return StreamEvent(
            token_ids=tuple(tokens),
            pieces=tuple(pieces),
            drafted=tuple(place if place < num_drafted else None for place in range(count)),
            rejected=rejected,
            logprobs=tuple(sequence.logprobs[records]) if params.logprobs else None,
            top_logprobs=tuple(sequence.top_logprobs[records]) if params.top_logprobs else None,
            completion=sequence.complete() if is_last else None,
            request_id=sequence.request_id,
            choice=sequence.choice,
        )

    def _prompt_ids(self, prompt: Prompt, index: int) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("prompt is text but the engine has no tokenizer; pass token ids or tokenizer=...")
            prompt = self.tokenizer.encode(prompt)
        ids = list(prompt)
        most = min(self.config.max_positions, self.runner.num_pages * PAGE_TOKENS)
        if not ids:
            raise RequestError(f"prompt {index} has no tokens; give at least one")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise RequestError(f"prompt {index} has token ids outside the vocabulary of {self.config.vocab_size}")
        if len(ids) >= self.config.max_positions:
            raise RequestError(
                f"prompt {index} has {len(ids)} tokens; the model has {self.config.max_positions} positions, "
                "so shorten it"
            )
        if len(ids) >= most:
            raise RequestError(
                f"prompt {index} has {len(ids)} tokens; the cache holds {most}, so shorten it or pass a larger "
                "cache_tokens"
            )
        return ids

    def _check_params(self, params: SamplingParams) -> None:
        if params.routed_experts and self.config.num_moe_layers == 0:
            raise RequestError("routed_experts=True, but this model has no sparse layers")
        if params.stop and self.tokenizer is None:
            raise RequestError("stop texts need a tokenizer; pass tokenizer=... or use stop_token_ids")
        outside = [token for token in params.logit_bias if token >= self._core.num_tokens]
        if outside:
            raise RequestError(f"logit_bias has ids {outside} outside the vocabulary of {self._core.num_tokens} tokens")

    def _checked_part(self, part: PartialAnswer, ids: list[int], params: SamplingParams) -> int:
        """The choice that a part belongs to. Raises: RequestError if it is no unfinished answer to this request."""
        size, moe = len(part.token_ids), self.config.moe
        routes = part.routed_experts
        shape = (len(ids) + size - 1, self.config.num_moe_layers, moe.num_experts_per_token if moe else 0)
        if size >= params.max_tokens or (params.logprobs and len(part.logprobs) != size):
            raise RequestError(
                f"a part has {size} tokens and {len(part.logprobs)} log-probabilities; expected fewer than "
                f"max_tokens={params.max_tokens}, and one for each"
            )
        if params.routed_experts and size and (routes is None or routes.shape != shape):
            raise RequestError(
                f"a part has routes {None if routes is None else routes.shape}; expected {shape}, one row per token fed"
            )
        if min(part.token_ids, default=0) < 0 or max(part.token_ids, default=0) >= self.config.vocab_size:
            raise RequestError(f"a part has token ids outside the vocabulary of {self.config.vocab_size}")
        return part.choice

    def _make_answers(
        self, request_id: int, ids: list[int], params: SamplingParams, index: int, choices: Iterable[int]
    ) -> list[Answer]:
        config, moe = self.config, self.config.moe
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids.update(config.eos_token_ids, () if self.tokenizer is None else self.tokenizer.eos_token_ids)
        seed = secrets.randbits(64) if params.seed is None else params.seed + index
        routes_per_token = (config.num_moe_layers, moe.num_experts_per_token if moe and config.num_moe_layers else 0)
        routes_dtype = np.uint8 if moe is None or moe.num_experts <= 256 else np.uint16
        limit = min(len(ids) + params.max_tokens, config.max_positions, self.runner.num_pages * PAGE_TOKENS)
        return [
            Answer(
                params,
                ids,
                blocks=self._core.blocks,
                request_id=request_id,
                choice=choice,
                limit=limit,
                stop_ids=frozenset(stop_ids),
                random_state=random_state(seed, choice),
                draft_limit=self.draft_heads,
                adaptive=self.adaptive,
                routes=np.zeros((len(ids) + 64, *routes_per_token), dtype=routes_dtype),
                codec=self.tokenizer,
            )
            for choice in choices
        ]


def _checked_heads(draft_heads: int | str, available: int) -> tuple[int, bool]:
    """The most drafts per step, and whether every answer chooses its own number up to that."""
    if draft_heads == "auto":
        return available, True
    if not isinstance(draft_heads, int) or not 0 <= draft_heads <= available:
        raise RequestError(
            f"draft_heads={draft_heads!r}, but the model has {available} MTP heads; pass 'auto' or 0 to {available}"
        )
    return draft_heads, False
