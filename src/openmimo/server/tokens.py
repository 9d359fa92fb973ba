"""Models, tokens and templates: what clients ask about before they ask the model."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from openmimo.engine import PAGE_TOKENS
from openmimo.errors import TextError
from openmimo.server.errors import bad_request
from openmimo.server.http import JsonAnswer, read_model, unless_gone
from openmimo.server.openai_chat import TemplateOptions
from openmimo.server.sampling import Body, TokenId
from openmimo.server.service import Service
from openmimo.text.messages import read_messages


class TokenizeBody(Body):
    """A text, or a conversation, in vLLM's layout."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1, max_length=10_000)
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[TokenId] = Field(max_length=1 << 20)


def model_card(service: Service) -> dict[str, Any]:
    """An entry of the list of models."""
    name, config = service.options.model_name, service.config
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "openmimo",
        "root": name,
        "parent": None,
        "max_model_len": service.max_tokens,
        "meta": {
            "vocab_size": config.vocab_size,
            "num_layers": config.num_layers,
            "num_sparse_layers": config.num_moe_layers,
            "num_experts": config.moe.num_experts if config.moe else 0,
            "experts_per_token": config.moe.num_experts_per_token if config.moe else 0,
            "layer_kinds": [kind.value for kind in config.layer_kinds],
            "draft_heads": service.engine.draft_heads,
            "window_keys": config.sliding_attention.window_keys,
            "page_tokens": PAGE_TOKENS,
            "page_bytes": service.engine.runner.page_bytes,
            "ring_bytes": service.engine.runner.row_bytes,
        },
    }


async def list_models(service: Service, request: Request) -> Response:
    """The one model."""
    return JsonAnswer({"object": "list", "data": [model_card(service)]})


async def get_model(service: Service, request: Request) -> Response:
    """One model by name."""
    service.check_model(request.path_params["name"])
    return JsonAnswer(model_card(service))


async def tokenize(service: Service, request: Request) -> Response:
    """Ids of a text, or of a conversation as the template writes it."""
    body = await read_model(request, TokenizeBody)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages", param="prompt")
    if body.prompt is not None:
        ids = await unless_gone(request, service.encode(body.prompt))
    else:
        kwargs = body.chat_template_kwargs
        thinking = bool(kwargs and kwargs.enable_thinking)
        try:
            messages = read_messages(body.messages or ())
        except TextError as error:
            raise bad_request(str(error), param="messages") from error
        asks = body.add_generation_prompt is not False
        work = service.render(messages, tools=body.tools, thinking=thinking, add_generation_prompt=asks)
        ids = await unless_gone(request, work)
    strings = [service.tokenizer.decode([token]) for token in ids] if body.return_token_strs else None
    return JsonAnswer({"count": len(ids), "max_model_len": service.max_tokens, "tokens": ids, "token_strs": strings})


async def detokenize(service: Service, request: Request) -> Response:
    """The text of ids."""
    body = await read_model(request, DetokenizeBody)
    service.check_model(body.model)
    return JsonAnswer({"prompt": service.tokenizer.decode(body.tokens)})
