"""Prometheus metrics under the names that vLLM's dashboards use, with our prefix.

What is counted of tokens and drafts is counted when a request ends, from the same records as its usage.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from openmimo.engine import EngineLoad
from openmimo.server.worker import Ticket

PREFIX = "openmimo:"
SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class ServerMetrics:
    """A registry of its own, so that several servers may live in one process."""

    def __init__(self, *, num_heads: int) -> None:
        self.registry = registry = CollectorRegistry()
        self.num_heads = num_heads

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(PREFIX + name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, registry=registry, buckets=buckets)

        self.requests = counter("request_success", "Answers that were finished.", "finished_reason")
        self.failures = counter("request_failure", "Requests that ended without all answers.", "reason")
        self.refused = counter("http_requests_refused", "Requests that were refused.", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts of finished answers.")
        self.generation_tokens = counter("generation_tokens", "Tokens of finished answers.")
        self.cached_tokens = counter("prefix_cache_hits", "Prompt tokens that came from the prefix cache.")
        self.drafts = counter("spec_decode_num_drafts", "Steps that verified drafts.")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Drafts that were verified.")
        self.accepted_tokens = counter("spec_decode_num_accepted_tokens", "Drafts that were kept.")
        self.accepted_at = counter("spec_decode_num_accepted_tokens_per_pos", "Kept drafts by head.", "position")
        self.first_token = histogram("time_to_first_token_seconds", "From request to first token.", SECONDS)
        self.per_token = histogram("inter_token_latency_seconds", "Mean time per token after the first.", STEP_SECONDS)
        self.whole = histogram("e2e_request_latency_seconds", "From request to last token.", SECONDS)
        self.running = gauge("num_requests_running", "Answers that are written.")
        self.waiting = gauge("num_requests_waiting", "Answers that wait.")
        self.cache = gauge("kv_cache_usage_perc", "Share of the cache in use, 0 to 1.", "pool")
        self.preemptions = gauge("num_preemptions", "Answers that were put back, since the start.")
        for head in range(num_heads):
            self.accepted_at.labels(str(head))

    def observe(self, ticket: Ticket) -> None:
        """A request has ended."""
        for completion in ticket.completions:
            draft = completion.draft
            self.requests.labels(completion.finish_reason).inc()
            self.prompt_tokens.inc(len(ticket.prompt))
            self.cached_tokens.inc(completion.num_cached_tokens)
            self.generation_tokens.inc(len(completion.token_ids))
            self.drafts.inc(draft.num_drafting_steps)
            self.draft_tokens.inc(draft.num_proposed)
            self.accepted_tokens.inc(draft.num_accepted)
            for head in range(1, len(draft.histogram)):
                self.accepted_at.labels(str(head - 1)).inc(sum(draft.histogram[head:]))
        if ticket.error is not None:
            self.failures.labels(ticket.error.code or str(ticket.error.status)).inc()
            return
        self.first_token.observe(ticket.first_token_at - ticket.submitted_at)
        self.whole.observe(ticket.finished_at - ticket.submitted_at)
        later = sum(len(completion.token_ids) for completion in ticket.completions) - ticket.num_choices
        if later > 0:
            each = (ticket.finished_at - ticket.first_token_at) * ticket.num_choices / later
            self.per_token.observe(each)

    def exposition(self, load: EngineLoad) -> bytes:
        """All metrics as text."""
        self.running.set(load.num_running)
        self.waiting.set(load.num_waiting)
        self.preemptions.set(load.num_preemptions)
        self.cache.labels("full").set(load.page_bytes / max(1, load.page_bytes_total))
        self.cache.labels("swa").set(load.ring_bytes / max(1, load.ring_bytes_total))
        return generate_latest(self.registry)
