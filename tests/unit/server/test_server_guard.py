"""What is refused before it costs anything: keys, names, sizes, bad bodies, and public addresses without a key."""

from __future__ import annotations

import base64
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
from server_fakes import LiveServer, serving, small_engine

from openmimo.errors import RequestError
from openmimo.server import run
from openmimo.server.options import ServerOptions
from openmimo.text import Tokenizer

USER, ADMIN = "user-key", "admin-key"
BAD_BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[1]",
    "bytes that are no text": b'{"prompt": "\xff"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinite": b'{"prompt": "a", "temperature": 1e999}',
    "a huge number": b'{"prompt": "a", "seed": ' + b"9" * 6000 + b"}",
    "too deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a key twice": b'{"prompt": "a", "prompt": "b"}',
    "half a character": b'{"prompt": "\\ud800"}',
    "text for a number": b'{"prompt": "a", "temperature": "1"}',
    "a truth for a number": b'{"prompt": "a", "max_tokens": true}',
    "no prompt": b"{}",
    "an empty prompt": b'{"prompt": ""}',
    "unknown ids": b'{"prompt": [1, 999999]}',
    "negative ids": b'{"prompt": [-1]}',
    "many prompts": json.dumps({"prompt": ["a"] * 2000}).encode(),
    "many answers": b'{"prompt": "a", "n": 1000}',
    "many stop texts": json.dumps({"prompt": "a", "stop": ["x"] * 100}).encode(),
    "bias for no token": b'{"prompt": "a", "logit_bias": {"a": 1}}',
    "bias beyond the vocabulary": b'{"prompt": "a", "logit_bias": {"99999": 1}}',
    "a penalty next to none": b'{"prompt": "a", "repetition_penalty": 1e-300}',
    "too many drafts": b'{"prompt": "a", "draft_heads": 9}',
    "not implemented": b'{"prompt": "a", "suffix": "b"}',
}


def all_routes(server: LiveServer) -> list[tuple[str, str]]:
    found = server.get("/openapi.json", headers={"x-api-key": USER}).json()["paths"]
    return [(method.upper(), path.replace("{name}", "nano")) for path, methods in found.items() for method in methods]


def test_every_route_but_health_wants_the_key(tokenizer: Tokenizer) -> None:
    """Catches a route that was added past the door; wrong keys, and ways to send the right one."""
    with serving(small_engine(tokenizer), api_key=USER, admin_key=ADMIN, model_name="nano") as server:
        routes = all_routes(server)
        assert len(routes) >= 14
        basic = base64.b64encode(f"me:{USER}".encode()).decode()
        right = [{"Authorization": f"Bearer {USER}"}, {"x-api-key": USER}, {"Authorization": f"Basic {basic}"}]
        wrong = [{}, {"Authorization": f"Bearer {USER}x"}, {"x-api-key": ADMIN}, {"Authorization": "Basic ???"}]
        for method, path in routes:
            if path.startswith("/admin"):
                continue
            for headers in wrong:
                status = httpx.request(method, server.url + path, headers=headers, content=b"{}").status_code
                assert status == (200 if path == "/health" else 401), (method, path, headers)
            for headers in right:
                status = httpx.request(method, server.url + path, headers=headers, content=b"{}").status_code
                assert status != 401, (method, path, headers)
        admin = [(method, path) for method, path in routes if path.startswith("/admin")]
        assert len(admin) == 5
        for method, path in admin:
            for headers in ({}, {"x-api-key": USER}, {"Authorization": f"Bearer {ADMIN}x"}):
                status = httpx.request(method, server.url + path, headers=headers, content=b"{}").status_code
                assert status == 401, (method, path, headers)
        assert server.get("/admin/nothing", headers={"x-api-key": USER}).status_code == 401
        assert server.get("/admin/nothing", headers={"x-api-key": ADMIN}).status_code == 404


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies_are_refused_with_a_reason(live: LiveServer, name: str) -> None:
    """Catches errors that become status 500, and reasons that do not say what to do."""
    answer = httpx.post(f"{live.url}/v1/completions", content=BAD_BODIES[name], timeout=60)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) > 10
    assert answer.headers["x-request-id"]


def test_large_bodies_and_long_prompts_are_refused_early(live: LiveServer) -> None:
    """Catches a body that is read whole before its size is looked at, and a prompt that is tokenized before."""
    large = httpx.post(f"{live.url}/v1/completions", content=b"x" * (9 << 20), timeout=60)
    assert large.status_code == 413

    def drip() -> object:
        for _ in range(10):
            yield b"x" * (1 << 20)

    assert httpx.post(f"{live.url}/v1/completions", content=drip(), timeout=60).status_code == 413  # type: ignore[arg-type]
    long = live.post("/v1/completions", {"prompt": "a" * 4_000_000})
    assert long.status_code == 400
    assert long.json()["error"]["code"] == "context_length_exceeded"


def test_names_of_other_sites_are_refused(live: LiveServer, tokenizer: Tokenizer) -> None:
    """Catches a page of another site that calls a local server through its visitor's browser."""
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Host": "127.0.0.1.evil.example"}):
        assert live.get("/v1/models", headers=headers).status_code == 403
    for headers in ({"Host": "localhost:80"}, {"Origin": "http://127.0.0.1:8000"}, {"Host": "[::1]:80"}):
        assert live.get("/v1/models", headers=headers).status_code == 200


def test_the_server_listens_on_loopback_only(live: LiveServer) -> None:
    """Catches a socket on all addresses. Read from the kernel's own list."""
    port = f"{int(live.url.rpartition(':')[2]):04X}"
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    assert [address for address in listening if address.endswith(f":{port}")] == [f"0100007F:{port}"]
    assert socket.inet_aton("127.0.0.1")[::-1].hex().upper() == "0100007F"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_public_address_needs_a_key(host: str) -> None:
    """Catches a server that is open to a network by mistake."""
    with pytest.raises(RequestError, match="--api-key"):
        ServerOptions(host=host)
    assert ServerOptions(host=host, api_key="key").host == host
    with pytest.raises(RequestError, match="value of its own"):
        ServerOptions(api_key="key", admin_key="key")


def test_a_connection_without_a_request_is_closed(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches connections that drip a head for ever, and a timer that ends requests whose head is there."""
    monkeypatch.setattr("openmimo.server.run.HEAD_SECONDS", 0.3)
    host, _, port = live.url.removeprefix("http://").partition(":")
    for content in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: loc"):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(content)
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
            assert connection.recv(100) == b""
    body = {"prompt": "the", "max_tokens": 900, "ignore_eos": True, "draft_heads": 0}
    with httpx.Client(base_url=live.url, timeout=60) as client:
        for _ in range(2):  # the second on the same connection
            assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 900


HEALTH, HOST = b"GET /health HTTP/1.1\r\n", b"Host: localhost\r\n"
ODD_HEADS = {
    "a name that goes on": (HEALTH + b"a" * run.MOST_HEAD_BYTES, b"431"),
    "a value that goes on": (HEALTH + HOST + b"x-a: " + b"a" * run.MOST_HEAD_BYTES, b"431"),
    "lines that go on": (HEALTH + HOST + b"x-a: 1\r\n" * (run.MOST_HEAD_BYTES // 8), b"431"),
    "a long address": (b"GET /" + b"a" * run.MOST_HEAD_BYTES, b"431"),
    "large at once": (HEALTH + HOST + b"x-a: " + b"a" * run.MOST_HEAD_BYTES + b"\r\n\r\n", b"400"),
    "no host": (HEALTH + b"\r\n", b"400"),
    "two hosts": (HEALTH + HOST + b"Host: example.org\r\n\r\n", b"400"),
    "another version": (b"GET /health HTTP/3.7\r\n" + HOST + b"\r\n", b"400"),
    "two lengths": (HEALTH + HOST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n", b"400"),
    "a length and chunks": (HEALTH + HOST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", b"400"),
    "a space in a name": (HEALTH + HOST + b"x a: 1\r\n\r\n", b"400"),
    "a proxy's method": (b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST + b"\r\n", b"400"),
    "an old version": (b"GET /health HTTP/1.0\r\n\r\n", b"200"),
}


@pytest.mark.parametrize("name", ODD_HEADS)
def test_odd_heads_are_answered_and_closed(live: LiveServer, name: str) -> None:
    """Catches heads that take memory without end, and those that a proxy before the server would read differently."""
    content, status = ODD_HEADS[name]
    host, _, port = live.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(content)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 " + status)


def test_a_wish_for_another_protocol_is_passed_over(live: LiveServer) -> None:
    """Catches bodies that are lost where a client, as Java's does, asks for HTTP/2 beside its request."""
    wishes = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    body = json.dumps({"prompt": "the", "max_tokens": 3, "ignore_eos": True}).encode()
    with httpx.Client(base_url=live.url, timeout=20) as client:
        for content in (body, iter([body[:9], body[9:]]), body):  # the second in chunks
            answer = client.post("/v1/completions", content=content, headers=wishes)
            assert answer.json()["usage"]["completion_tokens"] == 3
        assert client.get("/health", headers=wishes).json() == {"status": "ok"}


def test_a_long_body_is_no_head(live: LiveServer) -> None:
    """Catches a count of a head's bytes that takes in the body before it, where the next request comes in parts."""
    host, _, port = live.url.removeprefix("http://").partition(":")
    body = b'{"text": "' + b"a" * (run.MOST_HEAD_BYTES + 1000) + b'"}'
    post = b"POST /detokenize HTTP/1.1\r\n" + HOST + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(post + HEALTH)
        time.sleep(0.2)
        connection.sendall(HOST + b"Connection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert answer.count(b"HTTP/1.1 400") == 1
    assert answer.endswith(b'{"status":"ok"}')


def test_an_answer_is_written_at_once(live: LiveServer) -> None:
    """Catches a head that is sent before its body, which wakes clients twice."""
    host, _, port = live.url.removeprefix("http://").partition(":")
    for _ in range(20):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(HEALTH + HOST + b"\r\n")
            assert connection.recv(1 << 16).endswith(b"}")


def test_a_log_that_nobody_reads_holds_up_nothing() -> None:
    """Catches a server that stops because standard error is a full pipe, as under a supervisor that hangs."""
    reading, writing = os.pipe()
    handler, listener = run._patient_log()
    (output,) = listener.handlers
    assert isinstance(output, logging.StreamHandler)
    logger = logging.Logger("test")
    logger.addHandler(handler)
    with os.fdopen(writing, "w") as file:
        output.setStream(file)
        listener.start()
        began = time.monotonic()
        for _ in range(run.LOG_LINES + 1000):
            logger.error("x" * 100)  # ten times what a pipe holds
        assert time.monotonic() - began < 10
        drain = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(reading, 1 << 16), b"")])
        drain.start()
        listener.stop()
    drain.join()
    os.close(reading)
