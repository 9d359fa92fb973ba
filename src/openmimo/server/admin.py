"""The /admin routes, which need the admin key: what is open, drain and resume, forget prefixes, other weights."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from openmimo.checkpoint import load_model
from openmimo.engine import resolve_model_folder
from openmimo.errors import MimoError
from openmimo.server.errors import bad_request
from openmimo.server.http import JsonAnswer, read_model
from openmimo.server.sampling import Body
from openmimo.server.service import Service


class WeightsBody(Body):
    """Where the weights are, on the server's machine; `version` is what they are called from now on."""

    folder: str = Field(min_length=1, max_length=4096)
    version: int | None = Field(default=None, ge=0, lt=2**31)


async def list_requests(service: Service, request: Request) -> Response:
    """Every open request: how old it is, and how long its prompt. Prompts themselves stay where they are."""
    now = time.monotonic()
    found = [
        {
            "request_id": ticket.request_id,
            "seconds": now - ticket.submitted_at,
            "prompt_tokens": len(ticket.prompt),
            "answers": ticket.num_choices,
            "finished": len(ticket.completions),
            "max_tokens": ticket.params.max_tokens,
            "streams": ticket.wants_steps,
        }
        for ticket in service.worker.open_tickets
    ]
    return JsonAnswer({"requests": sorted(found, key=lambda each: -float(each["seconds"]))})


async def drain(service: Service, request: Request) -> Response:
    """Take no new requests; those that are open go on. A balancer sees it at /ready and /health."""
    service.worker.draining = True
    return JsonAnswer({"draining": True, "num_open": service.worker.num_open})


async def resume(service: Service, request: Request) -> Response:
    """Take requests again. Raises: ApiError 400 where the server is on its way out."""
    if service.worker.closing:
        raise bad_request("the server has been told to stop; start it again")
    service.worker.draining = False
    return JsonAnswer({"draining": False, "num_open": service.worker.num_open})


async def forget_prefixes(service: Service, request: Request) -> Response:
    """Empty the prefix cache."""
    await service.worker.call(service.engine.clear_prefix_cache)
    return JsonAnswer({"prefixes": 0})


async def put_weights(service: Service, request: Request) -> Response:
    """Other weights of the same shape, between two steps; answers in progress go on under them.

    Raises: ApiError 400 for a folder that cannot be read or holds another model.
    """
    body = await read_model(request, WeightsBody)

    try:
        # One at a time: two models beside the engine's own might not fit.
        async with service.weights_lock:
            model = await asyncio.to_thread(lambda: load_model(resolve_model_folder(Path(body.folder))))
            version = await service.worker.call(lambda: service.engine.update_weights(model, version=body.version))
    except (MimoError, OSError) as error:
        raise bad_request(str(error), param="folder") from error
    return JsonAnswer({"version": version})
