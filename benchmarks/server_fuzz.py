"""A live server under generated requests and hostile bytes: nothing fails, hangs or grows, and others do not notice.

    python benchmarks/server_fuzz.py                    # all of it, about a quarter of an hour
    python benchmarks/server_fuzz.py --examples 20      # a short one

Schemathesis reads the server's own OpenAPI description and sends requests that fit it, that nearly do and that do not
(phases coverage and fuzzing, both modes). The hostile corpus goes over raw sockets: bodies that are no JSON, numbers
and nesting without end, wrong lengths, headers and methods, connections that drip or never read. Before, between and
after, one question must have the same answer. What comes out: cases, failures, cases without any answer, and the growth
of the server's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from common import describe_machine, print_result
from openmimo.checkpoint import save_model
from openmimo.config.model import preset
from openmimo.model import build_model
from openmimo.text import train_tokenizer

QUESTION = {"prompt": "the weather in Paris", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
ANSWER_SECONDS = 20.0
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/detokenize")
DRIFT = 0.02  # of the memory after warming up


@dataclass(frozen=True)
class Case:
    """Bytes to send, and the statuses that answer them; none means that a closed connection is an answer too."""

    name: str
    content: bytes
    statuses: tuple[int, ...] = (400, 404, 405, 408, 411, 413, 414, 415, 422, 431, 501, 505)


@contextmanager
def running_server(folder: Path, port: int, *options: str, quiet: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """`openmimo serve` in a process of its own; what it said comes at the end, unless `quiet`."""
    command = [sys.executable, "-m", "openmimo", "serve", "--model", str(folder), "--port", str(port)]
    command += options
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stderr=file)
        try:
            end = time.monotonic() + 120
            while not is_up(port):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the server did not start: {log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield process
        finally:
            process.terminate()
            process.wait(60)
            if not quiet:
                print(log.read_text()[-5000:], file=sys.stderr)


def is_up(port: int) -> bool:
    """Whether a server says that it is well."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def save_small_server_model(folder: Path) -> None:
    """Nano with random weights and a tokenizer of its own."""
    words = ("the", "weather", "in", "Paris", "is", "fine", "<tool_call>", "function=", '{"a": 1}', "日本語", "é")
    tokenizer = train_tokenizer([f"{a} {b} {n}\n" for a in words for b in words for n in range(8)], vocab_size=400)
    config = preset("nano").replace(vocab_size=tokenizer.vocab_size, max_positions=1024)
    save_model(build_model(config, seed=0), folder)
    tokenizer.save(folder)


def ask(port: int) -> str:
    """The canary."""
    body = json.dumps(QUESTION).encode()
    url = f"http://127.0.0.1:{port}/v1/completions"
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=ANSWER_SECONDS) as answer:
        return json.loads(answer.read())["choices"][0]["text"]


def memory(process: subprocess.Popen[bytes]) -> int:
    """Resident bytes of the server."""
    fields = Path(f"/proc/{process.pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def http(path: str, body: bytes, *, headers: Sequence[tuple[str, str]] = (), method: str = "POST") -> bytes:
    """A request as it goes over the wire; a given header replaces ours."""
    given = {name.lower() for name, _ in headers}
    lines = [f"{method} {path} HTTP/1.1"]
    ours = (("Host", "127.0.0.1"), ("Content-Length", str(len(body))), ("Connection", "close"))
    lines += [f"{name}: {value}" for name, value in ours if name.lower() not in given]
    lines += [f"{name}: {value}" for name, value in headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace") + body


def hostile_cases() -> list[Case]:
    """More than three hundred."""
    cases: list[Case] = []
    bodies: dict[str, bytes] = {
        "nothing": b"",
        "a NUL": b"\x00",
        "half an object": b'{"a": ',
        "an array": b"[]",
        "a number": b"1",
        "null": b"null",
        "text": b'"a"',
        "a byte order mark": b"\xef\xbb\xbf{}",
        "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
        "bad UTF-8": b'{"prompt": "\xc3\x28"}',
        "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
        "a surrogate in UTF-8": b'{"prompt": "\xed\xa0\x80"}',
        "half a pair": b'{"prompt": "\\ud800", "input": "\\udfff"}',
        "half a pair in a message": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "NaN": b'{"prompt": "a", "temperature": NaN}',
        "minus infinity": b'{"prompt": "a", "temperature": -Infinity}',
        "1e400": b'{"prompt": "a", "temperature": 1e400}',
        "five thousand digits": b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}",
        "a thousand levels": b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}",
        "a hundred thousand levels": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "objects in objects": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
        "a key twice": b'{"prompt": "a", "prompt": "a"}',
        "a comment": b'{"prompt": "a" /* hi */}',
        "single quotes": b"{'prompt': 'a'}",
        "a comma too many": b'{"prompt": "a",}',
        "words after the end": b'{"prompt": "a"} {"prompt": "b"}',
        "many keys": json.dumps({f"k{number}": number for number in range(20_000)}).encode(),
        "a key of a megabyte": json.dumps({"k" * 1_000_000: 1}).encode(),
        "form data": b"prompt=a&max_tokens=1",
        "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "nine megabytes": b'{"prompt": "' + b"a" * (9 << 20) + b'"}',
        "a text that cannot fit": json.dumps({"prompt": "a" * 4_000_000, "input": "a" * 4_000_000}).encode(),
    }
    for route in ROUTES:
        cases += [Case(f"{name} to {route}", http(route, body)) for name, body in bodies.items()]
    digits = b'{"prompt": "a", "max_tokens": 1, "top_p": 0.' + b"3" * 100_000 + b"}"
    cases.append(Case("a long fraction", http("/v1/completions", digits), (200,)))
    wrong: dict[str, object] = {
        "max_tokens": [-1, 2**63, 1.5, "1", True, [], {}],
        "temperature": [-1, 1e308, "0", [], True],
        "top_p": [-0.1, 1.1, "1", None.__class__.__name__],
        "n": [0, -1, 10**9, 1.5],
        "stop": [1, [1], ["x"] * 1000, ["y" * 100_000], {}],
        "logit_bias": [{"a": 1}, {"1": 101}, {"-1": 1}, [1], {"999999999999": 1}],
        "seed": [2**64, 1.5, "a"],
        "logprobs": [-1, 10**6, "a"],
        "draft_heads": [-1, 99, "many", 1.5],
        "prompt": [1, None, {}, [[]], [["a"]], [1.5], [-1], [2**40], [[1], "a"], [True]],
        "structured_outputs": [
            {"regex": "("},
            {"json": {"$ref": "#/no"}},
            {"choice": []},
            {"regex": "a", "grammar": "b"},
        ],
        "stream_options": [1, {"x": 1}],
    }
    for key, values in wrong.items():
        for place, value in enumerate(values):  # type: ignore[arg-type]
            body = {"prompt": "a", "max_tokens": 1, key: value}
            cases.append(Case(f"{key} {place}", http("/v1/completions", json.dumps(body).encode())))
            chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, key: value}
            cases.append(Case(f"chat {key} {place}", http("/v1/chat/completions", json.dumps(chat).encode())))
    good = json.dumps(QUESTION).encode()
    path = "/v1/completions"
    anything = (200, *Case("", b"").statuses)
    for name, headers in {
        "a length too small": [("Content-Length", "3")],
        "a negative length": [("Content-Length", "-1")],
        "a length that is no number": [("Content-Length", "many")],
        "two lengths": [("Content-Length", "5"), ("Content-Length", "6")],
        "a huge length": [("Content-Length", str(10**15))],
        "length and chunks": [("Content-Length", "5"), ("Transfer-Encoding", "chunked")],
        "bad chunks": [("Transfer-Encoding", "chunked")],
        "unknown encoding": [("Transfer-Encoding", "gzip, chunked")],
        "a compressed body": [("Content-Encoding", "gzip")],
        "no host": [("Host", "")],
        "another host": [("Host", "evil.example")],
        "a hundred thousand bytes of header": [("X-Long", "a" * 100_000)],
        "a thousand headers": [(f"X-{number}", "a") for number in range(1000)],
        "an origin": [("Origin", "null")],
        "a bad request id": [("X-Request-Id", "a\tb")],
        "an expectation": [("Expect", "200-maybe")],
        "an upgrade": [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Key", "x")],
        "HTTP/2": [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAMA")],
    }.items():
        cases.append(Case(name, http(path, good, headers=headers), (*anything, 403)))
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "FOO", "A" * 10_000):
        cases.append(Case(f"method {method[:9]}", http(path, b"", method=method)))
    for target in (
        "/../../etc/passwd",
        "//",
        "/%00",
        "/v1/models/%ff%fe",
        "/" + "a" * 60_000,
        "*",
        "http://evil/",
        "/page/..%2f..%2fapp.py",
    ):
        cases.append(Case(f"target {target[:12]}", http(target, b"", method="GET"), (*anything, 403)))
    for name, raw in {
        "not HTTP": b"hello\r\n\r\n",
        "TLS": bytes.fromhex("160301020001000" + "1fc0303") + b"\x00" * 200,
        "HTTP/9.9": b"GET /health HTTP/9.9\r\nHost: a\r\n\r\n",
        "bare line feeds": b"GET /health HTTP/1.1\nHost: 127.0.0.1\n\n",
        "a header that goes on": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nA: b\r\n c\r\n\r\n",
        "spaces before a colon": b"GET /health HTTP/1.1\r\nHost : 127.0.0.1\r\n\r\n",
        "zeros": b"\x00" * 4096,
        "random bytes": random.Random(0).randbytes(8192),
    }.items():
        cases.append(Case(name, raw, (*anything, 403)))
    return cases


def send(port: int, case: Case) -> str:
    """The status of the answer, `closed` where the connection ended without one, `hang` where nothing came."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS) as connection:
            try:
                connection.sendall(case.content)
                connection.shutdown(socket.SHUT_WR) if b"chunked" in case.content[:400] else None
            except OSError:
                pass  # refused before all of it was sent; the answer may still be there
            answer = connection.recv(4096)
    except TimeoutError:
        return "hang"
    except OSError:
        return "closed"
    first = answer.split(b"\r\n", 1)[0].split()
    return first[1].decode("latin-1") if len(first) > 1 else "closed"


def send_all(port: int, cases: Sequence[Case]) -> list[str]:
    """`send` for all, eight at a time."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda case: send(port, case), cases))


def slow_clients(port: int, count: int) -> bool:
    """That many connections which send a byte now and then; whether the canary was answered meanwhile."""
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    content = http("/v1/completions", b"{" + b" " * 1000)
    answered = True
    for place in range(0, 40):
        for connection in connections:
            with suppress(OSError):
                connection.sendall(content[place : place + 1])
        if place % 10 == 0:
            began = time.monotonic()
            ask(port)
            answered &= time.monotonic() - began < 2.0
    for connection in connections:
        connection.close()
    return answered


def run_schemathesis(port: int, examples: int, scratch: Path) -> dict[str, int]:
    """Cases and failures, from its own report."""
    report = scratch / "schemathesis.json"
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json"),
        *("--phases", "coverage,fuzzing", "--mode", "all", "--max-examples", str(examples), "--continue-on-failure"),
        *("--checks", "not_a_server_error", "--request-timeout", str(ANSWER_SECONDS), "--seed", "0", "--no-color"),
        *("--suppress-health-check", "all", "--report", "json", "--report-json-path", str(report)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, check=False)
    if not report.is_file():
        raise SystemExit(f"schemathesis did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = json.loads(report.read_text())
    for failure in found["failures"][:5]:
        print(json.dumps(failure)[:1000], file=sys.stderr)
    counts = found["test_cases"]
    return {"cases": counts["generated"], "failures": counts["with_failures"], "errors": counts["errored"]}


def main() -> int:
    """Run everything; print a table and a JSON line; 1 if anything fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="of schemathesis, per route")
    parser.add_argument("--port", type=int, default=8765)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        save_small_server_model(scratch / "model")
        # The prefix cache is memory that is meant to fill; a small one is full before the count begins.
        settings = ("--max-tokens", "8", "--max-waiting", "512", "--name", "nano", "--prefix-cache-mib", "4")
        with running_server(scratch / "model", options.port, *settings) as process:
            result = measure(process, options.port, options.examples, scratch)
    failed = [name for name, bad in result["verdict"].items() if bad]  # type: ignore[union-attr]
    print("failed: " + ", ".join(failed) if failed else "all of it holds")
    print_result("server_fuzz", describe_machine(), result)
    return int(bool(failed))


def measure(process: subprocess.Popen[bytes], port: int, examples: int, scratch: Path) -> dict[str, object]:
    """The figures, and under `verdict` what each bar says."""
    expected, cases = ask(port), hostile_cases()
    # Caches and pools fill once, and buffers of connections are kept for the next ones.
    send_all(port, cases)
    run_schemathesis(port, max(5, examples // 20), scratch)
    slow_clients(port, 200)
    before = memory(process)
    generated = run_schemathesis(port, examples, scratch)
    same = ask(port) == expected
    found = send_all(port, cases)
    bad = [
        f"{case.name}: {status}"
        for case, status in zip(cases, found, strict=True)
        if status == "hang" or (status != "closed" and int(status) not in case.statuses)
    ]
    for line in bad[:20]:
        print(line, file=sys.stderr)
    calm = slow_clients(port, 200)
    same &= ask(port) == expected
    after = memory(process)
    drift = after / before - 1
    print(f"schemathesis: {generated['cases']:,} cases, {generated['failures']} failures")
    print(f"hostile corpus: {len(cases)} cases, {len(bad)} bad; {found.count('closed')} closed without an answer")
    print(f"200 slow connections: {'others did not wait' if calm else 'others waited'}")
    print(
        f"memory {before / 1e6:.1f} -> {after / 1e6:.1f} MB ({drift:+.2%}); canary {'the same' if same else 'changed'}"
    )
    return {
        "generated": generated,
        "hostile": {"cases": len(cases), "bad": bad, "closed": found.count("closed")},
        "memory": [before, after],
        "verdict": {
            "generated requests": generated["failures"] + generated["errors"] > 0,
            "hostile bytes": bool(bad),
            "slow connections": not calm,
            "canary": not same,
            "memory": drift > DRIFT,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
