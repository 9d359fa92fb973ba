"""`quantization_config`: the one number format that quantised checkpoints of this architecture have."""

from __future__ import annotations

from dataclasses import dataclass

from openmimo.config.fields import Fields, Fixed, Json
from openmimo.config.model import ModelConfig
from openmimo.errors import ConfigError

KEY = "quantization_config"

_FIXED: dict[str, Fixed] = {
    "quant_method": Fixed(("fp8",), "weights are FP8 in blocks"),
    "fmt": Fixed(("e4m3",), "weights are E4M3"),
    "activation_scheme": Fixed(("dynamic",), "no activation scales are stored"),
    "weight_block_size": Fixed(([128, 128],), "there is one scale per 128 x 128 block"),
    "scale_fmt": Fixed(("float",), "scales are fp32", written=False),
    "expert_dtype": Fixed(("fp8",), "experts are E4M3 too", written=False),
    "modules_to_convert": Fixed((None,), "embeddings stay in bfloat16", written=False),
}
_IGNORED = {"dequantize": "decided when loading"}
_REQUIRED = ("quant_method", "weight_block_size")
_NAME_LISTS = ("ignored_layers", "modules_to_not_convert")


@dataclass(frozen=True, kw_only=True)
class Fp8Quantization:
    """Weights in E4M3 with one scale per 128 x 128 block; `ignored_layers` names the linear layers left in bfloat16.

    Activations are quantised while running, so nothing is stored about them.
    """

    ignored_layers: tuple[str, ...] = ()

    @staticmethod
    def of_model(config: ModelConfig) -> Fp8Quantization:
        """What the published checkpoint leaves in bfloat16; its last name means the MTP heads' projections."""
        names = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(config.num_layers)]
        return Fp8Quantization(ignored_layers=(*names, "model.decoder.self_attn.o_proj"))

    def to_json(self) -> Json:
        """The value of `quantization_config`."""
        written = {key: rule.allowed[0] for key, rule in _FIXED.items() if rule.written}
        return {**written, "weight_block_size": [128, 128], "ignored_layers": list(self.ignored_layers)}


def read_quantization(fields: Fields) -> Fp8Quantization | None:
    """The number format, None without the key. Raises: ConfigError for any format but FP8 in 128 x 128 blocks."""
    table = fields.optional_table(KEY)
    if table is None:
        return None
    parts = Fields(table, prefix=f"{KEY}.")
    for key in _REQUIRED:
        parts.get(key)
    parts.fixed(_FIXED)
    lists = {parts.names(key) for key in _NAME_LISTS if key in parts}
    if len(lists) > 1:
        raise ConfigError(f"{KEY} has different lists in {' and '.join(_NAME_LISTS)}; remove one of them")
    parts.finish(_IGNORED)
    return Fp8Quantization(ignored_layers=lists.pop() if lists else ())
