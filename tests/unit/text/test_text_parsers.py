from __future__ import annotations

import json

import pytest
from response_cases import BROKEN, CASES, CITY, TOOLS, UNKNOWN, block

from openmimo.errors import TextError
from openmimo.text import (
    ArgumentsDelta,
    ChatTemplate,
    ContentDelta,
    Message,
    ReasoningDelta,
    ResponseEvent,
    ResponseParser,
    Tokenizer,
    ToolCallEvent,
    ToolCallStart,
    join_events,
    parse_response,
)


@pytest.mark.parametrize("text", CASES)
def test_answers_are_taken_apart(text: str) -> None:
    reasoning, content, calls = CASES[text]
    parsed = parse_response(text, TOOLS)
    assert (parsed.reasoning, parsed.content) == (reasoning, content)
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == calls


@pytest.mark.parametrize("text", CASES)
def test_streaming_in_two_parts_equals_the_whole_at_every_cut(text: str) -> None:
    """Catches tags that are only seen when they arrive in one piece."""
    whole = parse_response(text, TOOLS)
    for cut in range(len(text) + 1):
        parser = ResponseParser(TOOLS)
        events = [*parser.push(text[:cut]), *parser.push(text[cut:]), *parser.finish()]
        assert join_events(events) == whole, cut


@pytest.mark.parametrize("text", CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_streaming_in_small_parts_equals_the_whole(text: str, size: int) -> None:
    parser = ResponseParser(TOOLS)
    events = [event for start in range(0, len(text), size) for event in parser.push(text[start : start + size])]
    assert join_events([*events, *parser.finish()]) == parse_response(text, TOOLS)


def calls_of(events: list[ResponseEvent]) -> list[tuple[str, str, bool]]:
    """Name, JSON text and whether it is complete, of every call in a stream."""
    found: list[tuple[str, str, bool]] = []
    for event in events:
        if isinstance(event, ToolCallStart):
            found.append((event.name, "", False))
        elif isinstance(event, ArgumentsDelta):
            name, text, _ = found[-1]
            found[-1] = (name, text + event.text, False)
        elif isinstance(event, ToolCallEvent):
            name, text, _ = found[-1]
            assert name == event.call.name
            pairs = json.loads(text, object_pairs_hook=list)
            assert dict(pairs) == event.call.arguments
            found[-1] = (name, text, True)
    return found


@pytest.mark.parametrize("text", [*CASES, *BROKEN])
def test_arguments_are_streamed_the_same_at_every_cut(text: str) -> None:
    """Catches arguments that are lost where a tag arrives in parts, or that a later piece would have to take back."""
    parser = ResponseParser(TOOLS, stream_arguments=True)
    events = [*parser.push(text), *parser.finish()]
    whole, whole_calls = join_events(events), calls_of(events)
    for cut in range(len(text) + 1):
        for size in (len(text) + 1, 4, 1):
            parser = ResponseParser(TOOLS, stream_arguments=True)
            events = parser.push(text[:cut])
            for start in range(cut, len(text), size):
                events += parser.push(text[start : start + size])
            events += parser.finish()
            assert (join_events(events), calls_of(events)) == (whole, whole_calls), (cut, size)
            if cut > 100:
                break
    if text in CASES:
        plain = parse_response(text, TOOLS)
        complete = [call for call in whole_calls if call[2]]
        if len(complete) == len(whole_calls) == len(plain.tool_calls):
            assert whole == plain
    else:
        assert (whole.content, whole_calls) == BROKEN[text]


def test_a_long_argument_goes_out_as_it_arrives() -> None:
    """Catches a file's text that is held back until its last line."""
    parser = ResponseParser(TOOLS, stream_arguments=True)
    assert parser.push("<tool_call>\n<function=weather>\n<para") == []
    assert parser.push("meter=city>Pa") == [ToolCallStart("weather"), ArgumentsDelta('{"city": "Pa')]
    assert parser.push('r"is</para') == [ArgumentsDelta('r\\"is')]
    assert parser.push("<") == [ArgumentsDelta("</para")]
    assert parser.push("</parameter>\n<parameter=days>1") == [ArgumentsDelta('<"')]
    assert parser.push("2</parameter>\n</function>\n") == [ArgumentsDelta(', "days": 12')]
    assert parser.push("</tool_call>")[0] == ArgumentsDelta("}")


def test_text_is_passed_on_as_soon_as_it_is_sure() -> None:
    """Catches a parser that holds everything back until the end."""
    parser = ResponseParser(TOOLS)
    assert parser.push("<think>so") == [ReasoningDelta("so")]
    assert parser.push(" a </") == [ReasoningDelta(" a ")]
    assert parser.push("b") == [ReasoningDelta("</b")]
    assert parser.push("</think>Hi") == [ContentDelta("Hi")]
    assert parser.push(f" {CITY[:-1]}") == [ContentDelta(" ")]
    (event,) = parser.push(">")
    assert isinstance(event, ToolCallEvent)
    assert event.call.arguments == {"city": "Paris"}
    assert parser.finish() == []


def test_without_declarations_every_call_counts_and_arguments_are_text() -> None:
    parsed = parse_response(UNKNOWN + block(("days", "3")))
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == [
        ("rm", {"a": "1"}),
        ("weather", {"days": "3"}),
    ]
    assert parse_response(CITY, []).content == CITY


def test_a_finished_parser_takes_no_more() -> None:
    parser = ResponseParser()
    parser.finish()
    with pytest.raises(TextError, match="finished"):
        parser.push("x")


def test_unusable_tools_are_refused() -> None:
    with pytest.raises(TextError, match="tool 0"):
        ResponseParser([{"type": "function"}])


@pytest.mark.parametrize(
    "text",
    [
        "<think></think>Hello",
        "<think>\nhm\n</think>\n\nHello \n",
        f"<think>hm</think>Wait.\n{CITY}",
        "<think></think>" + block(("days", "3"), ("dry", "false"), ("tags", '["a", 1]')) + CITY,
    ],
)
def test_a_parsed_answer_renders_to_the_same_text(tokenizer: Tokenizer, text: str) -> None:
    """Catches trimming: later turns must see what the model wrote, or cached keys cannot be used again."""
    parsed = parse_response(text, TOOLS)
    answer = Message("assistant", parsed.content, parsed.reasoning, parsed.tool_calls)
    rendered = tokenizer.decode(ChatTemplate(tokenizer).render([answer], add_generation_prompt=False))
    assert rendered.endswith(f"<|im_start|>assistant\n{text}<|im_end|>")


def test_hostile_answers_are_read_in_bounded_time() -> None:
    """Catches quadratic reading: these would take minutes."""
    opened = "<tool_call><function=weather><parameter=city>"
    for text in ("<tool_call>" * 5000, opened * 1000, opened + "</parameter>" * 20_000, "<think>" + "</thin" * 50_000):
        assert parse_response(text, TOOLS).tool_calls == ()
    parser = ResponseParser(TOOLS)
    events = [event for piece in [opened, *["<b>x</b> "] * 5000] for event in parser.push(piece)]
    assert events == []
    assert len(parser.finish()[0].text) > 0  # type: ignore[union-attr]
