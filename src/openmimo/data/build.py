"""From the data part of a recipe to a loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from openmimo.data.documents import Encoder, TrainingTemplate
from openmimo.data.loader import BatchLoader
from openmimo.data.mixture import Mixture
from openmimo.data.packing import Packer, PackingMode
from openmimo.data.sources import Source, TaskSource, TextSource
from openmimo.errors import DataError, nearest

if TYPE_CHECKING:
    from openmimo.config.train import DataRecipe, SourceRecipe

STAGES = ("pretrain", "sft")
# Tokens of a text that are handled at once where documents may be cut anyway.
LONGEST_SPLIT_DOCUMENT = 8192


def build_loader(
    recipe: DataRecipe,
    tokenizer: Encoder,
    *,
    seed: int,
    stage: str,
    template: TrainingTemplate | None = None,
    cursor: Mapping[str, Any] | None = None,
    rank: int = 0,
    world_size: int = 1,
    prefetch: int = 2,
) -> BatchLoader:
    """The loader that a recipe describes, at its start or behind the batch whose cursor is given.

    Stage `pretrain`: plain text, every token a target, documents cut at row ends. Stage `sft`: conversations (which
    need `template`), the assistant's tokens targets, documents kept whole. The recipe's `packing` may say otherwise.

    Raises: DataError for an unknown stage or source kind, missing files, or a cursor of another recipe.
    """
    if stage not in STAGES:
        raise DataError(f"unknown stage {stage!r}: {nearest(stage, STAGES)}")
    if stage == "sft" and template is None:
        raise DataError("stage 'sft' renders conversations but got no chat template; pass `template`")
    whole = recipe.packing.value == "whole" or (recipe.packing.value == "auto" and stage == "sft")
    longest = recipe.sequence_length if whole else max(recipe.sequence_length, LONGEST_SPLIT_DOCUMENT)
    sources = [
        _build_source(source, tokenizer, seed=seed, stage=stage, template=template, max_tokens=longest)
        for source in recipe.sources
    ]
    mixture = Mixture(sources, [source.weight for source in recipe.sources])
    packer = Packer(
        recipe.sequence_length,
        recipe.batch_sequences,
        mode=PackingMode.WHOLE if whole else PackingMode.SPLIT,
    )
    return BatchLoader(mixture, packer, cursor=cursor, rank=rank, world_size=world_size, prefetch=prefetch)


def _build_source(
    recipe: SourceRecipe,
    tokenizer: Encoder,
    *,
    seed: int,
    stage: str,
    template: TrainingTemplate | None,
    max_tokens: int,
) -> Source:
    sft = stage == "sft"
    match recipe.kind:
        case "task":
            return TaskSource(
                recipe.domain,
                levels=recipe.levels,
                split=recipe.split,
                seed=seed,
                tokenizer=tokenizer,
                template=template if sft else None,
                task=recipe.task or None,
                guess_share=recipe.guess_share,
            )
        case "text":
            return TextSource(
                [recipe.path],
                seed=seed,
                tokenizer=tokenizer,
                template=template,
                assistant_only=sft,
                max_document_tokens=max_tokens,
            )
        case other:
            raise DataError(f"unknown source kind {other!r}: {nearest(str(other), ('task', 'text'))}")
