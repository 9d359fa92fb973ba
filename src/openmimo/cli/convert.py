"""`openmimo convert`: change the layout or number format of a checkpoint folder, or export it for llama.cpp."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from openmimo.checkpoint.gguf import GgufDtype
    from openmimo.checkpoint.save import SaveDtype


class LayoutChoice(str, Enum):
    """Which reader the folder is for."""

    HUB = "hub"
    NATIVE = "native"
    GGUF = "gguf"


class DtypeChoice(str, Enum):
    """Number format of the weights."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FP8 = "fp8"
    Q8_0 = "q8_0"


def convert_command(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder to read: Hub or transformers layout.")],
    target: Annotated[
        Path, typer.Argument(help="Folder (gguf: file) to write; an existing one is replaced in one step.")
    ],
    layout: Annotated[
        LayoutChoice,
        typer.Option(help="hub: the published layout; native: the one of transformers; gguf: a file for llama.cpp."),
    ] = LayoutChoice.HUB,
    dtype: Annotated[
        DtypeChoice, typer.Option(help="Number format of the weights; gguf has no fp8, only gguf has q8_0.")
    ] = DtypeChoice.BFLOAT16,
    verify: Annotated[bool, typer.Option(help="Check the source against its manifest.json first.")] = False,
    max_shard_gib: Annotated[float, typer.Option(min=0.001, help="Largest weight file, in GiB.")] = 2.0,
) -> None:
    """Convert a checkpoint between layouts and number formats, tensor by tensor."""
    if layout is LayoutChoice.GGUF:
        from openmimo.checkpoint.gguf import convert_to_gguf

        convert_to_gguf(source, target, dtype=cast("GgufDtype", dtype.value), verify=verify)
    else:
        from openmimo.checkpoint.convert import convert

        convert(
            source,
            target,
            layout=layout.value,
            dtype=cast("SaveDtype", dtype.value),
            verify=verify,
            max_shard_bytes=int(max_shard_gib * 2**30),
        )
    typer.echo(f"wrote {target} ({layout.value}, {dtype.value})")
