"""Soft masks: decisions that are 0 or 1 forwards and have a gradient backwards, and the attention mask they make.

Shapes: B rows, N visual tokens, L sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-9
"""What a dropped token's decision counts as: low enough to vanish from attention, high enough to have a gradient."""


def decide(scores: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Straight-through Gumbel-softmax (eq. 5 and 6): scores (B, N, 2) for keeping and removing -> (B, N).

    Forwards exactly 0 or 1, 1 with the probability softmax(scores)[..., 0]; backwards the derivative of the softmax of
    scores and noise, divided by `temperature`.
    """
    scores = scores.float()
    soft = ((scores + gumbel(scores, generator)) / temperature).softmax(dim=-1)[..., 0]
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())


def gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Gumbel noise in float32, as many numbers as another tensor has, on its device."""
    uniform = torch.rand(like.shape, generator=generator, device=like.device)
    return -(-uniform.clamp(1e-20, 1 - 1e-7).log()).log()


def limited(decisions: Tensor, limit: float | None) -> Tensor:
    """The same decisions (B, N), whose gradients are cut at the limit; None cuts none."""
    if limit is None or not decisions.requires_grad:
        return decisions
    shown = decisions.clone()
    shown.register_hook(lambda gradient: gradient.clamp(-limit, limit))
    return shown


def columns(decisions: Tensor, places: Tensor, present: Tensor, length: int) -> Tensor:
    """One value for each key of the sequence: 1 for text, the decision for a visual token (eq. 7 without diagonal).

    Args:
        decisions: (B, N) decisions.
        places: (B, N) where the tokens stand in the sequence.
        present: (B, N) bool; what is no token of the row counts for nothing.
        length: L.

    Returns:
        (B, L) float32.
    """
    kept = decisions.float().where(present, 1.0)
    ones = torch.ones(len(decisions), length + 1, device=decisions.device)
    # Whatever fills up a row with fewer tokens goes to a place behind the end.
    return ones.scatter(1, places.where(present, length), kept)[:, :length]


def soft_mask(original: Tensor, keys: Tensor) -> Tensor:
    """The additive mask under which softmax is eq. 9: `original` + log(D + 1e-9), and a token always sees itself.

    Forwards and backwards the same as multiplying the exponentials by D, except that a dropped token (D = 0) weighs
    1e-9 and so has the gradient that eq. 9 gives it; the logarithm of 0 itself would give none, or NaN.

    Args:
        original: (B or 1, 1, L, L) float32, the causal and padding mask, 0 or lowest.
        keys: (B, L) float32, D of every key.

    Returns:
        (B, 1, L, L) float32.
    """
    weight = (keys + EPSILON).log()[:, None, None, :]
    diagonal = torch.eye(original.shape[-1], dtype=torch.bool, device=original.device)
    return original + weight.masked_fill(diagonal, 0.0)
