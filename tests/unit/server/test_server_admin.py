"""The /admin routes against a live server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_fakes import LiveServer, serving, small_engine

from openmimo.checkpoint import save_model
from openmimo.config.model import preset
from openmimo.engine import Engine, SamplingParams
from openmimo.model import build_model
from openmimo.text import Tokenizer

KEY = {"x-api-key": "admin-key"}
QUESTION = {"prompt": "the weather in Paris", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def server(tokenizer: Tokenizer) -> Iterator[LiveServer]:
    with serving(small_engine(tokenizer), admin_key="admin-key", model_name="nano") as found:
        yield found


def answer(server: LiveServer) -> str:
    return server.post("/v1/completions", QUESTION).json()["choices"][0]["text"]


def test_without_a_key_there_are_no_admin_routes(live: LiveServer) -> None:
    """Catches routes that are open to everybody where nobody asked for them."""
    assert live.post("/admin/drain", {}).status_code == 404
    assert "/admin/drain" not in live.get("/openapi.json").json()["paths"]
    assert not live.service.worker.draining


def test_a_drained_server_finishes_and_takes_up_again(server: LiveServer) -> None:
    """Catches a drain that ends what was begun, and one that cannot be taken back."""
    long = {**QUESTION, "max_tokens": 800, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=long, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        (found,) = server.get("/admin/requests", headers=KEY).json()["requests"]
        assert (found["max_tokens"], found["streams"], found["finished"]) == (800, True, 0)
        assert server.post("/admin/drain", {}, headers=KEY).json()["draining"]
        assert server.post("/v1/completions", QUESTION).status_code == 503
        assert server.get("/health").status_code == server.get("/ready").status_code == 503
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert server.get("/admin/requests", headers=KEY).json()["requests"] == []
    assert not server.post("/admin/resume", {}, headers=KEY).json()["draining"]
    assert server.post("/v1/completions", QUESTION).status_code == 200


def test_other_weights_answer_from_then_on(server: LiveServer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches weights that do not arrive, and texts that older weights computed."""
    before = answer(server)
    config = preset("nano").replace(vocab_size=tokenizer.vocab_size, max_positions=1024)
    other = build_model(config, seed=1)
    save_model(other, tmp_path / "other")
    wide = build_model(config.replace(vocab_size=400), seed=1)
    save_model(wide, tmp_path / "wide")
    assert server.post("/admin/weights", {"folder": str(tmp_path / "none")}, headers=KEY).status_code == 400
    refused = server.post("/admin/weights", {"folder": str(tmp_path / "wide")}, headers=KEY)
    assert refused.status_code == 400
    assert "another config" in refused.json()["error"]["message"]
    assert answer(server) == before
    put = server.post("/admin/weights", {"folder": str(tmp_path / "other"), "version": 7}, headers=KEY)
    assert put.json() == {"version": 7}
    engine = Engine(tmp_path / "other", tokenizer=tokenizer, max_batch=8, threads=1)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    (expected,) = engine.generate([tokenizer.encode(str(QUESTION["prompt"]))], params)
    assert answer(server) == expected.text != before


def test_prefixes_are_forgotten(server: LiveServer) -> None:
    """Catches a cache that is emptied in name only."""
    body = {**QUESTION, "prompt": "the weather in Paris is fine and warm " * 12}

    def cached() -> int:
        usage = server.post("/v1/completions", body).json()["usage"]
        return (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)

    assert (cached(), cached() > 0) == (0, True)
    assert server.post("/admin/forget_prefixes", {}, headers=KEY).status_code == 200
    assert cached() == 0
