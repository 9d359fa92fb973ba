"""Programs that people put before a server: lm-eval, LiteLLM and LangChain, against a live one (`make clients`)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from server_fakes import LiveServer, serving, small_engine

from openmimo.text import Tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "days",
        "description": "Count the days.",
        "parameters": {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]},
    },
}
pytestmark = pytest.mark.filterwarnings("ignore")


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(module) is None, reason=f"{module} is not installed; `make clients` does it")


@pytest.fixture(scope="module")
def keyed(tokenizer: Tokenizer) -> Iterator[LiveServer]:
    """A server with a key, as most stand behind one."""
    with serving(small_engine(tokenizer), model_name="nano", api_key="secret") as server:
        yield server


# --------------------------------------------------------------------------------------------------------- lm-eval


@pytest.fixture
def local_task(tmp_path: Path) -> Path:
    """A folder with two tasks: words to choose among, and answers to write."""
    rows = [{"question": f"the weather in Paris {n}", "choices": [" fine", " warm"], "gold": n % 2} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\ntest_split: test\n"
    (tmp_path / "choose.yaml").write_text(
        f"task: choose\n{shared}output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
        "target_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    (tmp_path / "write.yaml").write_text(
        f"task: write\n{shared}output_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[gold]}}"\n'
        'generation_kwargs:\n  until: ["\\n\\n"]\n  max_gen_toks: 8\n  do_sample: false\n'
        "metric_list:\n  - metric: exact_match\n"
    )
    return tmp_path


def lm_eval(live: LiveServer, model: str, route: str, tasks: Path, task: str, *more: str) -> dict[str, Any]:
    """The whole command, and what it wrote."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "secret"}
    environment |= {"HF_HOME": str(tasks / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    arguments = ",".join(["model=nano", f"base_url={live.url}{route}", "num_concurrent=2", "max_retries=1", *more])
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", task]
    command += ["--include_path", str(tasks), "--output_path", str(tasks / "out"), "--log_samples", "--batch_size", "4"]
    if model == "local-chat-completions":
        command[command.index("--batch_size") + 1 :] = ["1", "--apply_chat_template"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tasks / "out").rglob("results_*.json")
    (samples,) = (tasks / "out").rglob(f"samples_{task}_*.jsonl")
    return {
        "results": json.loads(results.read_text())["results"][task],
        "samples": [json.loads(line) for line in samples.read_text().splitlines()],
    }


@needs("lm_eval")
def test_lm_eval_scores_choices(keyed: LiveServer, local_task: Path) -> None:
    """Catches log-probabilities that lm-eval reads at the wrong place, by the engine's own."""
    folder = local_task / "tokenizer"
    keyed.service.tokenizer.save(folder)
    found = lm_eval(keyed, "local-completions", "/v1/completions", local_task, "choose", f"tokenizer={folder}")
    assert 0 <= found["results"]["acc,none"] <= 1
    assert len(found["samples"]) == 6
    tokenizer = keyed.service.tokenizer
    for sample in found["samples"]:
        for choice, ((logprob, _),) in zip((" fine", " warm"), sample["resps"], strict=True):
            context = tokenizer.encode(sample["doc"]["question"])
            whole = tokenizer.encode(sample["doc"]["question"] + choice)
            body = {"prompt": whole, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
            answer = keyed.post("/v1/completions", body, headers={"Authorization": "Bearer secret"}).json()
            scores = answer["choices"][0]["logprobs"]["token_logprobs"][len(context) : len(whole)]
            assert math.isclose(float(logprob), sum(scores), rel_tol=1e-3, abs_tol=1e-3)


@needs("lm_eval")
def test_lm_eval_writes_answers(keyed: LiveServer, local_task: Path) -> None:
    """Catches options of its chat requests that are refused."""
    found = lm_eval(keyed, "local-chat-completions", "/v1/chat/completions", local_task, "write")
    assert all(len(sample["resps"][0][0]) > 0 for sample in found["samples"])
    assert len(found["samples"]) == 6


# --------------------------------------------------------------------------------------------------------- LiteLLM


@needs("litellm")
def test_litellm(keyed: LiveServer) -> None:
    """Catches answers, streams, calls and errors that it does not understand."""
    import litellm

    where = {"model": "openai/nano", "api_base": f"{keyed.url}/v1", "api_key": "secret", "num_retries": 0}
    messages = [{"role": "user", "content": "the weather"}]
    options = {**where, "messages": messages, "max_tokens": 12, "temperature": 0.0}
    whole = litellm.completion(**options)
    assert whole.usage.completion_tokens <= 12
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**options, stream=True)]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3
    forced = litellm.completion(**{**options, "max_tokens": 100}, tools=[TOOL], tool_choice="required", n=1)
    call = forced.choices[0].message.tool_calls[0].function
    assert call.name == "days"
    assert json.loads(call.arguments)["n"] in (1, 2)
    chunks = list(
        litellm.completion(**{**options, "max_tokens": 100}, tools=[TOOL], tool_choice="required", stream=True)
    )
    built = litellm.stream_chunk_builder(chunks, messages=messages)
    assert built.choices[0].message.tool_calls[0].function.arguments == call.arguments
    assert litellm.text_completion(**where, prompt="the weather", max_tokens=4).choices[0].text
    with pytest.raises(litellm.exceptions.AuthenticationError):
        litellm.completion(**{**options, "api_key": "wrong"})
    with pytest.raises(litellm.exceptions.BadRequestError, match="top_k"):
        litellm.completion(**options, extra_body={"top_k": -5})
    other = {"model": "anthropic/nano", "api_base": keyed.url, "api_key": "secret", "num_retries": 0}
    said = litellm.completion(**other, messages=messages, max_tokens=6, temperature=0.0)
    assert said.usage.completion_tokens <= 6


# ------------------------------------------------------------------------------------------------------- LangChain


@needs("langchain_openai")
def test_langchain(keyed: LiveServer) -> None:
    """Catches answers, streams, bound tools and schemas that it does not understand."""
    from langchain_openai import ChatOpenAI, OpenAI

    where = {"base_url": f"{keyed.url}/v1", "api_key": "secret", "model": "nano", "max_retries": 0}
    model = ChatOpenAI(**where, temperature=0, max_completion_tokens=100)  # type: ignore[arg-type]
    whole = model.invoke("the weather")
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] <= 100
    assert "".join(str(chunk.content) for chunk in model.stream("the weather")) == whole.content
    called = model.bind_tools([TOOL], tool_choice="required", parallel_tool_calls=False).invoke("the weather")
    (call,) = called.tool_calls
    assert call["name"] == "days"
    assert call["args"]["n"] in (1, 2)
    gathered = None
    for chunk in model.bind_tools([TOOL], tool_choice="days").stream("the weather"):
        gathered = chunk if gathered is None else gathered + chunk
    assert gathered is not None
    assert gathered.tool_calls[0]["args"]["n"] in (1, 2)
    schema = {"title": "Days", "type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    for method in ("json_schema", "function_calling"):
        found = model.with_structured_output({**schema, "additionalProperties": False}, method=method).invoke("the")
        assert found["n"] in (1, 2)
    texts = ["the", "weather", "in Paris", "the weather of the world"]
    alone = [model.invoke(text).content for text in texts]
    assert len(set(map(str, alone))) > 1
    assert [answer.content for answer in model.batch(texts)] == alone  # type: ignore[arg-type]
    plain = OpenAI(**where, temperature=0, max_tokens=6)  # type: ignore[arg-type]
    assert plain.invoke("the weather")
    again = ChatOpenAI(**where, use_responses_api=True, temperature=0, max_tokens=8)  # type: ignore[call-arg,arg-type]
    assert again.invoke("the weather").content
