"""Who competes with whom: the tokens of an image, or of each of its tiles, as pools padded to one size.

Shapes: B images, N tokens, P pools, M tokens of the largest pool, K picks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops.device import on_device


@dataclass(frozen=True, eq=False)
class Pools:
    """The pools of B images, those of image 0 first."""

    place: Tensor  # (P, M) positions on the N axis, ascending; padding repeats the pool's first
    image: Tensor  # (P,) image of each pool
    sizes: list[list[int]]  # per image, the tokens of each of its pools
    free: Tensor | None = None  # (P, M) bool, False in padding; None without any
    whole: bool = False  # one pool per image, which holds all its tokens as they stand

    def take(self, values: Tensor) -> Tensor:
        """(B, N, ...) -> (P, M, ...): each pool's tokens."""
        return values if self.whole else values[self.image[:, None], self.place]

    def shared(self, values: Tensor) -> Tensor:
        """(B, ...) -> (P, ...): what is the same for all pools of an image."""
        return values if self.whole else values[self.image]

    def without_padding(self, values: Tensor) -> Tensor:
        """(P, M), with 0 in padding."""
        return values if self.free is None else values.masked_fill(~self.free, 0.0)

    def chosen(self, picks: Tensor, shares: list[list[int]]) -> list[Tensor]:
        """(P, K) picks in each pool, the first `shares` of which count -> B ascending position tensors."""
        found: list[Tensor] = []
        pool = 0
        for counts in shares:
            kept = [self.place[pool + nth, picks[pool + nth, :count]] for nth, count in enumerate(counts)]
            found.append(torch.cat(kept).sort().values)
            pool += len(counts)
        return found


def whole_images(index: Tensor) -> Pools:
    """One pool per image; `index` (B, N) gives the shape and the device."""
    batch, tokens = index.shape
    place = torch.arange(tokens, device=index.device).expand(batch, tokens)
    return Pools(place, torch.arange(batch, device=index.device), [[tokens]] * batch, whole=True)


def by_tile(tile: Tensor, sizes: Sequence[Sequence[int]]) -> Pools:
    """One pool per tile that has tokens, the base (tile 0) first.

    Args:
        tile: (B, N) numbers each token's tile.
        sizes: of each image the tokens of each tile.
    """
    places: list[Tensor] = []
    held: list[list[int]] = []
    images: list[int] = []
    for image, (row, counts) in enumerate(zip(tile, sizes, strict=True)):
        held.append([count for count in counts if count])
        places.extend(row.argsort(stable=True).split(held[-1]))
        images.extend([image] * len(held[-1]))
    longest = max(map(len, places))
    place = torch.stack([torch.cat([one, one[:1].expand(longest - len(one))]) for one in places])
    lengths = on_device(torch.tensor([len(one) for one in places]), tile.device)
    free = torch.arange(longest, device=tile.device) < lengths[:, None]
    padded = any(len(one) < longest for one in places)
    return Pools(place, on_device(torch.tensor(images), tile.device), held, free if padded else None)
