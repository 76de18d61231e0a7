"""What methods that hand on merged tokens share: the tokens in raster order, and a selection of tokens new and old."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from foveate.core import FoveateError, Selection, Signals
from foveate.ops.pooling import take
from foveate.ops.subsets import split_budget

Space: TypeAlias = Literal["encoded", "projected"]
Tokens: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Of B images: original indices (B, K), features (B, K, D) and which are extra (B, K), in any order."""


def merged_signal(space: Space) -> str:
    """The signal that has the tokens to merge: those that the projector reads, or what it makes of them."""
    return "tower.read.hidden" if space == "encoded" else "features"


def merged_tokens(signals: Signals, space: Space) -> Tensor:
    """(B, N, E) of the encoder or (B, N, D) behind the projector."""
    tokens = signals.tower["read"].hidden if space == "encoded" else signals.features
    assert tokens is not None
    return tokens


def check_space(official: bool, space: Space) -> None:
    """Refuse to give for an authors' code that merges tokens of the encoder what merges others."""
    if official and space != "encoded":
        raise FoveateError(
            f"official=True is the authors' code, which merges tokens of the encoder, not space={space!r}; leave out "
            "one of the two"
        )


def everything(signals: Signals) -> Selection:
    """Every token that is left, as it is."""
    return Selection([row.sort().values for row in signals.index])


def in_raster_order(signals: Signals, *values: Tensor) -> list[Tensor]:
    """The index (B, N) ascending, and each (B, N) or (B, N, D) in the same order."""
    order = signals.index.argsort(dim=-1)
    return [take(value, order) for value in (signals.index, *values)]


def handed_on(tokens: Tokens, space: Space = "encoded") -> Selection:
    """The selection that hands these tokens on, in raster order."""
    order = tokens[0].argsort(dim=-1)
    indices, features, extra = (list(take(value, order)) for value in tokens)
    return Selection(indices, features=features, space=space, extra=extra)


def with_rest(
    index: Tensor, kept: Tensor, left_out: Tensor, tokens: Tensor, rest: Tensor, space: Space = "encoded"
) -> Selection:
    """Kept patches and one extra token for the rest, which takes the largest index of those left out.

    Args:
        index: (B, N) original index of each place.
        kept: (B, K) places.
        left_out: (B, M) places; where there are none, there is no rest.
        tokens: (B, K, E) what is handed on for the kept ones.
        rest: (B, 1, E).
    """
    indices, extra = take(index, kept), torch.zeros_like(kept, dtype=torch.bool)
    if left_out.shape[1]:
        last = take(index, left_out).amax(dim=-1, keepdim=True)
        indices, tokens = torch.cat([indices, last], dim=1), torch.cat([tokens, rest], dim=1)
        extra = torch.cat([extra, torch.ones_like(last, dtype=torch.bool)], dim=1)
    return handed_on((indices, tokens, extra), space)


def of_all_rows(selections: list[Selection]) -> Selection:
    """One selection of the rows of several, which all hand on tokens of one space."""
    indices = [row for one in selections for row in one.indices]
    features = [row for one in selections for row in one.features or []]
    extra = [row for one in selections for row in one.extra or []]
    return Selection(indices, features=features, space=selections[0].space, extra=extra)


def tile_by_tile(
    tile: Tensor,
    sizes: Sequence[Sequence[int]],
    total: int,
    merge: Callable[[slice, Tensor, int, bool], Tokens],
    space: Space = "encoded",
) -> Selection:
    """Let every tile hand on its share of `total`: evenly split, the remainder to tile 0.

    Args:
        tile: (B, N) in raster order.
        sizes: of each image the tokens of each tile.
        merge: takes one image as a slice of B, the (1, n) places of the tile's tokens, ascending, its share of at least
            1, and whether it is tile 0.
    """
    images = []
    for image, (tiles, counts) in enumerate(zip(tile, sizes, strict=True)):
        found, shares = [], split_budget(total, counts)
        for number, places in enumerate(tiles.argsort(stable=True).split(list(counts))):
            if shares[number]:
                found.append(merge(slice(image, image + 1), places[None], shares[number], number == 0))
        index, features, extra = (torch.cat(values, dim=1) for values in zip(*found, strict=True))
        images.append(handed_on((index, features, extra), space))
    return of_all_rows(images)
