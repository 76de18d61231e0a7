"""Layouts of videos: how the patches of frames become tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveate.core import Grid
from foveate.families.anyres import _taps
from foveate.families.layouts import Encoded, Layout, merged
from foveate.families.towers import patches_per_side


def pooled_frames(side: int, encoded: Encoded) -> list[Layout]:
    """Videos, each a number of frames of one size whose patches are pooled in squares of `side`."""
    height = width = patches_per_side(encoded.model.config)
    # A stride that does not divide the raster leaves its last rows and columns out.
    whole = merged(height // side * side, width // side * side, side)
    y, x = whole // (width // side * side), whole % (width // side * side)
    return _frames(y * width + x, None, height * width, (height // side, width // side), encoded, newline=False)


def halved_frames(encoded: Encoded) -> list[Layout]:
    """Videos, each a number of frames of one size that bilinear interpolation halves, and one newline."""
    height = width = patches_per_side(encoded.model.config)
    raster = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).float()
    half = [math.ceil(height / 2), math.ceil(width / 2)]
    where = torch.nn.functional.interpolate(raster[None], size=half, mode="bilinear")[0].flatten(1).T
    patches, weights = _taps(where, 1, height)
    return _frames(patches, weights, height * width, (half[0], half[1]), encoded, newline=True)


def _frames(
    patches: Tensor, weights: Tensor | None, of: int, grid: Grid, encoded: Encoded, newline: bool
) -> list[Layout]:
    """Frames of `of` patches, (n, G) of which make the n tokens of each; every frame is a tile."""
    made = []
    frames, tokens = int(encoded.given["pixel_values_videos"].shape[1]), patches.shape[0]
    for number in range(len(encoded.rows)):
        first = number * frames
        made.append(
            Layout(
                placeholders=frames * tokens + newline,
                visual=torch.arange(frames * tokens),
                patches=torch.cat([patches + (first + frame) * of for frame in range(frames)]),
                lengths=(of,) * frames,
                weights=None if weights is None else weights.repeat(frames, 1),
                tile=torch.arange(frames).repeat_interleave(tokens),
                summary=first,
                grids=(grid,) * frames,
            )
        )
    return made


def whole_frames(encoded: Encoded) -> list[Layout]:
    """Videos, each a number of frames of one size, whose tokens are the patches; the CLS before each frame's stays.

    An entry of what the encoder hands over is a frame.
    """
    side = patches_per_side(encoded.model.config)
    of = side**2
    videos, frames = (int(size) for size in encoded.given["pixel_values_videos"].shape[:2])
    visual = torch.arange(frames * (of + 1)).view(frames, of + 1)[:, 1:].flatten()
    patches = torch.arange(frames * of)
    return [
        Layout(
            placeholders=frames * (of + 1),
            visual=visual,
            patches=(patches + number * frames * of)[:, None],
            lengths=(of,) * frames,
            tile=patches // of,
            summary=number * frames,
            grids=((side, side),) * frames,
        )
        for number in range(videos)
    ]
