"""The page at `/`: files of this package, sent as they are."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources

from fastapi import Request
from starlette.responses import Response

from openmimo.server.errors import ApiError
from openmimo.server.service import Service

# What may be asked for, and what it is. Nothing else is read, whatever a path says.
FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "views.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    # Nothing from elsewhere, nothing inline but the widths of bars, no frames: what a model writes stays text.
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def index(service: Service, request: Request) -> Response:
    """The page."""
    return _file("index.html", service)


async def asset(service: Service, request: Request) -> Response:
    """A file that the page asks for."""
    return _file(request.path_params["name"], service)


def _file(name: str, service: Service) -> Response:
    if name not in FILES or not service.options.page:
        raise ApiError(404, f"there is no file {name[:40]!r} here")
    return Response(_content(name), media_type=FILES[name], headers=HEADERS)


@lru_cache
def _content(name: str) -> bytes:
    return resources.files("openmimo.server").joinpath("page", name).read_bytes()
