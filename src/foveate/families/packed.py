"""Layouts of encoders that see the patches of all pictures as one sequence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foveate.core import FoveateError
from foveate.families.layouts import Encoded, Layout, merged


def packed_blocks(encoded: Encoded, name: str = "image_grid_thw") -> list[Layout]:
    """Pictures of any size in one sequence, patches in squares behind each other, which a window order may shuffle."""
    tower = encoded.tower
    side = tower.config.spatial_merge_size
    sizes = encoded.sizes(name)
    order = _window_order(tower, torch.tensor(sizes))
    made, first, summary = [], 0, 0
    for frames, height, width in sizes:
        tokens = frames * height * width // side**2
        given = torch.arange(first, first + tokens)
        groups = given if order is None else order[first : first + tokens]
        frame = height * width // side**2
        made.append(
            Layout(
                placeholders=tokens,
                visual=torch.arange(tokens),
                patches=groups[:, None] * side**2 + torch.arange(side**2),
                lengths=(height * width,) * frames,
                grid=(height // side, width // side) if frames == 1 else None,
                tile=None if frames == 1 else torch.arange(tokens) // frame,
                summary=summary,
                grids=((height // side, width // side),) * frames,
                sources=given[:, None] * side**2 + torch.arange(side**2),
            )
        )
        first, summary = first + tokens, summary + frames
    return made


def _window_order(tower: Any, sizes: Tensor) -> Tensor | None:
    """Where the encoder's blocks hold each merged token; None where it keeps the order of the pictures."""
    if not hasattr(tower, "window_size"):
        return None
    if hasattr(tower, "get_window_index"):
        index = tower.get_window_index(sizes)[0]
    else:
        from transformers.vision_utils import get_vision_window_index

        config = tower.config
        index = get_vision_window_index(sizes, config.spatial_merge_size, config.window_size, config.patch_size)[0]
    return torch.as_tensor(index).argsort()


def packed_rasters(side: int, encoded: Encoded, name: str = "image_sizes") -> list[Layout]:
    """Pictures of any size in one sequence, patches row by row, merged in squares of `side`.

    Args:
        name: the argument with their sizes: in pixels, or after the number of frames, which is 1, in patches.
    """
    patch = encoded.model.config.vision_config.patch_size
    made, first = [], 0
    for number, size in enumerate(encoded.sizes(name)):
        height, width = size[-2:] if len(size) == 3 else (pixels // patch for pixels in size)
        patches = merged(height, width, side)
        grid = height // side, width // side
        tokens = math.prod(grid)
        made.append(Layout(tokens, torch.arange(tokens), patches + first, (height * width,), None, grid, None, number))
        first += height * width
    return made


def packed_patches(encoded: Encoded) -> list[Layout]:
    """Pictures of any size in one sequence, of which each states that its patches do not merge.

    Raises:
        FoveateError: they do, or it is not stated.
    """
    most = max(encoded.stated("image_merge_sizes").tolist(), default=1)
    if most > 1:
        raise FoveateError(
            f"image_merge_sizes={most} merges patches of a picture, whose tokens can then not be told apart; 1 works"
        )
    return packed_rasters(1, encoded, "image_grid_thw")


def padded_rasters(side: int, encoded: Encoded) -> list[Layout]:
    """Pictures of any size, each padded to the same number of patches, whose places are told; squares of `side` merge.

    Raises:
        FoveateError: their places were not given.
    """
    made = []
    for number, (x, y) in enumerate(encoded.stated("image_position_ids").cpu().transpose(1, 2)):
        there = (x >= 0).nonzero().squeeze(-1)
        width, height = int(x.max()) + 1, int(y.max()) + 1
        raster = torch.empty(height * width, dtype=torch.int64)
        raster[y[there] * width + x[there]] = there
        patches = raster[merged(height, width, side)]
        grid, length = (height // side, width // side), x.numel()
        tokens = math.prod(grid)
        made.append(
            Layout(tokens, torch.arange(tokens), patches + number * length, (length,), None, grid, None, number)
        )
    return made
