"""VisionZip: prune by what CLS attends to in the encoder, and merge the rest into a few tokens of context."""

from __future__ import annotations

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
from foveate.methods._merged import (
    Space,
    Tokens,
    check_space,
    everything,
    handed_on,
    in_raster_order,
    merged_signal,
    merged_tokens,
    tile_by_tile,
)
from foveate.ops.pooling import joined, most_similar, others, take
from foveate.ops.subsets import descending


@dataclass(frozen=True)
class VisionZip(Method):
    """VisionZip: keeps the patches that CLS attends to, CLS itself, and averages of all others around a few of them.

    Dominant tokens are the CLS token and the patches of highest CLS attention (mean over heads) in the block that the
    projector reads. Of the remaining patches every s-th in raster order is a target, s = remaining // contextual;
    every other one joins the target of most similar keys (mean over heads, cosine), and each target is replaced by the
    mean of itself and what joined it. All are encoder tokens; CLS stands at the smallest index that is free.

    The authors' code (`official`) adds the mean of what joined a target to the target instead, which about doubles it.

    Args:
        keep: tokens per image, or a share of them, rounded half to even; CLS and contextual tokens count. All hands the
            patches on as they are, without CLS.
        contextual: how many of them are contextual. None for the paper's 10 of 64, round(keep * 10 / 64): at least 1
            from keep=3 and none below, where CLS and a dominant patch come first.
        budget: with several tiles, "tile" gives each an even share, dominant and contextual (at most all but one), and
            the first tile CLS; "image" lets the tiles compete.
        official: the code's contextual tokens.
        attention: "cls" as in the paper; "received" takes the attention that each patch receives from all patches
            instead, for encoders without CLS. There is no token of CLS then: all are dominant
            or contextual (at least 1 from keep=2). Not with `official`.
        space: "encoded" merges tokens of the encoder as in the paper; "projected" merges them behind the projector,
            for projectors that take no single ones. CLS cannot be projected there, so that it needs
            attention="received".
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.04467"
    site: ClassVar[Site] = "input"
    encoded: ClassVar[bool] = True

    keep: Keep = 64
    contextual: int | None = None
    budget: Literal["tile", "image"] = "tile"
    official: bool = False
    attention: Attention = "cls"
    space: Space = "encoded"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choices(self)
        check_official(self.official, self.attention)
        check_space(self.official, self.space)
        if self.attention == "cls" and self.space == "projected":
            raise FoveateError(
                "space='projected' has no token of CLS, which attention='cls' hands on; write attention='received', or "
                "leave space='encoded'"
            )
        # The class speaks for the default.
        object.__setattr__(self, "encoded", self.space == "encoded")
        if self.contextual is not None and (type(self.contextual) is not int or self.contextual < 0):
            raise FoveateError(f"contextual={self.contextual!r} is no number of tokens; the least is contextual=0")
        if isinstance(self.keep, int):
            self._check_contextual(self.keep)

    @classmethod
    def example(cls, config: object = None) -> VisionZip:
        return cls(keep=0.25)

    def _check_contextual(self, total: int) -> None:
        if self.contextual is not None and self.contextual >= total:
            raise FoveateError(
                f"contextual={self.contextual} leaves no token of the {total} that keep={self.keep} asks for to "
                f"{'CLS' if self.attention == 'cls' else 'dominant patches'}; the most is contextual={total - 1}"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        ranking = (attention_signal(self.attention), "tower.read.keys")
        return (merged_signal(self.space), *(("tower.read.cls",) if self.attention == "cls" else ()), *ranking)

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        total = tokens_to_keep(self.keep, original)
        self._check_contextual(total)
        return (total,)

    def select(self, signals: Signals) -> Selection:
        read, left = signals.tower["read"], signals.shape[1]
        assert read.keys is not None
        total = self.wanted(signals)
        self._check_contextual(total)
        if total == left:
            return everything(signals)
        cls = read.cls if self.attention == "cls" else None
        tokens, attention = merged_tokens(signals, self.space), attended(read, self.attention)
        seen = in_raster_order(signals, tokens, attention, read.keys.float().mean(dim=1))
        if signals.tile is None or self.budget == "image":
            return handed_on(self._zipped(seen, cls, total), self.space)
        tile = in_raster_order(signals, signals.tile)[1]
        return tile_by_tile(tile, signals.by_tile(), total, partial(self._of_tile, seen, cls), self.space)

    def _of_tile(
        self, seen: list[Tensor], cls: Tensor | None, image: slice, places: Tensor, share: int, first: bool
    ) -> Tokens:
        own = cls[image] if first and cls is not None else None
        return self._zipped([take(value[image], places) for value in seen], own, share)

    def _zipped(self, seen: list[Tensor], cls: Tensor | None, total: int) -> Tokens:
        """`total` tokens of b pictures.

        Args:
            seen: index, tokens, attention and keys in raster order, each (b, n) or (b, n, width).
            cls: (b, E); None where the picture has none of its own.
        """
        index, hidden, attention, keys = seen
        tokens = index.shape[1]
        if total == tokens:
            return index, hidden, torch.zeros_like(index, dtype=torch.bool)
        contextual = self._contextual(total)
        dominant = descending(attention)[:, : total - contextual - (cls is not None)]
        remaining = others(dominant, tokens)
        step = remaining.shape[1] // max(1, contextual)
        target = remaining[:, ::step][:, :contextual]
        places = torch.cat([dominant, target], dim=1)
        joining = others(places, tokens)
        features = torch.cat([take(hidden, dominant), self._context(hidden, keys, target, joining)], dim=1)
        chosen = take(index, places)
        extra = torch.zeros_like(chosen, dtype=torch.bool)
        if cls is not None:
            free = take(index, joining).amin(dim=-1, keepdim=True)
            chosen, features = torch.cat([free, chosen], dim=1), torch.cat([cls[:, None], features], dim=1)
            extra = torch.cat([torch.ones_like(free, dtype=torch.bool), extra], dim=1)
        return chosen, features, extra

    def _contextual(self, total: int) -> int:
        if self.contextual is not None:
            return min(self.contextual, total - 1)
        dominant = 2 if self.attention == "cls" else 1  # that come first: CLS and a patch
        return min(max(1, round(total * 10 / 64)), max(0, total - dominant))

    def _context(self, hidden: Tensor, keys: Tensor, target: Tensor, joining: Tensor) -> Tensor:
        """(b, C, E) what stands for the targets, in the dtype of the tokens."""
        own = take(hidden, target)
        if not target.shape[1]:
            return own
        sums, numbers = joined(take(hidden, joining), most_similar(keys, joining, target), target.shape[1])
        if self.official:
            return (own.float() + sums / numbers.clamp(min=1)).to(own.dtype)
        return ((own.float() + sums) / (1 + numbers)).to(own.dtype)
