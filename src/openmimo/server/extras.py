"""What a choice carries on request beyond OpenAI's fields: token ids and the experts that answered."""

from __future__ import annotations

import base64
from typing import Any

from openmimo.engine import Completion
from openmimo.server.sampling import SamplingFields


def extras_of(completion: Completion, body: SamplingFields) -> dict[str, Any]:
    """Under vLLM's name `token_ids`; routes as base64 of the array with its shape and type, in row order."""
    extras: dict[str, Any] = {}
    if body.return_token_ids and not body.stream:
        extras["token_ids"] = list(completion.token_ids)
    routes = completion.routed_experts
    if routes is not None:
        extras["routed_experts"] = {
            "shape": list(routes.shape),
            "dtype": str(routes.dtype),
            "data": base64.b64encode(routes.tobytes()).decode("ascii"),
        }
    return extras
