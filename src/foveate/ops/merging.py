"""From many tokens to few: groups of tokens that are alike, and the token that stands for each group.

Shapes: B images, N tokens, K left of them, E width; M tokens of one image, C clusters, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops.device import refuse_any
from foveate.ops.scores import CHUNK_VALUES
from foveate.ops.subsets import descending


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


@dataclass(frozen=True, eq=False)
class Merged:
    """What a merging step left. B images, N tokens before it, K after it."""

    features: Tensor  # (B, K, E), in the dtype of the tokens
    size: Tensor  # (B, K) float32: how many original tokens each stands for
    representative: Tensor  # (B, K) position of the token that each one grew from
    group: Tensor  # (B, N) output position of the token that each one went into


def bipartite_merge(tokens: Tensor, metric: Tensor, size: Tensor, r: int, behind_cls: bool = False) -> Merged:
    """One step of ToMe: every other token may merge into the most similar of those between; the `r` best pairs do.

    Tokens are numbered from 0, or from 1 behind a CLS token, which takes no part. Even ones have one edge each, to the
    odd one of highest cosine similarity (the first of several); tokens on the `r` most similar edges become part of
    the other end, as the mean weighted by size. Output order: even ones that stay, then all odd ones in order. The even
    ones stand in order behind a CLS token, else from the most to the least similar (the authors' code).

    Args:
        tokens: (B, N, E).
        metric: (B, N, d), keys averaged over heads.
        size: (B, N).
        r: 0..N // 2; with 0 everything stays where it is.
    """
    batch, count, _ = tokens.shape
    if r == 0:
        return _unmerged(tokens, size)
    places = torch.arange(count, device=tokens.device)
    even, odd = places[int(behind_cls) :: 2], places[1 - int(behind_cls) :: 2]
    unit = torch.nn.functional.normalize(metric.float(), dim=-1)
    nearest, likeness = _nearest(unit[:, even], unit[:, odd])
    order = descending(likeness)
    stay = order[:, r:].sort(dim=-1).values if behind_cls else order[:, r:]
    representative = torch.cat([even[stay], odd.expand(batch, -1)], dim=1)
    group = _places_of(representative, count)
    merged = order[:, :r]
    target = odd[nearest.gather(1, merged)]
    group = group.scatter(1, even[merged], group.gather(1, target))
    return _weighted_means(tokens, size.float(), representative, group)


def _nearest(ones: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """(B, M, d) and (B, N, d) unit vectors -> (B, M) the first most similar of the others, and how similar it is.

    Rows of the table of similarities are computed some at a time, so that memory grows with N, not with its square.
    """
    rows = max(1, CHUNK_VALUES // max(1, others.shape[0] * others.shape[1]))
    place, value = [], []
    for some in ones.split(rows, dim=1):
        similarity = some @ others.transpose(-1, -2)
        place.append(similarity.argmax(dim=-1))
        value.append(similarity.amax(dim=-1))
    return torch.cat(place, dim=1), torch.cat(value, dim=1)


def _unmerged(tokens: Tensor, size: Tensor) -> Merged:
    places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
    return Merged(tokens, size.float(), places, places)


def _places_of(representative: Tensor, count: int) -> Tensor:
    """(B, K) positions among `count` tokens -> (B, count) where in the list each token stands, 0 where it does not."""
    order = torch.arange(representative.shape[1], device=representative.device).expand_as(representative)
    return order.new_zeros(representative.shape[0], count).scatter_(1, representative, order)


def _weighted_means(tokens: Tensor, size: Tensor, representative: Tensor, group: Tensor) -> Merged:
    """The mean of each group, weighted by size."""
    left = representative.shape[1]
    total = size.new_zeros(size.shape[0], left).scatter_add_(1, group, size)
    weighted = tokens.float() * size[..., None]
    summed = weighted.new_zeros(weighted.shape[0], left, weighted.shape[2])
    summed = summed.scatter_add(1, group[..., None].expand_as(weighted), weighted)
    return Merged((summed / total[..., None]).to(tokens.dtype), total, representative, group)


def in_raster_order(index: Tensor, features: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort output tokens by their original indices: (B, K), (B, K, E) and (B, N) groups, which follow."""
    order = index.argsort(dim=-1)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    features = features.gather(1, order[..., None].expand_as(features))
    return index.gather(1, order), features, rank.gather(1, group)


@dataclass(frozen=True, eq=False)
class Matching:
    """Which tokens merge into which. B images, r pairs."""

    source: Tensor  # (B, r) positions of tokens that merge away, in the order of their rank for it
    destination: Tensor  # (B, r) positions that they merge into; several sources may share one
    weight: Tensor  # (B, r, 2) softmax over the importance of source and destination


def similarity_rank(metric: Tensor) -> Tensor:
    """(B, N, d) -> (B, N) rank of every token by its highest cosine similarity to another, 0 the highest (CrossGET).

    Tokens that are each other's nearest are equally similar; the lower position ranks first.
    """
    order = descending(_others(metric).amax(dim=-1).nan_to_num(neginf=-2.0))
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def complete_matching(metric: Tensor, importance: Tensor, r: int, rank: Tensor | None = None) -> Matching:
    """CrossGET's complete-graph soft matching: the `r` tokens that matter least beside what they resemble.

    A token may look at those of lower standing (larger rank) only; importance minus its highest similarity to one of
    them is its score, and the `r` lowest scores are sources. A source's destination is the most similar of all tokens
    that are no source (the first of several).

    Args:
        metric: (B, N, d), keys averaged over heads.
        importance: (B, N).
        r: 1..N // 2.
        rank: (B, N) in place of `similarity_rank(metric)`.
    """
    similarity = _others(metric)
    rank = similarity_rank(metric) if rank is None else rank
    looked_at = similarity.masked_fill(rank[:, None, :] <= rank[:, :, None], -torch.inf)
    bad = (~importance.isfinite()).sum()
    refuse_any(bad, "the importance of a token is NaN or infinite; finite values are needed to choose")
    score = importance.float() - looked_at.amax(dim=-1)
    source = score.sort(dim=-1, stable=True).indices[:, :r]
    to_sources = torch.zeros_like(score, dtype=torch.bool).scatter_(1, source, True)[:, None, :]
    rows = similarity.gather(1, source[..., None].expand(-1, -1, similarity.shape[2]))
    destination = rows.masked_fill(to_sources, -torch.inf).argmax(dim=-1)
    both = torch.stack([importance.gather(1, source), importance.gather(1, destination)], dim=-1)
    return Matching(source, destination, both.float().softmax(dim=-1))


def _others(metric: Tensor) -> Tensor:
    """(B, N, N) cosine similarities, -inf on the diagonal."""
    unit = torch.nn.functional.normalize(metric.float(), dim=-1)
    similarity = unit @ unit.transpose(-1, -2)
    # Products may round differently on both sides of the diagonal; two nearest neighbours are exactly as near.
    similarity = torch.maximum(similarity, similarity.transpose(-1, -2))
    itself = torch.eye(metric.shape[1], dtype=torch.bool, device=metric.device)
    return similarity.masked_fill(itself, -torch.inf)


def ensemble_merge(tokens: Tensor, size: Tensor, matching: Matching) -> Merged:
    """CrossGET's cross-guided matching and ensemble: merge every source into its destination, the order staying.

    With each token first multiplied by its size, a destination d becomes d + sum over its sources s of
    (2 w_s s + (2 w_d - 1) d), divided by the sum of the sizes. Where both matter equally this is ToMe's mean.

    Args:
        tokens: (B, N, E).
        size: (B, N).
    """
    source, destination, weight = matching.source, matching.destination, 2.0 * matching.weight
    width = tokens.shape[2]
    scaled = tokens.float() * size.float()[..., None]
    taken = scaled.gather(1, source[..., None].expand(-1, -1, width))
    given = scaled.gather(1, destination[..., None].expand(-1, -1, width))
    added = weight[..., :1] * taken + (weight[..., 1:] - 1.0) * given
    summed = scaled.scatter_add(1, destination[..., None].expand_as(added), added)
    total = size.float().scatter_add(1, destination, size.float().gather(1, source))
    leaves = torch.zeros_like(size, dtype=torch.int8).scatter_(1, source, 1)
    left = tokens.shape[1] - source.shape[1]
    representative = leaves.sort(dim=-1, stable=True).indices[:, :left]
    group = _places_of(representative, tokens.shape[1])
    group = group.scatter(1, source, group.gather(1, destination))
    features = summed.gather(1, representative[..., None].expand(-1, -1, width))
    size = total.gather(1, representative)
    return Merged((features / size[..., None]).to(tokens.dtype), size, representative, group)
