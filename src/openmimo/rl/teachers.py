"""Teachers by domain: checkpoint folders whose weights take turns in one model.

A teacher reads the student's tokens with experts of its own choice: it never replays the student's.
Suffixes: B rows, T tokens of a row, N answer tokens, V vocabulary, K the teacher's most probable tokens.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from openmimo.checkpoint import load_model
from openmimo.config.io import read_model_config
from openmimo.config.rl import OWN_START, Signal, TeacherRecipe
from openmimo.engine.loading import resolve_model_folder
from openmimo.errors import TrainingError
from openmimo.model import MiMoModel, cast_model
from openmimo.rl.batching import MicroBatch
from openmimo.rl.logprobs import scaled_logits, token_logprobs
from openmimo.text import Tokenizer

# Teachers beyond the one in use are kept while all together are below this.
KEPT_BYTES = 256 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TeacherView:
    """What a teacher says about the tokens of a micro-batch, on the student's own path.

    `logprobs_N` are those of the sampled tokens. `top_NK` and `ids_NK` are the log-probabilities and ids of its most
    probable tokens, `full_NV` all of them; each only where the signal needs it.
    """

    logprobs_N: Tensor
    top_NK: Tensor | None = None
    ids_NK: Tensor | None = None
    full_NV: Tensor | None = None


class Teachers:
    """All teachers of a run. Peak memory is one teacher, and those that fit into KEPT_BYTES.

    Raises: TrainingError for a teacher with another tokenizer or vocabulary than the student's.
    """

    def __init__(
        self,
        recipes: Sequence[TeacherRecipe],
        *,
        start: Path,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.dtype, self.device = dtype, device
        start = resolve_model_folder(start)
        self.folders = {
            each.domain: start if each.folder == OWN_START else resolve_model_folder(each.folder) for each in recipes
        }
        self._loaded: OrderedDict[Path, MiMoModel] = OrderedDict()
        student = read_model_config(start)
        texts = Tokenizer.load(start)
        self.num_tokens = min(student.vocab_size, texts.vocab_size)
        for domain, folder in self.folders.items():
            config, tokenizer = read_model_config(folder), Tokenizer.load(folder)
            if config.vocab_size != student.vocab_size or tokenizer.definition != texts.definition:
                raise TrainingError(
                    f"the teacher of {domain!r} in {str(folder)!r} has another tokenizer than the student in "
                    f"{str(start)!r}; all must come from one base model"
                )

    def folder(self, domain: str) -> Path:
        """Raises: TrainingError for a domain that nobody teaches."""
        if domain not in self.folders:
            raise TrainingError(f"no teacher for domain {domain!r}; there are some for {sorted(self.folders)}")
        return self.folders[domain]

    @torch.no_grad()
    def view(self, domain: str, batch: MicroBatch, signal: Signal, top_k: int) -> TeacherView:
        """What the domain's teacher says about a micro-batch of that domain's answers."""
        model = self._model(self.folder(domain))
        output = model(batch.token_ids_BT, **batch.places())
        hidden_ND = model.norm(output.hidden_BTD.flatten(0, 1)[batch.rows_N])
        weight_VD = model.lm_head.weight[: self.num_tokens]
        if signal is Signal.SAMPLED:
            logprobs_N = token_logprobs(hidden_ND, weight_VD, batch.targets_N, batch.temperature_N).logprobs_N
            return TeacherView(logprobs_N=logprobs_N)
        full_NV = scaled_logits(hidden_ND, weight_VD, batch.temperature_N).log_softmax(-1)
        logprobs_N = full_NV.gather(1, batch.targets_N[:, None])[:, 0]
        if signal is Signal.FULL:
            return TeacherView(logprobs_N=logprobs_N, full_NV=full_NV)
        best = full_NV.topk(min(top_k, full_NV.shape[1]), dim=-1)
        return TeacherView(logprobs_N=logprobs_N, top_NK=best.values, ids_NK=best.indices)

    def _model(self, folder: Path) -> MiMoModel:
        if folder not in self._loaded:
            if self._loaded and self._num_bytes() + _model_bytes(next(iter(self._loaded.values()))) > KEPT_BYTES:
                self._loaded.clear()  # before the next one comes, so that there never are two
            model = cast_model(load_model(folder), self.dtype).to(self.device)
            self._loaded[folder] = model.requires_grad_(False)
        return self._loaded[folder]

    def _num_bytes(self) -> int:
        return sum(_model_bytes(model) for model in self._loaded.values())


def warn_about_origin(divergence: dict[str, float], limit: float) -> list[str]:
    """Domains whose teacher is further than `limit` nats per token from the student at the start, with a warning."""
    far = [domain for domain, value in divergence.items() if value > limit]
    for domain in far:
        _log.warning(
            "the teacher of %r is %.3f nats per token away from the student (more than %.3f): it may not come from the "
            "same base model, and distillation may be unstable; check its folder",
            domain,
            divergence[domain],
            limit,
        )
    return far


def _model_bytes(model: MiMoModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
