"""Visual tokens on their way: of a picture at its placeholders, or of one tile inside the encoder.

Indices are on the host, where prompts are planned; features and hidden states are on a device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import Grid
from foveate.ops.device import on_device
from foveate.trace import StageRecord


@dataclass(frozen=True, eq=False)
class Apart:
    """Tokens of one picture that are not visual and stay: the ends of its rows."""

    columns: Tensor  # (M - N,) of the prompt
    features: Tensor  # (M - N, D)


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokens:
    """What stages have left of some visual tokens: N before any stage, K of them left.

    Attributes:
        original: N.
        grid: raster shape of the N; None where they form none.
        index: (K,) original indices of those that are left.
        tile: (N,) tile of each original token, 0 = base; None without tiles.
        extra: (K,) bool, tokens that are not to be drawn; None for none.
        untouched: no stage has acted yet, or each has left everything where it was.
        adapted: an adaptive stage has acted.
        stages: what each stage did.
    """

    original: int
    grid: Grid | None
    index: Tensor
    tile: Tensor | None = None
    extra: Tensor | None = None
    untouched: bool = True
    adapted: bool = False
    stages: tuple[StageRecord, ...] = ()

    @property
    def tiling(self) -> tuple[int, ...]:
        """Original tokens of each tile; empty without tiles."""
        return () if self.tile is None else tuple(self.tile.bincount().tolist())


@dataclass(frozen=True, eq=False, kw_only=True)
class Image(Tokens):
    """A picture at its placeholders in a prompt.

    Attributes:
        row: of the prompt batch.
        columns: (N,) its placeholders in that row.
        features: (K, D) what goes into the decoder, rows of `index`.
        patches: that the encoder saw of it, tile by tile; None where all pictures have as many.
        encoded: of each tile, the patches that each encoder block ran on; None where that is all of them.
        projected: tokens that the projector mapped; None where that is all of them.
        apart: what of it is not visual; None where all is.
    """

    row: int
    columns: Tensor
    features: Tensor
    patches: tuple[int, ...] | None = None
    encoded: tuple[tuple[int, ...], ...] | None = None
    projected: int | None = None
    apart: Apart | None = None

    @classmethod
    def placed(
        cls,
        row: int,
        columns: Tensor,
        features: Tensor,
        grid: Grid | None,
        *,
        tile: Tensor | None = None,
        patches: tuple[int, ...] | None = None,
        apart: Apart | None = None,
    ) -> Image:
        """A picture of which nothing has left."""
        return cls(
            original=columns.numel(),
            grid=grid,
            index=torch.arange(columns.numel()),
            tile=tile,
            row=row,
            columns=columns,
            features=features,
            patches=patches,
            apart=apart,
        )

    def woven(self, features: Tensor) -> Tensor:
        """The rows (K, D) that stand for what is left, with what is not visual among them in the prompt's order."""
        if self.apart is None:
            return features
        columns = torch.cat([self.columns[self.index].sort().values, self.apart.columns])
        order = on_device(columns.argsort(), features.device)
        return torch.cat([features, self.apart.features.to(features)])[order]


@dataclass(frozen=True, eq=False, kw_only=True)
class TileTokens(Tokens):
    """The tokens of one tile inside the encoder, or of a picture that is one tile.

    Attributes:
        share: where a picture's tiles are pictures of their own: the tile's place among those that have tokens, and how
            many each has; None for a picture that is one tile.
        size: (K,) patches in each token; None while it is one.
        group: (N,) place of the token that a patch is in, -1 once dropped; None where nobody asks.
        frame: the video of the call that it is a frame of, and which; None for pictures.
        unread: index, size, group and extra are where the hidden states are; see `Later`.
    """

    share: tuple[int, tuple[int, ...]] | None = None
    size: Tensor | None = None
    group: Tensor | None = None
    frame: tuple[int, int] | None = None
    unread: bool = False

    @property
    def tiling(self) -> tuple[int, ...]:
        """Empty: a tile has none, whatever its number."""
        return ()
