"""How the encoder's patches become the tokens that a picture takes in the prompt: one function per way of packing them.

Shapes: N visual tokens of a picture, M placeholders that it takes (newlines included), G patches behind one token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.core import FoveateError, Grid
from foveate.families.towers import patches_per_side


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
        grids: raster shape of the tokens of each tile, None where they form none; of a single tile it is `grid`.
        sources: (N, G) the patches as the encoder is given them; None where its blocks hold them in the same order.
    """

    placeholders: int
    visual: Tensor
    patches: Tensor
    lengths: tuple[int, ...]
    weights: Tensor | None = None
    grid: Grid | None = None
    tile: Tensor | None = None
    summary: int = 0
    grids: tuple[Grid | None, ...] | None = None
    sources: Tensor | None = None

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
        sources: (n, G) those patches as the encoder is given them.
        grid: raster of its tokens, where they form one.
        share: its place among the tiles of the picture that have tokens, and how many each of them has; None where it
            is the only one.
        number: of the tile or frame, as the picture's tokens have it, 0 = base; None without tiles.
    """

    picture: int
    tokens: Tensor
    patches: Tensor
    sources: Tensor
    length: int
    weights: Tensor | None = None
    grid: Grid | None = None
    share: tuple[int, tuple[int, ...]] | None = None
    number: int | None = None

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
        grids = layout.grids or ((layout.grid,) if len(layout.lengths) == 1 else (None,) * len(layout.lengths))
        main = patches[:, :1] if weights is None else patches.gather(1, weights.argmax(dim=1, keepdim=True))
        ends = torch.tensor(layout.lengths).cumsum(0)
        tile = torch.bucketize(main[:, 0].contiguous(), ends, right=True)
        if weights is not None:
            here = torch.bucketize(patches.contiguous(), ends, right=True) == tile[:, None]
            patches, weights = patches.where(here, main), weights * here
            weights = weights / weights.sum(dim=1, keepdim=True)
        sources = patches if layout.sources is None else layout.sources - first
        counts = tile.bincount(minlength=len(layout.lengths)).tolist()
        sizes = tuple(count for count in counts if count)
        for number, length in enumerate(layout.lengths):
            tokens = (tile == number).nonzero().squeeze(-1)
            made.append(
                Tile(
                    picture=picture,
                    tokens=tokens,
                    patches=patches[tokens] - (int(ends[number]) - length),
                    sources=sources[tokens] - (int(ends[number]) - length),
                    length=length,
                    weights=None if weights is None else weights[tokens],
                    grid=grids[number],
                    share=(sum(count > 0 for count in counts[:number]), sizes) if len(sizes) > 1 else None,
                    number=int(layout.tile[tokens[0]]) if layout.tile is not None and tokens.numel() else None,
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
                grids=((rows // side, columns // side),) * tiles,
            )
        )
        count += tiles
    return made


def runs_of(ids: Tensor, token: int) -> list[int]:
    """Lengths of the runs of `token` in the rows of (B, S) prompts, row by row."""
    visual = (ids == token).cpu()  # the one wait for the device
    steps = torch.nn.functional.pad(visual.int(), (1, 1)).diff(dim=1)
    lengths: list[int] = ((steps == -1).nonzero()[:, 1] - (steps == 1).nonzero()[:, 1]).tolist()
    return lengths
