"""What is said of a model, and how one answer of it is seen and compared with another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.core import FoveateError
from foveate.runtime.seams import CACHE
from foveate.runtime.wrapped import unwrapped

STEPS = 8
"""Tokens of an answer that are compared."""


@dataclass(frozen=True)
class Outcome:
    """One statement about a model.

    Attributes:
        name: what should hold.
        passed: whether it does.
        detail: what was seen.
    """

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, eq=False)
class Run:
    """One answer: its tokens, their logits, what the decoder was handed, and what was left in the cache.

    Shapes: B rows, S tokens handed over, V words.
    """

    answer: Tensor  # (B, STEPS)
    steps: Tensor  # (B, STEPS, V)
    positions: Tensor | None  # (..., B, S)
    cache: Any

    @property
    def logits(self) -> Tensor:
        """(B, V) of the first token."""
        return self.steps[:, 0]

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, Any]) -> Run:
        """Ask a model, greedily."""
        seen: list[Tensor | None] = []
        hook = (
            unwrapped(model)
            .get_decoder()
            .register_forward_pre_hook(
                lambda module, arguments, options: seen.append(options.get("position_ids")), with_kwargs=True
            )
        )
        try:
            out = model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=STEPS,
                min_new_tokens=STEPS,
                return_dict_in_generate=True,
                output_logits=True,
            )
        finally:
            hook.remove()
        answer = out.sequences[:, inputs["input_ids"].shape[1] :]
        return cls(answer, torch.stack(out.logits, dim=1).float(), seen[0] if seen else None, out[CACHE])


def stated(name: str, statement: Callable[[], tuple[bool, str]], refused: str | None = None) -> Outcome:
    """A statement that may also end in an error.

    Args:
        refused: what holds where a FoveateError says why the statement cannot be made; None where that is a failure.
    """
    try:
        return Outcome(name, *statement())
    except FoveateError as error:
        return Outcome(refused or name, refused is not None, str(error))
    except Exception as error:  # a model never seen before may fail in any way
        return Outcome(name, False, f"{type(error).__name__}: {error}")


def apart(run: Run, other: Run) -> float:
    """By how much the first logits of two runs differ."""
    return float((run.logits - other.logits).abs().max())


def apart_along(run: Run, other: Run) -> float:
    """By how much logits of two runs differ, as far as the answers are the same."""
    same = (run.answer == other.answer).long().cumprod(dim=1)
    known = torch.nn.functional.pad(same[:, :-1], (1, 0), value=1).bool()  # a first other token has logits to compare
    return float((run.steps - other.steps).abs().amax(dim=-1)[known].max())


def tolerance(model: Any, run: Run) -> float:
    """What rounding may do to logits: a part of their spread."""
    share = 1e-4 if model.dtype in (torch.float32, torch.float64) else 3e-2
    return share * max(1.0, float(run.logits.std()) * 4)
