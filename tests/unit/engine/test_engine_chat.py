"""The chat session, with a byte tokenizer and a template that counts turns."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from engine_fakes import ByteCodec, generate_ids, make_engine, plant_drafts, small_model
from rich.console import Console

from openmimo.cli.chat import ChatSession, parse_draft_heads, printable
from openmimo.engine import Engine, SamplingParams


class PlainTemplate:
    """Joins the messages by line ends."""

    def __init__(self) -> None:
        self.seen: list[list[dict[str, str]]] = []

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        self.seen.append([dict(message) for message in messages])
        return list("\n".join(message["content"] for message in messages).encode())


def talk(
    monkeypatch: pytest.MonkeyPatch, lines: Sequence[str | type[BaseException]], *, terminal: bool = False, **options
) -> tuple[str, ChatSession, PlainTemplate]:
    """Run a session on the given input; an exception type in the lines is raised at the prompt."""
    engine = make_engine(small_model(max_positions=200), tokenizer=ByteCodec())
    console = Console(file=io.StringIO(), force_terminal=terminal, highlight=False, width=200)
    remaining = [*lines, EOFError]

    def answer(prompt: str = "", **_: object) -> str:
        line = remaining.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(console, "input", answer)
    template = PlainTemplate()
    params = SamplingParams(max_tokens=options.pop("max_tokens", 9), ignore_eos=True)
    session = ChatSession(engine, template, params, console=console, **options)
    session.run()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue(), session, template


def name_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token its own visible text."""
    monkeypatch.setattr(ByteCodec, "decode", lambda self, ids, skip_special=False: "".join(f"<{i}>" for i in ids))


def test_answers_are_streamed_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a conversation that forgets turns, and an answer that differs from `generate`."""
    shown, session, template = talk(monkeypatch, ["hello", "", "again"], system="be brief")
    roles = [message["role"] for message in session.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert template.seen[1] == session.messages[:-1]
    expected = session.engine.generate([list(b"be brief\nhello")], session.params)[0].text
    assert session.messages[2]["content"] == expected
    assert printable(expected) in shown
    assert "\x1b" not in shown
    assert "9 tokens, 1.00 per step" in shown


def test_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["hi", "/drafts off", "/drafts", "/restt", "/help", "/reset", "/drafts on", "/quit", "never read"]
    shown, session, _ = talk(monkeypatch, lines)
    assert session.messages == []
    assert session.engine.draft_heads == 3
    for words in ("no drafts", "say /drafts on", "did you mean '/reset'", "/quit  ", "forgotten", "drafts by 3 MTP"):
        assert words in shown


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a session that dies on Ctrl-C, and one that forgets half an answer."""
    genuine = Engine.stream

    def interrupted(self: Engine, prompt, params):
        for count, event in enumerate(genuine(self, prompt, params)):
            if count == 3:
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(Engine, "stream", interrupted)
    name_tokens(monkeypatch)
    shown, session, _ = talk(monkeypatch, ["hello", KeyboardInterrupt])
    whole = session.engine.generate([list(b"hello")], session.params)[0].text
    said = session.messages[1]["content"]
    assert said
    assert whole.startswith(said)
    assert whole != said
    assert "[stopped]" in shown


def test_a_conversation_that_no_longer_fits_is_an_answer_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, session, _ = talk(monkeypatch, ["x" * 300, "short"])
    assert "200 positions" in shown
    assert [message["role"] for message in session.messages] == ["user", "assistant"]


def test_drafted_tokens_are_coloured_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches colours of the wrong head: token i of a window comes from head i."""
    prompt = list(b"hello")
    text = generate_ids(make_engine(small_model(max_positions=200)), [prompt], 9)[0]
    plant_drafts(monkeypatch, [prompt], [text], lambda step, true_SK: true_SK)
    name_tokens(monkeypatch)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    shown, _, _ = talk(monkeypatch, ["hello"], terminal=True)
    pieces = [f"<{token}>" for token in text]
    green, cyan, magenta = "\x1b[32m", "\x1b[36m", "\x1b[35m"
    window = [green + pieces[1], cyan + pieces[2], magenta + pieces[3]]
    assert pieces[0] + "\x1b[0m".join(window) + "\x1b[0m" + pieces[4] in shown


def test_control_characters_never_reach_the_terminal() -> None:
    """Catches a model that clears the screen or sets the window title."""
    assert printable("a\x1b[2J\x07é\n\t\u202e\x9b") == "a\ufffd[2J\ufffdé\n\t\ufffd\ufffd"


def test_draft_heads_option() -> None:
    assert parse_draft_heads("2") == 2
    assert parse_draft_heads("auto") == "auto"
