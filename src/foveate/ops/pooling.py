"""What stays takes over what leaves: weighted sums of neighbours, means of tokens with those that joined them.

Shapes: B images, N tokens, K that stay, M that leave, J neighbours of each, D width, C width of what likeness is
measured on. Places are positions on the N axis, int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.scores import cosines


def take(values: Tensor, places: Tensor) -> Tensor:
    """(B, N) or (B, N, D) at (B, K): the values at these places, in their order."""
    return values[torch.arange(len(values), device=values.device)[:, None], places]


def others(places: Tensor, tokens: int) -> Tensor:
    """(B, K) distinct places among N tokens -> (B, N - K) all other places, ascending."""
    taken = places.new_zeros(places.shape[0], tokens, dtype=torch.int8).scatter(1, places, 1)
    return taken.sort(dim=-1, stable=True).indices[:, : tokens - places.shape[1]]


def nearest_neighbours(points: Tensor, of: Tensor, among: Tensor, count: int) -> Tensor:
    """The places among (B, M) of highest cosine similarity to each of (B, K): (B, K, count), the most similar first.

    Where a token is among its own candidates, its first appearance is the token itself and no neighbour of it. The
    first of `among` wins a tie; a token of norm 0 is at similarity 0 to all.

    Args:
        points: (B, N, C).
        among: places, repeated ones as often as they are to count.
        count: at most the number of candidates that every token has.
    """
    itself = of[..., None] == among[:, None]
    itself &= itself.cumsum(dim=-1) == 1
    likeness = cosines(take(points, of), take(points, among)).masked_fill(itself, -torch.inf)
    nearest = likeness.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return among[:, None].expand(-1, of.shape[1], -1).gather(2, nearest)


def weighted_sums(tokens: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """(B, N, D), (B, K, J) places and their weights -> (B, K, D) the sum over J, float32; repeated places add up."""
    spread = weights.new_zeros(*places.shape[:2], tokens.shape[1], dtype=torch.float32)
    return spread.scatter_add(2, places, weights.float()) @ tokens.float()


def most_similar(points: Tensor, leaving: Tensor, staying: Tensor) -> Tensor:
    """Which of the (B, K) that stay each of the (B, M) that leave joins: (B, M) in 0..K-1, by cosine similarity.

    The first wins a tie. `points`: (B, N, C).
    """
    return cosines(take(points, leaving), take(points, staying)).argmax(dim=-1)


def joined(tokens: Tensor, target: Tensor, targets: int) -> tuple[Tensor, Tensor]:
    """(B, M, D) tokens and the (B, M) target of each -> their sums (B, K, D), float32, and numbers (B, K, 1)."""
    member = (target[:, None] == torch.arange(targets, device=target.device)[:, None]).float()
    return member @ tokens.float(), member.sum(dim=-1, keepdim=True)
