"""Every kind of answer over HTTP: whole and streamed, with drafts and without, it is the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from server_fakes import LiveServer

from openmimo.text import parse_response

sys.path.append(str(Path(__file__).parents[1] / "text"))
from response_cases import BROKEN, CASES, TOOLS

WRAPPED = [each if "function" in each else {"type": "function", "function": each} for each in TOOLS]


def message_of(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of a stream."""
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            found["content"] += delta.get("content") or ""
            found["reasoning"] += delta.get("reasoning_content") or ""
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls") or ():
                if "id" in call:
                    found["calls"].append([call["function"]["name"], ""])
                found["calls"][call["index"]][1] += call["function"]["arguments"]
    return found


@pytest.mark.parametrize("text", [text for text in dict.fromkeys((*CASES, *BROKEN)) if 0 < len(text) < 300])
def test_a_stream_amounts_to_the_whole_answer(live: LiveServer, text: str) -> None:
    """Catches what is lost where a burst of drafted tokens ends inside a tag, a character or a value."""
    # A grammar is how a model with random weights comes to write this.
    body = {
        "messages": [{"role": "user", "content": "the weather"}], "tools": WRAPPED, "seed": 1,
        "temperature": 1.0, "structured_outputs": {"choice": [text]},
    }  # fmt: skip
    found: list[dict[str, Any]] = []
    for heads in (0, 3):
        (choice,) = live.post("/v1/chat/completions", {**body, "draft_heads": heads}).json()["choices"]
        message = choice["message"]
        calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls") or ()]
        whole = {
            "content": message["content"] or "",
            "reasoning": message.get("reasoning_content") or "",
            "calls": calls,
        }
        assert choice["finish_reason"] in ("stop", "tool_calls")
        lines = live.post("/v1/chat/completions", {**body, "draft_heads": heads, "stream": True}).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
        found += [whole, message_of(chunks)]
    assert found[1:] == found[:-1]
    if text in CASES and text not in BROKEN:
        parsed = parse_response(text, TOOLS)
        read = [(name, json.loads(arguments)) for name, arguments in found[0]["calls"]]
        assert (found[0]["content"], found[0]["reasoning"]) == (parsed.content, parsed.reasoning)
        assert read == [(call.name, call.arguments) for call in parsed.tool_calls]
    elif text in BROKEN:
        content, calls = BROKEN[text]
        assert (found[0]["content"], found[0]["calls"]) == (content, [[name, text] for name, text, _ in calls])
