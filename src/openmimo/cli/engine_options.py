"""Options of every command that opens an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelFolder = Annotated[Path, typer.Option(help="Checkpoint folder, or a run folder that holds one in model/.")]
DraftHeads = Annotated[str, typer.Option(help="Drafts per step: auto, or a number from 0.")]
Weights = Annotated[str, typer.Option(help="Weights in memory: bf16, float32, int8, int8_block, fp8 or int4.")]
Activations = Annotated[str, typer.Option(help="int8: multiply 8-bit weights in whole numbers; or auto.")]
CacheFormat = Annotated[str, typer.Option("--cache", help="int8: keys and values in half the memory; or auto.")]
RunnerName = Annotated[str, typer.Option(help="What computes: auto, native (C++) or torch.")]
Verify = Annotated[bool, typer.Option(help="Check the files against manifest.json first.")]
