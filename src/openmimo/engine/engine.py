"""The engine: prompts in, completions out. It schedules rows and turns logits into tokens; a `Runner` computes.

Suffixes: B rows, T tokens of a step, V vocabulary.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from openmimo.checkpoint.load import LoadDtype, load_model
from openmimo.engine.request import Completion, Request, SamplingParams, StreamEvent
from openmimo.engine.sampler import choose_greedy, logprobs_of, sample
from openmimo.engine.sequence import Detokenizer, RunningSequence, TextCodec
from openmimo.engine.speculate import count_kept
from openmimo.engine.torch_batch import RunningBatch, TorchRunner
from openmimo.errors import RequestError, nearest
from openmimo.model import MiMoModel
from openmimo.text import Tokenizer

Prompt = str | Sequence[int]
RUNNERS = ("torch",)


@dataclass(frozen=True)
class _Emission:
    """Tokens that one step gave one sequence; the first `num_drafted` of the window were drafts."""

    sequence: RunningSequence
    token_ids: list[int]
    num_drafted: int


class Engine:
    """Decode with a model, drafting with its MTP heads when decoding greedily.

    Drafts are verified, so the tokens are those of plain greedy decoding. `draft_heads` is "auto" (all heads) or a
    number, 0 for none. With `uniform_steps` greedy decoding feeds the same number of token rows per step whatever
    `draft_heads` is, so that drafting cannot change a near tie through rounding (see `TorchRunner`); without it,
    fewer heads mean smaller and faster steps. `dtype` applies when a folder
    is loaded, and `verify` then checks every file against the folder's sha256 manifest first.
    Raises: RequestError on unusable options, CheckpointError when the folder cannot be loaded.
    """

    def __init__(
        self,
        folder_or_model: str | Path | MiMoModel,
        *,
        tokenizer: TextCodec | None = None,
        runner: str = "torch",
        draft_heads: int | str = "auto",
        dtype: str = "float32",
        verify: bool = False,
        max_batch: int = 32,
        uniform_steps: bool = True,
    ) -> None:
        if runner not in (*RUNNERS, "auto"):
            raise RequestError(f"no runner {runner!r}; {nearest(runner, (*RUNNERS, 'auto'))}")
        if max_batch < 1:
            raise RequestError(f"max_batch={max_batch} must be at least 1")
        if isinstance(folder_or_model, MiMoModel):
            model = folder_or_model
        else:
            folder = resolve_model_folder(folder_or_model)
            model = _load_model(folder, dtype, verify)
            tokenizer = tokenizer or _load_tokenizer(folder)
        self.config = model.config
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.uniform_steps = uniform_steps
        self.runner = TorchRunner(model)
        self.draft_heads = _checked_heads(draft_heads, self.config.num_mtp_heads)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> list[Completion]:
        """Continue every prompt (text or token ids), at most `max_batch` at a time; the order is kept.

        Raises: RequestError on a prompt that is empty, too long, or outside the vocabulary.
        """
        requests = [self._request(prompt, params or SamplingParams(), i) for i, prompt in enumerate(prompts)]
        done: dict[int, Completion] = {}
        for emission in self._decode(requests):
            if emission.sequence.finish_reason is not None:
                done[emission.sequence.request.index] = emission.sequence.complete(self.tokenizer)
        return [done[i] for i in range(len(requests))]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[StreamEvent]:
        """Continue one prompt and hand out the tokens of every step as they come; closing the iterator stops it."""
        text = Detokenizer(self.tokenizer)
        for emission in self._decode([self._request(prompt, params or SamplingParams(), 0)]):
            sequence, tokens = emission.sequence, emission.token_ids
            hidden = int(sequence.finish_reason == "stop")
            pieces = [text.push(token) for token in tokens[: len(tokens) - hidden]] + [""] * hidden
            if sequence.finish_reason is not None:
                pieces[-1] += text.flush()
            yield StreamEvent(
                token_ids=tuple(tokens),
                pieces=tuple(pieces),
                drafted=tuple(place if place < emission.num_drafted else None for place in range(len(tokens))),
                completion=None if sequence.finish_reason is None else sequence.complete(self.tokenizer),
            )

    def with_drafts(self, draft_heads: int | str, *, uniform_steps: bool | None = None) -> Engine:
        """The same model and options, drafting with another number of heads; shares the weights."""
        other = copy.copy(self)
        other.draft_heads = _checked_heads(draft_heads, self.config.num_mtp_heads)
        other.uniform_steps = self.uniform_steps if uniform_steps is None else uniform_steps
        return other

    def _request(self, prompt: Prompt, params: SamplingParams, index: int) -> Request:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("prompt is text but the engine has no tokenizer; pass token ids or tokenizer=...")
            prompt = self.tokenizer.encode(prompt)
        config, ids = self.config, tuple(prompt)
        if not ids:
            raise RequestError(f"prompt {index} has no tokens; give at least one")
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            raise RequestError(f"prompt {index} has token ids outside the vocabulary of {config.vocab_size}")
        if len(ids) >= config.max_positions:
            raise RequestError(
                f"prompt {index} has {len(ids)} tokens; the model has {config.max_positions} positions, so shorten it"
            )
        if params.routed_experts and config.num_moe_layers == 0:
            raise RequestError("routed_experts=True, but this model has no sparse layers")
        return Request(prompt_ids=ids, params=params, index=index)

    def _sequence(self, request: Request, num_drafts: int) -> RunningSequence:
        params = request.params
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids.update(self.config.eos_token_ids, () if self.tokenizer is None else self.tokenizer.eos_token_ids)
        limit = min(params.max_tokens, self.config.max_positions - len(request.prompt_ids))
        return RunningSequence(request, limit=limit, stop_ids=frozenset(stop_ids), num_drafts=num_drafts)

    def _decode(self, requests: Sequence[Request]) -> Iterator[_Emission]:
        """All steps of all requests, which share their options.

        The number of rows never changes: a row whose sequence is finished takes the next request, or idles.
        """
        if not requests:
            return
        params = requests[0].params
        num_drafts = self.draft_heads if params.greedy else 0
        widest = self.config.num_mtp_heads if params.greedy and self.uniform_steps else num_drafts
        waiting = deque(self._sequence(request, num_drafts) for request in requests)
        rows: list[RunningSequence] = []
        batch = self.runner.open_batch(
            min(self.max_batch, len(requests)), num_drafts=num_drafts, step_tokens=1 + widest
        )
        for row in range(min(self.max_batch, len(requests))):
            yield from self._fill_row(batch, row, waiting, rows)
        while any(sequence.finish_reason is None for sequence in rows):
            yield from self._step(batch, rows, num_drafts)
            for row, sequence in enumerate(rows):
                if sequence.finish_reason is not None and waiting:
                    yield from self._fill_row(batch, row, waiting, rows)

    def _fill_row(
        self, batch: RunningBatch, row: int, waiting: deque[RunningSequence], rows: list[RunningSequence]
    ) -> Iterator[_Emission]:
        """Start waiting sequences in a row until one of them goes on after its first token."""
        while waiting:
            sequence = waiting.popleft()
            params = sequence.request.params
            logits_BTV = batch.prefill(row, list(sequence.request.prompt_ids))[None, None]
            choices_BT, logprobs_BT = _choose(logits_BTV, [sequence])
            rows[row : row + 1] = [sequence]
            if logprobs_BT is not None:
                sequence.logprobs.append(float(logprobs_BT))
            if params.routed_experts:
                sequence.routes.append(batch.routed_experts[0].cpu().numpy())
            yield _Emission(sequence, sequence.take_first(int(choices_BT)), 0)
            if sequence.finish_reason is None:
                return

    def _step(self, batch: RunningBatch, rows: list[RunningSequence], num_drafts: int) -> Iterator[_Emission]:
        """Propose, verify and commit once for all rows."""
        params = rows[0].request.params
        window_BT = batch.propose(torch.tensor([sequence.token_ids[-1] for sequence in rows]))
        choices_BT, logprobs_BT = _choose(batch.verify(window_BT), rows)
        kept_B = count_kept(window_BT, choices_BT, num_drafts)
        running_B = torch.tensor([sequence.finish_reason is None for sequence in rows], device=kept_B.device)
        batch.commit(kept_B * running_B)
        routes = batch.routed_experts.cpu().numpy() if params.routed_experts else None
        logprobs = None if logprobs_BT is None else logprobs_BT.tolist()
        choices, kept = choices_BT.tolist(), kept_B.tolist()
        for row, sequence in enumerate(rows):
            if sequence.finish_reason is not None:
                continue
            if logprobs is not None:
                sequence.logprobs += logprobs[row][: kept[row]]
            if routes is not None:
                sequence.routes.append(routes[row, : kept[row]])
            yield _Emission(sequence, sequence.take_step(choices[row][: kept[row]]), kept[row] - 1)


def resolve_model_folder(path: str | Path) -> Path:
    """The folder that holds the checkpoint: `path` itself, or `path/model` of a run folder."""
    folder = Path(path)
    inner = folder / "model"
    return inner if not (folder / "config.json").is_file() and (inner / "config.json").is_file() else folder


def _choose(logits_BTV: Tensor, rows: list[RunningSequence]) -> tuple[Tensor, Tensor | None]:
    """The next token after every position, and its log-probability when it is wanted. Shapes: (B, T)."""
    params = rows[0].request.params
    if params.greedy:
        choices_BT = choose_greedy(logits_BTV)
        return choices_BT, logprobs_of(logits_BTV, choices_BT) if params.logprobs else None
    uniform_B = torch.tensor(
        [sequence.next_uniform for sequence in rows], dtype=torch.float64, device=logits_BTV.device
    )
    tokens_B, logprobs_B = sample(logits_BTV[:, 0], params, uniform_B)
    return tokens_B[:, None], logprobs_B[:, None] if params.logprobs else None


def _checked_heads(draft_heads: int | str, available: int) -> int:
    if draft_heads == "auto":
        return available
    if not isinstance(draft_heads, int) or not 0 <= draft_heads <= available:
        raise RequestError(
            f"draft_heads={draft_heads!r}, but the model has {available} MTP heads; pass 'auto' or 0 to {available}"
        )
    return draft_heads


def _load_model(folder: Path, dtype: str, verify: bool) -> MiMoModel:
    # `load_model` refuses other words.
    return load_model(folder, dtype=cast(LoadDtype, dtype), verify=verify)


def _load_tokenizer(folder: Path) -> TextCodec | None:
    """The tokenizer beside the weights; None for a folder without one, which then takes token ids only."""
    return Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
