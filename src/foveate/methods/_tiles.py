"""What methods that are applied tile by tile share: how a budget is counted and spent over the tiles of an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from foveate.core import Keep, Method, Selection, Signals, check_choices, check_keep
from foveate.ops.subsets import each_tile


class TileMethod(Method):
    """A method whose only budget is `keep` over the tiles of an image; its dataclasses have these fields."""

    keep: Keep
    budget: Literal["tile", "image"]

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choices(self)


def choose_by_tile(
    signals: Signals, kept: int, budget: Literal["tile", "image"], choose: Callable[[Tensor, Tensor, int], Tensor]
) -> Selection:
    """Let `choose` pick `kept` tokens of each image: of every tile its even share, or of all its tokens at once.

    Args:
        choose: takes (R,) numbers of images, (R, n) positions on the N axis and a count; gives the (R, count) chosen
            among the n, distinct.
    """
    batch, left = signals.shape
    if signals.tile is None or budget == "image":
        images = torch.arange(batch, device=signals.index.device)
        everything = torch.arange(left, device=signals.index.device).expand(batch, left)
        positions = list(choose(images, everything, kept))
    else:
        positions = each_tile(signals.tile, signals.by_tile(), kept, choose)
    return Selection([index[row].sort().values for index, row in zip(signals.index, positions, strict=True)])
