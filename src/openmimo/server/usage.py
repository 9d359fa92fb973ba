"""What an answer cost, under the names of OpenAI (`usage`), vLLM (`metrics`) and llama.cpp (`timings`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openmimo.engine import Completion, DraftStats
from openmimo.server.service import Service
from openmimo.server.worker import Ticket


def usage_of(service: Service, tickets: Sequence[Ticket]) -> dict[str, Any]:
    """OpenAI's object. A prompt with several answers counts once."""
    answers = [completion for ticket in tickets for completion in ticket.completions]
    prompt = sum(len(ticket.prompt) for ticket in tickets)
    written = sum(len(completion.token_ids) for completion in answers)
    draft = DraftStats.merge(completion.draft for completion in answers)
    cached = sum(
        min((completion.num_cached_tokens for completion in ticket.completions), default=0) for ticket in tickets
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "reasoning_tokens": sum(service.num_reasoning_tokens(completion.token_ids) for completion in answers),
            "accepted_prediction_tokens": draft.num_accepted,
            "rejected_prediction_tokens": draft.num_proposed - draft.num_accepted,
        },
    }


def statistics_of(tickets: Sequence[Ticket]) -> dict[str, Any]:
    """vLLM's and llama.cpp's objects, for the end of an answer."""
    answers = [completion for ticket in tickets for completion in ticket.completions]
    draft = DraftStats.merge(completion.draft for completion in answers)
    return {
        "metrics": {"speculative_decoding": speculation_of(draft)},
        "timings": timings_of(tickets, answers, draft),
    }


def speculation_of(draft: DraftStats) -> dict[str, Any]:
    """vLLM's names; `acceptance_per_head` and the seconds are ours."""
    proposed, accepted = draft.num_proposed, draft.num_accepted
    return {
        "mean_acceptance_length": draft.acceptance_length,
        "draft_acceptance_rate": accepted / proposed if proposed else 0.0,
        "acceptance_histogram": list(draft.histogram),
        "num_spec_steps": draft.num_steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": proposed,
        "num_spec_tokens": max(0, len(draft.histogram) - 1),
        "acceptance_per_head": list(draft.per_head),
        "draft_seconds": draft.draft_seconds,
        "verify_seconds": draft.verify_seconds,
    }


def timings_of(tickets: Sequence[Ticket], answers: Sequence[Completion], draft: DraftStats) -> dict[str, Any]:
    """llama.cpp's names. Waiting counts as time of the prompt."""
    cached = sum(completion.num_cached_tokens for completion in answers)
    prompt = sum(len(ticket.prompt) * len(ticket.completions) for ticket in tickets) - cached
    written = sum(len(completion.token_ids) for completion in answers)
    first = min((ticket.submitted_at for ticket in tickets), default=0.0)
    began = min((ticket.first_token_at for ticket in tickets), default=0.0)
    ended = max((ticket.finished_at for ticket in tickets), default=0.0)
    prompt_seconds, seconds = max(began - first, 1e-9), max(ended - began, 1e-9)
    return {
        "cache_n": cached,
        "prompt_n": prompt,
        "prompt_ms": 1e3 * prompt_seconds,
        "prompt_per_second": prompt / prompt_seconds,
        "predicted_n": written,
        "predicted_ms": 1e3 * seconds,
        "predicted_per_second": max(0, written - len(answers)) / seconds,
        "draft_n": draft.num_proposed,
        "draft_n_accepted": draft.num_accepted,
    }
