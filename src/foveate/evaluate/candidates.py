"""What tuning tries: every method that runs on a model, at a few budgets and layouts of its stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate import methods
from foveate.core import FoveateError, Keep, Method
from foveate.evaluate.catalogue import at
from foveate.spec import format as format_spec
from foveate.spec import parse_stages

SHARES = (0.5, 0.25, 0.125)
"""Budgets that are tried first."""

LOWER = 0.75
"""What is left of a budget that held, to be tried next."""

_PICTURE = 576  # tokens of a usual picture, at which a budget must make sense


def candidates(model: Any, name: str, check: Callable[[tuple[Method, ...]], None]) -> dict[str, tuple[Method, ...]]:
    """Everything that can be tried on a model, by spec.

    Args:
        name: how the user calls the model; weights of trained methods may lie beside its own.
        check: refuses, by a FoveateError, stages that cannot run on what will be asked.
    """
    folder = Path(model.name_or_path)
    found: dict[str, tuple[Method, ...]] = {}
    for method in methods.names():
        weights = name if (folder / method).is_dir() else None
        for share in SHARES:
            for keep in _layouts(method, share):
                try:
                    made = (at(method, keep, _PICTURE, weights),)
                    check(made)
                except FoveateError:
                    continue
                found[format_spec(made)] = made
    return found


def smaller(stages: Sequence[Method]) -> tuple[Method, ...] | None:
    """The same stages with `LOWER` of each budget; None where none can be lowered."""
    lowered: list[Method] = []
    for stage in stages:
        there: Any = stage
        keep = getattr(there, "keep", None)
        if keep is not None:
            each = keep if isinstance(keep, tuple) else (keep,)
            less = tuple(max(1, int(one * LOWER)) if isinstance(one, int) else round(one * LOWER, 4) for one in each)
            there = dataclasses.replace(there, keep=less if isinstance(keep, tuple) else less[0])
        lowered.append(there)
    spec = format_spec(tuple(lowered))
    return None if spec == format_spec(tuple(stages)) else parse_stages(spec)  # which loads what was trained


def joined(given: Mapping[str, Sequence[Method]]) -> dict[str, tuple[Method, ...]]:
    """Candidates that a user names instead, without the unpruned model.

    Raises:
        FoveateError: one has no budget that could be lowered or told.
    """
    found = {spec: tuple(stages) for spec, stages in given.items() if stages}
    for spec, stages in found.items():
        if all(getattr(stage, "keep", None) is None for stage in stages):
            raise FoveateError(f"{spec} has no budget to tune; give methods with keep=")
    return found


def _layouts(name: str, share: float) -> Iterator[Keep | tuple[Keep, ...]]:
    """The same budget at each stage, and of several stages twice of it at the first to half of it at the last."""
    yield share
    stages = getattr(methods.get(name).example(), "keep", None)
    if isinstance(stages, tuple) and len(stages) > 1:
        steps = [1 - 2 * place / (len(stages) - 1) for place in range(len(stages))]
        yield tuple(min(0.9, round(share * 2**step, 4)) for step in steps)
