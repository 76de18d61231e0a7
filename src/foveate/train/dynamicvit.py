"""How DynamicViT's predictors are trained for an encoder that stays frozen: their settings and their learner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from foveate.core import FoveateError
from foveate.depths import check_depths, scaled_layers
from foveate.families import family_of
from foveate.modules import dynamicvit as modules
from foveate.runtime.encoder.soften import check_softens_encoder
from foveate.train.learner import Learner
from foveate.train.settings import StagedSettings
from foveate.train.soft_encoder import SoftEncoder, Weights
from foveate.train.softened import check_trains
from foveate.train.trainer import Recipe, Rows, train

LAYERS = (3, 6, 9)
"""The paper's depths in an encoder of 12 blocks."""


@dataclass(frozen=True)
class Settings(StagedSettings):
    """How to train; weights and shares are the paper's (section 3.2), whose classifier is the language model here.

    The paper trains the encoder along, at a hundredth of the predictors' rate; here it stays as it is, so that the
    predictors are a file of their own beside a model that has not changed.

    Attributes:
        likeness_weight: of the divergence of what is said from what the unpruned model says.
        token_weight: of the squared difference of the kept tokens from what the unpruned model makes of them.
        hint_weight: of a loss that the paper does not have: the predictors are to put tokens of things that could be
            asked about before the background. Scenes know them; other data say nothing. With `budgets` and all of the
            other weights 0 the model answers nothing, and a step takes a small part of the time.
    """

    paper_layers: ClassVar[tuple[int, ...]] = LAYERS
    method: ClassVar[str] = "DynamicViT"
    from_zero: ClassVar[tuple[str, ...]] = (*StagedSettings.from_zero, "likeness_weight", "token_weight", "hint_weight")

    ratios: tuple[float, ...] = (0.7, 0.49, 0.343)
    rate: float = 1e-3
    likeness_weight: float = 0.5
    token_weight: float = 0.5
    hint_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.causal_weight or self.likeness_weight or self.token_weight or self.hint_weight):
            raise FoveateError("causal_weight=, likeness_weight=, token_weight= and hint_weight= are all 0; give one")

    def depths(self, blocks: int) -> tuple[int, ...]:
        """Where the predictors stand in an encoder of `blocks` blocks."""
        if self.layers is None:
            return scaled_layers(LAYERS, 12, blocks)
        check_depths(self.layers, blocks, "DynamicViT")
        return self.layers


class _Recipe(Recipe):
    """Predictors between encoder blocks."""

    folder: ClassVar[str] = modules.FOLDER
    title: ClassVar[str] = "Predictors of DynamicViT"
    settings: Settings

    def check(self) -> None:
        check_softens_encoder(self.base)
        check_trains(self.base)
        self._depths()

    def _depths(self) -> tuple[int, ...]:
        """Where the predictors stand; what leaves behind the block that is read would never have been there."""
        family = family_of(self.base)
        read = family.read_block(self.base)
        layers = self.settings.depths(len(family.blocks_of(self.base)))
        if layers[-1] > read:
            raise FoveateError(f"layers={layers}: the projector reads block {read}; the deepest is {read}")
        return layers

    def build(self) -> PreTrainedModel:
        """New predictors, or those of `start`."""
        vision = self.base.config.vision_config
        layers = self._depths()
        if self.settings.start is None:
            config = modules.DynamicViTConfig(
                width=vision.hidden_size, blocks=vision.num_hidden_layers, layers=list(layers)
            )
            return modules.build(config, self.settings.seed)
        before = modules.load(self.settings.start)
        before.check(vision)
        if tuple(before.config.layers) != layers:
            raise FoveateError(
                f"start={self.settings.start!r} holds predictors after {list(before.config.layers)} blocks, not "
                f"{list(layers)}; give the same layers"
            )
        return before

    def learner(self, predictors: PreTrainedModel, rows: int) -> Learner:
        settings = self.settings
        assert isinstance(predictors, modules.DynamicViTPredictors)
        weights = Weights(
            settings.causal_weight,
            settings.ratio_weight,
            settings.likeness_weight,
            settings.token_weight,
            settings.hint_weight,
        )
        return SoftEncoder(
            self.base,
            predictors,
            settings.ratios,
            weights,
            told=bool(settings.budgets),
            ratio_kind=settings.ratio_loss,
            temperature=settings.temperature,
            limit=None if settings.decision_clip is None else settings.decision_clip / rows,
        )

    def shape(self, predictors: PreTrainedModel) -> str:
        shape = predictors.config
        return (
            f"Small networks (https://arxiv.org/abs/2106.02034) after {', '.join(map(str, shape.layers))} of "
            f"{shape.blocks} encoder blocks of width {shape.width}; the model itself is unchanged."
        )

    def call(self) -> str:
        keep = ", ".join(map(str, self.settings.ratios))
        return f"foveate.prune(model, foveate.DynamicViT.from_pretrained(FOLDER, keep=({keep})))"


def train_dynamicvit(
    base: Any, rows: Rows, out: str | Path, settings: Settings | None = None, *, name: str = "", **options: Any
) -> Path:
    """Train predictors for `base` and return their folder, `out`/dynamicvit.

    Args:
        base: a loaded vision-language model; it is frozen, and not a bit of it changes.
        rows: `Conversations` or `SceneQuestions`, which hand on pixels.
        settings: the paper's where None.
        name: what the model is called, for the card.
        options: further arguments of `foveate.train.trainer.train`.

    Raises:
        FoveateError: as `train`.
    """
    return train(_Recipe(base, settings or Settings(), name), rows, out, **options)
