"""Sampling options of requests, under the names that OpenAI's, vLLM's and SGLang's clients use."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from openmimo.engine import Constraint, SamplingParams
from openmimo.server.errors import bad_request
from openmimo.server.options import ServerOptions

MAX_STOP_CHARACTERS = 1024
MAX_BIASES = 1024
INT64 = 2**63

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Body(BaseModel):
    """A request's JSON object: types are taken literally, and what is not known is refused by name."""

    model_config = ConfigDict(strict=True, extra="forbid")


class SamplingFields(Body):
    """What the completion and chat routes have in common. None means the server's default."""

    model: str | None = Field(default=None, max_length=512)
    temperature: float | None = Field(default=None, ge=0.0, le=10.0)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10.0)
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = Field(
        default=None, max_length=MAX_BIASES
    )
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64)
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=128)
    ignore_eos: bool | None = None
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    n: int | None = Field(default=None, ge=1, lt=2**31)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # This server's own.
    draft_heads: int | Literal["auto"] | None = None
    return_token_ids: bool | None = None
    return_routed_experts: bool | None = None
    token_events: bool | None = None
    # Taken and not needed: names for a caller's own bookkeeping.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


def sampling_params(
    body: SamplingFields,
    options: ServerOptions,
    *,
    room: int,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: bool = False,
    constraint: Constraint | None = None,
    stop: tuple[str, ...] | None = None,
) -> SamplingParams:
    """The engine's options. `room` is how many tokens fit behind the prompt; `logprobs` counts the wanted alternatives.

    `stop` takes the place of the body's own texts.

    Raises: ApiError 400 that names the parameter.
    """
    n = body.n or 1
    if n > options.max_choices:
        raise bad_request(f"n is {n}; this server writes at most {options.max_choices} answers", param="n")
    if max_tokens is not None and max_tokens > room:
        raise bad_request(
            f"max_tokens is {max_tokens}, but behind this prompt there is room for {room} tokens; ask for fewer",
            param="max_tokens",
            code="context_length_exceeded",
        )
    top_p = options.top_p if body.top_p is None else body.top_p
    return SamplingParams(
        temperature=options.temperature if body.temperature is None else body.temperature,
        # 0 keeps the most probable token alone, as the smallest share does.
        top_p=max(top_p, 1e-9),
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_biases(body.logit_bias or {}),
        max_tokens=max(1, min(options.max_tokens, room) if max_tokens is None else max_tokens),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        stop=stop_texts(body.stop, options, param="stop") if stop is None else stop,
        ignore_eos=bool(body.ignore_eos),
        seed=body.seed,
        n=n,
        logprobs=logprobs is not None,
        top_logprobs=logprobs or 0,
        routed_experts=bool(body.return_routed_experts),
        prompt_logprobs=prompt_logprobs,
        constraint=constraint,
    )


def stop_texts(stop: str | list[str] | None, options: ServerOptions, *, param: str) -> tuple[str, ...]:
    """Texts that end the answer; empty ones are left out. Raises: ApiError 400 for too many or too long ones."""
    texts = tuple(text for text in ([stop] if isinstance(stop, str) else stop or ()) if text)
    if len(texts) > options.max_stop or any(len(text) > MAX_STOP_CHARACTERS for text in texts):
        raise bad_request(
            f"{param} has {len(texts)} texts; at most {options.max_stop} of {MAX_STOP_CHARACTERS} characters are taken",
            param=param,
        )
    return texts


def _biases(given: dict[str, float]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, value in given.items():
        if not key.isascii() or not key.isdecimal() or len(key) > 10:
            raise bad_request(f"logit_bias has the key {key[:40]!r}; keys are token ids", param="logit_bias")
        biases[int(key)] = value
    return biases


SamplingFields.model_rebuild()
