"""Batches, chunks, prefix cache, forks, aborts and preemption, on a runner whose logits show what the caches hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from fake_runner import FakeRunner, next_logits, plain_routes, plain_text

from openmimo.engine import Engine, SamplingParams, StepInput
from openmimo.engine.prefix import MIN_CACHED_TOKENS
from openmimo.errors import RequestError

GREEDY = SamplingParams(max_tokens=30, ignore_eos=True, routed_experts=True)


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 23, length).tolist() for length in lengths]


def make(
    draft_heads: int | str = 3, *, num_rows: int = 4, num_pages: int = 40, step_tokens: int = 64, **options
) -> tuple[Engine, FakeRunner]:
    runner = FakeRunner(
        num_rows=num_rows,
        num_pages=num_pages,
        max_step_tokens=step_tokens,
        checks_heads=options.pop("checks_heads", draft_heads != "auto"),
        hit_share=options.pop("hit_share", 0.7),
    )
    options = {"snapshot_tokens": 32, "max_batch": num_rows, "step_tokens": step_tokens, **options}
    return Engine(runner, draft_heads=draft_heads, **options), runner


@pytest.mark.parametrize("draft_heads", [0, 1, 2, 3, "auto"])
@pytest.mark.parametrize("num_pages", [4, 40])
def test_text_and_routes_depend_on_nothing_but_the_prompt(draft_heads: int | str, num_pages: int) -> None:
    """Batch sizes x step sizes x chunk sizes x cache on and off, twice each so that the cache is used.

    Catches rows, pages, positions or snapshots mixed up, heads that skip positions (the runner looks), and leaks.
    """
    prompts = prompts_of(1, 2, 5, 63, 64, 65, 100, 130, 17)
    texts = [plain_text(prompt, 30) for prompt in prompts]
    for num_rows, step_tokens, chunk, cache in itertools.product((1, 7), (8, 200), (5, None), (0, 1 << 20)):
        engine, _ = make(
            draft_heads,
            num_rows=num_rows,
            num_pages=num_pages,
            step_tokens=step_tokens,
            chunk_tokens=chunk,
            prefix_cache_bytes=cache,
        )
        for _ in range(2):
            done = engine.generate(prompts, GREEDY)
            assert [each.token_ids for each in done] == texts, (num_rows, step_tokens, chunk, cache)
            for prompt, each in zip(prompts, done, strict=True):
                assert each.routed_experts is not None
                assert each.routed_experts.tolist() == plain_routes([*prompt, *each.token_ids[:-1]]).tolist()
        engine.clear_prefix_cache()
        assert engine.used_cache_bytes == 0
        assert not engine.has_work


def test_a_step_holds_prompts_and_answers_within_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches prompts that stop the answers in progress, and chunks that ignore the limit."""
    engine, runner = make(0, step_tokens=20, chunk_tokens=9, prefix_cache_bytes=0)
    steps: list[list[int]] = []
    genuine = runner.forward

    def forward(step: StepInput):
        steps.append(step.counts_S.tolist())
        return genuine(step)

    monkeypatch.setattr(runner, "forward", forward)
    engine.generate(prompts_of(3, 40), GREEDY)
    assert steps[:6] == [[3, 6], [1, 9], [1, 9], [1, 9], [1, 7], [1, 1]]


def test_a_repeated_prompt_is_not_computed_again() -> None:
    """Catches a cache that is never hit, or that recomputes the last token although its logits are known."""
    engine, runner = make(0, prefix_cache_bytes=1 << 20)
    (prompt,) = prompts_of(50)
    first = engine.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))[0]
    before = runner.num_forwards
    second = engine.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))[0]
    assert (first.token_ids, first.num_cached_tokens, second.num_cached_tokens) == (second.token_ids, 0, 50)
    assert runner.num_forwards == before


@pytest.mark.parametrize("draft_heads", [0, 3])
def test_a_conversation_goes_on_from_where_its_last_answer_ended(draft_heads: int) -> None:
    """Catches snapshots of answers that hold rejected drafts, or heads that miss positions at the seam."""
    engine, _ = make(draft_heads, prefix_cache_bytes=1 << 20)
    ids = prompts_of(40)[0]
    for turn in range(6):
        (done,) = engine.generate([ids], GREEDY)
        assert done.token_ids == plain_text(ids, 30)
        assert done.num_cached_tokens == (len(ids) - 4 if turn else 0)  # the last token of an answer was not fed
        ids = [*ids, *done.token_ids, 1, 2, 3]


def test_an_answer_that_stopped_inside_its_window_leaves_its_own_tokens_only() -> None:
    """Catches snapshots that count right drafts behind a stop token as part of the text."""
    engine, _ = make(3, hit_share=1.0, prefix_cache_bytes=1 << 20)
    for prompt in prompts_of(*range(30, 46)):
        text = plain_text(prompt, 12)
        place = next(i for i in range(1, 12) if text[i] not in text[:i])
        params = SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=(text[place],))
        (done,) = engine.generate([prompt], params)
        assert done.token_ids == text[: place + 1]
        # A prompt that ends where the answer's cache did has no logits yet; one that goes on does not need them.
        for further in ([*prompt, *text[:place]], [*prompt, *text[: place + 1], 5]):
            (after,) = engine.generate([further], GREEDY)
            assert after.token_ids == plain_text(further, 30)


def test_snapshots_keep_what_the_model_gave_before_penalties() -> None:
    """Catches one request's penalties in another's first token."""
    engine, _ = make(0, prefix_cache_bytes=1 << 20)
    (prompt,) = prompts_of(40)
    (first,) = plain_text(prompt, 1)
    biased = SamplingParams(max_tokens=1, ignore_eos=True, logit_bias={first: -100.0})
    assert engine.generate([prompt], biased)[0].token_ids != (first,)
    done = engine.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))[0]
    assert (done.token_ids, done.num_cached_tokens) == ((first,), 40)


def test_a_shared_beginning_is_taken_up_at_a_boundary() -> None:
    """Catches snapshots that depend on the tokens after them, and hits beyond the shared part."""
    engine, _ = make(3, prefix_cache_bytes=1 << 20)
    shared, ends = prompts_of(70)[0], prompts_of(40, 9, 3, seed=1)
    reused = []
    for end in ends:
        (done,) = engine.generate([[*shared, *end]], GREEDY)
        assert done.token_ids == plain_text([*shared, *end], 30)
        reused.append(done.num_cached_tokens)
    assert reused == [0, 64, 64]


def test_the_cache_keeps_to_its_bytes_and_counts_shared_pages_once() -> None:
    """Catches a budget that is passed, and entries whose pages are never given back."""
    engine, runner = make(0, num_pages=40, prefix_cache_bytes=9000)
    prefix = engine._core.prefix
    assert prefix is not None
    for prompt in prompts_of(*range(20, 200, 17)):
        engine.generate([prompt], GREEDY)
        pages = {page for entry in prefix.entries.values() for page in entry.pages}
        own = sum(entry.own_bytes for entry in prefix.entries.values())
        assert prefix.num_bytes == own + len(pages) * runner.page_bytes <= 9000
        assert engine.used_cache_bytes == len(pages) * runner.page_bytes
    assert prefix.entries
    assert all(entry.length >= MIN_CACHED_TOKENS for entry in prefix.entries.values())


def test_choices_share_the_prompt_and_draw_from_streams_of_their_own() -> None:
    """Catches a prompt that is computed n times, choices with equal numbers, and forks that write into each other."""
    engine, runner = make(0, num_rows=3, prefix_cache_bytes=0)
    (prompt,) = prompts_of(61)
    greedy = engine.generate([prompt], SamplingParams(max_tokens=20, n=5, ignore_eos=True))
    assert [each.token_ids for each in greedy] == [plain_text(prompt, 20)] * 5
    assert [each.choice for each in greedy] == [0, 1, 2, 3, 4]
    assert [each.num_cached_tokens for each in greedy] == [0, 61, 61, 61, 61]
    params = SamplingParams(temperature=1.0, max_tokens=20, n=5, seed=3, ignore_eos=True)
    before = runner.num_forwards
    drawn = [each.token_ids for each in engine.generate([prompt], params)]
    assert runner.num_forwards - before == 1 + 19 + 19  # one for the prompt; three choices at once, then two
    assert len(set(drawn)) == 5
    single = SamplingParams(temperature=1.0, max_tokens=20, seed=3, ignore_eos=True)
    assert engine.generate([prompt], single)[0].token_ids == drawn[0]
    assert engine.used_cache_bytes == 0


@pytest.mark.parametrize("draft_heads", [0, 3, "auto"])
def test_a_stopped_sequence_is_computed_again_without_a_trace(draft_heads: int | str) -> None:
    """Catches preemption that loses or repeats tokens, records or random numbers."""
    prompts = prompts_of(50, 60, 70)
    params = SamplingParams(
        temperature=0.8, top_p=0.9, presence_penalty=0.3, max_tokens=120, seed=1, ignore_eos=True, logprobs=True
    )
    roomy, _ = make(draft_heads, prefix_cache_bytes=0)
    tight, _ = make(draft_heads, num_pages=5, prefix_cache_bytes=0)
    expected = roomy.generate(prompts, params)
    assert roomy._core.scheduler.num_preemptions == 0
    for mine, other in zip(tight.generate(prompts, params), expected, strict=True):
        assert (mine.token_ids, mine.logprobs) == (other.token_ids, other.logprobs)
    assert tight._core.scheduler.num_preemptions > 0
    assert tight.used_cache_bytes == 0


def test_requests_step_by_step_beside_each_other() -> None:
    """Catches events that are lost when `generate` and `stream` run between steps, and aborts that stop others."""
    engine, _ = make(2, prefix_cache_bytes=0)
    prompts = prompts_of(10, 20, 30, 5)
    texts = [plain_text(prompt, 30) for prompt in prompts]
    ids = [engine.add_request(prompt, GREEDY) for prompt in prompts[:3]]
    got: dict[int, list[int]] = {request_id: [] for request_id in ids}
    finished = {}
    (between,) = engine.generate(prompts[3:], GREEDY)
    assert between.token_ids == texts[3]
    engine.abort(ids[1])
    engine.abort(ids[1])
    stream = engine.stream(prompts[3], GREEDY)
    assert next(stream).token_ids == texts[3][:1]
    stream.close()
    while engine.has_work:
        for event in engine.step():
            got[event.request_id] += event.token_ids
            if event.completion is not None:
                finished[event.request_id] = event.completion.token_ids
    assert tuple(got[ids[0]]) == finished[ids[0]] == texts[0]
    assert tuple(got[ids[2]]) == finished[ids[2]] == texts[2]
    assert ids[1] not in finished
    assert engine.used_cache_bytes == 0
    assert engine.step() == []


@pytest.mark.parametrize("max_tokens", [1, 2, 6])
def test_steps_without_pieces_finish_every_answer_once(max_tokens: int) -> None:
    """Catches an answer that is told twice because one step gave it two emissions: a known text's first token, then
    the next."""
    engine, _ = make(1, num_rows=4)
    prompts = [*prompts_of(70, 70, 9)] * 2  # the second time from the prefix cache
    params = SamplingParams(max_tokens=max_tokens, n=3, ignore_eos=True, temperature=1.0, seed=5)
    other, _ = make(1, num_rows=4)
    expected = [one for prompt in prompts for one in other.generate([prompt], params)]
    done: list[tuple[int, int, tuple[int, ...]]] = []
    for part in (prompts[:3], prompts[3:]):
        for prompt in part:
            engine.add_request(prompt, params)
        while engine.has_work:
            done += [(number, one.choice, tuple(one.token_ids)) for number, one in engine.step_to_completions()]
    assert len(done) == len({(number, choice) for number, choice, _ in done})
    assert [ids for _, _, ids in sorted(done)] == [tuple(one.token_ids) for one in expected]


def test_aborting_choices_at_any_moment_frees_everything() -> None:
    """Catches pages held by choices that never started."""
    (prompt,) = prompts_of(70)
    for num_steps in range(12):
        engine, _ = make(1, num_rows=2, prefix_cache_bytes=0)
        request_id = engine.add_request(prompt, SamplingParams(max_tokens=6, n=5, ignore_eos=True))
        for _ in range(num_steps):
            engine.step()
        engine.abort(request_id)
        assert engine.used_cache_bytes == 0
        assert not engine._core.scheduler.has_work


def test_what_can_never_fit_is_refused_and_what_fits_exactly_runs() -> None:
    """Catches a queue that waits for ever for pages that do not exist."""
    engine, _ = make(3, num_pages=2, prefix_cache_bytes=1 << 20)
    with pytest.raises(RequestError, match="cache holds 128"):
        engine.generate(prompts_of(128), GREEDY)
    for _ in range(2):
        (done,) = engine.generate(prompts_of(127), GREEDY)
        assert (done.finish_reason, len(done.token_ids)) == ("length", 1)
        (done,) = engine.generate(prompts_of(100), GREEDY)
        assert len(done.token_ids) == 28
        assert done.token_ids == plain_text(prompts_of(100)[0], 28)


def test_drafts_join_sampling_with_every_option() -> None:
    """Catches drafts verified against the wrong random number, penalty state or filter."""
    prompts = prompts_of(5, 30, 64)
    options = [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.2, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.9, "presence_penalty": 0.8, "frequency_penalty": 0.2},
        {"repetition_penalty": 1.3},
        {"temperature": 1.0, "logit_bias": {4: 3.0, 7: -100.0}},
        {"temperature": 0.6, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "frequency_penalty": 0.4},
    ]
    for option in options:
        params = SamplingParams(max_tokens=60, seed=5, ignore_eos=True, logprobs=True, top_logprobs=3, **option)
        plain = make(0)[0].generate(prompts, params)
        for heads in (1, 3, "auto"):
            drafted = make(heads, num_rows=2)[0].generate(prompts, params)
            for mine, other in zip(drafted, plain, strict=True):
                assert mine.token_ids == other.token_ids, option
                assert mine.logprobs == other.logprobs
                assert mine.top_logprobs == other.top_logprobs
        if "logit_bias" in option:
            assert all(7 not in each.token_ids for each in plain)


def test_rejected_drafts_are_no_part_of_the_statistics() -> None:
    """Catches acceptance that is counted over the wrong steps; good drafts save steps."""
    (prompt,) = prompts_of(20)
    for share, length in ((0.0, 1.0), (1.0, 4.0)):
        (done,) = make(3, hit_share=share)[0].generate([prompt], SamplingParams(max_tokens=41, ignore_eos=True))
        assert done.token_ids == plain_text(prompt, 41)
        assert done.draft.acceptance_length == length
        assert done.draft.num_steps == 40 / length
        assert done.draft.proposed[0] == (39 if share == 0.0 else 10)
        assert done.draft.verify_seconds > 0 < done.draft.draft_seconds
    logits = next_logits(prompt)
    assert logits.argmax() == done.token_ids[0]
