"""Modules in training beside the frozen model that they serve: what the trainer asks of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from foveate.core import Keep


class Learner(nn.Module):
    """Modules in training beside the model that they serve, which is no part of this module's tree: nothing here
    trains, saves or shards it.

    Called with a batch of rows, it gives the weighted `loss`, each loss by its name, and `kept`: of each stage the
    share of the visual tokens that it left.

    Args:
        base: the model; it is frozen and put into eval mode.
        modules: what is trained.
        ratios: what each stage is to leave, as tokens or shares; set anew before each step.
    """

    # By its open signature the Trainer would take it for a loss that is divided by the parts of a step already.
    accepts_loss_kwargs = False

    def __init__(self, base: Any, modules: PreTrainedModel, ratios: tuple[Keep, ...], image_token: int) -> None:
        super().__init__()
        self.gates: Any = modules
        self._base = [base.eval().requires_grad_(False)]  # in a list, so that it is no submodule
        self.ratios, self.image_token = ratios, image_token
        self.generator: torch.Generator | None = None  # of noise; None is torch's own

    @property
    def base(self) -> Any:
        """The frozen model."""
        return self._base[0]
