"""The application: routes over a service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp

import openmimo
from openmimo.engine import Engine, SamplingParams
from openmimo.errors import MimoError
from openmimo.server import admin, anthropic_messages, openai_chat, openai_completions, openai_responses, static, tokens
from openmimo.server.errors import ApiError, bad_request
from openmimo.server.guard import Guard, refusal_answer
from openmimo.server.http import GoneError, JsonAnswer
from openmimo.server.options import ServerOptions
from openmimo.server.service import Service

Handler = Callable[[Service, Request], Awaitable[Response]]

CANARY_SECONDS = 2.0  # a canary's answer counts for this long


def create_app(engine: Engine, options: ServerOptions | None = None) -> ASGIApp:
    """An ASGI application that serves `engine`. Raises: RequestError if the engine has no tokenizer."""
    service = Service(engine, options or ServerOptions())

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncGenerator[None]:
        service.open()
        yield
        await service.close()

    app = FastAPI(
        title="OpenMiMo", version=openmimo.__version__, lifespan=life, docs_url=None, redoc_url=None, openapi_url=None
    )
    routes = _Routes(app, service)
    routes.add("POST", "/v1/chat/completions", openai_chat.chat, openai_chat.ChatBody)
    routes.add("POST", "/v1/completions", openai_completions.complete, openai_completions.CompletionBody)
    routes.add("POST", "/v1/responses", openai_responses.respond, openai_responses.ResponsesBody)
    routes.add("POST", "/v1/messages", anthropic_messages.messages, anthropic_messages.MessagesBody)
    routes.add("POST", "/v1/messages/count_tokens", anthropic_messages.count_tokens, anthropic_messages.CountBody)
    routes.add("GET", "/v1/models", tokens.list_models)
    routes.add("GET", "/v1/models/{name}", tokens.get_model)
    routes.add("POST", "/tokenize", tokens.tokenize, tokens.TokenizeBody)
    routes.add("POST", "/detokenize", tokens.detokenize, tokens.DetokenizeBody)
    routes.add("GET", "/health", _health)
    routes.add("GET", "/ready", _Canary().answer)
    routes.add("GET", "/metrics", _metrics)
    routes.add("GET", "/load", _load)
    routes.add("GET", "/version", _version)
    if service.options.admin_key:
        routes.add("GET", "/admin/requests", admin.list_requests)
        routes.add("POST", "/admin/drain", admin.drain)
        routes.add("POST", "/admin/resume", admin.resume)
        routes.add("POST", "/admin/forget_prefixes", admin.forget_prefixes)
        routes.add("POST", "/admin/weights", admin.put_weights, admin.WeightsBody)
    routes.add("GET", "/", static.index)
    routes.add("GET", "/page/{name}", static.asset)
    routes.add("GET", "/openapi.json", lambda _, __: _now(JsonAnswer(routes.schema())))

    app.add_exception_handler(Exception, _refused)
    for kind in (MimoError, GoneError, ClientDisconnect, HTTPException):
        app.add_exception_handler(kind, _refused)
    app.state.service = service
    return Guard(app, service.options, service.metrics, refusal=service.worker.refusal)


async def _refused(request: Request, error: Exception) -> Response:
    """Any error in the shape that the route's clients expect; what is not ours is status 500."""
    match error:
        case ApiError():
            refusal = error
        case GoneError() | ClientDisconnect():
            return Response(status_code=499)
        case MimoError():
            refusal = bad_request(str(error))
        case HTTPException():
            refusal = ApiError(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}")
        case _:
            refusal = ApiError(500, "something went wrong here; the server's log has more")
    return refusal_answer(refusal, request.url.path)


class _Routes:
    """Adds routes; the models of bodies are there for the schema, the handlers read bodies themselves."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        self._app, self._service = app, service
        self._definitions: dict[str, Any] = {}

    def schema(self) -> dict[str, Any]:
        """The OpenAPI description of all routes."""
        found = self._app.openapi()
        found.setdefault("components", {}).setdefault("schemas", {}).update(self._definitions)
        return found

    def add(self, method: str, path: str, handler: Handler, body: type[BaseModel] | None = None) -> None:
        service = self._service

        async def endpoint(request: Request) -> Response:
            return await handler(service, request)

        extra: dict[str, Any] = {}
        if "{name" in path:
            extra["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        if body is not None:
            schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
            self._definitions |= schema.pop("$defs", {})
            if "model" in schema["properties"]:
                schema["properties"]["model"] = {"type": "string", "enum": [self._service.options.model_name]}
            extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        self._app.add_api_route(path, endpoint, methods=[method], openapi_extra=extra, name=path)


async def _now(response: Response) -> Response:
    return response


async def _health(service: Service, request: Request) -> Response:
    """Whether the process lives: it needs no key and does no work."""
    if service.worker.draining:
        raise ApiError(503, "the server is stopping", code="draining")
    if not service.worker.is_well:
        raise ApiError(503, "the engine does not work; restart the server", code="engine_failed")
    return JsonAnswer({"status": "ok"})


async def _load(service: Service, request: Request) -> Response:
    """How busy the engine is, and what its cache holds."""
    return JsonAnswer({**asdict(service.worker.load), "num_open": service.worker.num_open})


async def _version(service: Service, request: Request) -> Response:
    return JsonAnswer({"version": openmimo.__version__})


async def _metrics(service: Service, request: Request) -> Response:
    text = service.metrics.exposition(service.worker.load)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


class _Canary:
    """Whether the engine still writes: one short answer at a time, however many ask."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._at = -CANARY_SECONDS
        self._tokens: tuple[int, ...] = ()

    async def answer(self, service: Service, request: Request) -> Response:
        """The canary's tokens. Raises: ApiError 503 while the server stops, or if no answer comes."""
        await _health(service, request)
        async with self._lock:
            if time.monotonic() - self._at > CANARY_SECONDS:
                params = SamplingParams(max_tokens=4, ignore_eos=True)
                ticket = service.worker.submit(service.tokenizer.encode("ready?"), params, wants_steps=False)
                try:
                    answers = await asyncio.wait_for(service.worker.completions(ticket), 30.0)
                except TimeoutError as error:
                    raise ApiError(503, "the engine did not answer within 30 s", code="engine_stuck") from error
                self._tokens, self._at = answers[0].token_ids, time.monotonic()
        return JsonAnswer({"status": "ready", "canary": list(self._tokens)})
