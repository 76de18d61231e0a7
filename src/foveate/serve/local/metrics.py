"""What a server did, for Prometheus: requests, tokens before and after, seconds to a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from foveate.serve.local.jobs import Job

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry, "namespace": "foveate"}
        self.requests = Counter("requests", "Requests by path and HTTP status.", ("path", "status"), **made)
        self.visual = Counter(
            "visual_tokens", "Visual tokens of answered requests, before and after pruning.", ("when",), **made
        )
        self.prompts = Counter("prompt_tokens", "Tokens that the decoder saw of prompts.", **made)
        self.answers = Counter("answer_tokens", "Tokens of answers.", **made)
        self.first = Histogram(
            "first_token_seconds", "From a request's turn to its first token.", buckets=_FIRST, **made
        )
        self.next = Histogram("per_token_seconds", "From one token to the next.", buckets=_NEXT, **made)
        self.queue = Gauge("requests_in_hand", "Requests that run or wait.", **made)

    def watch(self, count: Callable[[], int]) -> None:
        """Read the number of requests in hand where it is kept."""
        self.queue.set_function(count)

    def counted(self, path: str, status: int) -> None:
        """Count a request that has been answered, or refused."""
        self.requests.labels(path, str(status)).inc()

    def answered(self, job: Job) -> None:
        """Take the figures of a job that is done."""
        self.visual.labels("before").inc(job.before)
        self.visual.labels("after").inc(job.after)
        self.prompts.inc(job.length)
        self.answers.inc(len(job.ticks))
        if job.ticks and job.begun is not None:
            self.first.observe(job.ticks[0] - job.begun)
        for earlier, later in zip(job.ticks, job.ticks[1:], strict=False):
            self.next.observe(later - earlier)

    def text(self) -> bytes:
        """All of them in Prometheus' form."""
        return generate_latest(self.registry)
