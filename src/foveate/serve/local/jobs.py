"""One request on its way: what it asked, when things happened to it, and what pruning did."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from foveate import spec
from foveate.core import Method

if TYPE_CHECKING:
    from foveate.trace import Call, Trace

CURRENT: ContextVar[Job] = ContextVar("job")
"""The job whose request is being handled, for what is called in between by code that knows nothing of jobs."""

WATCHER: ContextVar[Callable[[Job], None] | None] = ContextVar("watcher", default=None)
"""Who in this process wants to see the job of the request that it sends, and what each stage did to its pictures."""


@dataclass
class Job:
    """A request that is to be answered.

    Attributes:
        stages: methods that prune its pictures; none for an unpruned answer.
        seed: of sampling.
        longest: tokens of its answer; None for what the server and the context leave.
    """

    stages: tuple[Method, ...] = ()
    seed: int | None = None
    longest: int | None = None
    arrived: float = field(default_factory=time.perf_counter)
    begun: float | None = None
    ticks: list[float] = field(default_factory=list)  # when each token of the answer came
    before: int = 0  # visual tokens of all its pictures
    after: float = 0.0  # ... that the decoder's layers had, on average
    prompt: int = 0  # tokens of the prompt as it was sent
    length: int = 0  # ... as the decoder saw it
    choosing: float = 0.0
    dropped: threading.Event = field(default_factory=threading.Event)
    watched: bool = False
    call: Call | None = None  # what each stage did, where that is watched

    @property
    def method(self) -> str:
        """Its spec in the one spelling, or "none"."""
        return spec.format(self.stages) if self.stages else "none"

    def note(self, trace: Trace | None, prompt: int) -> None:
        """Take over what the handle's trace says; None where nothing was pruned."""
        self.prompt = self.length = prompt
        if trace is None or not trace.history:
            return
        call = trace.latest
        self.call = call if self.watched else None
        self.length, self.choosing = call.length, call.milliseconds
        self.before = sum(image.original for image in call.images)
        self.after = call.budget.equivalent_tokens * len(call.images)

    def report(self) -> dict[str, Any]:
        """What its answer tells of it; times in milliseconds."""
        now = time.perf_counter()
        begun = now if self.begun is None else self.begun
        return {
            "method": self.method,
            "prompt_tokens_unpruned": self.prompt,
            "visual_tokens": {"before": self.before, "after": round(self.after, 1)} if self.before else None,
            "queue_ms": round((begun - self.arrived) * 1e3, 2),
            "choosing_ms": round(self.choosing, 3),
            "first_token_ms": round((self.ticks[0] - begun) * 1e3, 2) if self.ticks else None,
            "total_ms": round((now - self.arrived) * 1e3, 2),
        }
