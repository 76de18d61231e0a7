"""MMTok: prune to the tokens that cover both the question and the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.core import Keep, Selection, Signals, Site
from foveate.methods._checks import check_positive
from foveate.methods._sets import choose_sets
from foveate.methods._tiles import TileMethod
from foveate.methods._words import words_after
from foveate.ops.greedy import covering
from foveate.ops.likeness import spread_over
from foveate.ops.tiles import Pools


@dataclass(frozen=True)
class MMTok(TileMethod):
    """MMTok: keeps tokens that cover the words of the question and the picture, so that neither is left out.

    Every word spreads a softmax of its cosines to the projected tokens over them, every patch one of its cosines to the
    patches before the projector; both are divided by their number. A set covers a word or patch by the largest share
    that it gives to one of the set, and each pick raises the sum of the covers, those of patches weighted, most.

    The words are those of all text after the image. The authors drop stop words and stock answer formats and, on
    pictures padded to a square, patches of the border alone; here all tokens take part.

    Args:
        keep: tokens per image, or a share of them, rounded half to even: 64 of 576 by default.
        text_temperature: of the words' softmax, 0.02 on LLaVA; the authors take 0.01 on Qwen.
        vision_temperature: of the patches' softmax.
        weight: of covering the patches beside covering the words.
        budget: with several tiles, "tile" covers every tile on its own and shares the budget evenly as the authors do,
            "image" covers all at once.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2508.18264"
    site: ClassVar[Site] = "input"
    needs = ("features", "text", "text_mask", "after_image", "tower.read.hidden")

    keep: Keep = 0.111
    text_temperature: float = 0.02
    vision_temperature: float = 0.2
    weight: float = 0.5
    budget: Literal["tile", "image"] = "tile"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("text_temperature", self.text_temperature, 0.02)
        check_positive("vision_temperature", self.vision_temperature, 0.2)
        check_positive("weight", self.weight, 0.5)

    def select(self, signals: Signals) -> Selection:
        features, hidden, text = signals.features, signals.tower["read"].hidden, signals.text
        assert features is not None and hidden is not None and text is not None
        mask = words_after(signals, "MMTok reads the text after the image")
        words = text.masked_fill(~mask[..., None], 0.0)
        per_word = mask.float() / mask.sum(dim=-1, keepdim=True)

        def choose(pools: Pools, count: int) -> Tensor:
            patches, projected = pools.take(hidden), pools.take(features)
            of_words = spread_over(pools.shared(words), projected, self.text_temperature, pools.free)
            of_patches = spread_over(patches, patches, self.vision_temperature, pools.free)
            present = pools.without_padding(torch.ones(patches.shape[:2], device=patches.device))
            per_patch = self.weight * present / present.sum(dim=-1, keepdim=True)
            rows = torch.cat([pools.shared(per_word), per_patch], dim=1)
            return covering(torch.cat([of_words, of_patches], dim=1), count, rows, free=pools.free)

        return choose_sets(signals, self.wanted(signals), self.budget, choose)
