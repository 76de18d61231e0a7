"""DynamicViT: drop patches inside the encoder, stage by stage, by what trained predictors say of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.core import Keep, Selection, Signals, Site
from foveate.methods._stages import stage_depths
from foveate.methods._trained import RANDOM, TrainedStages, Words
from foveate.ops.subsets import top_k

LAYERS = (3, 6, 9)
"""The paper's stages in an encoder of 12 blocks."""

KEEP: tuple[Keep, ...] = (0.7, 0.49, 0.343)
"""The paper's r, r^2 and r^3 with r = 0.7."""


@dataclass(frozen=True)
class DynamicViT(TrainedStages):
    """DynamicViT: keeps the patches that trained predictors between the encoder's blocks score highest.

    Before some blocks a small network sees each patch left beside the mean of all (equations 1 to 3) and gives
    log-probabilities of keeping and of dropping it (equation 4); the patches most likely to be kept go on, CLS always.
    The paper trains them together with a classifier, `foveate train dynamicvit` beside a frozen model. Patches keep
    their places here where the authors' code hands them on in the order of their scores.

    Args:
        layers: encoder blocks that run before each stage; by default those that the predictors were trained for, and
            without any 3, 6 and 9 of 12, scaled to the encoder.
        keep: for each stage patches per image, or a share of its ORIGINAL ones, rounded down as in the code, 1 or more.
        path: folder or hub id of trained predictors; "mini" for those of the model that ships with Foveate, "random"
            for untrained ones. In a spec it is written `from=`. None plans and counts but cannot choose.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2106.02034"
    site: ClassVar[Site] = "tower"
    needs = ("tower.latest.hidden",)
    paper_layers: ClassVar[tuple[int, ...]] = LAYERS
    words: ClassVar[Words] = Words("predictors", read="patches", of="encoder", trained_for="encoder")
    missing: ClassVar[str] = (
        "DynamicViT chooses by trained predictors and was given none; write dynamicvit:from=FOLDER (from=mini for "
        "those of the model that ships with Foveate) or DynamicViT.from_pretrained(FOLDER); `foveate train dynamicvit` "
        "makes them"
    )

    layers: tuple[int, ...] | None = None
    keep: tuple[Keep, ...] = KEEP
    path: str | None = None
    modules: Any = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def from_pretrained(
        cls, path: str, keep: tuple[Keep, ...] = KEEP, layers: tuple[int, ...] | None = None
    ) -> DynamicViT:
        """DynamicViT with the predictors of a folder or hub id.

        Raises:
            FoveateError: none can be loaded from there, or `keep` or `layers` do not fit them.
        """
        return cls(layers=layers, keep=keep, path=str(path))._ready()

    @classmethod
    def example(cls, config: Any = None) -> DynamicViT:
        """With untrained predictors, which take the width of the encoder that they meet."""
        return cls(path=RANDOM)

    def _load(self, path: str) -> Any:
        from foveate.modules.dynamicvit import load

        return load(path)

    def _build(self, width: int) -> Any:
        from foveate.modules.dynamicvit import DynamicViTConfig, build

        stages = len(self.keep)
        return build(DynamicViTConfig(width=width, blocks=stages, layers=list(range(1, stages + 1))))

    def check_model(self, config: Any) -> None:
        """Refuse a model whose encoder the predictors were not trained for, and any where there are none.

        Raises:
            FoveateError: no predictors, or another width or number of blocks.
        """
        if (trained := self._given()) is not None:
            trained.check(config.vision_config)

    def depths(self, layers: int) -> tuple[int, ...]:
        """ENCODER blocks, of `layers`, that run before each stage."""
        return stage_depths("DynamicViT", self._own_layers(), LAYERS, 12, layers)

    def select(self, signals: Signals) -> Selection:
        hidden = signals.tower["latest"].hidden
        assert hidden is not None
        scores = self._score(signals.stage, hidden)
        rows = zip(signals.index, top_k(scores, self.wanted(signals)), strict=True)
        return Selection([row[chosen].sort().values for row, chosen in rows], scores=scores)

    @torch.no_grad()
    def _score(self, stage: int, hidden: Tensor) -> Tensor:
        """(B, N, E) -> (B, N) how much more likely keeping is than dropping, as a logarithm."""
        scores: Tensor = self._modules_for(hidden.shape[-1])(stage, hidden)
        # Ranks as the log-probability of keeping alone does, but does not round to 0 where a predictor is sure.
        return scores[..., 0] - scores[..., 1]
