"""Convert a checkpoint folder to another layout or number format without holding the model in memory."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from openmimo.checkpoint.fp8 import Quantized, RankGrid
from openmimo.checkpoint.load import OpenCheckpoint, open_checkpoint
from openmimo.checkpoint.names import HubTensor
from openmimo.checkpoint.save import MAX_SHARD_BYTES, SaveDtype, write_checkpoint
from openmimo.config.hub import Layout
from openmimo.errors import CheckpointError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class CheckpointSource:
    """The tensors of an open checkpoint folder, read one at a time."""

    def __init__(self, checkpoint: OpenCheckpoint) -> None:
        self._checkpoint = checkpoint

    def read(self, tensor: HubTensor) -> Tensor:
        return self._checkpoint.reader.read(tensor, self._checkpoint.config)

    def quantized(self, tensor: HubTensor) -> tuple[Quantized, RankGrid | None] | None:
        return self._checkpoint.reader.quantized(tensor, self._checkpoint.config)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    layout: Layout = "hub",
    dtype: SaveDtype = "bfloat16",
    verify: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Read `source` in any layout and number format and write `target`; tokenizer files come along.

    FP8 to FP8 keeps bytes and scales where both layouts use the same grid. Any other step goes through float32.
    Raises: CheckpointError, ConfigError.   Cost: peak memory is two shards.
    """
    source, target = Path(source), Path(target)
    if target.exists() and source.exists() and target.samefile(source):
        raise CheckpointError(f"source and target are both {str(source)!r}; choose another target")
    with open_checkpoint(source, verify=verify) as checkpoint:
        write_checkpoint(
            target,
            checkpoint.config,
            CheckpointSource(checkpoint),
            layout=layout,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            extra_files={name: source / name for name in TOKENIZER_FILES if (source / name).is_file()},
        )
