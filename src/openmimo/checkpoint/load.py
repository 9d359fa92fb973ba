"""Load a checkpoint folder into a model: check every name and shape first, then fill tensor by tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from openmimo.checkpoint.coverage import check_coverage
from openmimo.checkpoint.manifest import verify_manifest
from openmimo.checkpoint.names import HubTensor
from openmimo.checkpoint.reader import CheckpointReader
from openmimo.config.model import ModelConfig
from openmimo.config.tensor_names import NO_HEADS, with_present_mtp_heads
from openmimo.errors import CheckpointError, nearest
from openmimo.model.model import MiMoModel

LoadDtype = Literal["float32", "bfloat16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenCheckpoint:
    """A folder whose tensors were found complete and of the right shapes."""

    config: ModelConfig
    tensors: tuple[HubTensor, ...]
    reader: CheckpointReader


def load_model(
    folder: str | Path, dtype: LoadDtype = "float32", *, verify: bool = False, device: str | torch.device = "cpu"
) -> MiMoModel:
    """Load a Hub or transformers-native checkpoint folder; FP8 ones are dequantised.

    Router weights and biases stay fp32. With `verify` every file is first checked against `manifest.json`.
    A checkpoint without any MTP tensors gives a model without MTP heads.
    Raises: CheckpointError on damaged, missing or unexpected tensors; ConfigError on an unusable config.json.
    Cost: peak memory is the model and one tensor of the files; `verify` reads the files twice.
    """
    if dtype not in _DTYPES:
        raise CheckpointError(f"cannot load as {dtype!r}; {nearest(dtype, _DTYPES)}")
    with open_checkpoint(Path(folder), verify=verify) as checkpoint:
        model = _materialize(checkpoint, _DTYPES[dtype], torch.device(device))
        state = model.state_dict()
        with torch.no_grad():
            for tensor in checkpoint.tensors:
                tensor.of(state[tensor.target]).copy_(checkpoint.reader.read(tensor, checkpoint.config))
    return model


@contextmanager
def open_checkpoint(folder: Path, *, verify: bool = False) -> Generator[OpenCheckpoint]:
    """Open a folder and compare its tensors with its configuration; allocates no weights.

    Raises: CheckpointError with the coverage report, ConfigError.
    """
    records = verify_manifest(folder) if verify else None
    with CheckpointReader(folder) as reader:
        unlisted = [name for name in reader.file_names if records is not None and name not in records]
        if unlisted:
            raise CheckpointError(f"manifest.json of {str(folder)!r} does not list {unlisted}; save the folder again")
        config = with_present_mtp_heads(reader.config_file.model, reader.names)
        if config.num_mtp_heads < reader.config_file.model.num_mtp_heads:
            _log.warning(NO_HEADS, folder)
        report = check_coverage(reader, config)
        if not report.complete:
            raise CheckpointError(
                f"the tensors in {str(folder)!r} do not fit its config.json; use the files that belong together\n"
                f"{report.describe()}"
            )
        keys = [tensor for tensor in report.loaded if tensor.pair is not None]
        if keys:
            reader.log_grid(keys[0], config)
        yield OpenCheckpoint(config, report.loaded, reader)


class _NoInitialization(TorchFunctionMode):
    """Skips the random initialisation of layers, whose meta versions load a compiler: 1.4 s and 70 MiB for nothing."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        return None if func in (nn.init.kaiming_uniform_, nn.init.normal_) else func(*args, **(kwargs or {}))


def _materialize(checkpoint: OpenCheckpoint, dtype: torch.dtype, device: torch.device) -> MiMoModel:
    """The model with memory for every parameter and buffer, not yet filled."""
    with torch.device("meta"), _NoInitialization():
        model = MiMoModel(checkpoint.config)
    in_fp32 = {tensor.target: tensor.fp32 for tensor in checkpoint.tensors}
    for prefix, module in model.named_modules():
        for name, meta in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            own_dtype = torch.float32 if in_fp32.get(f"{prefix}.{name}", False) else dtype
            memory = torch.empty(meta.shape, dtype=own_dtype, device=device)
            setattr(module, name, nn.Parameter(memory) if isinstance(meta, nn.Parameter) else memory)
    if model.config.tie_embeddings:  # the files have no head then
        model.lm_head.weight = model.embed_tokens.weight
    unfilled = model.state_dict().keys() - in_fp32.keys() - {"lm_head.weight"}
    assert not unfilled, f"no checkpoint tensor fills {sorted(unfilled)}"
    return model
