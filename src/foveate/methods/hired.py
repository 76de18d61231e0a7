"""HiRED: share one budget over the tiles of an image, then prune each by the attention of the encoder's CLS token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.core import (
    FoveateError,
    Grid,
    Keep,
    Selection,
    Signals,
    Site,
    check_choices,
    check_keep,
    tokens_to_keep,
)
from foveate.forms import Stepwise
from foveate.methods._attention import Attention, attended, attention_signal, check_official
from foveate.methods._checks import check_share
from foveate.ops.device import Steps
from foveate.ops.subsets import best_of_tiles, descending, split_in_proportion


@dataclass(frozen=True)
class HiRED(Stepwise):
    """HiRED: keeps the patches that CLS attends to most, more of them in the tiles where there is more to see.

    In every tile the attention of the CLS query in the block whose output the projector reads, averaged over heads,
    ranks the tokens. Of the budget the base tile (the whole picture at low resolution) gets int(total * alpha), at most
    what it has; the other tiles share the rest in proportion to the CLS attention that the FIRST encoder block pays to
    their part of the base tile. What a full tile cannot take goes to the others. One tile: the `keep` highest of it.

    The other tiles are taken to stand in raster order, and the base tile to be a square cut into as many even rows and
    columns as they form; it must be complete (no earlier stage). The tokens of an image do not say how its tiles lie:
    give `layout` for pictures that are not cut into a square number of tiles, or pass them with their grid.

    Args:
        keep: tokens per image, all its tiles together, or a share of them; a share is cut, not rounded (int(N * keep)),
            and at least 1.
        alpha: share of the budget that goes to the base tile, 0 to 1.
        layout: rows and columns of the other tiles. None: the arrangement of that many tiles whose shape is nearest to
            the grid's where the image has one, else nearest to a square, and wide rather than tall.
        official: as the authors' code does it: the base tile's part of each tile is a run of consecutive tokens in
            raster order; shares are counts among the int(N * (1 - alpha)) tokens of the base tile that the first block
            attends to most, and are cut to whole tokens, so that up to one token per tile fewer than `keep` stay. The
            count then depends on the picture.
        attention: "cls" as in the paper; "received" takes the attention that each patch receives from all patches
            instead, for encoders without CLS; in both blocks, and not with `official`.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2408.10945"
    site: ClassVar[Site] = "input"

    keep: Keep = 0.2
    alpha: float = 0.5
    layout: tuple[int, int] | None = None
    official: bool = False
    attention: Attention = "cls"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choices(self)
        check_official(self.official, self.attention)
        check_share("alpha", self.alpha, 0.5)
        if self.layout is not None and (
            len(self.layout) != 2 or any(type(side) is not int or side < 1 for side in self.layout)
        ):
            raise FoveateError(f"layout={self.layout} is not (rows, columns) of whole numbers from 1, such as (2, 2)")
        # The class speaks for the default.
        object.__setattr__(self, "adaptive", self.official)

    @property
    def needs(self) -> tuple[str, ...]:
        return (attention_signal(self.attention, 0), attention_signal(self.attention))

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return None if self.official else self.asked(original)

    def asked(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        """A share is cut, not rounded."""
        cut = self.keep if isinstance(self.keep, int) else max(1, int(original * self.keep))
        return (tokens_to_keep(cut, original),)

    def steps(self, signals: Signals) -> Steps[Selection]:
        first, read = (attended(signals.tower[block], self.attention) for block in (0, "read"))
        total = self.wanted(signals)
        order = descending(read)
        if signals.tile is None or signals.tiles == 1 or total == signals.shape[1]:
            kept = list(order[:, :total])
        else:
            (contents,) = yield [self.contents(first, signals)]
            shares = self.budgets(contents, signals.by_tile(), total)
            asked = zip(order, signals.tile, signals.by_tile(), shares, strict=True)
            kept = [best_of_tiles(*row) for row in asked]
        rows = zip(signals.index, kept, strict=True)
        return Selection([index[row].sort().values for index, row in rows], scores=read)

    def contents(self, first: Tensor, signals: Signals) -> Tensor:
        """(B, tiles - 1) how much of every image's base tile there is in the part of each other tile.

        Args:
            first: (B, N) attention that the first block pays to each token.

        Raises:
            FoveateError: the base tile is no complete square, or `layout` is of another number of tiles.
        """
        assert signals.tile is not None
        descending(first)  # refuses what is not finite
        others, capacities = signals.tiles - 1, signals.by_tile()
        _check_base([capacity[0] for capacity in capacities], signals)
        layout = self._layout(others, signals)
        # The base tile in raster order, then all others.
        places = signals.index.masked_fill(signals.tile != 0, signals.original).argsort(dim=-1)
        bases = [row[place[: sizes[0]]] for row, place, sizes in zip(first, places, capacities, strict=True)]
        return torch.stack([self._content(base, layout) for base in bases])

    def budgets(self, contents: Tensor, capacities: Sequence[Sequence[int]], total: int) -> list[list[int]]:
        """Tokens to keep of every tile of every image, the base tile first.

        Args:
            contents: of the other tiles, (B, tiles - 1) on the host.
            capacities: of each image the tokens of each tile.
        """
        found = []
        for content, capacity in zip(contents, capacities, strict=True):
            sub = min(total - min(int(total * self.alpha), capacity[0]), sum(capacity[1:]))
            if self.official:
                share = (content / content.sum().clamp(min=1) * sub).int().tolist()
                rest = list(map(min, share, capacity[1:]))
                head = max(min(int(total * self.alpha), capacity[0]), 0 if any(rest) else 1)
            else:
                head, rest = total - sub, split_in_proportion(sub, content.tolist(), capacity[1:])
            found.append([head, *rest])
        return found

    def _content(self, base: Tensor, layout: Grid) -> Tensor:
        """(n,) attention of the base tile in raster order -> (rows * columns,) how much of it each tile's part has."""
        tokens, (rows, columns) = base.numel(), layout
        place = torch.arange(tokens, device=base.device)
        if self.official:
            part = place * (rows * columns) // tokens
            best = base.sort(descending=True, stable=True).indices[: int(tokens * (1 - self.alpha))]
            weight = torch.zeros_like(base).scatter(0, best, 1.0)
        else:
            side = math.isqrt(tokens)
            part = place // side * rows // side * columns + place % side * columns // side
            weight = base
        cells = torch.arange(rows * columns, device=base.device)
        return (part == cells[:, None]).to(base.dtype) @ weight

    def _layout(self, others: int, signals: Signals) -> Grid:
        """Rows and columns of the tiles that are not the base."""
        if self.layout is not None:
            if math.prod(self.layout) != others:
                raise FoveateError(
                    f"layout={self.layout} arranges {math.prod(self.layout)} tiles, but beside its base tile the image "
                    f"has {others}; the nearest is layout={_nearest_layout(others, 1.0)}"
                )
            return self.layout
        height, width = signals.grid or (1, 1)
        return _nearest_layout(others, height / width)


def _check_base(sizes: list[int], signals: Signals) -> None:
    """Refuse images whose base tiles, of these sizes, are no whole squares."""
    if signals.shape[1] != signals.original:
        raise FoveateError(
            "HiRED needs the whole grid of the image's base tile to share the budget over the tiles, but an earlier "
            "stage has taken tokens from the image; put HiRED first"
        )
    for size in sizes:
        if size < 1 or math.isqrt(size) ** 2 != size:
            raise FoveateError(
                f"HiRED shares the budget by the places in a square base tile (tile 0), but this one has {size} "
                "tokens; use a method with budget='tile'"
            )


def _nearest_layout(tiles: int, shape: float) -> Grid:
    """Rows and columns of `tiles` tiles whose rows / columns is nearest to `shape`; of two, the wide one."""
    choices = [(rows, tiles // rows) for rows in range(1, tiles + 1) if tiles % rows == 0]
    return min(choices, key=lambda choice: (round(abs(math.log(choice[0] / choice[1] / shape)), 9), choice))
