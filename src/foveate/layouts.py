"""How the encoder's patches become the tokens that a picture takes in the prompt: one function per way of packing them.

Shapes: N visual tokens of a picture, M placeholders that it takes (newlines included), G patches behind one token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.core import FoveateError, Grid


@dataclass(frozen=True, eq=False)
class Encoded:
    """What is known of the pictures of one call.

    Attributes:
        model: the vision-language model.
        tower: its vision encoder.
        given: the arguments of the call: sizes of the pictures, numbers of pictures per row.
        rows: tokens in each entry of what the encoder hands over; an entry is a picture, a tile, or a row's pictures.
        count_runs: gives `runs`; called where they are needed, since it waits for the device.
    """

    model: Any
    tower: Any
    given: Mapping[str, Any]
    rows: Sequence[int]
    count_runs: Callable[[], Sequence[int]]

    @property
    def runs(self) -> Sequence[int]:
        """Lengths of the runs of placeholders in the prompts, in their order."""
        return self.count_runs()

    def stated(self, name: str) -> Any:
        """An argument of the call.

        Raises:
            FoveateError: it was not given.
        """
        value = self.given.get(name)
        if value is None:
            raise FoveateError(f"{name} is missing; pass what the processor made, {name} among it")
        return value

    def sizes(self, name: str) -> list[list[int]]:
        """The argument that states the pictures' sizes.

        Raises:
            FoveateError: it was not given.
        """
        value = self.stated(name)
        # At once: on a device every number read by itself would wait for it.
        value = value.tolist() if isinstance(value, Tensor) else value
        return [[int(side) for side in one] for one in value]


@dataclass(frozen=True, eq=False)
class Layout:
    """One picture.

    Attributes:
        placeholders: M.
        visual: (N,) places of the visual tokens among them; the others are newlines or CLS, which stay.
        patches: (N, G) patches behind each token, numbered through the whole encoding.
        lengths: patches of each tile.
        weights: (N, G) share of each patch, rows sum to 1; None for their mean.
        grid: raster shape of the N tokens; None where they form no single raster.
        tile: (N,) tile of each token, 0 = base; None without tiles.
        summary: number of the encoded tile whose CLS speaks for the picture.
    """

    placeholders: int
    visual: Tensor
    patches: Tensor
    lengths: tuple[int, ...]
    weights: Tensor | None = None
    grid: Grid | None = None
    tile: Tensor | None = None
    summary: int = 0

    @property
    def plain(self) -> bool:
        """The tokens are the patches of one tile in their order."""
        return len(self.lengths) == 1 and self.patches.shape == (self.lengths[0], 1) == (self.placeholders, 1)


@dataclass(frozen=True, eq=False)
class Tile:
    """What the encoder sees as one sequence: a picture, a tile of one, or a frame of a video.

    Attributes:
        picture: number of its picture.
        tokens: (n,) which of that picture's N tokens come from it.
        patches: (n, G) patches behind each, numbered within the tile.
        weights: (n, G) share of each patch; None for their mean, where no patch is behind two tokens.
        length: its patches.
        grid: raster of its tokens, where it is all of its picture.
        share: its place among the tiles of the picture that have tokens, and how many each of them has; None where it
            is the only one.
    """

    picture: int
    tokens: Tensor
    patches: Tensor
    length: int
    weights: Tensor | None = None
    grid: Grid | None = None
    share: tuple[int, tuple[int, ...]] | None = None

    @property
    def plain(self) -> bool:
        """Its tokens are its patches."""
        return self.weights is None and self.patches.shape == (self.length, 1)

    @property
    def rest(self) -> Tensor:
        """(R,) patches of no token, such as padding."""
        bound = torch.zeros(self.length, dtype=torch.bool).index_fill(0, self.patches.flatten(), True)
        return (~bound).nonzero().squeeze(-1)


def tiles_of(layouts: Sequence[Layout]) -> list[Tile]:
    """The tiles of some pictures, in the order in which the encoder sees them.

    A token that is interpolated between patches of two tiles counts for the one of its largest share, and of that
    tile's patches only.
    """
    made: list[Tile] = []
    first = 0
    for picture, layout in enumerate(layouts):
        patches, weights = layout.patches - first, layout.weights
        main = patches[:, :1] if weights is None else patches.gather(1, weights.argmax(dim=1, keepdim=True))
        ends = torch.tensor(layout.lengths).cumsum(0)
        tile = torch.bucketize(main[:, 0].contiguous(), ends, right=True)
        if weights is not None:
            here = torch.bucketize(patches.contiguous(), ends, right=True) == tile[:, None]
            patches, weights = patches.where(here, main), weights * here
            weights = weights / weights.sum(dim=1, keepdim=True)
        counts = tile.bincount(minlength=len(layout.lengths)).tolist()
        sizes = tuple(count for count in counts if count)
        for number, length in enumerate(layout.lengths):
            tokens = (tile == number).nonzero().squeeze(-1)
            made.append(
                Tile(
                    picture=picture,
                    tokens=tokens,
                    patches=patches[tokens] - (int(ends[number]) - length),
                    length=length,
                    weights=None if weights is None else weights[tokens],
                    grid=layout.grid if len(layout.lengths) == 1 else None,
                    share=(sum(count > 0 for count in counts[:number]), sizes) if len(sizes) > 1 else None,
                )
            )
        first += sum(layout.lengths)
    return made


def as_pictures(tiles: Sequence[Tile]) -> list[Layout]:
    """Each tile of an encoding that has tokens as a picture of its own."""
    made, first = [], 0
    for number, tile in enumerate(tiles):
        if tile.tokens.numel():
            count = tile.tokens.numel()
            patches = tile.patches + first
            made.append(
                Layout(count, torch.arange(count), patches, (tile.length,), tile.weights, tile.grid, None, number)
            )
        first += tile.length
    return made


def merged(height: int, width: int, side: int) -> Tensor:
    """(h/side * w/side, side * side) patches of a raster (h, w) in each square of `side` x `side`, row by row."""
    numbers = torch.arange(height * width).view(height // side, side, width // side, side)
    return numbers.transpose(1, 2).reshape(-1, side * side)


def plain(encoded: Encoded) -> list[Layout]:
    """Pictures of one size, whose tokens are the patches."""
    return square(1, encoded)


def square(side: int, encoded: Encoded) -> list[Layout]:
    """Pictures of one size whose patches merge in squares of `side`; an entry may hold several of them.

    An entry that is no number of whole pictures is taken for one of unknown shape, where nothing merges.
    """
    config = encoded.model.config
    height = width = patches_per_side(config)
    tokens = (height // side) * (width // side)
    entries = list(encoded.rows)
    if any(rows % tokens for rows in entries) and side == 1:
        return [_unknown(number, rows) for number, rows in enumerate(entries)]
    patches = merged(height, width, side)
    grid = height // side, width // side
    count = sum(entries) // tokens
    return [
        Layout(
            tokens, torch.arange(tokens), patches + number * height * width, (height * width,), None, grid, None, number
        )
        for number in range(count)
    ]


def _unknown(number: int, tokens: int) -> Layout:
    """A picture of unknown shape; all pictures of such an encoding have as many tokens."""
    numbers = torch.arange(tokens)
    return Layout(tokens, numbers, numbers[:, None] + number * tokens, (tokens,), None, None, None, number)


def entries(encoded: Encoded) -> list[Layout]:
    """Each entry of what the encoder hands over is one picture, of unknown shape.

    Raises:
        FoveateError: the prompt has another number of placeholders.
    """
    tokens, placeholders = sum(encoded.rows), sum(encoded.runs)
    if tokens != placeholders:
        raise FoveateError(
            f"the prompt has {placeholders} visual placeholders, but the entries of the encoder's pooler_output, taken "
            f"for one picture each, have {tokens} tokens together"
        )
    made, first = [], 0
    for number, rows in enumerate(encoded.rows):
        numbers = torch.arange(rows)
        made.append(Layout(rows, numbers, numbers[:, None] + first, (rows,), None, None, None, number))
        first += rows
    return made


def tiled_runs(side: int, encoded: Encoded) -> list[Layout]:
    """Tiles of one picture stand behind each other, its thumbnail last; each run of placeholders is a picture."""
    rows, columns = patches_per_side(encoded.model.config), patches_per_side(encoded.model.config)
    patches = merged(rows, columns, side)
    tokens, count = patches.shape[0], 0
    made = []
    for run in encoded.runs:
        tiles, rest = divmod(run, tokens)
        if rest:
            raise FoveateError(f"a run of {run} visual placeholders is no number of whole tiles of {tokens} tokens")
        numbers = torch.cat([patches + (count + tile) * rows * columns for tile in range(tiles)])
        # The thumbnail shows the whole picture, as the base tile does elsewhere.
        of_tile = torch.arange(1, tiles + 1).remainder(tiles)
        made.append(
            Layout(
                placeholders=run,
                visual=torch.arange(run),
                patches=numbers,
                lengths=(rows * columns,) * tiles,
                grid=(rows // side, columns // side) if tiles == 1 else None,
                tile=of_tile.repeat_interleave(tokens) if tiles > 1 else None,
                summary=count + tiles - 1,
            )
        )
        count += tiles
    return made


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
    )


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


def pooled_frames(side: int, encoded: Encoded) -> list[Layout]:
    """Videos, each a number of frames of one size whose patches are pooled in squares of `side`."""
    height = width = patches_per_side(encoded.model.config)
    # A stride that does not divide the raster leaves its last rows and columns out.
    whole = merged(height // side * side, width // side * side, side)
    y, x = whole // (width // side * side), whole % (width // side * side)
    return _frames(y * width + x, None, height * width, encoded, newline=False)


def halved_frames(encoded: Encoded) -> list[Layout]:
    """Videos, each a number of frames of one size that bilinear interpolation halves, and one newline."""
    height = width = patches_per_side(encoded.model.config)
    raster = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).float()
    half = [math.ceil(height / 2), math.ceil(width / 2)]
    where = torch.nn.functional.interpolate(raster[None], size=half, mode="bilinear")[0].flatten(1).T
    patches, weights = _taps(where, 1, height)
    return _frames(patches, weights, height * width, encoded, newline=True)


def _frames(patches: Tensor, weights: Tensor | None, of: int, encoded: Encoded, newline: bool) -> list[Layout]:
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
            )
        )
    return made


def whole_frames(encoded: Encoded) -> list[Layout]:
    """Videos, each a number of frames of one size, whose tokens are the patches; the CLS before each frame's stays.

    An entry of what the encoder hands over is a frame.
    """
    of = patches_per_side(encoded.model.config) ** 2
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
        )
        for number in range(videos)
    ]


def packed_blocks(encoded: Encoded, name: str = "image_grid_thw") -> list[Layout]:
    """Pictures of any size in one sequence, patches in squares behind each other, which a window order may shuffle."""
    tower = encoded.tower
    side = tower.config.spatial_merge_size
    sizes = encoded.sizes(name)
    order = _window_order(tower, torch.tensor(sizes))
    made, first, summary = [], 0, 0
    for frames, height, width in sizes:
        tokens = frames * height * width // side**2
        groups = torch.arange(first, first + tokens) if order is None else order[first : first + tokens]
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


def runs_of(ids: Tensor, token: int) -> list[int]:
    """Lengths of the runs of `token` in the rows of (B, S) prompts, row by row."""
    steps = torch.nn.functional.pad((ids == token).int(), (1, 1)).diff(dim=1)
    lengths: list[int] = ((steps == -1).nonzero()[:, 1] - (steps == 1).nonzero()[:, 1]).tolist()
    return lengths


def patches_per_side(config: Any) -> int:
    """Patches along a side of one tile."""
    vision = config.vision_config
    image, patch = (one if isinstance(one, int) else one[0] for one in (vision.image_size, vision.patch_size))
    return int(image // patch)
