"""Tokens per second and time to the first token over HTTP, beside llama.cpp's `llama-server` on the same weights.

    python benchmarks/server_speed.py                                  # tiny and small with random weights
    python benchmarks/server_speed.py --models runs/demo --clients 8

Both servers run at once with both cores each and are asked in turns (A B A B), so that drift of the machine meets both;
the one that is not asked sleeps. A turn is four requests, or two for each client; turns go on until each server had 48
requests, three at least, and the ratio is the median of the turns'. Clients send one request after the other, stream
the answer, and read all of it.
Prompts are token ids, another one for each request, so that no server can use what it has computed before. llama-server
is built from llama-cpp-python's source package on this machine (about ten minutes, once) unless `--llama-server` names
one. It gets as many slots as there are clients, and flash attention; ours runs as it comes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import describe_machine, print_result, print_table
from openmimo.checkpoint import save_model
from openmimo.checkpoint.gguf import convert_to_gguf
from openmimo.config.model import preset, preset_names
from openmimo.engine import resolve_model_folder
from openmimo.model import build_model
from openmimo.text import train_tokenizer
from server_fuzz import is_up, running_server

SOURCE = "llama-cpp-python==0.3.36"
OPTIONS = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP", "LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI")
PROMPT, ANSWER = 128, 128


@dataclass
class Run:
    """What one arm's clients saw."""

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list[float])

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def llama_server(folder: Path) -> Path:
    """The program, built in `folder` where it is not there yet."""
    program = folder / "llama-server-build" / "bin" / "llama-server"
    if not program.is_file():
        source = folder / "llama-server-source"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir(parents=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        subprocess.run([*pip, "--dest", str(source), SOURCE], check=True)
        (archive,) = source.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(source, filter="data")
        (root,) = source.glob("*/vendor/llama.cpp")
        off = [f"-D{name}=OFF" for name in (*OPTIONS, "BUILD_SHARED_LIBS", "LLAMA_OPENSSL")]
        build = str(program.parents[1])
        subprocess.run(["cmake", "-S", str(root), "-B", build, "-DCMAKE_BUILD_TYPE=Release", *off], check=True)
        subprocess.run(["cmake", "--build", build, "-j", "2", "--target", "llama-server"], check=True)
    return program


def served_model(name: str, folder: Path) -> Path:
    """A checkpoint folder: a run's, or a preset with random weights and a small tokenizer."""
    if name not in preset_names():
        return resolve_model_folder(name)
    target = folder / f"{name}-served"
    if not target.is_dir():
        words = ("the", "weather", "in", "Paris", "is", "fine", "and", "warm")
        tokenizer = train_tokenizer([f"{a} {b} {n}\n" for a in words for b in words for n in range(8)], vocab_size=400)
        save_model(build_model(preset(name), seed=0), target, dtype="bfloat16")
        tokenizer.save(target)
    return target


@contextmanager
def running_llama(program: Path, gguf: Path, port: int, clients: int, log: Path) -> Iterator[None]:
    """llama-server with a slot for every client."""
    room = str(2 * (PROMPT + ANSWER) * clients)
    command = [str(program), "--model", str(gguf), "--port", str(port), "--ctx-size", room, "--parallel", str(clients)]
    command += ["--threads", "2", "--threads-batch", "2", "--flash-attn", "on", "--no-webui"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        end = time.monotonic() + 120
        while not is_up(port):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"llama-server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(60)


async def ask(port: int, prompt: Sequence[int], extra: Mapping[str, Any], run: Run) -> None:
    """One streamed request, entered into the run."""
    wishes = {"prompt": list(prompt), "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True, "stream": True}
    content = json.dumps({**wishes, "stream_options": {"include_usage": True}, **extra}).encode()
    head = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + content)
    first, usage = None, None
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            if first is None:
                first = time.perf_counter() - began
            if b'"usage"' in line and (found := json.loads(line[6:]).get("usage")):
                usage = found
    writer.close()
    if usage is None or first is None or usage["completion_tokens"] != ANSWER:
        raise SystemExit(f"an answer of {ANSWER} tokens was expected, got {usage}")
    run.tokens += ANSWER
    run.first.append(first)


async def measure(port: int, clients: int, requests: int, vocabulary: int, seed: int, extra: Mapping[str, Any]) -> Run:
    """`clients` at once, each with its share of the requests."""
    chance, run = random.Random(seed), Run()
    prompts = [[chance.randrange(vocabulary) for _ in range(PROMPT)] for _ in range(requests)]

    async def client(place: int) -> None:
        for prompt in prompts[place::clients]:
            await ask(port, prompt, extra, run)

    began = time.perf_counter()
    await asyncio.gather(*(client(place) for place in range(clients)))
    run.seconds = time.perf_counter() - began
    return run


def compare(name: str, clients: int, options: argparse.Namespace, program: Path, work: Path) -> dict[str, Any]:
    """Both servers with so many clients; a row of figures."""
    folder = served_model(name, work)
    title = folder.parent.name if folder.name == "model" else name
    gguf = work / f"{title}-served.gguf"
    if not gguf.is_file():
        convert_to_gguf(folder, gguf, dtype="bfloat16")
    vocabulary = 256  # ids that every tokenizer here has as text
    requests = max(4, 2 * clients)
    rounds = max(3, options.requests // requests)
    ports = {"openmimo": options.port, "llama-server": options.port + 1}
    # Its cache of earlier prompts is off, as ours finds nothing to reuse.
    extra: dict[str, dict[str, Any]] = {"openmimo": {}, "llama-server": {"cache_prompt": False}}
    runs: dict[str, list[Run]] = {arm: [] for arm in ports}
    with ExitStack() as stack:
        stack.enter_context(running_server(folder, ports["openmimo"], quiet=True))
        stack.enter_context(running_llama(program, gguf, ports["llama-server"], clients, work / "llama-server.log"))
        for round_ in range(rounds + 1):
            for arm, port in ports.items():
                share = max(clients, 2) if round_ == 0 else requests
                found = asyncio.run(measure(port, clients, share, vocabulary, 100 * round_, extra[arm]))
                if round_:
                    runs[arm].append(found)
    rates = {arm: statistics.median(run.rate for run in found) for arm, found in runs.items()}
    firsts = {arm: statistics.median(x for run in found for x in run.first) for arm, found in runs.items()}
    return {
        "model": title,
        "clients": clients,
        "tokens_per_s": rates["openmimo"],
        "llama_tokens_per_s": rates["llama-server"],
        "ratio": statistics.median(a.rate / b.rate for a, b in zip(*runs.values(), strict=True)),
        "first_token_s": firsts["openmimo"],
        "llama_first_token_s": firsts["llama-server"],
        "first_token_ratio": firsts["llama-server"] / firsts["openmimo"],
    }


def main() -> int:
    """A row for every model and number of clients, and a JSON line; 1 if llama-server is ahead on one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,small", help="presets, checkpoint or run folders")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument(
        "--requests", type=int, default=48, help="of each server, model and number of clients, at least"
    )
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--work-dir", type=Path, help="keeps conversions and the built llama-server")
    parser.add_argument("--port", type=int, default=8770)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work_dir or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        program = options.llama_server or llama_server(work)
        for model in options.models.split(","):
            for clients in map(int, options.clients.split(",")):
                rows.append(compare(model, clients, options, program, work))
                row = rows[-1]
                print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    header = ("model", "clients", "tokens/s", "llama-server", "ratio", "first token ms", "llama-server", "ratio")
    print_table(
        header,
        [
            (
                row["model"],
                row["clients"],
                row["tokens_per_s"],
                row["llama_tokens_per_s"],
                row["ratio"],
                1e3 * row["first_token_s"],
                1e3 * row["llama_first_token_s"],
                row["first_token_ratio"],
            )
            for row in rows
        ],
    )
    print_result("server_speed", describe_machine(), {"rows": rows})
    return int(any(row["ratio"] < 1 or row["first_token_ratio"] < 1 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
