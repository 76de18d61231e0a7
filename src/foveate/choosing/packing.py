"""Carries what the encoder showed of its patches to the tokens of the pictures, as the decoder has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from foveate.choosing.signals import TOKEN_AXIS
from foveate.core import Block, FoveateError
from foveate.families.layouts import Layout
from foveate.ops.device import on_device
from foveate.ops.padding import joined


def to_tokens(blocks: Mapping[int | str, Block], layouts: Sequence[Layout], packed: bool) -> dict[int | str, Block]:
    """Blocks with one row per picture, its N tokens in place of the patches of its tiles; padded to the longest.

    A token has the mean of its patches. What a block shows of CLS is that of the base tile.

    Args:
        packed: the encoder ran the patches of all pictures as one row.
    """
    if not packed and all(layout.plain and layout.summary == number for number, layout in enumerate(layouts)):
        return dict(blocks)
    return {name: _to_tokens(name, block, layouts) for name, block in blocks.items()}


def _to_tokens(name: int | str, block: Block, layouts: Sequence[Layout]) -> Block:
    fields = {}
    for field, value in vars(block).items():
        axis = TOKEN_AXIS.get(field)
        if value is None or not layouts:
            continue
        if axis is None:
            fields[field] = torch.stack([value[layout.summary] for layout in layouts])
            continue
        flat = value.movedim(axis, 1).flatten(0, 1)
        seen, wanted = flat.shape[0], max(int(layout.patches.max()) + 1 for layout in layouts)
        if wanted > seen:
            raise FoveateError(
                f"encoder block {name} saw {seen} patches where the pictures of the prompt have {wanted}"
            )
        rows = [_mean(flat, layout) for layout in layouts]
        fields[field] = joined([row[None] for row in rows]).movedim(1, axis)
    return Block(**fields)


def _mean(flat: Tensor, layout: Layout) -> Tensor:
    """(patches, ...) -> (N, ...)."""
    behind = flat[on_device(layout.patches, flat.device)]
    if layout.weights is None:
        return behind[:, 0] if behind.shape[1] == 1 else behind.mean(dim=1)
    shares = (
        on_device(layout.weights, behind.device).to(behind.dtype).view(*layout.weights.shape, *[1] * (behind.ndim - 2))
    )
    return (behind * shares).sum(dim=1)
