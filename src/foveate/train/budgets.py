"""Decisions that meet a budget whatever the scores are: modules are told it, and a part of it may be spread evenly.

Shapes: B rows, N visual tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.subsets import best_and_even

_HALVINGS = 40


def threshold(gaps: Tensor, left: Tensor, count: Tensor) -> Tensor:
    """What to take off the scores so that so many tokens are kept on average: (B,), without gradient.

    Args:
        gaps: (B, N) by how much keeping outweighs removing; a token is kept with the probability sigmoid(gap).
        left: (B, N) bool, the tokens that can still be kept.
        count: (B,) how many are to be kept, not necessarily whole; where it is no less than those left, all are.
    """
    with torch.no_grad():
        gaps = gaps.float()
        low, high = gaps.amin(dim=1) - 30, gaps.amax(dim=1) + 30
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            too_many = ((gaps - middle[:, None]).sigmoid() * left).sum(dim=1) > count
            low, high = middle.where(too_many, low), high.where(too_many, middle)
        return (low + high) / 2


def shared(
    gaps: Tensor,
    odds: Tensor | None,
    ranks: Tensor,
    left: Tensor,
    count: Tensor,
    noise: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Decisions (B, N) of one stage that keep `count` tokens of each row, exactly or, with noise, on average.

    Forwards 0 or 1. Backwards, the derivative of the probability that a token is among the best or in the lattice, by
    the scores and by the share of the lattice.

    Args:
        gaps: (B, N) by how much keeping outweighs removing.
        odds: (B,) of how much of the budget is spread evenly; None is nothing.
        ranks: (B, N) each token's place in an even order.
        left: (B, N) bool.
        count: (B,) tokens to keep.
        noise: (B, N) logistic noise; None takes the best without a draw, as inference does.
        temperature: by which scores and noise are divided, backwards alone.
    """
    share = torch.zeros_like(count) if odds is None else odds.sigmoid()
    count = torch.minimum(count, left.sum(dim=1).to(count))
    best = (1 - share) * count
    cut = threshold(gaps, left, best.detach())
    kept = (gaps.float() - cut[:, None]).sigmoid() * left
    # By how much the cut has to fall for one more of the best.
    slope = (kept * (1 - kept)).sum(dim=1).clamp(min=1e-3).detach()
    cut = cut - (best - best.detach()) / slope
    centred = gaps.float() - cut[:, None]
    chance = ((centred if noise is None else centred + noise) / temperature).sigmoid() * left
    lattice = (share * count / left.sum(dim=1).clamp(min=1))[:, None] * left
    soft = 1 - (1 - chance) * (1 - lattice)
    with torch.no_grad():
        hard = _best(gaps, ranks, left, count, share) if noise is None else _drawn(chance, ranks, left, share * count)
    return hard + (soft - soft.detach())


def _best(gaps: Tensor, ranks: Tensor, left: Tensor, count: Tensor, share: Tensor) -> Tensor:
    """(B, N) 1 where inference keeps a token."""
    made = torch.zeros_like(gaps, dtype=torch.float32)
    for row in range(len(gaps)):
        # Rounded down as inference does, where a product of two floats may lie just below a whole number.
        places, keep = left[row].nonzero()[:, 0], max(1, int(count[row].item() + 1e-3))
        even = [round(share[row].item() * keep)]
        made[row, places[best_and_even(gaps[row, places][None], ranks[row, places][None], keep, even)[0]]] = 1.0
    return made


def _drawn(chance: Tensor, ranks: Tensor, left: Tensor, even: Tensor) -> Tensor:
    """(B, N) 1 where noise decides for a token, or the lattice of what it leaves."""
    hard = (chance > 0.5).float()
    rest = left & (chance <= 0.5)
    order = ranks.masked_fill(~rest, torch.iinfo(ranks.dtype).max).argsort(dim=1).argsort(dim=1)
    return torch.where(rest & (order < even.round()[:, None]), 1.0, hard)
