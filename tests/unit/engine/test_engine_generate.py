"""Requests, records, rows and streams."""

from __future__ import annotations

import pytest
import torch
from engine_fakes import (
    EOS,
    ByteCodec,
    awkward_prompts,
    generate_ids,
    make_engine,
    plant_drafts,
    small_config,
    small_model,
)

from openmimo.engine import DraftStats, Engine, SamplingParams, resolve_model_folder
from openmimo.engine.text import MOST_PENDING, Detokenizer
from openmimo.errors import RequestError
from openmimo.model import build_model


def test_a_refilled_row_gives_what_the_prompt_gives_alone() -> None:
    """Catches a row that inherits its predecessor's keys, history or place in the results."""
    model, prompts = small_model(), awkward_prompts(7)[::-1]
    alone = [generate_ids(make_engine(model), [prompt], 9)[0] for prompt in prompts]
    assert generate_ids(make_engine(model, max_batch=3), prompts, 9) == alone


def test_logprobs_and_routes_are_those_of_a_whole_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches records of rejected drafts, of padding or of the neighbouring row, and rows off by one."""
    model, prompts = small_model(), awkward_prompts(5)
    texts = generate_ids(make_engine(model, 0), prompts, 14)
    plant_drafts(monkeypatch, prompts, texts, lambda step, true_SK: true_SK if step % 2 else (true_SK + 1) % 256)
    params = SamplingParams(max_tokens=14, ignore_eos=True, logprobs=True, routed_experts=True)
    for prompt, done in zip(prompts, make_engine(model).generate(prompts, params), strict=True):
        with torch.inference_mode():
            output = model(torch.tensor([[*prompt, *done.token_ids[:-1]]]))
        expected = output.logits[0].log_softmax(-1)[len(prompt) - 1 :].gather(-1, torch.tensor(done.token_ids)[:, None])
        assert done.logprobs is not None
        torch.testing.assert_close(torch.tensor(done.logprobs), expected[:, 0], rtol=0, atol=1e-5)
        assert done.routed_experts is not None
        assert done.routed_experts.dtype == "uint8"
        assert done.routed_experts.tolist() == output.routed_experts[0].tolist()


def test_a_stop_token_inside_a_window_ends_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tokens, records and statistics that go on behind the stop token."""
    model, prompt = small_model(), [1, 2, 3]
    text = generate_ids(make_engine(model, 0), [prompt], 20)[0]
    place = next(i for i in range(2, 20) if i % 4 == 2 and text[i] not in text[:i])
    plant_drafts(monkeypatch, [prompt], [text], lambda step, true_SK: true_SK)
    params = SamplingParams(
        max_tokens=20, stop_token_ids=(text[place],), ignore_eos=True, logprobs=True, routed_experts=True
    )
    (done,) = make_engine(model, tokenizer=ByteCodec()).generate([prompt], params)
    assert done.token_ids == text[: place + 1]
    assert done.finish_reason == "stop"
    assert done.text == ByteCodec().decode(text[:place])
    assert done.logprobs is not None
    assert len(done.logprobs) == place + 1
    assert done.routed_experts is not None
    assert done.routed_experts.shape == (3 + place, 5, 2)
    assert done.draft.histogram == (0, 1, 0, place // 4)  # the last step counts up to its stop token, its second


def test_limits_cut_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches overshooting max_tokens or the model's last position, and a first token that is never checked."""
    model, prompt = small_model(max_positions=30), list(range(10))
    text = generate_ids(make_engine(model, 0), [prompt], 20)[0]
    assert len(text) == 20
    plant_drafts(monkeypatch, [prompt], [text], lambda step, true_SK: true_SK)
    for max_tokens, expected in ((1, 1), (2, 2), (7, 7), (100, 20)):
        (done,) = make_engine(model).generate([prompt], SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        assert (done.token_ids, done.finish_reason) == (text[:expected], "length")


def test_the_models_and_the_tokenizers_end_tokens_stop_unless_ignored() -> None:
    """Catches a chat that never ends."""
    model = small_model()
    (free,) = make_engine(model).generate([[4, 5]], SamplingParams(max_tokens=8, ignore_eos=True))
    ending = build_model(small_config(eos_token_ids=(free.token_ids[2],)), seed=0)
    ending.load_state_dict(model.state_dict())
    expected = free.token_ids[: free.token_ids.index(free.token_ids[2]) + 1]
    (done,) = make_engine(ending).generate([[4, 5]], SamplingParams(max_tokens=8))
    assert (done.token_ids, done.finish_reason) == (expected, "stop")
    codec = ByteCodec()
    codec.eos_token_ids = (free.token_ids[2],)
    (done,) = make_engine(model, tokenizer=codec).generate([[4, 5]], SamplingParams(max_tokens=8))
    assert (done.token_ids, done.finish_reason) == (expected, "stop")
    (done,) = make_engine(ending, tokenizer=codec).generate([[4, 5]], SamplingParams(max_tokens=8, ignore_eos=True))
    assert done.token_ids == free.token_ids


def test_stream_gives_the_same_text_and_says_which_head_proposed_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches events that lose, repeat or mislabel tokens."""
    model, prompt = small_model(), list(b"hello")
    engine = make_engine(model, tokenizer=ByteCodec())
    text = generate_ids(engine, [prompt], 11)[0]
    plant_drafts(monkeypatch, [prompt], [text], lambda step, true_SK: true_SK)
    events = list(engine.stream("hello", SamplingParams(max_tokens=11, ignore_eos=True)))
    assert [event.drafted for event in events] == [(None,), (0, 1, 2, None), (0, 1, 2, None), (0, None)]
    assert sum((event.token_ids for event in events), ()) == text
    final = events[-1].completion
    assert final is not None
    assert "".join(event.text for event in events) == final.text == ByteCodec().decode(text)
    assert all(event.completion is None for event in events[:-1])


@pytest.mark.parametrize("draft_heads", [0, 3])
def test_a_stop_text_ends_the_answer_and_is_never_shown(monkeypatch: pytest.MonkeyPatch, draft_heads: int) -> None:
    """Catches a stop text across tokens that is missed, shown in part, or taken back too much."""
    spell = b"the cat sat on the mat"
    monkeypatch.setattr(ByteCodec, "decode", lambda self, ids, skip_special=False: "".join(chr(i) for i in ids))
    engine = make_engine(small_model(), draft_heads, tokenizer=ByteCodec())
    genuine = engine.runner.forward

    def forward(step):  # whatever comes in, the next letter of the spell goes out
        output = genuine(step)
        positions = step.starts_S[0] + step.logits_M
        output.logits_MV[:] = 0
        for row, position in enumerate(positions):
            output.logits_MV[row, spell[position % len(spell)]] = 9
        return output

    monkeypatch.setattr(engine.runner, "forward", forward)
    for stop, text, tokens in (
        (("sat",), "the cat ", 11),
        (("mat", "on t"), "the cat sat ", 16),
        (("t o", "at on"), "the cat sa", 13),
        (("zebra",), "the cat sat on the mat", 22),
        (("mats",), "the cat sat on the mat", 22),
    ):
        params = SamplingParams(max_tokens=22, ignore_eos=True, stop=stop)
        events = list(engine.stream([7], params))
        final = events[-1].completion
        assert final is not None
        assert "".join(event.text for event in events) == final.text == text
        assert len(final.token_ids) == tokens
        assert final.finish_reason == ("stop" if tokens < 22 else "length")
        shown = ""
        for event in events:
            shown += event.text
            assert text.startswith(shown)


def test_detokenizer_never_shows_half_a_character() -> None:
    """Catches mojibake in a stream, and bytes that are held back for ever."""
    text = Detokenizer(ByteCodec())
    assert [text.push(byte) for byte in "aé€😀".encode()] == ["a", "", "é", "", "", "€", "", "", "", "😀"]
    assert text.push(0xE2) == ""
    assert text.flush() == "\ufffd"
    assert "".join(text.push(0x80) for _ in range(MOST_PENDING)) == "\ufffd" * MOST_PENDING


def test_sampling_is_reproducible_and_independent_of_the_batch() -> None:
    """Catches a random stream shared between rows, or one that depends on the company."""
    model, prompts = small_model(), awkward_prompts(6)
    params = SamplingParams(temperature=1.0, max_tokens=12, seed=7, ignore_eos=True)
    together = [done.token_ids for done in make_engine(model).generate(prompts, params)]
    assert together == [done.token_ids for done in make_engine(model, max_batch=2).generate(prompts, params)]
    same = [done.token_ids for done in make_engine(model).generate([prompts[0]] * 3, params)]
    assert same[0] == together[0]
    assert len(set(same)) == 3
    other = SamplingParams(temperature=1.0, max_tokens=12, seed=8, ignore_eos=True)
    assert make_engine(model).generate(prompts[:1], other)[0].token_ids != together[0]
    assert make_engine(model, 0).generate(prompts[:1], params)[0].token_ids == together[0]


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_vocabulary_rows_without_a_token_are_never_chosen(temperature: float) -> None:
    """Catches ids that the tokenizer cannot decode; the model has 320 rows, the tokenizer 40 tokens."""
    codec = ByteCodec()
    codec.vocab_size = 40
    params = SamplingParams(temperature=temperature, max_tokens=60, seed=0, ignore_eos=True)
    for heads in (0, 3):
        (done,) = make_engine(small_model(), heads, tokenizer=codec).generate([[1, 2, 3]], params)
        assert max(done.token_ids) < 40
    with pytest.raises(RequestError, match="logit_bias has ids"):
        make_engine(small_model(), tokenizer=codec).generate([[1]], SamplingParams(logit_bias={40: 1.0}))


def test_draft_statistics_add_up() -> None:
    stats = DraftStats.merge([DraftStats((2, 1, 0, 1)), DraftStats(()), DraftStats((1, 0, 0, 3))])
    assert stats.histogram == (3, 1, 0, 4)
    assert stats.num_steps == 8
    assert stats.acceptance_length == (3 * 1 + 1 * 2 + 4 * 4) / 8
    assert stats.per_head == (5 / 8, 4 / 8, 4 / 8)
    assert DraftStats().acceptance_length == 1.0


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias"),
        ({"n": 0}, "n=0"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_senseless_options_are_refused(changes: dict[str, object], word: str) -> None:
    with pytest.raises(RequestError, match=word):
        SamplingParams(**changes)


def test_senseless_prompts_and_engines_are_refused() -> None:
    """Catches an index error deep inside the model in place of a clear message."""
    model = small_model(max_positions=16)
    engine = make_engine(model)
    for prompt, word in (([], "no tokens"), ([0] * 16, "16 positions"), ([EOS + 9999], "vocabulary"), ([-1], "vocab")):
        with pytest.raises(RequestError, match=word):
            engine.generate([prompt])
    with pytest.raises(RequestError, match="no tokenizer"):
        engine.generate(["text"])
    with pytest.raises(RequestError, match="3 MTP heads"):
        Engine(model, draft_heads=4)
    with pytest.raises(RequestError, match="did you mean 'torch'"):
        Engine(model, runner="torhc")
    with pytest.raises(RequestError, match="max_batch"):
        Engine(model, max_batch=0)
    dense = small_model(layer_is_moe=(False,) * 6)
    with pytest.raises(RequestError, match="no sparse layers"):
        make_engine(dense).generate([[1]], SamplingParams(routed_experts=True))
    assert engine.generate([]) == []


def test_with_drafts_shares_the_model_and_leaves_the_original_alone() -> None:
    engine = make_engine(small_model())
    plain = engine.with_drafts(0)
    assert (engine.draft_heads, plain.draft_heads) == (3, 0)
    assert plain.runner is engine.runner
    auto = plain.with_drafts("auto")
    assert (auto.draft_heads, auto.adaptive, plain.adaptive) == (3, True, False)


def test_a_run_folder_resolves_to_its_model(tmp_path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    assert resolve_model_folder(tmp_path / "run") == tmp_path / "run" / "model"
    (tmp_path / "run" / "config.json").write_text("{}")
    assert resolve_model_folder(tmp_path / "run") == tmp_path / "run"
