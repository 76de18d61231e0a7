"""EADP: prune to the tokens that cover what the sharpest words of the question point at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.core import FoveateError, Keep, Selection, Signals, Site
from foveate.methods._checks import check_power
from foveate.methods._sets import choose_sets
from foveate.methods._tiles import TileMethod
from foveate.methods._words import WordSpace, tokens_and_question, words_after
from foveate.ops.greedy import covering
from foveate.ops.likeness import between_extremes, by_sharpest_words, smoothed
from foveate.ops.scores import cosines
from foveate.ops.subsets import split_in_proportion
from foveate.ops.tiles import Pools, by_tile


@dataclass(frozen=True)
class EADP(TileMethod):
    """EADP: keeps tokens that cover what the sharpest words of the question point at, so that none repeats another.

    A token's relevance is half its cosine to the whole question, half its cosine to single words: the fifth of the
    words whose softmax over the tokens has the lowest entropy, the sharper the weightier. Stretched to (0, 1] over the
    image, smoothed by a 3 x 3 Gaussian and raised to `beta`, it weighs the tokens to be covered: each pick raises most
    the weighted sum, over all tokens, of the similarity (1 + cos) / 2 to the most similar kept one.

    Smoothing needs the raster: each tile that is a full square, or the image's grid. It is left out for other tiles,
    and where tokens have already left.

    The authors' code (`official`) NEGATES both cosines, so that what resembles the question least counts as relevant,
    and takes all positions of CLIP's text for words, start, end and padding included; the paper speaks of the words.
    All pieces of a long question are read together here; the code averages over them.

    Args:
        keep: tokens per image, or a share of them, rounded half to even: 64 of 576 by default.
        space: where tokens meet words: "clip" in CLIP's joint space (the form for LLaVA), "decoder" among the
            embeddings that the decoder gets, with the text after the image (the form for Qwen).
        beta: exponent of the relevance, 0 to 8; None for 1 in "clip" and 2 in "decoder".
        relevance: "negated" takes what resembles the question least for relevant.
        budget: with several tiles, "tile" covers every tile on its own, and a tile's share of the budget is its share
            of the relevance, at least one token where there are enough (the code rounds down; the total is exact
            here); "image" covers all at once.
        official: the code's sign and words, whatever `relevance` says.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2607.02484"
    site: ClassVar[Site] = "input"

    keep: Keep = 0.111
    space: WordSpace = "clip"
    beta: float | None = None
    relevance: Literal["direct", "negated"] = "direct"
    budget: Literal["tile", "image"] = "tile"
    official: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta is not None:
            check_power("beta", self.beta)

    @property
    def needs(self) -> tuple[str, ...]:
        if self.space == "clip":
            return ("features", "image_clip", "text_clip", "word_clip", "word_mask")
        return ("features", "text", "text_mask", "after_image")

    def select(self, signals: Signals) -> Selection:
        features, importance = signals.features, self.importance(signals)
        assert features is not None

        def choose(pools: Pools, count: int) -> Tensor:
            tokens, weights = pools.take(features), pools.without_padding(pools.take(importance))
            return covering(cosines(tokens, tokens).add_(1.0).div_(2.0), count, weights, free=pools.free)

        def share(pools: Pools, kept: int) -> list[list[int]]:
            mass = iter(pools.without_padding(pools.take(importance)).sum(dim=-1).tolist())
            return [_by_mass(kept, [next(mass) for _ in sizes], sizes) for sizes in pools.sizes]

        return choose_sets(signals, self.wanted(signals), self.budget, choose, share)

    def importance(self, signals: Signals) -> Tensor:
        """(B, N), 0 to 1: the weight of each token that is to be covered."""
        whole, words, mask = self._likeness(signals)
        if self.official or self.relevance == "negated":
            whole, words = -whole, -words
        relevance = between_extremes(0.5 * whole + 0.5 * by_sharpest_words(words, mask), 1e-6)
        beta = self.beta if self.beta is not None else 1.0 if self.space == "clip" else 2.0
        return _smoothed(relevance, signals).pow(beta)

    def _likeness(self, signals: Signals) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines to the whole question (B, N) and to each word (B, N, W); which words count (B, W)."""
        if self.space == "clip":
            tokens, words, mask = signals.image_clip, signals.word_clip, signals.word_mask
            assert tokens is not None and words is not None and mask is not None and signals.text_clip is not None
            mask = torch.ones_like(mask) if self.official else mask
            if not bool(mask.any(dim=-1).all()):
                raise FoveateError("EADP reads the words of the question, but it has none; ask one with question=")
            return cosines(tokens, signals.text_clip).mean(dim=-1), cosines(tokens, words), mask
        assert signals.features is not None and signals.text is not None
        mask = words_after(signals, "EADP reads the text after the image")
        words = signals.text.float().masked_fill(~mask[..., None], 0.0)
        tokens, question = tokens_and_question(signals, self.space, "EADP")
        return cosines(tokens, question).squeeze(-1), cosines(tokens, words), mask


def _smoothed(values: Tensor, signals: Signals) -> Tensor:
    """(B, N) smoothed over each tile that is a full square, or over the grid; as it is where tokens have left."""
    left, index = signals.shape[1], signals.index
    if left != signals.original:
        return values
    raster = torch.empty_like(values).scatter_(1, index, values)
    if signals.tile is None:
        if signals.grid is None or math.prod(signals.grid) != left:
            return values
        return smoothed(raster, signals.grid).gather(1, index)
    pools = by_tile(torch.empty_like(signals.tile).scatter_(1, index, signals.tile), signals.by_tile())
    images = pools.image.tolist()
    for image, place, size in zip(images, pools.place, [one for sizes in pools.sizes for one in sizes], strict=True):
        side = math.isqrt(size)
        if side * side == size:
            raster[image, place[:size]] = smoothed(raster[image, place[:size]][None], (side, side))[0]
    return raster.gather(1, index)


def _by_mass(kept: int, mass: list[float], sizes: list[int]) -> list[int]:
    """Shares in proportion to the mass; where there are enough tokens, a tile without any gets one of the largest's."""
    shares = split_in_proportion(kept, mass, sizes)
    while kept >= len(shares) and 0 in shares:
        shares[shares.index(max(shares))] -= 1
        shares[shares.index(0)] += 1
    return shares
