"""The MiMo-V2-Flash architecture: single device, no collectives, no globals."""

from openmimo.model.cache import Cache
from openmimo.model.model import MiMoModel, ModelOutput, build_model, cast_model, replicate_mtp_head

__all__ = ["Cache", "MiMoModel", "ModelOutput", "build_model", "cast_model", "replicate_mtp_head"]
