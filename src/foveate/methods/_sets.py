"""What methods that choose a set out of every tile share: pools, shares of the budget, and checks of their fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from foveate.core import Block, FoveateError, Keep, Selection, Signals
from foveate.methods._attention import Attention, attended
from foveate.methods._tiles import kept_of
from foveate.ops.subsets import split_budget
from foveate.ops.tiles import Pools, by_tile, whole_images


def choose_sets(
    signals: Signals,
    keep: Keep,
    budget: Literal["tile", "image"],
    choose: Callable[[Pools, int], Tensor],
    share: Callable[[Pools, int], list[list[int]]] | None = None,
) -> Selection:
    """Let `choose` pick tokens of each pool, best first, and keep of every pool its share.

    Args:
        choose: takes the pools and a count K; gives (P, K) places in the pools.
        share: takes the pools and the tokens to keep of an image; gives the tokens to keep of each pool of each image;
            by default equal ones, the remainder to the first.
    """
    kept = kept_of(keep, signals, budget)
    if kept == signals.shape[1]:
        return Selection(list(signals.index.sort(dim=-1).values))
    apart = None if budget == "image" else signals.tile
    pools = whole_images(signals.index) if apart is None else by_tile(apart)
    shares = share(pools, kept) if share else [split_budget(kept, sizes) for sizes in pools.sizes]
    chosen = pools.chosen(choose(pools, max(map(max, shares))), shares)
    return Selection([index[places].sort().values for index, places in zip(signals.index, chosen, strict=True)])


def salience(block: Block, attention: Attention) -> Tensor:
    """(B, N): the attention to each patch, at most 1 in each image."""
    paid = attended(block, attention)
    return paid / paid.amax(dim=-1, keepdim=True).clamp_min(1e-30)


def check_power(name: str, value: float) -> None:
    """Refuse an exponent that is no number from 0 to 8; beyond, float32 no longer tells the weights apart."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 8.0:
        nearest = 8.0 if isinstance(value, int | float) and value > 8 else 0.0
        raise FoveateError(f"{name}={value!r} is no number in [0, 8]; the nearest is {name}={nearest}")


def check_positive(name: str, value: float, usual: float) -> None:
    """Refuse what is no finite number above 0; `usual` is one that is."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
        raise FoveateError(f"{name}={value!r} is no positive number; the usual one is {name}={usual}")


def words_after(signals: Signals, method: str) -> Tensor:
    """(B, T) bool: the text that stands after the image.

    Raises:
        FoveateError: an image is followed by none.
    """
    assert signals.text_mask is not None and signals.after_image is not None
    mask = signals.text_mask & signals.after_image
    silent = (~mask.any(dim=-1)).nonzero().flatten().tolist()
    if silent:
        raise FoveateError(
            f"{method} reads the text after the image, but image {silent[0]} is followed by none; put the question "
            "after the image, or use a method that does not read the text"
        )
    return mask
