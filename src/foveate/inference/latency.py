"""Seconds as a user sees them: from calling `generate()` to the first token, and from each token to the next."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.core import FoveateError
from foveate.inference.answers import end_tokens, greedy

QUICK = 2.0  # seconds within which an answer is worth repeating for a steadier figure


@dataclass(frozen=True)
class Latency:
    """Medians over `runs` calls of `generate()`.

    Attributes:
        first_token_ms: from the call to the first token on the host; tower, choosing and prefill included.
        per_token_ms: from one token to the next; None for answers of a single token.
        runs: calls behind the medians.
        whole_ms: from the call to the end of the answer; None where it was not noted.
    """

    first_token_ms: float
    per_token_ms: float | None
    runs: int = 1
    whole_ms: float | None = None


class Ticks:
    """A streamer that notes when each token of an answer arrives on the host, which waits for the device."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note a token (B,); the prompt (B, L) comes first and does not count."""
        if value.ndim == 1:
            self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def timed(
    model: Any, inputs: Any, *, max_new_tokens: int, full: bool = False, **options: Any
) -> tuple[Tensor, Latency]:
    """One greedy answer and how long its tokens took.

    Args:
        options: further ones of `generate`.
        full: generate all of `max_new_tokens`, also past the end of the answer, so that decoding can be timed.

    Returns:
        (B, L) tokens, prompt included, and the times of this one call.
    """
    ticks = Ticks()
    options |= {"min_new_tokens": max_new_tokens} if full and end_tokens(model) else {}
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    start = time.perf_counter()
    output = greedy(model, inputs, max_new_tokens=max_new_tokens, streamer=ticks, **options)
    whole = (time.perf_counter() - start) * 1e3
    gaps = [after - before for before, after in zip(ticks.times, ticks.times[1:], strict=False)]
    per_token = statistics.median(gaps) * 1e3 if gaps else None
    return output, Latency((ticks.times[0] - start) * 1e3, per_token, whole_ms=whole)


def settled(
    model: Any, inputs: Any, *, max_new_tokens: int, repeats: int = 3, compiled: Mapping[str, Any] | None = None
) -> tuple[Tensor, Latency]:
    """One greedy answer with steady times: a quick one is repeated, and its first call counts as warm-up.

    A first call pays for compiled kernels and cold caches. Where it takes more than 2 s that share is small and
    a repetition is not, so its own times stand (`runs` is 1).

    Args:
        compiled: options of `generate` that compile decoding, whose first answer waits for the compiler.
    """
    options = {"max_new_tokens": max_new_tokens, **(compiled or {})}
    if compiled:
        timed(model, inputs, **options)
    start = time.perf_counter()
    output, first = timed(model, inputs, **options)
    if time.perf_counter() - start > QUICK:
        return output, first
    return output, medians([timed(model, inputs, **options)[1] for _ in range(repeats)])


def interleaved(runs: Mapping[str, Callable[[], Latency]], *, repeats: int = 5, warmup: int = 1) -> dict[str, Latency]:
    """Medians of several rivals that take turns, so that a machine that slows down slows all of them.

    Args:
        runs: a name and one timed call of each rival.
        warmup: rounds before those that count.

    Raises:
        FoveateError: fewer than one round.
    """
    if repeats < 1:
        raise FoveateError(f"repeats={repeats} measures nothing; the smallest is repeats=1")
    measured: dict[str, list[Latency]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            latency = run()
            if turn >= warmup:
                measured[name].append(latency)
    return {name: medians(latencies) for name, latencies in measured.items()}


def medians(latencies: Sequence[Latency]) -> Latency:
    """The median of each time over several calls."""
    per_token = [latency.per_token_ms for latency in latencies if latency.per_token_ms is not None]
    whole = [latency.whole_ms for latency in latencies if latency.whole_ms is not None]
    return Latency(
        first_token_ms=statistics.median(latency.first_token_ms for latency in latencies),
        per_token_ms=statistics.median(per_token) if per_token else None,
        runs=len(latencies),
        whole_ms=statistics.median(whole) if whole else None,
    )
