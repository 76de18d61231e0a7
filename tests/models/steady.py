"""Logits that depend on nothing but the step, so that whatever else decides an answer can be compared exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from models import tiny
from torch import Tensor


@contextmanager
def steady(model: Any, end: bool = False) -> Iterator[None]:
    """The n-th call of the head gives the n-th of some drawn logits, row by row, whatever it was given.

    Args:
        end: answers end as soon as they may.
    """
    calls = iter(range(1000))

    def draw(module: Any, arguments: Any, logits: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(next(calls))
        drawn = torch.randn(logits.shape[0], 1, logits.shape[-1], generator=generator)
        drawn[..., [tiny.PAD, tiny.IMAGE]] = -100.0
        if end:
            drawn[..., tiny.EOS] = 50.0
        return drawn.expand_as(logits).to(logits.dtype)

    hook = model.lm_head.register_forward_hook(draw)
    try:
        yield
    finally:
        hook.remove()
