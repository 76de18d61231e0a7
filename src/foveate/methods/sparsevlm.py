"""SparseVLM: prune inside the decoder by what the relevant words of the question attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.core import FoveateError, Grid, Keep, Method, Selection, Signals, Site, tokens_to_keep
from foveate.methods._stages import check_stages, stage_depths
from foveate.methods._words import words_after
from foveate.ops.device import on_device
from foveate.ops.merging import cluster_means, density_peaks
from foveate.ops.scores import rated, text_raters
from foveate.ops.subsets import descending

LAYERS = (3, 7, 16)
"""The paper's depths in a decoder of 32 blocks: blocks 2, 6 and 15 run in full and are pruned at their output."""

PUBLISHED = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
"""Tokens after each stage for the budgets of the paper's tables, which are averages over the layers, at 576 tokens."""


@dataclass(frozen=True)
class SparseVLM(Method):
    """SparseVLM: keeps the visual tokens that the words which resemble the picture attend to.

    Raters are chosen once, on the decoder's input: of the text after the image, the words whose share in a softmax
    over the text, averaged over the visual tokens, is above the mean. At each stage the attention of the last full
    block, averaged over heads and raters, ranks the tokens still present. With `recycle`, the best of the dropped ones
    (int(0.3 * dropped) + 1) are clustered by density peaks into a tenth as many (plus one) means, each of which stands
    where its highest-rated member stood.

    The paper derives the counts from the rank of the attention; its code, and so this class, fixes them per stage.

    Args:
        layers: decoder blocks that run before each stage; by default 3, 7 and 16 of 32, scaled to the decoder.
        keep: for each stage tokens per image, or a share of its ORIGINAL tokens, rounded half to even; recycled
            tokens count. The default makes 300, 200 and 110 of 576. A single number is a budget of the paper's tables
            (192, 128, 96 or 64 of 576 tokens, averaged over the layers) and stands for the stages published for it, in
            proportion where an image has not 576 tokens.
        recycle: merge part of the dropped tokens instead of losing them.
        seed: of the noise that decides between equally dense tokens when recycling, 0 or more.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.04417"
    site: ClassVar[Site] = "layer"

    layers: tuple[int, ...] | None = None
    keep: int | tuple[Keep, ...] = (0.52, 0.347, 0.191)
    recycle: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.keep, tuple) and (type(self.keep) is not int or self.keep not in PUBLISHED):
            raise FoveateError(
                f"SparseVLM: keep={self.keep!r} is no budget of the paper's tables ({', '.join(map(str, PUBLISHED))}); "
                "give tokens or shares for each stage, such as keep=(0.5, 0.35, 0.2)"
            )
        check_stages("SparseVLM", self._shares(), self.layers, LAYERS)
        if type(self.seed) is not int or self.seed < 0:
            raise FoveateError(f"seed={self.seed!r} is no whole number from 0; the smallest is seed=0")

    @property
    def needs(self) -> tuple[str, ...]:
        asked = ("decoder.text_query", "features", "text", "text_mask", "after_image")
        return (*asked, "decoder.hidden") if self.recycle else asked

    def _shares(self) -> tuple[Keep, ...]:
        if isinstance(self.keep, tuple):
            return self.keep
        return tuple(tokens / 576 for tokens in PUBLISHED[self.keep])

    def depths(self, layers: int) -> tuple[int, ...]:
        return stage_depths("SparseVLM", self.layers, LAYERS, 32, layers)

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        counts: list[int] = []
        for keep in self._shares():
            left = counts[-1] if counts else original
            counts.append(tokens_to_keep(keep, original, left))
            if self.recycle:
                _own(left, counts[-1])
        return tuple(counts)

    def select(self, signals: Signals) -> Selection:
        assert signals.decoder is not None and signals.decoder.text_query is not None
        left, kept = signals.shape[1], self.wanted(signals)
        scores = rated(signals.decoder.text_query, self._raters(signals))
        order = descending(scores)
        if not self.recycle or kept == left:
            best = zip(signals.index, order[:, :kept], strict=True)
            return Selection([row[places].sort().values for row, places in best], scores=scores)
        assert signals.decoder.hidden is not None
        rows = zip(order, signals.decoder.hidden, signals.index, strict=True)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + signals.original) % 2**63)
        noise = on_device(1e-6 * torch.rand(left, generator=generator), order.device)
        merged = [_recycled(places, hidden, index, kept, noise) for places, hidden, index in rows]
        return Selection([index for index, _ in merged], features=[features for _, features in merged], scores=scores)

    def _raters(self, signals: Signals) -> Tensor:
        """(B, T) bool, chosen at the first stage and remembered."""
        if "raters" not in signals.memory:
            assert signals.features is not None and signals.text is not None
            mask = words_after(signals, "SparseVLM lets the text after the image rate")
            signals.memory["raters"] = text_raters(signals.features, signals.text, mask)
        raters: Tensor = signals.memory["raters"]
        return raters


def _recycled(order: Tensor, hidden: Tensor, index: Tensor, kept: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """One image: (N,) places by falling score, (N, D), (N,) -> `kept` original indices, ascending, and features."""
    own = _own(order.numel(), kept)
    pool = order[own : own + _pool(order.numel() - own)]
    clusters, members = kept - own, pool.numel()
    cluster = density_peaks(hidden[pool], clusters, noise[:members])
    # The pool descends by score, so that the first member of a cluster is its highest-rated one.
    ranks = torch.arange(members, device=pool.device)
    first = torch.full_like(pool[:clusters], members).scatter_reduce(0, cluster, ranks, "amin")
    places = torch.cat([order[:own], pool[first]])
    features = torch.cat([hidden[order[:own]], cluster_means(hidden[pool], cluster, clusters)])
    ascending = index[places].argsort()
    return index[places][ascending], features[ascending]


def _pool(dropped: int) -> int:
    """How many of the dropped tokens are recycled."""
    return int(0.3 * dropped) + 1


def _own(left: int, kept: int) -> int:
    """How many of `kept` tokens, out of `left`, stay themselves; the others are recycled.

    Raises:
        FoveateError: recycling alone makes more tokens than that.
    """
    if kept == left:
        return kept
    for own in range(kept - 1, 0, -1):
        if own + int(_pool(left - own) / 10) + 1 == kept:
            return own
    least = 2 + int(_pool(left - 1) / 10)
    raise FoveateError(
        f"SparseVLM recycle=True makes at least {least} tokens of {left}, keep asks for {kept}; the least is {least}"
    )
