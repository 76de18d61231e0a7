"""The layout of pictures cut into tiles of any arrangement, un-padded, with newlines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.core import Grid
from foveate.families.layouts import Encoded, Layout, patches_per_side


def anyres(encoded: Encoded) -> list[Layout]:
    """A base tile, then the tiles of the enlarged picture as one raster without its padding, a newline per row.

    Where each visual token comes from is found by sending coordinates through the family's own packing.
    """
    config = encoded.model.config
    side = patches_per_side(config)
    made, first = [], 0
    for size, tiles in zip(encoded.sizes("image_sizes"), _tiles_per_picture(encoded), strict=True):
        made.append(_anyres(encoded.model, size, tiles, side, first))
        first += tiles
    return made


def _tiles_per_picture(encoded: Encoded) -> list[int]:
    """As the family counts them: a picture among several of a row is one tile where it is told of the rows."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = encoded.model.config
    sizes = encoded.sizes("image_sizes")
    per_row = encoded.given.get("batch_num_images")
    per_row = per_row.tolist() if isinstance(per_row, Tensor) else per_row
    alone = [True] * len(sizes) if per_row is None else [n == 1 for n in per_row for _ in range(n)]
    pins, side = config.image_grid_pinpoints, config.vision_config.image_size
    return [image_size_to_num_patches(size, pins, side) if one else 1 for size, one in zip(sizes, alone, strict=True)]


def _anyres(model: Any, size: list[int], tiles: int, side: int, first: int) -> Layout:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    config, per_tile = model.config, side * side
    pins = config.image_grid_pinpoints
    across = get_anyres_image_grid_shape(size, pins, config.vision_config.image_size)[1] if tiles > 1 else 1
    packed = _packed_coordinates(model, size, tiles, across, side)
    visual = (packed[:, 0] >= 0).nonzero().squeeze(-1)
    # The base tile is packed as it is, before the others.
    base, _ = _taps(packed[visual[:per_tile]], 1, side)
    others, shares = _taps(packed[visual[per_tile:]], across, side)
    patches = torch.cat([base.expand(-1, others.shape[1]), others + per_tile])
    weights = torch.cat([torch.eye(1, others.shape[1]).expand(per_tile, -1), shares])
    main = patches.gather(1, weights.argmax(dim=1, keepdim=True))[:, 0]
    return Layout(
        placeholders=packed.shape[0],
        visual=visual,
        patches=patches + first * per_tile,
        lengths=(per_tile,) * tiles,
        weights=None if patches.shape[1] == 1 else weights,
        grid=(side, side) if tiles == 1 else None,
        tile=main // per_tile if tiles > 1 else None,
        summary=first,
        grids=tuple(_raster(packed[visual[main // per_tile == number]]) for number in range(tiles)),
    )


def _raster(where: Tensor) -> Grid | None:
    """(h, w) that tokens at these coordinates (n, 2), row by row, fill; None for none."""
    height, width = (int(axis.round(decimals=2).unique().numel()) for axis in where.T)
    return (height, width) if height * width == where.shape[0] > 0 else None


def _packed_coordinates(model: Any, size: list[int], tiles: int, across: int, side: int) -> Tensor:
    """(M, 2) row and column of each placeholder: in the base tile for its tokens, then in the enlarged picture, whose
    tiles stand `across` side by side; -1 for newlines."""
    config = model.config
    raster = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1).flatten(0, 1)
    corners = [(0, 0), *((number // across * side, number % across * side) for number in range(tiles - 1))]
    coordinates = (torch.tensor(corners)[:, None] + raster).float()  # (tiles, side * side, 2)
    options = (
        {"vision_aspect_ratio": config.vision_aspect_ratio}
        if hasattr(config, "vision_aspect_ratio")
        else {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    )
    newline = torch.full((2,), -1.0)
    packed, _ = model.base_model.pack_image_features([coordinates], [size], image_newline=newline, **options)
    found: Tensor = packed[0]
    return found


def _taps(where: Tensor, across: int, side: int) -> tuple[Tensor, Tensor]:
    """(N, 2) coordinates on a canvas `across` tiles wide -> the 1 or 4 patches around each, and their shares."""
    low = (where + 1e-4).floor()
    share = (where - low).clamp(min=0.0)
    share = torch.where(share < 1e-3, 0.0, share)
    corners = ((0, 0), (0, 1), (1, 0), (1, 1)) if bool((share > 0).any()) else ((0, 0),)
    patches, weights = [], []
    for down, right in corners:
        step = torch.tensor([down, right])
        weight = torch.where(step.bool(), share, 1.0 - share).prod(dim=1)
        y, x = (low + step * (share > 0)).long().unbind(dim=1)
        tile = y // side * across + x // side
        patches.append(tile * side * side + y % side * side + x % side)
        weights.append(weight)
    return torch.stack(patches, dim=1), torch.stack(weights, dim=1)
