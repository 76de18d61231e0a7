"""What methods that choose a set out of every tile share: pools, shares of the budget, and weights of the patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from foveate.core import Block, Selection, Signals
from foveate.methods._attention import Attention, attended
from foveate.ops.subsets import split_budget
from foveate.ops.tiles import Pools, by_tile, whole_images


def choose_sets(
    signals: Signals,
    kept: int,
    budget: Literal["tile", "image"],
    choose: Callable[[Pools, int], Tensor],
    share: Callable[[Pools, int], list[list[int]]] | None = None,
) -> Selection:
    """Let `choose` pick tokens of each pool, best first, and keep of every pool its share.

    Args:
        kept: tokens to keep of each image.
        choose: takes the pools and a count K; gives (P, K) places in the pools.
        share: takes the pools and the tokens to keep of an image; gives the tokens to keep of each pool of each image;
            by default equal ones, the remainder to the first.
    """
    if kept == signals.shape[1]:
        return Selection(list(signals.index.sort(dim=-1).values))
    apart = None if budget == "image" else signals.tile
    pools = whole_images(signals.index) if apart is None else by_tile(apart, signals.by_tile())
    shares = share(pools, kept) if share else [split_budget(kept, sizes) for sizes in pools.sizes]
    chosen = pools.chosen(choose(pools, max(map(max, shares))), shares)
    return Selection([index[places].sort().values for index, places in zip(signals.index, chosen, strict=True)])


def salience(block: Block, attention: Attention) -> Tensor:
    """(B, N): the attention to each patch, at most 1 in each image."""
    paid = attended(block, attention)
    return paid / paid.amax(dim=-1, keepdim=True).clamp_min(1e-30)
