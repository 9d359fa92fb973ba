"""The same weights in the form that each bench target reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from openmimo import tasks
from openmimo.checkpoint.convert import convert
from openmimo.checkpoint.gguf import GgufDtype, convert_to_gguf
from openmimo.checkpoint.save import SaveDtype, save_model
from openmimo.config.io import CONFIG_NAME, read_config_file
from openmimo.config.model import preset, preset_names
from openmimo.engine import resolve_model_folder
from openmimo.evals.bench_target import TargetKind, Weights
from openmimo.model.model import build_model
from openmimo.text import ChatTemplate, Tokenizer

_SAVED: dict[Weights, SaveDtype] = {"float32": "float32", "bf16": "bfloat16", "int8": "bfloat16"}
_EXPORTED: dict[Weights, GgufDtype] = {"float32": "float32", "bf16": "bfloat16", "int8": "q8_0"}


def prepare_models(model: str, weights: Weights, kinds: Sequence[TargetKind], work_dir: Path) -> dict[TargetKind, Path]:
    """What each target opens, written into `work_dir` where it is not there yet.

    `model` is a preset, which gets random weights, or a checkpoint or run folder. A folder is read as it is;
    transformers gets it in its own layout, llama.cpp as GGUF. Raises: MimoError.
    """
    folder, name = _own_folder(model, weights, work_dir)
    paths: dict[TargetKind, Path] = {"openmimo": folder}
    if "transformers" in kinds:
        paths["transformers"] = folder
        if read_config_file(folder).layout != "native":
            paths["transformers"] = work_dir / f"{name}-{weights}-native"
            if not paths["transformers"].is_dir():
                convert(folder, paths["transformers"], layout="native", dtype=_SAVED[weights])
    if "llama.cpp" in kinds:
        paths["llama.cpp"] = work_dir / f"{name}-{weights}.gguf"
        if not paths["llama.cpp"].is_file():
            convert_to_gguf(folder, paths["llama.cpp"], dtype=_EXPORTED[weights])
    return paths


def domain_prompts(folder: Path, domains: Sequence[str], num_prompts: int) -> dict[str, list[list[int]]]:
    """Test problems of each domain as chats, for a model with a tokenizer. Raises: TaskError, TextError."""
    template = ChatTemplate(Tokenizer.load(folder))

    def render(domain: str, index: int) -> list[int]:
        problem = tasks.sample_problem(domain, split="test", level=1, seed=0, index=index)
        return template.render([{"role": "user", "content": problem.prompt}])

    return {domain: [render(domain, index) for index in range(num_prompts)] for domain in domains}


def _own_folder(model: str, weights: Weights, work_dir: Path) -> tuple[Path, str]:
    if model not in preset_names():
        folder = resolve_model_folder(model)
        return folder, folder.resolve().parent.name if folder.name == "model" else folder.resolve().name
    folder = work_dir / f"{model}-{_SAVED[weights]}"
    if not (folder / CONFIG_NAME).is_file():
        dtype = torch.float32 if weights == "float32" else torch.bfloat16
        save_model(build_model(preset(model), dtype=dtype), folder, layout="native", dtype=_SAVED[weights])
    return folder, model
