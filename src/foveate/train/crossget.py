"""How CrossGET's cross tokens are trained behind an encoder that merges, both models frozen: settings and learner.

Shapes: B rows, L sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.core import FoveateError, Keep, check_keep
from foveate.families import family_of
from foveate.methods.crossget import CrossGET
from foveate.modules import crossget as modules
from foveate.prune import check_prunable, prune
from foveate.train.learner import Learner
from foveate.train.settings import Settings as Common
from foveate.train.settings import joined
from foveate.train.trainer import Recipe, Rows, train

PAPER = 13
"""Patches that each block merges away in the authors' code."""


@dataclass(frozen=True)
class Settings(Common):
    """How to train; the paper trains the language model along, which stays as it is here.

    Attributes:
        budgets: tokens or shares to be left, (K,) each; each step draws one. Without any 13 patches merge in each
            block, as in the authors' code.
    """

    rate: float = 1e-3
    budgets: tuple[tuple[Keep, ...], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for budget in self.budgets:
            if len(budget) != 1:
                raise FoveateError(f"budgets: {joined(budget)} is no single budget; CrossGET has one, such as 144")
            check_keep(budget[0], f"budgets: {budget[0]}")

    def targets(self, done: float, step: int = 0) -> tuple[Keep, ...]:
        """One of `budgets`; nothing where a number of merges is fixed."""
        return self.drawn(self.budgets, step) if self.budgets else ()

    def asked(self) -> str:
        return f"budgets {', '.join(map(joined, self.budgets))}" if self.budgets else f"{PAPER} merges in each block"


class Merging(Learner):
    """Cross tokens in training: the model runs pruned, as in inference, and answers.

    Gradients reach a cross token through the patches that attend to it in its block, and through the last one, which
    the decoder reads; which patches merge has none, nor have the weights of a merge.

    Args:
        base: a loaded vision-language model; it is frozen and put into eval mode.
        tokens: the cross tokens of its encoder.

    Raises:
        FoveateError: cross tokens of another encoder, or a model that CrossGET cannot run on.
    """

    def __init__(self, base: Any, tokens: modules.CrossGETTokens) -> None:
        tokens.check(base.config.vision_config)
        family = family_of(base)
        super().__init__(base, tokens, (), family.image_token_id(base.config))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **given: Tensor) -> dict[str, Tensor]:
        """The loss of the answers, and the share of the visual tokens that was left.

        Args:
            input_ids, attention_mask, labels: (B, L); labels are -100 wherever no answer stands.
            given: `pixel_values` of the pictures in the order of their placeholders, and what else the processor makes.
        """
        known = {name: value for name, value in given.items() if name not in ("wanted", "even")}
        known["pixel_values"] = known["pixel_values"].to(self.base.dtype)
        method = CrossGET.of(self.gates, keep=self.ratios[0] if self.ratios else None)
        with prune(self.base, method, short_outputs=True) as trace:
            output = self.base(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False, **known
            )
        kept = sum(image.after for image in trace.images) / sum(image.original for image in trace.images)
        loss: Tensor = output.loss
        return {"loss": loss, "causal": loss.detach(), "kept": torch.tensor([kept], device=loss.device)}


class _Recipe(Recipe):
    """Cross tokens beside CLS."""

    folder: ClassVar[str] = modules.FOLDER
    title: ClassVar[str] = "Cross tokens of CrossGET"
    settings: Settings

    def check(self) -> None:
        for budget in self.settings.budgets or ((None,),):
            check_prunable(self.base, CrossGET(keep=budget[0]))
        if not family_of(self.base).tower_of(self.base)[1].summary:
            raise FoveateError("a cross token starts as a copy of CLS, which this encoder does not have")

    def build(self) -> PreTrainedModel:
        """Zeros, or the cross tokens of `start`."""
        vision = self.base.config.vision_config
        if self.settings.start is not None:
            before = modules.load(self.settings.start)
            before.check(vision)
            return before
        return modules.CrossGETTokens(modules.CrossGETConfig(width=vision.hidden_size, blocks=vision.num_hidden_layers))

    def learner(self, tokens: PreTrainedModel, rows: int) -> Learner:
        assert isinstance(tokens, modules.CrossGETTokens)
        return Merging(self.base, tokens)

    def shape(self, tokens: PreTrainedModel) -> str:
        shape = tokens.config
        return (
            f"One vector of {shape.width} values for each of {shape.blocks} encoder blocks "
            "(https://arxiv.org/abs/2305.17455); the model itself is unchanged."
        )

    def call(self) -> str:
        return "foveate.prune(model, foveate.CrossGET.from_pretrained(FOLDER, keep=0.25))"


def train_crossget(
    base: Any, rows: Rows, out: str | Path, settings: Settings | None = None, *, name: str = "", **options: Any
) -> Path:
    """Train cross tokens for `base` and return their folder, `out`/crossget.

    Args:
        base: a loaded vision-language model; it is frozen, and not a bit of it changes.
        rows: `Conversations` or `SceneQuestions`, which hand on pixels.
        settings: the authors' where None.
        name: what the model is called, for the card.
        options: further arguments of `foveate.train.trainer.train`.

    Raises:
        FoveateError: as `train`.
    """
    return train(_Recipe(base, settings or Settings(), name), rows, out, **options)
