"""From many tokens to few: groups of tokens that are alike, and the token that stands for each group.

Shapes: M tokens of one image, C clusters, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def density_peaks(points: Tensor, clusters: int, noise: Tensor) -> Tensor:
    """Group tokens around those that lie densely and far from anything denser: (M,) cluster of each token.

    Density peaks with nearest neighbours: a token's density is exp(-mean squared distance to its `clusters` nearest
    tokens, itself included), its rank density times the distance to the nearest denser token; the highest become
    centres and every other token joins the nearest centre. Distances are divided by sqrt(D).

    Args:
        points: (M, D).
        clusters: 1..M; every cluster gets at least one token.
        noise: (M,) added to the densities; of tokens that are equally dense even so, the first counts as the denser.
    """
    distance = _distances(points.float())
    nearest = distance.topk(clusters, dim=-1, largest=False).values
    density = (-nearest.square().mean(dim=-1)).exp() + noise
    order = density.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    denser = rank[None, :] < rank[:, None]
    gap = distance.masked_fill(~denser, torch.inf).amin(dim=-1).clamp(max=distance.max())
    centres = (gap * density).sort(descending=True, stable=True).indices[:clusters]
    cluster = distance[:, centres].argmin(dim=-1)
    # A centre that coincides with another one would join it and leave its own cluster empty.
    return cluster.scatter(0, centres, torch.arange(clusters, device=centres.device))


def _distances(points: Tensor) -> Tensor:
    """(M, M) Euclidean distances over sqrt(D), exactly symmetric, so that mutual neighbours are equally far."""
    points = points - points.mean(dim=0)
    products = points @ points.T
    products = (products + products.T) / 2
    squares = products.diagonal()
    squared = squares[:, None] + squares[None, :] - 2 * products
    squared = squared.clamp(min=0).fill_diagonal_(0)
    return (squared / points.shape[-1]).sqrt()


def cluster_means(points: Tensor, cluster: Tensor, clusters: int) -> Tensor:
    """(M, D) tokens -> (C, D) the mean of each cluster, in the dtype of the tokens."""
    member = torch.nn.functional.one_hot(cluster, clusters).T.float()
    return (member @ points.float() / member.sum(dim=-1, keepdim=True)).to(points.dtype)
