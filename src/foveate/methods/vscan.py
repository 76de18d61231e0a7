"""VScan: prune by a local and a global scan of the encoder's CLS attention, and again inside the decoder."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.core import (
    FoveateError,
    Grid,
    Keep,
    Method,
    Selection,
    Signals,
    Site,
    check_choices,
    check_keep,
    tokens_to_keep,
)
from foveate.methods._attention import Attention, attended, attention_signal, check_official
from foveate.methods._merged import Tokens, everything, handed_on, in_raster_order, tile_by_tile
from foveate.methods._stages import check_layers, stage_depths
from foveate.ops.pooling import joined, most_similar, others, take
from foveate.ops.subsets import descending, split_budget, top_k
from foveate.ops.windows import best_of_windows

HINT = "put VScan first, or use where='layer' for its part inside the decoder"

SIDE = 4
"""The raster is cut into 4 x 4 windows."""


@dataclass(frozen=True)
class VScan(Method):
    """VScan: keeps patches that CLS attends to in each window early on and in the whole picture later, then fewer.

    Before the decoder, half of the tokens (rounded down) are those of highest CLS attention (mean over heads) in
    encoder block 5 of 24, taken from 4 x 4 windows in turn: the best of each window, the second best of each, and so
    on; the other half are the best of what remains by the block that the projector reads. Every other token joins the
    kept one that it resembles most, by the cosine of the projected features, and each kept one becomes the mean of
    itself and what joined it. Inside the decoder, after half of its blocks, those tokens stay that the last prompt
    token is about to attend to in the next block (mean over heads).

    The local half needs the whole raster: after a stage that took tokens from it, VScan is refused. Of tiles it knows
    the raster where they are square.

    The authors' code (`official`) takes equally many from each window and loses what does not divide by 16, so that
    keep=100 hands on 98 tokens.

    Args:
        keep: tokens of an image before the decoder and after `layer`, each a number or a share of the ORIGINAL ones,
            rounded half to even; with 96 and 32 of 576, 64 on average over the layers. A single number is the first of
            them, and a third of it (rounded down, at least 1) the second.
        layer: decoder blocks that run before the second; None for the paper's 16 of 32, scaled to the decoder.
        block: encoder block of the local scan, 0-based; None for the paper's 5 of 24, scaled to the encoder.
        where: "input" or "layer" for one of the two parts alone, `keep` being its single budget.
        budget: with several tiles, "tile" shares the first budget evenly, "image" takes them for one picture.
        official: the code's count.
        attention: "cls" as in the paper; "received" takes the attention that each patch receives from all patches
            instead, for encoders without CLS; in both scans, and not with `official`.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2505.22654"
    site: ClassVar[Site] = "input"

    keep: Keep | tuple[Keep, Keep] = (96, 32)
    layer: int | None = None
    block: int | None = None
    where: Literal["both", "input", "layer"] = "both"
    budget: Literal["tile", "image"] = "tile"
    official: bool = False
    attention: Attention = "cls"

    def __post_init__(self) -> None:
        check_choices(self)
        check_official(self.official, self.attention)
        if isinstance(self.keep, tuple):
            self._check_pair(self.keep)
        else:
            check_keep(self.keep)
        if self.layer is not None:
            check_layers("VScan", (self.layer,))
        if self.block is not None and (type(self.block) is not int or self.block < 0):
            raise FoveateError(f"block={self.block!r} is no number of an encoder block; the least is block=0")
        # The class speaks for the whole; a part of it acts at one site.
        object.__setattr__(self, "site", "layer" if self.where == "layer" else "input")

    def _check_pair(self, keep: tuple[Keep, ...]) -> None:
        if self.where != "both":
            raise FoveateError(f"where={self.where!r} has one budget, not keep={keep}; the nearest is keep={keep[0]}")
        if len(keep) != 2:
            raise FoveateError(f"VScan has 2 budgets, before the decoder and inside it, not {len(keep)}: keep={keep}")
        for name, one in zip(("before the decoder", "inside the decoder"), keep, strict=True):
            check_keep(one, f"VScan: keep {name}")
        before, inside = keep
        if type(before) is type(inside) and inside > before:
            raise FoveateError(f"VScan: keep={keep} rises from {before} to {inside}; the most is {before}")

    @classmethod
    def example(cls, config: object = None) -> VScan:
        return cls(keep=(0.5, 0.25))

    @property
    def needs(self) -> tuple[str, ...]:
        before = (attention_signal(self.attention, self._local()), attention_signal(self.attention), "features")
        inside = ("decoder.next_query",)
        return {"input": before, "layer": inside, "both": (*before, *inside)}[self.where]

    def _local(self) -> int | str:
        """The encoder block of the local scan."""
        return "5/24" if self.block is None else self.block

    def parts(self) -> tuple[Method, ...]:
        """The scans before the decoder, and the stage inside it."""
        if self.where != "both":
            return (self,)
        before, inside = self._budgets()
        return (
            dataclasses.replace(self, keep=before, where="input"),
            dataclasses.replace(self, keep=inside, where="layer"),
        )

    def _budgets(self) -> tuple[Keep, Keep]:
        if isinstance(self.keep, tuple):
            return self.keep
        return self.keep, self.keep / 3 if isinstance(self.keep, float) else max(1, self.keep // 3)

    def _budget(self) -> Keep:
        """Of a part alone."""
        return self.keep[0] if isinstance(self.keep, tuple) else self.keep

    def depths(self, layers: int) -> tuple[int, ...]:
        if self.where == "input":
            return ()
        return stage_depths("VScan", None if self.layer is None else (self.layer,), (16,), 32, layers)

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        """After each of the parts that this one has."""
        if self.where == "both":
            first, second = (part.count(original, grid, tiles) for part in self.parts())
            assert first is not None and second is not None
            return (*first, tokens_to_keep(second[0], original, first[0], "keep inside the decoder"))
        total = tokens_to_keep(self._budget(), original)
        if self.where == "layer" or not self.official:
            return (total,)
        if self.budget == "image" or tiles == 1:
            return (total - self._lost(total, original, grid),)
        size = math.ceil(original / tiles)
        return (sum(share - self._lost(share, size, None) for share in split_budget(total, [size] * tiles)),)

    def asked(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        """Of one part; the code's windows lose some of it (`official`)."""
        return (tokens_to_keep(self._budget(), original),)

    def _lost(self, total: int, tokens: int, grid: Grid | None) -> int:
        """How many of `total` tokens, out of `tokens`, the code loses, its windows giving equally many."""
        if total == tokens:
            return 0
        return total // 2 % ((min(SIDE, grid[0]) * min(SIDE, grid[1])) if grid else SIDE * SIDE)

    def select(self, signals: Signals) -> Selection:
        """The part inside the decoder where that is all there is of this one, the scans elsewhere."""
        if self.where == "layer":
            assert signals.decoder is not None and signals.decoder.next_query is not None
            places = top_k(signals.decoder.next_query.float().mean(dim=1), self.wanted(signals))
            return Selection([row[chosen].sort().values for row, chosen in zip(signals.index, places, strict=True)])
        total = self.wanted(signals)
        return everything(signals) if total == signals.shape[1] else self._scan(signals, total)

    def _scan(self, signals: Signals, total: int) -> Selection:
        shallow, deep = (attended(signals.tower[block], self.attention) for block in (self._local(), "read"))
        assert signals.features is not None
        seen = in_raster_order(signals, signals.features, shallow, deep)
        if signals.tile is None or self.budget == "image":
            return handed_on(self._scanned(seen, signals.raster("VScan", HINT), total), "projected")
        tile = in_raster_order(signals, signals.tile)[1]
        return tile_by_tile(tile, signals.by_tile(), total, partial(self._of_tile, seen), "projected")

    def _of_tile(self, seen: list[Tensor], image: slice, places: Tensor, share: int, first: bool) -> Tokens:
        side = math.isqrt(places.shape[1])
        if side * side != places.shape[1]:
            raise FoveateError(
                f"VScan needs the whole grid of the image, but one of its tiles has {places.shape[1]} tokens, which "
                "are no square; use where='layer' for its part inside the decoder, or another method"
            )
        return self._scanned([take(value[image], places) for value in seen], (side, side), share)

    def _scanned(self, seen: list[Tensor], grid: Grid, total: int) -> Tokens:
        """`total` tokens, less what the code loses, of b whole rasters.

        Args:
            seen: index, features, shallow and deep attention in raster order, each (b, n) or (b, n, D).
        """
        index, features, shallow, deep = seen
        tokens = index.shape[1]
        nothing = torch.zeros_like(index, dtype=torch.bool)
        if total == tokens:
            return index, features, nothing
        lost = self._lost(total, tokens, grid) if self.official else 0
        local = best_of_windows(shallow, grid, SIDE, total // 2 - lost)
        # Below every attention, so that nothing is taken twice.
        remaining = deep.scatter(1, local, -1.0)
        kept = torch.cat([local, descending(remaining)[:, : total - total // 2]], dim=1).sort(dim=-1).values
        dropped = others(kept, tokens)
        sums, numbers = joined(take(features, dropped), most_similar(features, dropped, kept), kept.shape[1])
        merged = (take(features, kept).float() + sums) / (1 + numbers)
        return take(index, kept), merged.to(features.dtype), nothing[:, : kept.shape[1]]
