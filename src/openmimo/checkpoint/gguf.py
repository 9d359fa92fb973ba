"""Export to GGUF, the file format of llama.cpp: tensor names, hyper-parameters and the tokenizer of its `mimo2`.

llama.cpp keeps one fused q/k/v matrix per layer (its MTP blocks take no other form) and all experts of a layer
stacked. An MTP head is a block behind the main ones, with its extra tensors under `nextn`. The window counts the
query's own key there too, so `window_keys` is written as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor

from openmimo.checkpoint.convert import CheckpointSource
from openmimo.checkpoint.gguf_file import BLOCK, GgufFormat, GgufTensor, GgufValue, write_gguf_file
from openmimo.checkpoint.load import open_checkpoint
from openmimo.checkpoint.names import HubTensor, hub_tensors
from openmimo.checkpoint.save import ModelSource, TensorSource
from openmimo.config.model import AttentionKind, ModelConfig
from openmimo.config.tensor_names import mtp_head_index
from openmimo.errors import CheckpointError, ConfigError, nearest
from openmimo.model.model import MiMoModel
from openmimo.text import Tokenizer
from openmimo.text.byte_level import SPLIT_PATTERN

GgufDtype = Literal["float32", "bfloat16", "q8_0"]

ARCHITECTURE = "mimo2"
_FILE_TYPES: Mapping[GgufDtype, int] = {"float32": 0, "bfloat16": 32, "q8_0": 7}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# What follows "model.layers.<i>." or "model.mtp.layers.<i>.", with the number of an expert left out.
_BLOCK_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_qkv.weight",
    "self_attn.k_proj.weight": "attn_qkv.weight",
    "self_attn.v_proj.weight": "attn_qkv.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.attention_sink_bias": "attn_sinks.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "pre_mlp_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.gate_proj.weight": "ffn_gate_exps.weight",
    "mlp.experts.up_proj.weight": "ffn_up_exps.weight",
    "mlp.experts.down_proj.weight": "ffn_down_exps.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "final_layernorm.weight": "nextn.shared_head_norm.weight",
}


def save_gguf(
    model: MiMoModel, path: str | Path, *, dtype: GgufDtype = "bfloat16", tokenizer: Tokenizer | None = None
) -> None:
    """Write a model as one GGUF file, MTP heads included.

    `q8_0` and `bfloat16` apply to matrices; routers, norms, sinks and biases stay float32, and a matrix whose rows
    are no multiple of 32 stays bfloat16 in `q8_0`. Without a tokenizer the file works with token ids only.
    Raises: ConfigError if llama.cpp cannot compute this model, CheckpointError if the file cannot be written.
    """
    _write(Path(path), model.config, ModelSource(model), dtype, tokenizer)


def convert_to_gguf(
    source: str | Path, target: str | Path, *, dtype: GgufDtype = "bfloat16", verify: bool = False
) -> None:
    """Write a checkpoint folder of any layout as one GGUF file, with the folder's tokenizer if it has one.

    Raises: as `save_gguf`, and CheckpointError on a damaged source.   Cost: memory of one tensor of the source.
    """
    source, target = Path(source), Path(target)
    if target.is_dir():
        raise CheckpointError(f"{str(target)!r} is a folder; a GGUF is one file, so name that: {target / 'model.gguf'}")
    tokenizer = Tokenizer.load(source) if (source / "tokenizer.json").is_file() else None
    with open_checkpoint(source, verify=verify) as checkpoint:
        _write(target, checkpoint.config, CheckpointSource(checkpoint), dtype, tokenizer)


def _write(
    path: Path, config: ModelConfig, source: TensorSource, dtype: GgufDtype, tokenizer: Tokenizer | None
) -> None:
    if dtype not in _FILE_TYPES:
        raise CheckpointError(f"cannot write {dtype!r} as GGUF; {nearest(dtype, _FILE_TYPES)}")
    _check_expressible(config)
    metadata = _hyper_parameters(config, dtype) | _vocabulary(config, tokenizer)
    write_gguf_file(path, metadata, list(_tensors(config, source, dtype)))


def _check_expressible(config: ModelConfig) -> None:
    """Refuse what `mimo2` computes in one way only; llama.cpp would run it and give other logits."""
    kinds = tuple(map(config.attention, AttentionKind))
    problems = {
        "one QK and one V head size for all layers": len({(kind.qk_head_dim, kind.v_head_dim) for kind in kinds}) > 1,
        "at least one sliding layer": AttentionKind.SLIDING not in config.layer_kinds,
        "normalize_weights=True": config.moe is not None and not config.moe.normalize_weights,
        "routed_scaling=1": config.moe is not None and config.moe.routed_scaling != 1.0,
        "a value_scale other than 0": config.value_scale == 0,
    }
    wrong = [need for need, violated in problems.items() if violated]
    if wrong:
        raise ConfigError(f"llama.cpp cannot compute this model; it needs {' and '.join(wrong)}")


def _hyper_parameters(config: ModelConfig, dtype: GgufDtype) -> dict[str, GgufValue]:
    blocks = (*config.layer_kinds, *(AttentionKind.SLIDING,) * config.num_mtp_heads)
    window = config.sliding_attention.window_keys
    assert window is not None  # checked by ModelConfig
    values: dict[str, GgufValue] = {
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": len(blocks),
        "feed_forward_length": config.dense_dim,
        "vocab_size": config.vocab_size,
        "attention.head_count": [config.attention(kind).num_heads for kind in blocks],
        "attention.head_count_kv": [config.attention(kind).num_kv_heads for kind in blocks],
        "attention.key_length": config.global_attention.qk_head_dim,
        "attention.value_length": config.global_attention.v_head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "attention.sliding_window": window,
        "attention.sliding_window_pattern": [int(kind is AttentionKind.SLIDING) for kind in blocks],
        "attention.value_scale": float(config.value_scale),
        "rope.dimension_count": config.rotary_dim(AttentionKind.GLOBAL),
        "rope.freq_base": float(config.global_attention.rope_theta),
        "rope.freq_base_swa": float(config.sliding_attention.rope_theta),
        "nextn_predict_layers": config.num_mtp_heads,
        "expert_feed_forward_length": config.moe.expert_dim if config.moe else 0,
    }
    if config.moe is not None:
        values["expert_count"] = config.moe.num_experts
        values["expert_used_count"] = config.moe.num_experts_per_token
    general: dict[str, GgufValue] = {
        "general.architecture": ARCHITECTURE,
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": 2,
    }
    return general | {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}


def _tensors(config: ModelConfig, source: TensorSource, dtype: GgufDtype) -> Iterator[GgufTensor]:
    parts: dict[str, list[HubTensor]] = {}
    for tensor in hub_tensors(config):
        for name in _gguf_names(tensor, config):
            parts.setdefault(name, []).append(tensor)
    for name, tensors in parts.items():
        first = tensors[0]
        if first.expert is None:
            shape = (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:])
        else:
            shape = (len(tensors), *first.shape)
        yield GgufTensor(name=name, shape=shape, format=_format(first, dtype), read=_reader(source, tensors))


def _reader(source: TensorSource, tensors: list[HubTensor]) -> Callable[[], Iterable[Tensor]]:
    def read() -> Iterable[Tensor]:
        return (source.read(tensor) for tensor in tensors)

    return read


def _gguf_names(tensor: HubTensor, config: ModelConfig) -> list[str]:
    """Where a tensor goes: one place, or two for an embedding that is the output head as well."""
    if tensor.name in _TOP_NAMES:
        tied = config.tie_embeddings and tensor.name == "model.embed_tokens.weight"
        return [_TOP_NAMES[tensor.name], *(["output.weight"] if tied else [])]
    match = re.fullmatch(r"model\.(?:mtp\.)?layers\.(\d+)\.(.*)", tensor.name)
    assert match is not None, tensor.name
    head = mtp_head_index(tensor.name)
    block = int(match[1]) if head is None else config.num_layers + head
    suffix = re.sub(r"\.experts\.\d+\.", ".experts.", match[2])
    return [f"blk.{block}.{_BLOCK_NAMES[suffix]}"]


def _format(tensor: HubTensor, dtype: GgufDtype) -> GgufFormat:
    if tensor.fp32 or len(tensor.shape) < 2:
        return "float32"
    return "bfloat16" if dtype == "q8_0" and tensor.shape[-1] % BLOCK else dtype


def _vocabulary(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, GgufValue]:
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    pieces, types = _pieces(tokenizer, config.vocab_size)
    merges = cast("list[str | list[str]]", tokenizer.definition["model"]["merges"])
    eos = tokenizer.eos_token_ids or config.eos_token_ids
    values: dict[str, GgufValue] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.add_bos_token": False,
    }
    if eos:
        values["tokenizer.ggml.eos_token_id"] = eos[0]
    if tokenizer.chat_template:
        values["tokenizer.chat_template"] = tokenizer.chat_template
    return values


def _pieces(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    """Every id's text and type. llama.cpp wants one for each row of the embedding."""
    if SPLIT_PATTERN not in _split_patterns(tokenizer.definition.get("pre_tokenizer")):
        raise CheckpointError("the tokenizer splits text by another rule than MiMo's, which llama.cpp calls 'qwen2'")
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only {vocab_size}; use the model's own"
        )
    pieces, types = [f"[UNUSED{i}]" for i in range(vocab_size)], [_UNUSED] * vocab_size
    for piece, token in cast("dict[str, int]", tokenizer.definition["model"]["vocab"]).items():
        pieces[token], types[token] = piece, _NORMAL
    for added in tokenizer.added_tokens:
        pieces[added.token_id], types[added.token_id] = added.name, _CONTROL if added.special else _USER_DEFINED
    return pieces, types


def _split_patterns(pre_tokenizer: Any) -> list[str]:
    if not isinstance(pre_tokenizer, dict):
        return []
    node = cast("dict[str, Any]", pre_tokenizer)
    if node.get("type") == "Sequence":
        return [pattern for child in node.get("pretokenizers", []) for pattern in _split_patterns(child)]
    pattern = node.get("pattern")
    return [cast("dict[str, str]", pattern).get("Regex", "")] if isinstance(pattern, dict) else []
