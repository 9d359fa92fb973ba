"""A live server with more clients than it can serve, and with clients that go.

    python benchmarks/server_load.py                       # all three
    python benchmarks/server_load.py disconnects --times 200

`disconnects`: connections closed at random moments, streams or not, while others go on. Bars: no row, page or ticket is
left over, and what the others got is what they got in a quiet run.
`overload`: as many clients as the server has places give its peak; ten times as many requests per second as that for a
minute, of which one in 20 gives up before it is answered, are between two of it. Bars: sent = done + refused +
cancelled exactly, and the server has counted every one that was done or refused; tokens of finished answers per second
at least 95% of the peaks' beside it, in the median of three times; refusals within 50 ms (99 of 100).
`stall`: four streams, and beside them a prompt of 32,768 tokens. Bar: no stream waits longer between two pieces than a
tenth of what that prompt takes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common import describe_machine, print_result
from openmimo.checkpoint import save_model
from openmimo.config.model import preset
from openmimo.model import build_model
from openmimo.text import train_tokenizer
from server_fuzz import running_server

PLACES, WAITING, TOKENS, STALL_TOKENS = 32, 64, 128, 30_000
REFUSAL_SECONDS, GOODPUT = 0.05, 0.95


@dataclass
class Ledger:
    """What the clients saw. `seconds` are those of refusals; `done` says when answers came, with their tokens."""

    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter[str])
    seconds: list[float] = field(default_factory=list[float])
    done: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    texts: list[str] = field(default_factory=list[str])
    free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list[Any])

    def hang_up(self) -> None:
        """Close the connections, before the server does for want of requests."""
        while self.free:
            self.free.pop()[1].close()

    def rate(self, begin: float, end: float) -> float:
        """Tokens per second of the answers that were complete between two times."""
        return sum(tokens for at, tokens in self.done if begin <= at < end) / (end - begin)


def save_served_model(folder: Path, name: str = "tiny") -> None:
    """A preset with random weights and a small tokenizer."""
    words = ("the", "weather", "in", "Paris", "is", "fine", "and", "warm")
    tokenizer = train_tokenizer([f"{a} {b} {n}\n" for a in words for b in words for n in range(8)], vocab_size=400)
    config = preset(name).replace(vocab_size=tokenizer.vocab_size)
    save_model(build_model(config, seed=0, dtype=torch.bfloat16), folder, dtype="bfloat16")
    tokenizer.save(folder)


def body_of(number: int, tokens: int, *, stream: bool = False) -> bytes:
    """A request whose answer depends on its number alone."""
    prompt = "the weather in Paris " * (1 + number % 5) + str(number % 50)
    wishes = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    content = json.dumps(wishes).encode()
    headers = f"Host: 127.0.0.1\r\nContent-Length: {len(content)}\r\n"
    return f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n".encode() + content


async def ask(port: int, number: int, tokens: int, ledger: Ledger, patience: float | None = None) -> None:
    """One whole request, entered into the ledger; with `patience` it is given up after so many seconds.

    Connections are used again, as clients with a pool do.
    """
    ledger.sent += 1
    began = time.perf_counter()
    try:
        connection = ledger.free.pop() if ledger.free else await asyncio.open_connection("127.0.0.1", port)
        reader, writer = connection
        writer.write(body_of(number, tokens))
        try:
            status, content = await asyncio.wait_for(answer_of(reader), patience)
        except TimeoutError:
            writer.transport.abort()
            ledger.outcomes["cancelled"] += 1
            return
        ledger.free.append(connection)
    except (OSError, EOFError) as error:
        ledger.outcomes[f"broken: {type(error).__name__}"] += 1
        return
    ledger.outcomes[status] += 1
    if status == "200":
        found = json.loads(content)
        ledger.done.append((time.perf_counter(), found["usage"]["completion_tokens"]))
        ledger.texts.append(found["choices"][0]["text"])
    elif status == "429":
        ledger.seconds.append(time.perf_counter() - began)


async def answer_of(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """Status and body of the next answer on a connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    return head.split(b" ", 2)[1].decode(), await reader.readexactly(int(length))


async def load_of(port: int) -> dict[str, int]:
    """The server's own view."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /load HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    answer = await reader.read(-1)
    writer.close()
    return json.loads(answer.partition(b"\r\n\r\n")[2])


async def counts_of(port: int) -> Counter[str]:
    """What the server's metrics have counted so far: answers done, requests refused."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    text = (await reader.read(-1)).decode()
    writer.close()
    found: Counter[str] = Counter()
    for line in text.splitlines():
        for name, key in (
            ("openmimo:request_success_total", "success"),
            ("openmimo:http_requests_refused_total", "refused"),
        ):
            if line.startswith(name):
                found[key] += int(float(line.rsplit(" ", 1)[1]))
    return found


async def idle(port: int) -> dict[str, int]:
    """The load once nothing is open, or after a quarter of a minute."""
    for _ in range(150):
        load = await load_of(port)
        if not load["num_open"] and not load["num_running"]:
            return load
        await asyncio.sleep(0.1)
    return await load_of(port)


async def disconnects(port: int, times: int) -> dict[str, object]:
    """Clients that go, beside clients that stay."""
    quiet = Ledger()
    for number in range(8):
        await ask(port, number, TOKENS, quiet)
    chance, stayed, stop = random.Random(0), Ledger(), asyncio.Event()

    async def stay() -> None:
        while not stop.is_set():
            for number in range(8):
                await ask(port, number, TOKENS, stayed)

    async def go(number: int) -> None:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            content = body_of(number, 400, stream=chance.random() < 0.5)
            writer.write(content[: chance.choice((len(content), len(content), len(content) // 2))])
            await asyncio.sleep(chance.random() * 0.2)
            writer.transport.abort() if chance.random() < 0.5 else writer.close()
        except OSError:
            pass

    survivors = asyncio.ensure_future(stay())
    for first in range(0, times, 20):
        await asyncio.gather(*(go(first + place) for place in range(20)))
    stop.set()
    await survivors
    load = await idle(port)
    wrong = sum(text != quiet.texts[place % 8] for place, text in enumerate(stayed.texts))
    left = {name: load[name] for name in ("num_open", "num_running", "num_waiting")}
    print(f"{times:,} connections closed; left over: {left}; {len(stayed.texts)} answers beside them, {wrong} changed")
    return {
        "times": times,
        "left": left,
        "answers": len(stayed.texts),
        "changed": wrong,
        "failed": any(left.values()) or wrong > 0 or stayed.outcomes["200"] != stayed.sent,
    }


async def crowd_with_places(port: int, seconds: float, chance: random.Random) -> float:
    """Tokens per second with as many clients as the server has places."""
    ledger, began = Ledger(), time.perf_counter()
    end = began + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            await ask(port, chance.randrange(50), chance.randint(32, 224), ledger)

    await asyncio.gather(*(client() for _ in range(PLACES)))
    return ledger.rate(began + seconds / 4, end)


async def crowd_without_places(port: int, seconds: float, rate: float, chance: random.Random, ledger: Ledger) -> float:
    """Tokens per second with `rate` requests per second; of them one in 20 gives up."""
    tasks, number, began = set[asyncio.Task[None]](), 0, time.perf_counter()
    while (now := time.perf_counter() - began) < seconds:
        while number < now * rate:
            patience = chance.random() * 0.5 if number % 20 == 0 else None
            task = asyncio.ensure_future(ask(port, chance.randrange(50), chance.randint(32, 224), ledger, patience))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
        # Not more often than needed: the clients share the server's cores.
        await asyncio.sleep(max(0.001, number / rate - (time.perf_counter() - began)))
    found = ledger.rate(began + seconds / 4, began + seconds)
    await asyncio.gather(*tasks)
    ledger.hang_up()
    return found


async def overload(port: int, seconds: float, rounds: int) -> dict[str, object]:
    """The peak, then ten times its requests, in turns. Answers have 32 to 224 tokens, so that they end at all times.

    What counts of either is its last three quarters, when as many answers are half done as at its end; each time of
    overload is compared with the peaks before and after it, since the machine's speed drifts.
    """
    chance, crowd = random.Random(1), Ledger()
    peaks, rates = [await crowd_with_places(port, seconds * 2 / 3, chance)], list[float]()
    requests = 10 * peaks[0] / 128
    done = refused = 0
    for _ in range(rounds):
        before = await counts_of(port)
        rates.append(await crowd_without_places(port, seconds, requests, chance, crowd))
        load = await idle(port)
        after = await counts_of(port)
        done, refused = (was + after[name] - before[name] for was, name in ((done, "success"), (refused, "refused")))
        peaks.append(await crowd_with_places(port, seconds * 2 / 3, chance))
    shares = [rate / statistics.mean(pair) for rate, pair in zip(rates, itertools.pairwise(peaks), strict=True)]
    late = statistics.quantiles(crowd.seconds, n=100)[98] if len(crowd.seconds) > 1 else 0.0
    outcomes, goodput = crowd.outcomes, statistics.median(shares)
    known = outcomes["200"] + outcomes["429"] + outcomes["cancelled"]
    # What was given up may have been done or refused by then.
    agrees = 0 <= done - outcomes["200"] <= outcomes["cancelled"] >= refused - outcomes["429"] >= 0
    speeds = ", ".join(f"{peak:,.0f}" for peak in peaks)
    print(
        f"peaks of {speeds} tokens/s with {PLACES} clients; {requests:,.0f} requests/s for {seconds:.0f} s between them"
    )
    print(f"sent {crowd.sent:,} = {dict(outcomes)}; " + ", ".join(f"{rate:,.0f}" for rate in rates) + " tokens/s")
    print(f"of the peaks beside them: {', '.join(f'{share:.0%}' for share in shares)}; median {goodput:.1%}")
    print(
        f"refusals: median {1e3 * statistics.median(crowd.seconds or [0]):.1f} ms, 99 of 100 within {1e3 * late:.1f} ms"
    )
    return {
        "peak_tokens_per_s": peaks,
        "requests_per_s": requests,
        "sent": crowd.sent,
        "outcomes": dict(outcomes),
        "overload_tokens_per_s": rates,
        "goodput": goodput,
        "refusal_p99_s": late,
        "server": {"done": done, "refused": refused},
        "left": load["num_open"],
        "failed": not agrees
        or crowd.sent != known
        or goodput < GOODPUT
        or late > REFUSAL_SECONDS
        or load["num_open"] > 0,
    }


async def stream(port: int, number: int, tokens: int, arrivals: list[float]) -> None:
    """A streamed answer; when each of its pieces came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(body_of(number, tokens, stream=True))
    try:
        while (line := await reader.readline()) and not line.startswith(b"data: [DONE]"):
            if line.startswith(b"data: {"):
                arrivals.append(time.perf_counter())
    finally:
        writer.close()


async def stall(port: int, num_tokens: int) -> dict[str, object]:
    """The pauses of running streams, before and beside a long prompt."""
    arrivals: list[list[float]] = [[] for _ in range(4)]
    streams = [asyncio.ensure_future(stream(port, place, STALL_TOKENS, arrivals[place])) for place in range(4)]
    await asyncio.sleep(2.0)
    chance = random.Random(3)
    wishes = {"prompt": [chance.randrange(256) for _ in range(num_tokens)], "max_tokens": 1, "temperature": 0}
    content = json.dumps(wishes).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n")
    writer.write(f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    answer = await reader.read(-1)
    ended = time.perf_counter()
    writer.close()
    for task in streams:
        task.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    await idle(port)
    gaps: dict[str, list[float]] = {"before": [], "beside": []}
    for times in arrivals:
        for one, next_ in itertools.pairwise(times):
            if next_ <= ended:
                gaps["beside" if next_ > began else "before"].append(next_ - one)
    before, beside = (statistics.median(gaps[name]) for name in ("before", "beside"))
    worst, whole = max(gaps["beside"]), ended - began
    pieces = len(gaps["beside"])
    print(f"a prompt of {num_tokens:,} tokens takes {whole:.2f} s; four streams beside it get {pieces:,} pieces,")
    print(f"{1e3 * before:.1f} ms apart before, {1e3 * beside:.1f} ms beside it, at most {1e3 * worst:.0f} ms")
    return {
        "prompt_tokens": num_tokens,
        "prompt_s": whole,
        "gap_before_s": before,
        "gap_beside_s": beside,
        "gap_worst_s": worst,
        "failed": not answer.startswith(b"HTTP/1.1 200") or worst > whole / 10 or not gaps["beside"],
    }


def main() -> int:
    """Run what is asked for; print lines and a JSON line; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=("disconnects", "overload", "stall", []), default=[])
    parser.add_argument("--times", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=3, help="times of overload, each between two of the peak")
    parser.add_argument("--prompt", type=int, default=32768)
    parser.add_argument("--port", type=int, default=8766)
    options = parser.parse_args()
    wanted = options.what or ["disconnects", "stall", "overload"]
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as name:
        # Overload is for a model that is worth its requests: with a tiny one it measures the clients beside it.
        for model, works in (("tiny", ("disconnects", "stall")), ("small", ("overload",))):
            mine = [work for work in works if work in wanted]
            if not mine:
                continue
            folder = Path(name) / model
            save_served_model(folder, model)
            with running_server(folder, options.port, "--max-batch", str(PLACES), "--max-waiting", str(WAITING)):
                if "disconnects" in mine:
                    results["disconnects"] = asyncio.run(disconnects(options.port, options.times))
                if "stall" in mine:
                    results["stall"] = asyncio.run(stall(options.port, options.prompt))
                if "overload" in mine:
                    results["overload"] = asyncio.run(overload(options.port, options.seconds, options.rounds))
    failed = [name for name, result in results.items() if result["failed"]]
    print("failed: " + ", ".join(failed) if failed else "all of it holds")
    print_result("server_load", describe_machine(), results)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
