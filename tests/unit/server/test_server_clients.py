"""The official OpenAI and Anthropic clients against a live server."""

from __future__ import annotations

import json

import anthropic
import openai
import pytest
from server_fakes import LiveServer

MESSAGES = [{"role": "user", "content": "the weather"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
# A grammar is how a model with random weights comes to write these.
CITY, DAYS = "<parameter=city>Paris</parameter>", "<parameter=days>3</parameter>"
CALL = rf"(fine )?<tool_call>\n<function=weather>\n{CITY}\n{DAYS}\n</function>\n</tool_call>"
THOUGHTS = r"<think>warm</think>fine"


@pytest.fixture
def client(live: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def claude(live: LiveServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0)


def test_a_chat_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    """Catches a stream that loses, repeats or reorders text, tokens or usage."""
    options = {"model": "nano", "messages": MESSAGES, "max_tokens": 40, "seed": 3, "temperature": 1.0, "n": 2}
    whole = client.chat.completions.create(**options)
    texts, ends, usage = ["", ""], [None, None], None
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage is not None
    assert whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert whole.usage.completion_tokens <= 80


def test_log_probabilities_belong_to_the_tokens(client: openai.OpenAI) -> None:
    """Catches records of other tokens, and alternatives that are not the best ones."""
    answer = client.chat.completions.create(
        model="nano", messages=MESSAGES, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None
    entries = choice.logprobs.content
    assert entries is not None
    assert (
        bytes(byte for entry in entries for byte in entry.bytes or ()).decode(errors="replace")
        == choice.message.content
    )
    for entry in entries:
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert len(entry.top_logprobs) == 3


def test_tool_calls_and_thoughts_are_taken_apart(client: openai.OpenAI) -> None:
    """Catches calls that stay text, arguments of the wrong type, and reasoning under one name only."""
    call = client.chat.completions.create(
        model="nano",
        messages=MESSAGES,
        tools=[TOOL],
        max_tokens=200,
        extra_body={"structured_outputs": {"regex": CALL}},
    ).choices[0]
    assert call.finish_reason == "tool_calls"
    assert call.message.tool_calls is not None
    function = call.message.tool_calls[0].function
    assert (function.name, json.loads(function.arguments)) == ("weather", {"city": "Paris", "days": 3})
    thought = client.chat.completions.create(
        model="nano", messages=MESSAGES, max_tokens=60, extra_body={"structured_outputs": {"regex": THOUGHTS}}
    )
    message = thought.choices[0].message
    assert message.content == "fine"
    assert message.reasoning_content == message.reasoning == "warm"  # type: ignore[attr-defined]
    assert thought.usage is not None
    assert thought.usage.completion_tokens_details is not None
    assert thought.usage.completion_tokens_details.reasoning_tokens > 2


def streamed_calls(client: openai.OpenAI, **options: object) -> tuple[list[tuple[str, str]], str | None, int]:
    """Names and arguments of the calls in a stream, how it ended, and in how many pieces arguments came."""
    calls: list[tuple[str, str]] = []
    ended, pieces = None, 0
    for chunk in client.chat.completions.create(**options, stream=True):  # type: ignore[call-overload]
        for choice in chunk.choices:
            ended = choice.finish_reason or ended
            for call in choice.delta.tool_calls or ():
                if call.id is not None:
                    assert call.index == len(calls)
                    calls.append((call.function.name, ""))
                if call.function.arguments:
                    pieces += 1
                    calls[call.index] = (calls[call.index][0], calls[call.index][1] + call.function.arguments)
    return calls, ended, pieces


TWO_TOOLS = [TOOL, {"type": "function", "function": {"name": "stop"}}]


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "stop"}), ({"type": "function", "function": {"name": "weather"}}, {"weather"})],
)
def test_a_forced_call_is_made_and_streamed(client: openai.OpenAI, choice: object, names: set[str]) -> None:
    """Catches a choice that is only a wish, another function, and streams that differ from the whole."""
    seen: set[str] = set()
    for seed in range(8):
        options = {
            "model": "nano", "messages": MESSAGES, "tools": TWO_TOOLS, "tool_choice": choice, "max_tokens": 200,
            "seed": seed, "temperature": 1.0, "parallel_tool_calls": False,
        }  # fmt: skip
        (whole,) = client.chat.completions.create(**options).choices  # type: ignore[call-overload]
        calls, ended, pieces = streamed_calls(client, **options)
        assert [(call.function.name, call.function.arguments) for call in whole.message.tool_calls] == calls
        assert whole.finish_reason == ended
        assert len(calls) == 1
        assert calls[0][0] in names
        seen.add(calls[0][0])
        if ended == "tool_calls":
            json.loads(calls[0][1])
        else:
            assert ended == "length"
            assert pieces > 10
    assert seen == names


def test_choices_that_cannot_be_kept_are_refused(client: openai.OpenAI) -> None:
    """Catches a forced call without a function, and two forms for one answer."""
    named = {"type": "function", "function": {"name": "rain"}}
    for options, message in (
        ({"tool_choice": "required"}, "no tools are given"),
        ({"tool_choice": named, "tools": [TOOL]}, "they declare weather"),
        ({"tool_choice": "required", "tools": [TOOL], "response_format": {"type": "json_object"}}, "2 forms"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(model="nano", messages=MESSAGES, max_tokens=4, **options)  # type: ignore[call-overload]


def test_a_call_that_is_cut_has_open_arguments(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    """Catches cut arguments that are closed as if they were whole."""
    options = {
        "model": "nano", "messages": MESSAGES, "tools": [TOOL], "max_tokens": 60, "temperature": 0,
        "extra_body": {"structured_outputs": {"regex": "<tool_call>\n<function=weather>\n<parameter=city>(warm ){80}"}},
    }  # fmt: skip
    (whole,) = client.chat.completions.create(**options).choices  # type: ignore[call-overload]
    calls, ended, pieces = streamed_calls(client, **options)
    assert whole.finish_reason == ended == "length"
    assert whole.message.tool_calls[0].function.arguments == calls[0][1]
    assert calls[0][1].startswith('{"city": "warm warm')
    assert not calls[0][1].endswith("}")
    assert pieces > 5


def test_thoughts_end_with_their_budget(client: openai.OpenAI, live: LiveServer) -> None:
    """Catches a budget that is taken without effect."""
    start = live.service.tokenizer.special("<think>")
    answer = client.chat.completions.create(
        model="nano", messages=MESSAGES, max_tokens=40, seed=1, logit_bias={str(start): 80},
        extra_body={"enable_thinking": True, "thinking_token_budget": 9},
    )  # fmt: skip
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert 0 < answer.usage.completion_tokens_details.reasoning_tokens <= 10


def test_a_conversation_goes_on_with_its_calls_and_thoughts(client: openai.OpenAI) -> None:
    """Catches a server that does not take back what it gave."""
    first = client.chat.completions.create(
        model="nano",
        messages=MESSAGES,
        tools=[TOOL],
        max_tokens=200,
        extra_body={"structured_outputs": {"regex": CALL}},
    ).choices[0]
    assert first.message.tool_calls is not None
    result = {"role": "tool", "tool_call_id": first.message.tool_calls[0].id, "content": "18 degrees"}
    said = {**first.message.model_dump(), "reasoning_content": "warm", "reasoning": "warm"}
    second = client.chat.completions.create(
        model="nano", messages=[*MESSAGES, said, result], tools=[TOOL], max_tokens=4
    )
    assert second.usage is not None
    assert second.usage.prompt_tokens > 60


def test_json_by_schema_with_drafts_and_without(client: openai.OpenAI) -> None:
    """Catches a schema that is only asked for, and drafts that change what is written."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2, 3]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    texts = [
        client.chat.completions.create(
            model="nano",
            messages=MESSAGES,
            max_tokens=400,
            seed=1,
            temperature=1.2,
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
            extra_body={"draft_heads": heads},
        )
        .choices[0]
        .message.content
        for heads in (0, 3)
    ]
    assert texts[0] == texts[1]
    assert json.loads(texts[0] or "")["a"] in (1, 2, 3)


def test_a_conversation_is_tokenized_with_and_without_the_question(live: LiveServer) -> None:
    """Catches a wish of the template's that is taken and not kept."""
    counts = [
        live.post("/tokenize", {"messages": MESSAGES, "add_generation_prompt": asks}).json()["count"]
        for asks in (True, False)
    ]
    assert counts[0] > counts[1]


def test_completions_take_texts_and_token_ids(client: openai.OpenAI, live: LiveServer) -> None:
    """Catches prompts that are taken apart wrongly, and choices in another order."""
    ids = live.post("/tokenize", {"prompt": "the weather"}).json()["tokens"]
    by_text = client.completions.create(model="nano", prompt=["the weather", "Paris"], max_tokens=6, temperature=0, n=2)
    by_ids = client.completions.create(model="nano", prompt=[ids], max_tokens=6, temperature=0)
    assert [choice.index for choice in by_text.choices] == [0, 1, 2, 3]
    assert by_text.choices[0].text == by_text.choices[1].text == by_ids.choices[0].text
    assert by_text.choices[2].text == by_text.choices[3].text
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(
        model="nano", prompt=["the weather", "Paris"], max_tokens=6, temperature=0, n=2, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in by_text.choices]


def test_an_echo_scores_the_prompt(live: LiveServer, client: openai.OpenAI) -> None:
    """What lm-eval sends to score a text: catches records that are off by one against a chain of single questions."""
    ids = live.post("/tokenize", {"prompt": "the weather in Paris"}).json()["tokens"]
    echoed = client.completions.create(model="nano", prompt=[ids], max_tokens=1, temperature=0, logprobs=1, echo=True)
    logprobs = echoed.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert len(logprobs.token_logprobs) == len(ids) + 1
    for end in range(1, len(ids)):
        step = live.post("/v1/completions", {"prompt": ids[:end], "max_tokens": 1, "temperature": 0, "logprobs": 20})
        best = step.json()["choices"][0]["logprobs"]["top_logprobs"][0]
        assert max(logprobs.top_logprobs[end].values()) == pytest.approx(max(best.values()), abs=1e-4)


def test_models_and_errors(client: openai.OpenAI) -> None:
    """Catches errors that the client cannot read."""
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'"):
        client.chat.completions.create(model="nano", messages=MESSAGES, extra_body={"temprature": 1})
    with pytest.raises(openai.BadRequestError, match="room for") as error:
        client.chat.completions.create(model="nano", messages=MESSAGES, max_tokens=100_000)
    assert error.value.code == "context_length_exceeded"


def test_responses(client: openai.OpenAI) -> None:
    """Catches events that the client cannot put together to the answer that it gets in one piece."""
    schema = {"enum": ["the weather in Paris is fine", "warm"]}
    options = {
        "model": "nano",
        "input": "the weather",
        "temperature": 0,
        "text": {"format": {"type": "json_schema", "name": "words", "schema": schema}},
    }
    whole = client.responses.create(**options)
    assert whole.status == "completed"
    with client.responses.stream(**options) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text
    assert json.loads(text) in schema["enum"]
    said = [item.model_dump() for item in final.output]
    question = {"role": "user", "content": "Paris"}
    cut = client.responses.create(
        model="nano", input=[{"role": "user", "content": "the"}, *said, question], max_output_tokens=3
    )
    assert cut.usage is not None
    assert (cut.status, cut.usage.output_tokens) == ("incomplete", 3)
    with pytest.raises(openai.BadRequestError, match="send the whole conversation"):
        client.responses.create(**options, previous_response_id="resp_1")


def test_messages(claude: anthropic.Anthropic) -> None:
    """Catches blocks and events that Anthropic's client cannot read, and counts that are not the prompt's."""
    options = {
        "model": "nano",
        "messages": MESSAGES,
        "max_tokens": 16,
        "system": "Be warm.",
        "extra_body": {"temperature": 0.0},
    }
    whole = claude.messages.create(**options)
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 16
    with claude.messages.stream(**options) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text  # type: ignore[union-attr]
    counted = claude.messages.count_tokens(model="nano", messages=MESSAGES, system="Be warm.")  # type: ignore[arg-type]
    cached = final.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == final.usage.input_tokens + cached
    with pytest.raises(anthropic.NotFoundError, match="is not served here"):
        claude.messages.create(**{**options, "model": "other"})


def test_messages_with_tools(claude: anthropic.Anthropic) -> None:
    """Catches results of tools that are lost on the way into the conversation."""
    tool = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
    conversation = [
        {"role": "user", "content": "the weather"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "warm", "signature": ""},
                {"type": "text", "text": "fine"},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "18"}]},
    ]
    counts = [
        claude.messages.count_tokens(model="nano", messages=conversation[:size], tools=[tool]).input_tokens  # type: ignore[arg-type]
        for size in (1, 3)
    ]
    assert counts[1] > counts[0] + 20
    answer = claude.messages.create(model="nano", messages=conversation, tools=[tool], max_tokens=4)  # type: ignore[arg-type]
    assert answer.usage.output_tokens <= 4


def test_messages_that_must_call(claude: anthropic.Anthropic) -> None:
    """Catches inputs that come in pieces which do not join to the whole, and a choice that is only a wish."""
    tool = {"name": "weather", "input_schema": TOOL["function"]["parameters"]}  # type: ignore[index]
    days = {
        "name": "days",
        "input_schema": {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]},
    }
    for choice, name in (({"type": "any"}, None), ({"type": "tool", "name": "days"}, "days")):
        options = {
            "model": "nano", "messages": MESSAGES, "max_tokens": 120, "tools": [tool, days], "tool_choice": choice,
            "extra_body": {"temperature": 0.0},
        }  # fmt: skip
        whole = claude.messages.create(**options)
        with claude.messages.stream(**options) as stream:
            final = stream.get_final_message()
        blocks = [[(block.name, block.input) for block in each.content] for each in (whole, final)]
        if whole.stop_reason == "tool_use":
            assert blocks[0] == blocks[1]
        assert final.stop_reason == whole.stop_reason
        assert blocks[0][0][0] == (name or blocks[1][0][0])
        if name is not None:
            assert whole.stop_reason == "tool_use"
            assert blocks[0][0][1]["n"] in (1, 2)


def test_responses_that_must_call(client: openai.OpenAI) -> None:
    """Catches events of calls that the client cannot put together."""
    parameters = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    tool = {"type": "function", "name": "days", "parameters": parameters, "strict": False}
    options = {"model": "nano", "input": "the weather", "temperature": 0, "tools": [tool], "tool_choice": "required"}
    whole = client.responses.create(**options, parallel_tool_calls=False, max_output_tokens=100)  # type: ignore[call-overload]
    with client.responses.stream(**options, parallel_tool_calls=False, max_output_tokens=100) as stream:  # type: ignore[call-overload]
        text = "".join(event.delta for event in stream if event.type == "response.function_call_arguments.delta")
        final = stream.get_final_response()
    (item,) = whole.output
    assert item.arguments == text == final.output[0].arguments
    assert json.loads(text)["n"] in (1, 2)
    assert item.status == "completed"
