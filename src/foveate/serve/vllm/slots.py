"""Which places a picture has in a pruned prompt, by arithmetic alone: an engine must know them before it encodes.

Shapes: R tokens that stand for an item (a picture, or a video) in an unpruned prompt, P in the pruned one, M of the R
are placeholders, N of these stand for visual tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.serve.vllm.rooms import FoveateError, Layout, Method, visual_per_layer


@dataclass(frozen=True, eq=False)
class Unit:
    """What a budget counts: a picture, or a tile of one where text stands between tiles.

    Attributes:
        layout: how its tokens come from the encoder's patches.
        places: (M,) of its placeholders among the R tokens.
        between: (F,) of other tokens between them, such as the ends of rows.
        kept: visual tokens that stay.
    """

    layout: Layout
    places: Tensor
    between: Tensor
    kept: int

    @property
    def slots(self) -> int:
        """Embeddings that it takes in the pruned prompt; what stands between its tokens is one of them."""
        beside = self.layout.placeholders - self.layout.visual.numel()
        return self.kept + beside + self.between.numel()


def units_of(
    tokens: Tensor, layouts: Sequence[Layout], parts: Sequence[Method], left: Sequence[Tensor] | None = None
) -> list[Unit]:
    """The units of an item, in their order.

    Args:
        tokens: (R,) ids, -1 at the placeholders.
        layouts: of its pictures.
        parts: the methods that act on each behind the encoder; none keeps all.
        left: of each, what goes into the encoder; None for all.
    """
    places = (tokens < 0).nonzero().flatten()
    expected = sum(layout.placeholders for layout in layouts)
    if expected != places.numel():
        raise FoveateError(
            f"the prompt has {places.numel()} placeholders for a picture of {expected} tokens; this processor lays "
            "pictures out in another way than the family's row says, so they cannot be pruned"
        )
    found, start = [], 0
    for number, layout in enumerate(layouts):
        mine = places[start : start + layout.placeholders]
        start += layout.placeholders
        span = torch.arange(int(mine[0]), int(mine[-1]) + 1)
        kept = count_of(parts, layout)
        kept = kept if left is None else min(kept, left[number].numel())
        found.append(Unit(layout, mine, span[tokens[span] >= 0], kept))
    return found


def sources_of(tokens: Tensor, units: Sequence[Unit]) -> Tensor:
    """(P,) which of the R tokens each token of the pruned prompt is; -1 for a slot that takes an embedding."""
    made: list[int] = []
    at = 0
    for unit in units:
        first, last = int(unit.places[0]), int(unit.places[-1])
        made += [*range(at, first), *[-1] * unit.slots]
        at = last + 1
    return torch.tensor([*made, *range(at, tokens.numel())], dtype=torch.int64)


def count_of(parts: Sequence[Method], layout: Layout) -> int:
    """Visual tokens of a picture that are left.

    Raises:
        FoveateError: a later method asks for more than an earlier one leaves, or a method cannot act on this picture.
    """
    tokens = layout.visual.numel()
    tiles = 1 if layout.tile is None else int(layout.tile.max()) + 1
    return visual_per_layer(fitted(parts, tokens), tokens, 1, grid=layout.grid, tiles=tiles)[0]


def fitted(parts: Sequence[Method], tokens: int) -> list[Method]:
    """The methods with budgets that a picture of so many tokens can meet: a small picture keeps what it has."""
    return [_lowered(part, tokens) for part in parts]


def _lowered(part: Method, tokens: int) -> Method:
    keep = getattr(part, "keep", None)
    if isinstance(keep, int) and not isinstance(keep, bool) and keep > tokens:
        return dataclasses.replace(part, keep=tokens)  # type: ignore[call-arg]
    return part
