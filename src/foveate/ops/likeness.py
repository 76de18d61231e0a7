"""From likeness to one number per token: shares, sharpest words, smoothing over the raster.

Shapes: B images, N tokens, W words, C or D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from foveate.core import Grid
from foveate.ops.scores import cosines


def between_extremes(values: Tensor, smallest: float, dim: int | tuple[int, ...] = -1) -> Tensor:
    """Values stretched to (0, 1]: (v - min + smallest) / (max - min + smallest) over `dim`; equal ones all become 1."""
    low, high = values.amin(dim=dim, keepdim=True), values.amax(dim=dim, keepdim=True)
    return (values - low + smallest) / (high - low + smallest)


def spread_over(queries: Tensor, tokens: Tensor, temperature: float, free: Tensor | None = None) -> Tensor:
    """Softmax of cosine / temperature over the tokens: (B, W, C) and (B, N, C) -> (B, W, N), float32.

    Args:
        free: (B, N) bool, False in padding, which gets no share; None without any.
    """
    likeness = cosines(queries, tokens).div_(temperature)
    if free is not None:
        likeness = likeness.masked_fill_(~free[:, None], -torch.inf)
    return likeness.softmax(dim=-1)


def by_sharpest_words(likeness: Tensor, mask: Tensor, share: float = 0.2) -> Tensor:
    """What the most selective words say of each token: (B, N, W) cosines -> (B, N), float32 (EADP).

    A word's entropy is that of softmax(100 * likeness) over the tokens. The max(1, int(share * words)) words of lowest
    entropy H are averaged with weights softmax(-H / 0.01).

    Args:
        mask: (B, W) bool, words that count, at least one per row.
    """
    spread = (100.0 * likeness).log_softmax(dim=1)
    entropy = (-(spread.exp() * spread).sum(dim=1)).masked_fill(~mask, torch.inf)
    rank = entropy.sort(dim=-1, stable=True).indices.argsort(dim=-1)
    # In float64, as Python multiplies: a float32 0.2 would round differently at multiples of 5.
    limit = (mask.sum(dim=-1, keepdim=True).double() * share).long().clamp_min(1)
    weight = (-entropy / 0.01).masked_fill(rank >= limit, -torch.inf).softmax(dim=-1)
    return torch.matmul(likeness, weight[..., None]).squeeze(-1)


def smoothed(values: Tensor, grid: Grid) -> Tensor:
    """3 x 3 Gaussian of sigma 1 over a raster, mirrored at the border: (B, h * w) -> (B, h * w).

    A raster of one row or column has no border to mirror and stays as it is.
    """
    height, width = grid
    if min(grid) < 2:
        return values
    side = math.exp(-0.5)
    line = torch.tensor([side, 1.0, side], device=values.device, dtype=values.dtype) / (1 + 2 * side)
    padded = functional.pad(values.view(-1, 1, height, width), (1, 1, 1, 1), mode="reflect")
    return functional.conv2d(padded, (line[:, None] * line)[None, None]).flatten(1)
