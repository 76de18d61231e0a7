"""Puts what leaves the decoder back in the caller's columns, where tokens left before it or between its layers.

Shapes: B rows, S columns of the caller's tokens, L places of the shortened ones, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def speakers(index: Tensor, filled: Tensor, columns: int) -> Tensor:
    """(B, S) place of the token that speaks in each column; -1 where none is.

    In the column of a token that left, the last one before it speaks, because that one speaks next: what follows a
    picture is predicted even where the picture's last token has left.

    Args:
        index: (B, L) column of each place; counts for nothing where a place is not filled.
        filled: (B, L) bool, False in re-padding.
        columns: S.
    """
    places = torch.arange(index.shape[1], device=index.device).where(filled, -1)
    latest = torch.full((index.shape[0], columns), -1, device=index.device)
    return latest.scatter_reduce(1, index, places, "amax").cummax(dim=1).values


def chained(inner: Tensor | None, outer: Tensor | None) -> Tensor | None:
    """Speakers of the outer columns (B, S) among the places that the inner columns (B, L) have; None: each itself."""
    if inner is None or outer is None:
        return outer if inner is None else inner
    return inner.gather(1, outer.clamp(min=0)).where(outer >= 0, -1)


def spread(values: Tensor, speaking: Tensor | None) -> Tensor:
    """(B, L, D) -> (B, S, D), zero where nobody speaks."""
    if speaking is None:
        return values
    speaking = speaking.to(values.device)[..., None]
    return values.gather(1, speaking.clamp(min=0).expand(-1, -1, values.shape[-1])).masked_fill(speaking < 0, 0)


def kept(hidden: Tensor, keep: int | Tensor) -> Tensor:
    """What of (B, S, D) goes through the head, by a call's `logits_to_keep`.

    Args:
        keep: so many of the last columns, 0 for all; or columns (n,) of every row, or columns (B, n) of each.
    """
    if not isinstance(keep, Tensor):
        return hidden[:, -keep:]
    keep = keep.to(hidden.device)
    if keep.ndim < 2:
        return hidden[:, keep]
    return hidden.gather(1, keep[..., None].expand(-1, -1, hidden.shape[-1]))


def widen(output: Any, blocks: Sequence[Tensor | None], outer: Tensor | None) -> None:
    """What the decoder hands over, in the caller's columns; in place.

    Args:
        output: transformers' output of a decoder.
        blocks: of the tokens that each block saw, who speaks in the places that entered the decoder.
        outer: who of these speaks in the caller's columns.
    """
    output.last_hidden_state = spread(output.last_hidden_state, chained(blocks[-1], outer))
    states = getattr(output, "hidden_states", None)
    if states is None:
        return
    # The first is what enters block 0, the others are what blocks give; those that were not asked for are None.
    ways = [chained(way, outer) for way in (blocks[0], *blocks)]
    output.hidden_states = tuple(
        None if state is None else spread(state, way) for state, way in zip(states, ways, strict=True)
    )
