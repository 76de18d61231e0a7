"""Times of a table: the first token, those after it and the memory held, of all rows of a model in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.core import Method
from foveate.evaluate.scenes_task import NONE

ANSWER = 16
"""Tokens that each timed call decodes."""


@dataclass(frozen=True)
class Speed:
    """Medians of one rival."""

    first_token_ms: float
    per_token_ms: float
    peak_bytes: int | None


def measure(loaded: Any, picture: Any, question: str, rivals: Mapping[str, Sequence[Method]]) -> dict[str, Speed]:
    """Times of the unpruned model and of every rival, by spec, which take turns on one prompt.

    Args:
        rivals: stages by spec; without stages the unpruned model.
    """
    from foveate.evaluate.bench import Setting
    from foveate.evaluate.bench import measure as bench
    from foveate.inference.answers import encode

    inputs = encode(loaded.model, loaded.processor, [[picture]], [question])
    pruned = {spec: stages for spec, stages in rivals.items() if stages}
    setting, options = Setting(answer=ANSWER), {"processor": loaded.processor}
    results = bench(loaded.model, inputs, list(pruned.values()), setting, options=options)
    found = {}
    for spec, one in zip([NONE, *pruned], results, strict=True):
        assert one.per_token_ms is not None
        found[spec] = Speed(one.first_token_ms.median, one.per_token_ms.median, one.peak_bytes)
    return found


def figure(times: Mapping[str, Speed], spec: str, measure: str) -> float | None:
    """What a cell of times says of a rival; None where nothing was measured."""
    if spec not in times:
        return None
    one, whole = times[spec], times[NONE]
    if measure == "gpu_gb":
        return None if one.peak_bytes is None else one.peak_bytes / 1e9
    if measure.endswith("_speedup"):
        name = measure.removesuffix("_speedup") + "_ms"
        return float(getattr(whole, name) / getattr(one, name))
    return float(getattr(one, measure))
