"""LVPruning: prune between decoder blocks by trained modules in which visual tokens read the text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.core import FoveateError, Keep, Selection, Signals, Site
from foveate.methods._stages import stage_depths
from foveate.methods._trained import RANDOM, TrainedStages, Words
from foveate.ops.device import on_device
from foveate.ops.subsets import best_and_even, even_order, in_classes, top_k

LAYERS = (1, 8, 16)
"""The paper's depths in a decoder of 32 blocks."""


@dataclass(frozen=True)
class LVPruning(TrainedStages):
    """LVPruning: keeps the visual tokens that trained cross-attention to the text scores highest, stage by stage.

    After each of some decoder blocks a small module lets every visual token that is left attend to the hidden states
    of all text tokens (eq. 1-3) and gives it one score for being kept and one for being removed (eq. 4); the difference
    ranks the tokens (eq. 13 prints the hard decision, which cannot rank). Tokens leave for good and keep their
    positions (eq. 14). The modules are trained by `foveate train lvpruning` while the model stays frozen.

    Beyond the paper a share of each budget can go to an even lattice of what the scores leave: a score for each token
    by itself cannot keep what is spread over the whole picture, such as how many things there are. For the same reason
    the best scores lie close together, on one of several things that matter as much: with borders a score only says in
    which class a token is, and each class is taken evenly over the picture.

    Args:
        layers: decoder blocks that run before each stage; by default those that the modules were trained for, and
            without modules 1, 8 and 16 of 32, scaled to the decoder.
        keep: for each stage tokens per image, or a share of its ORIGINAL tokens, rounded down, at least 1; free of the
            shares that training aimed at. The paper writes (r, r - 0.2, r - 0.4) with r = 0.6, 0.5 or 0.45.
        path: folder or hub id of trained modules; "mini" for those of the model that ships with Foveate, "random" for
            untrained ones. In a spec it is written `from=`. None plans and counts but cannot choose.
        even: share of each stage's budget, rounded half to even, for an even lattice of what the scores leave. None is
            what the modules say of the text, as those of `mini` do, and nothing, as in the paper, where they have no
            say in it.
        borders: scores between which classes of tokens begin, none for the scores themselves as in the paper; None is
            what the modules were made for.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2501.13652"
    site: ClassVar[Site] = "layer"
    needs = ("decoder.hidden", "decoder.text_hidden", "text_mask")
    paper_layers: ClassVar[tuple[int, ...]] = LAYERS
    words: ClassVar[Words] = Words("modules", read="hidden states", of="decoder", trained_for="model")
    missing: ClassVar[str] = (
        "LVPruning chooses by trained modules and was given none; write lvpruning:from=FOLDER (from=mini for those of "
        "the model that ships with Foveate) or LVPruning.from_pretrained(FOLDER); `foveate train lvpruning` makes them"
    )

    layers: tuple[int, ...] | None = None
    keep: tuple[Keep, ...] = (0.5, 0.3, 0.1)
    path: str | None = None
    even: float | None = None
    borders: tuple[float, ...] | None = None
    modules: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.even is not None and (isinstance(self.even, bool) or not 0.0 <= self.even <= 1.0):
            raise FoveateError(f"LVPruning: even={self.even} is no share of the budget from 0.0 to 1.0")
        if not all(math.isfinite(border) for border in self.borders or ()):
            raise FoveateError(f"LVPruning: borders={self.borders} are not all finite numbers")

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        keep: tuple[Keep, ...] = (0.5, 0.3, 0.1),
        layers: tuple[int, ...] | None = None,
        even: float | None = None,
        borders: tuple[float, ...] | None = None,
    ) -> LVPruning:
        """LVPruning with the modules of a folder or hub id; "mini" for those of the model that ships with Foveate.

        Raises:
            FoveateError: no modules can be loaded from there, or `keep`, `layers`, `even` or `borders` do not fit
                them.
        """
        return cls(layers=layers, keep=keep, path=str(path), even=even, borders=borders)._ready()

    def _load(self, path: str) -> Any:
        from foveate.modules.lvpruning import load

        return load(path)

    def _build(self, width: int) -> Any:
        from foveate.modules.lvpruning import LVPruningConfig, build

        stages, heads = len(self.keep), math.gcd(width, 8)
        layers, ratios = list(range(1, stages + 1)), [0.5] * stages
        return build(LVPruningConfig(width=width, heads=heads, layers=layers, base_layers=stages + 1, ratios=ratios))

    @classmethod
    def example(cls, config: Any = None) -> LVPruning:
        """With untrained modules, which take the width of the decoder that they meet."""
        return cls(path=RANDOM)

    def check_model(self, config: Any) -> None:
        """Refuse a model that the modules were not trained for, and any where there are none.

        Raises:
            FoveateError: no modules, or another type, width or number of blocks.
        """
        if (trained := self._given()) is not None:
            trained.check(config)

    def depths(self, layers: int) -> tuple[int, ...]:
        return stage_depths("LVPruning", self._own_layers(), LAYERS, 32, layers)

    def flops(self, visual: int, text: int) -> int:
        """Two operations for each weight of a module's matrices and token, as the paper counts."""
        if self.modules is None:
            return 0
        width: int = self.modules.config.width
        blocks: int = self.modules.config.blocks
        return 2 * (blocks * width**2 * (6 * visual + 2 * text) + 2 * width * visual)

    def select(self, signals: Signals) -> Selection:
        keep = self.wanted(signals)
        scores, shares = self._score(signals), self._even_shares(signals, keep / signals.original)
        borders = self._made_for() if self.borders is None else self.borders
        if borders:
            scores = in_classes(scores, borders, _even_ranks(signals))
        if shares is None:
            kept = top_k(scores, keep)
        else:
            kept = best_and_even(scores, _even_ranks(signals), keep, [round(share * keep) for share in shares])
        rows = zip(signals.index, kept, strict=True)
        return Selection([row[chosen].sort().values for row, chosen in rows], scores=scores)

    @torch.no_grad()
    def _score(self, signals: Signals) -> Tensor:
        """(B, N) by how much keeping outweighs removing."""
        assert signals.decoder is not None and signals.text_mask is not None
        visual, text = signals.decoder.hidden, signals.decoder.text_hidden
        assert visual is not None and text is not None
        modules = self._modules_for(visual.shape[-1]).placed(visual.device, visual.dtype)
        scores: Tensor = modules(signals.stage, visual, text, signals.text_mask.to(visual.device))
        return scores[..., 0] - scores[..., 1]

    def _made_for(self) -> tuple[float, ...]:
        """The borders that the modules were made for; untrained ones have none."""
        return () if self.modules is None else tuple(self.modules.config.borders)

    @torch.no_grad()
    def _even_shares(self, signals: Signals, budget: float) -> list[float] | None:
        """Of each image the share of the budget for an even lattice; None where scores alone choose.

        Args:
            budget: share of the original tokens that this stage leaves.
        """
        if self.even is not None:
            return [self.even] * len(signals.index) if self.even else None
        assert signals.decoder is not None and signals.text_mask is not None
        text = signals.decoder.text_hidden
        assert text is not None
        modules = self._modules_for(text.shape[-1]).placed(text.device, text.dtype)
        budgets = torch.full((len(text),), budget, device=text.device)
        odds = modules.even_odds(signals.stage, text, signals.text_mask.to(text.device), budgets)
        shares: list[float] | None = None if odds is None else odds.sigmoid().tolist()
        return shares


def _even_ranks(signals: Signals) -> Tensor:
    """(B, N) each token's place in an even order of the picture's original tokens, the same at every stage.

    Tokens without a grid are spaced evenly by index.
    """
    if "grid" not in signals.memory:
        signals.memory["grid"] = signals.grid or (1, signals.original)
    return on_device(even_order(*signals.memory["grid"]), signals.index.device)[signals.index]
