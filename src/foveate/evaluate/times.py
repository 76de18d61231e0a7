"""Milliseconds of rivals that answer the same few questions in turns, one prompt at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from foveate.core import FoveateError, Method
from foveate.inference.answers import encode
from foveate.inference.latency import Latency, interleaved, timed
from foveate.inference.resizing import scalers_of
from foveate.prune import prune

PROMPTS = 3
"""Questions that are enough for a median where nobody asks for another number."""

ROUNDS = 3


def answer_times(
    model: Any,
    processor: Any,
    prompts: Sequence[tuple[Any, str]],
    rivals: Mapping[str, Sequence[Method]],
    *,
    max_new_tokens: int,
    clip: Any = None,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, float]]:
    """Medians over `ROUNDS` answers to each prompt, all rivals taking turns; a first answer of each does not count.

    A rival encodes the picture itself and answers until its own answer ends, as a user would see it.

    Args:
        prompts: pictures or videos and questions, at least one.
        rivals: stages by spec; one without stages is the unpruned model.
        max_new_tokens: of the longest answer.
        clip: as `prune` takes it.
        progress: called with the number of answers since the last call; `(1 + ROUNDS * prompts) * rivals` in all.

    Returns:
        of each rival `first_token_ms`, encoder and choosing included, and `whole_ms`, until the answer has ended.

    Raises:
        FoveateError: no prompt, or a method cannot run on this model.
    """
    if not prompts:
        raise FoveateError("no prompt was given, so there is nothing to time; give at least one")
    scalers = scalers_of(model, processor, rivals)
    whole = [encode(model, processor, [[image]], [question]) for image, question in prompts]

    def asked(spec: str, stages: Sequence[Method]) -> Callable[[], Latency]:
        pruned = bool(stages) and spec not in scalers
        handle = prune(model, [*stages], processor=processor, clip=clip) if pruned else nullcontext()
        small = scalers.get(spec)
        own = whole if small is None else [small.encode([[image]], [question]) for image, question in prompts]
        turn = itertools.cycle(own)

        def one() -> Latency:
            with handle:
                latency = timed(model, next(turn), max_new_tokens=max_new_tokens)[1]
            progress(1)
            return latency

        return one

    runs = {spec: asked(spec, stages) for spec, stages in rivals.items()}
    found = interleaved(runs, repeats=ROUNDS * len(prompts), warmup=1)
    return {
        spec: {"first_token_ms": latency.first_token_ms, "whole_ms": latency.whole_ms or 0.0}
        for spec, latency in found.items()
    }
