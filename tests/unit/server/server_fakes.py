"""A live server on a free port with a small random model, and a model that writes what a test wants."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from openmimo.config.model import preset
from openmimo.engine import Engine
from openmimo.model import build_model
from openmimo.server.app import create_app
from openmimo.server.guard import Guard
from openmimo.server.options import ServerOptions
from openmimo.server.run import make_server
from openmimo.server.service import Service
from openmimo.text import Tokenizer, train_tokenizer

WORDS = ("the", "weather", "in", "Paris", "is", "fine", "and", "warm", "<tool_call>", "function=", "parameter=", "{}")


def small_tokenizer() -> Tokenizer:
    texts = [f"{first} {second} {number}\n" for first in WORDS for second in WORDS for number in range(8)]
    return train_tokenizer(texts, vocab_size=352)


def small_engine(tokenizer: Tokenizer, **options: Any) -> Engine:
    """Nano with random weights."""
    config = preset("nano").replace(vocab_size=tokenizer.vocab_size, max_positions=1024)
    return Engine(build_model(config, seed=0), tokenizer=tokenizer, **{"max_batch": 8, "threads": 1, **options})


@dataclass
class LiveServer:
    """A server that listens."""

    url: str
    app: Guard
    service: Service

    def post(self, path: str, body: object, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def wait_until_idle(self) -> None:
        """Until nothing is open, in the loop and in the engine."""
        worker = self.service.worker
        end = time.monotonic() + 20
        while worker.num_open or self.service.engine.has_work:
            assert time.monotonic() < end, "requests are left over"
            time.sleep(0.005)


@contextmanager
def serving(engine: Engine, **options: Any) -> Iterator[LiveServer]:
    """Serve an engine until the end of the block."""
    settings = ServerOptions(**{"port": 0, "drain_seconds": 1.0, **options})
    app = create_app(engine, settings)
    assert isinstance(app, Guard)
    server = make_server(app, settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < end
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield LiveServer(f"http://127.0.0.1:{port}", app, app.app.state.service)  # type: ignore[attr-defined]
    finally:
        server.should_exit = True
        thread.join()
