"""LVPruning: prune between decoder blocks by trained modules in which visual tokens read the text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.core import FoveateError, Grid, Keep, Method, Selection, Signals, Site, tokens_to_keep
from foveate.methods._stages import check_stages, rounded_down, stage_depths
from foveate.ops.subsets import top_k

LAYERS = (1, 8, 16)
"""The paper's depths in a decoder of 32 blocks."""

RANDOM = "random"
"""The path of untrained modules, built when first used: to measure speed, never answers."""


@dataclass(frozen=True)
class LVPruning(Method):
    """LVPruning: keeps the visual tokens that trained cross-attention to the text scores highest, stage by stage.

    After each of some decoder blocks a small module lets every visual token that is left attend to the hidden states
    of all text tokens (eq. 1-3) and gives it one score for being kept and one for being removed (eq. 4); the difference
    ranks the tokens (eq. 13 prints the hard decision, which cannot rank). Tokens leave for good and keep their
    positions (eq. 14). The modules are trained by `foveate train lvpruning` while the model stays frozen.

    Args:
        layers: decoder blocks that run before each stage; by default those that the modules were trained for, and
            without modules 1, 8 and 16 of 32, scaled to the decoder.
        keep: for each stage tokens per image, or a share of its ORIGINAL tokens, rounded down, at least 1; free of the
            shares that training aimed at. The paper writes (r, r - 0.2, r - 0.4) with r = 0.6, 0.5 or 0.45.
        path: folder or hub id of trained modules; "mini" for those of the model that ships with Foveate, "random" for
            untrained ones. In a spec it is written `from=`. None plans and counts but cannot choose.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2501.13652"
    site: ClassVar[Site] = "layer"
    needs = ("decoder.hidden", "decoder.text_hidden", "text_mask")

    layers: tuple[int, ...] | None = None
    keep: tuple[Keep, ...] = (0.5, 0.3, 0.1)
    path: str | None = None
    modules: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.path is None or self.path == RANDOM:
            check_stages("LVPruning", self.keep, self.layers, LAYERS)
        else:  # how many stages there are is known once the modules are read
            check_stages("LVPruning", self.keep, self.layers, tuple(range(1, len(self.keep) + 1)))

    @classmethod
    def from_pretrained(
        cls, path: str, keep: tuple[Keep, ...] = (0.5, 0.3, 0.1), layers: tuple[int, ...] | None = None
    ) -> LVPruning:
        """LVPruning with the modules of a folder or hub id; "mini" for those of the model that ships with Foveate.

        Raises:
            FoveateError: no modules can be loaded from there, or `keep` or `layers` do not fit them.
        """
        made = cls(layers=layers, keep=keep, path=str(path))
        if made.path != RANDOM:
            made._trained()
        return made

    def _trained(self) -> Any:
        """The modules of `path`, read when they are first needed."""
        if self.modules is None:
            from foveate.modules.lvpruning import load

            assert self.path is not None
            modules = load(self.path)
            trained = tuple(modules.config.layers)
            if self.layers is not None and self.layers != trained:
                raise FoveateError(
                    f"LVPruning: layers={self.layers}, but the modules in {self.path} belong after {trained}; leave "
                    "layers out"
                )
            if len(self.keep) != len(trained):
                raise FoveateError(
                    f"LVPruning: {len(self.keep)} budgets {self.keep} for the {len(trained)} modules in {self.path}"
                )
            object.__setattr__(self, "modules", modules)
        return self.modules

    @classmethod
    def example(cls, config: Any = None) -> LVPruning:
        """With untrained modules, which take the width of the decoder that they meet."""
        return cls(path=RANDOM)

    def check_model(self, config: Any) -> None:
        """Refuse a model that the modules were not trained for, and any where there are none.

        Raises:
            FoveateError: no modules, or another type, width or number of blocks.
        """
        if self.path is None:
            raise FoveateError(_MISSING)
        if self.path != RANDOM:
            self._trained().check(config)

    def depths(self, layers: int) -> tuple[int, ...]:
        own = self.layers if self.path in (None, RANDOM) else tuple(self._trained().config.layers)
        return stage_depths("LVPruning", own, LAYERS, 32, layers)

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return rounded_down(self.keep, original)

    def flops(self, visual: int, text: int) -> int:
        """Two operations for each weight of a module's matrices and token, as the paper counts."""
        if self.modules is None:
            return 0
        width: int = self.modules.config.width
        blocks: int = self.modules.config.blocks
        return 2 * (blocks * width**2 * (6 * visual + 2 * text) + 2 * width * visual)

    def select(self, signals: Signals) -> Selection:
        counts = self.count(signals.original)
        assert counts is not None
        kept = top_k(self._score(signals), tokens_to_keep(counts[signals.stage], signals.original, signals.shape[1]))
        return Selection([row[chosen].sort().values for row, chosen in zip(signals.index, kept, strict=True)])

    @torch.no_grad()
    def _score(self, signals: Signals) -> Tensor:
        """(B, N) by how much keeping outweighs removing."""
        assert signals.decoder is not None and signals.text_mask is not None
        visual, text = signals.decoder.hidden, signals.decoder.text_hidden
        assert visual is not None and text is not None
        modules = self._placed(visual)
        scores: Tensor = modules(signals.stage, visual, text, signals.text_mask.to(visual.device))
        return scores[..., 0] - scores[..., 1]

    def _placed(self, visual: Tensor) -> Any:
        """The modules where the hidden states (B, N, C) are, in their dtype."""
        if self.path is None:
            raise FoveateError(_MISSING)
        width = visual.shape[-1]
        modules = self._untrained(width) if self.path == RANDOM else self._trained()
        if modules.config.width != width:
            raise FoveateError(
                f"LVPruning: the modules in {self.path} read hidden states of {modules.config.width} values, the "
                f"decoder has {width}; load modules trained for this model"
            )
        return modules.placed(visual.device, visual.dtype)

    def _untrained(self, width: int) -> Any:
        if self.modules is None or self.modules.config.width != width:
            from foveate.modules.lvpruning import LVPruningConfig, build

            stages = len(self.keep)
            heads = math.gcd(width, 8)
            config = LVPruningConfig(width=width, heads=heads, layers=list(range(1, stages + 1)), ratios=[0.5] * stages)
            object.__setattr__(self, "modules", build(config))
        return self.modules


_MISSING = (
    "LVPruning chooses by trained modules and was given none; write lvpruning:from=FOLDER (from=mini for those of the "
    "model that ships with Foveate) or LVPruning.from_pretrained(FOLDER); `foveate train lvpruning` makes them"
)
