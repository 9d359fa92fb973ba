"""What a server is told when it starts."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from openmimo.errors import RequestError

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Address, keys, defaults and limits of a server.

    With `api_key`, every route but /health asks for it; `admin_key` opens the /admin routes, which without one do not
    exist. `temperature`, `top_p`, `max_tokens` and `system_prompt` (None: the chat template's own) hold where a request
    says nothing. `max_waiting` answers may wait beside those that are written, further ones are refused; a stream that
    has `buffer_tokens` tokens unread is stopped. `allowed_hosts` are names by which clients may call the server,
    beside its own address, while it has no key.
    Raises: RequestError for a public address without a key, and values that make no sense.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    admin_key: str = ""
    model_name: str = "model"
    system_prompt: str | None = None
    temperature: float = 0.8
    top_p: float = 0.95
    max_tokens: int = 2048
    max_waiting: int = 256
    max_choices: int = 128
    max_stop: int = 16
    max_logprobs: int = 20
    max_body_bytes: int = 8 << 20
    max_grammar_bytes: int = 64 << 10
    buffer_tokens: int = 4096
    body_seconds: float = 30.0
    keep_alive_seconds: float = 15.0
    drain_seconds: float = 30.0
    allowed_hosts: tuple[str, ...] = ()
    page: bool = True

    def __post_init__(self) -> None:
        if not self.is_local and not self.api_key:
            raise RequestError(
                f"host {self.host!r} can be reached from outside and there is no API key; give one "
                "(--api-key or OPENMIMO_API_KEY), or bind to 127.0.0.1"
            )
        if self.admin_key and self.admin_key == self.api_key:
            raise RequestError("the admin key is the API key; give it a value of its own")
        for name in ("max_tokens", "max_choices", "max_stop", "max_body_bytes", "buffer_tokens"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_waiting < 0 or not 0 <= self.port < 65536:
            raise RequestError(f"max_waiting={self.max_waiting} must be 0 or more and port={self.port} below 65536")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host in LOCAL_NAMES:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
