"""Clients that go, do not read or come in crowds, and an engine that fails: nothing is left over, others go on."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from server_fakes import LiveServer, serving, small_engine

from openmimo.config.model import preset
from openmimo.engine import Engine, SamplingParams, StreamEvent
from openmimo.model import build_model
from openmimo.server.errors import ApiError
from openmimo.server.worker import EngineWorker, Ticket
from openmimo.text import Tokenizer

LONG = {"prompt": "the weather in Paris", "max_tokens": 900, "ignore_eos": True, "temperature": 0}


def raw_request(server: LiveServer, body: dict[str, object]) -> socket.socket:
    """A connection that has sent a request."""
    content = json.dumps(body).encode()
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def test_clients_that_go_leave_nothing_behind(live: LiveServer) -> None:
    """Closes connections at random moments, streams or not, in the queue, in the prompt and while tokens come.

    Catches rows, pages, tickets and tasks that stay, and survivors whose text changes.
    """
    expected = live.post("/v1/completions", LONG).json()["choices"][0]["text"]
    before = live.service.engine.used_cache_bytes
    chance = random.Random(0)
    with ThreadPoolExecutor(2) as pool:
        survivors = [pool.submit(live.post, "/v1/completions", LONG) for _ in range(4)]
        for _ in range(60):
            body = {**LONG, "stream": chance.random() < 0.5, "n": chance.choice((1, 2)), "prompt": "Paris " * 60}
            connection = raw_request(live, body)
            time.sleep(chance.random() * 0.02)
            connection.close()
        texts = [survivor.result().json()["choices"][0]["text"] for survivor in survivors]
    assert texts == [expected] * 4
    live.wait_until_idle()
    assert live.service.worker.num_open == 0
    assert live.service.engine.load.num_running == live.service.engine.load.num_waiting == 0
    live.service.engine.clear_prefix_cache()
    assert live.service.engine.used_cache_bytes <= before


def test_a_full_queue_refuses_at_once(tokenizer: Tokenizer) -> None:
    """Catches a queue without an end, refusals that take long, and counts that do not add up."""
    with serving(small_engine(tokenizer, max_batch=2), max_waiting=2) as server, ThreadPoolExecutor(24) as pool:

        def ask(_: int) -> tuple[int, float, httpx.Headers]:
            began = time.monotonic()
            answer = server.post("/v1/completions", {**LONG, "max_tokens": 400})
            return answer.status_code, time.monotonic() - began, answer.headers

        found = list(pool.map(ask, range(24)))
        done, refused = ([each for each in found if each[0] == status] for status in (200, 429))
        assert len(done) + len(refused) == 24
        assert len(done) >= 4
        assert refused
        assert all(int(headers["retry-after"]) >= 1 for _, _, headers in refused)
        assert max(seconds for _, seconds, _ in refused) < max(seconds for _, seconds, _ in done)
        text = server.get("/metrics").text
        assert f'openmimo:http_requests_refused_total{{status="429"}} {len(refused)}.0' in text
        assert f'openmimo:request_success_total{{finished_reason="length"}} {len(done)}.0' in text


def test_an_engine_that_fails_tells_its_requests_and_goes_on(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a thread that dies, clients that wait for ever, and memory that stays with the failed requests."""
    engine = small_engine(tokenizer)
    with serving(engine) as server:
        expected = server.post("/v1/completions", LONG).json()["choices"][0]["text"]
        step, left = Engine.step, [1]

        def failing(self: Engine) -> list[StreamEvent]:
            events = step(self)
            if left[0] and self.load.num_running:
                left[0] -= 1
                raise RuntimeError("planted")
            return events

        monkeypatch.setattr(Engine, "step", failing)
        answer = server.post("/v1/completions", LONG)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "engine_failed"
        assert server.get("/health").status_code == 200
        assert server.post("/v1/completions", LONG).json()["choices"][0]["text"] == expected
        left[0] = 10**9
        for _ in range(3):
            assert server.post("/v1/completions", LONG).status_code == 500
        assert server.get("/health").status_code == 503


def test_logits_that_are_no_numbers_end_their_own_request(tokenizer: Tokenizer) -> None:
    """Catches a step that fails for all, an answer without an error, and a server that calls itself unwell for it."""
    config = preset("nano").replace(vocab_size=tokenizer.vocab_size, max_positions=1024)
    model, bad = build_model(config, seed=0), tokenizer.vocab_size - 1
    expected = small_engine(tokenizer).generate(
        ["the weather in Paris"], SamplingParams(max_tokens=900, ignore_eos=True)
    )
    with torch.no_grad():
        model.embed_tokens.weight[bad] = torch.nan
    engine = Engine(model, tokenizer=tokenizer, max_batch=8, threads=1)
    with serving(engine) as server, ThreadPoolExecutor(4) as pool:
        beside = pool.submit(server.post, "/v1/completions", LONG)
        broken = {**LONG, "prompt": [5, bad, 6], "n": 2}
        answer = server.post("/v1/completions", broken)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "not_finite"
        assert "not_finite" in server.post("/v1/completions", {**broken, "stream": True}).text
        assert beside.result().json()["choices"][0]["text"] == expected[0].text
        late = {**LONG, "prompt": [5], "logit_bias": {str(bad): 100}, "stream": True}
        lines = server.post("/v1/completions", late).text.split("\n\n")
        assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["finish_reason"] is None
        assert "not_finite" in lines[-2] + lines[-3]
        server.wait_until_idle()
        assert server.get("/health").status_code == 200
        metrics = server.get("/metrics").text
        assert 'finished_reason="error"' not in metrics  # they are no success
        assert 'reason="not_finite"} 3.0' in metrics


def test_a_reader_that_sleeps_is_given_up(tokenizer: Tokenizer) -> None:
    """Catches a stream whose tokens pile up for ever."""
    closed: list[Ticket] = []

    async def run() -> None:
        worker = EngineWorker(small_engine(tokenizer), max_open=4, buffer_tokens=40, on_close=closed.append)
        worker.start()
        ticket = worker.submit([3, 4], SamplingParams(max_tokens=900, ignore_eos=True), wants_steps=True)
        steps = worker.steps(ticket)
        await anext(steps)
        while ticket.error is None:
            await asyncio.sleep(0.005)
        assert ticket.num_unread <= 40 + 4
        with pytest.raises(ApiError, match="not read in time"):
            async for _ in steps:
                pass
        await worker.close(0.0)

    asyncio.run(run())
    assert len(closed) == 1


def test_a_server_that_stops_finishes_what_it_began(tokenizer: Tokenizer) -> None:
    """Catches answers that are cut off, and new requests that are taken while it drains."""
    engine = small_engine(tokenizer)
    answers: list[httpx.Response] = []
    with serving(engine, drain_seconds=30.0) as server:
        thread = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", LONG)))
        thread.start()
        while not server.service.worker.num_open:
            time.sleep(0.002)
    thread.join()
    (answer,) = answers
    assert answer.json()["usage"]["completion_tokens"] == 900


def test_statistics_add_up_to_the_metrics(tokenizer: Tokenizer) -> None:
    """Catches figures that count a draft twice, or other steps than the answers say."""
    with serving(small_engine(tokenizer)) as server:
        sums = dict.fromkeys(("prompt", "written", "cached", "proposed", "accepted", "steps"), 0)
        for seed in range(6):
            body = {"prompt": "the weather in Paris " * (seed + 1), "max_tokens": 50, "seed": seed, "draft_heads": 3}
            answer = server.post("/v1/completions", {**body, "temperature": 0.5, "token_events": True}).json()
            usage, speculation = answer["usage"], answer["metrics"]["speculative_decoding"]
            details = usage["completion_tokens_details"]
            assert details["accepted_prediction_tokens"] == speculation["num_accepted_draft_tokens"]
            rejected = speculation["num_draft_tokens"] - speculation["num_accepted_draft_tokens"]
            assert details["rejected_prediction_tokens"] == rejected
            assert answer["timings"]["draft_n"] == speculation["num_draft_tokens"]
            assert sum(speculation["acceptance_histogram"]) == speculation["num_spec_steps"]
            sums["prompt"] += usage["prompt_tokens"]
            sums["written"] += usage["completion_tokens"]
            sums["cached"] += usage["prompt_tokens_details"]["cached_tokens"]
            sums["proposed"] += speculation["num_draft_tokens"]
            sums["accepted"] += speculation["num_accepted_draft_tokens"]
        text = server.get("/metrics").text
        for name, key in (
            ("prompt_tokens", "prompt"),
            ("generation_tokens", "written"),
            ("prefix_cache_hits", "cached"),
            ("spec_decode_num_draft_tokens", "proposed"),
            ("spec_decode_num_accepted_tokens", "accepted"),
        ):
            assert f"openmimo:{name}_total {sums[key]}.0" in text, name
        assert sums["proposed"] > 0


def test_token_events_tell_of_every_token_and_draft(live: LiveServer) -> None:
    """Catches rejected drafts that are not shown, wrong heads, and tokens beside the text."""
    body = {"messages": [{"role": "user", "content": "the"}], "max_tokens": 60, "temperature": 0, "draft_heads": 3}
    wishes = {"stream": True, "token_events": True, "stream_options": {"include_usage": True}}
    tokens: list[dict[str, object]] = []
    rejected: list[dict[str, object]] = []
    text, usage = "", {}
    with httpx.stream("POST", f"{live.url}/v1/chat/completions", json=body | wishes) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk["usage"] or usage
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                events = choice.get("token_events", {"tokens": [], "rejected": []})
                tokens += events["tokens"]
                rejected += events["rejected"]
    assert len(tokens) == usage["completion_tokens"]
    details = usage["completion_tokens_details"]
    assert sum(token["head"] is not None for token in tokens) == details["accepted_prediction_tokens"]
    assert len(rejected) == details["rejected_prediction_tokens"] > 0
    assert {entry["head"] for entry in rejected} <= {1, 2, 3}
    assert live.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"] == text
    ids = [token["id"] for token in tokens]
    assert live.post("/detokenize", {"tokens": ids}).json()["prompt"].startswith(text)
