"""Models with an adapter that was tuned while tokens were pruned: they are pruned by the same spec, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveate.core import FoveateError, Method
from foveate.spec import format as format_spec

TUNED = "foveate_tuned_under"
"""Attribute of such a model: the spec."""


def check_tuned(model: Any, stages: Sequence[Method]) -> None:
    """Refuse to prune a model by another spec than the one that its adapter was tuned under.

    Raises:
        FoveateError: it is another.
    """
    tuned = getattr(model, TUNED, None)
    if tuned is not None:
        refuse_other(tuned, stages)


def refuse_other(tuned: str, stages: Sequence[Method]) -> None:
    """Refuse stages that are not those of the spec that an adapter was tuned under.

    Raises:
        FoveateError: they are others.
    """
    asked = format_spec(tuple(stages))
    if asked != tuned:
        raise FoveateError(
            f"the model's adapter was tuned under {tuned}, not {asked}; prune by that, or attach the adapter with "
            "any_spec=True (--any-spec)"
        )
