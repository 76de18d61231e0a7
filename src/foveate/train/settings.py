"""How modules are trained: what all learned methods share, and what those share that drop tokens stage by stage."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from foveate.core import FoveateError, Keep, check_choices, check_keep
from foveate.train.losses import RatioLoss

NO_DIFFERENCE = ("save_steps", "log_steps", "check_steps", "above_random")
"""Settings that no weight depends on."""


@dataclass(frozen=True)
class Settings:
    """How to train the modules of any learned method.

    Attributes:
        rate: peak learning rate; cosine decay after the warm-up.
        batch: rows per optimizer step, over all processes.
        micro: rows per process at once; None is as many as the method finds best.
        epochs: passes over the data.
        steps: stop after so many optimizer steps, whatever `epochs` says; None is by epochs.
        warmup: share of the steps in which the rate rises.
        decay: weight decay.
        clip: largest norm of the gradient.
        start: folder of modules to start from, of the same shape; None is from nothing.
        bf16: compute in bfloat16 on float32 modules.
        save_steps: steps between two checkpoints.
        log_steps: steps between two lines of the log.
        seed: of modules, order and noise.
    """

    positive: ClassVar[tuple[str, ...]] = ("rate", "batch", "epochs", "clip", "save_steps", "log_steps")
    from_one: ClassVar[tuple[str, ...]] = ("micro", "steps")
    from_zero: ClassVar[tuple[str, ...]] = ("decay",)
    shares: ClassVar[tuple[str, ...]] = ("warmup",)

    rate: float = 2e-6
    batch: int = 64
    micro: int | None = None
    epochs: int = 1
    steps: int | None = None
    warmup: float = 0.03
    decay: float = 0.0
    clip: float = 1.0
    start: str | None = None
    bf16: bool = True
    save_steps: int = 500
    log_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)  # type: ignore[arg-type]
        for name in self.positive:
            if not getattr(self, name) > 0:
                raise FoveateError(f"{name}={getattr(self, name)} is not above 0")
        for name in self.from_one:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise FoveateError(f"{name}={getattr(self, name)} is below 1; the smallest is {name}=1")
        for name in self.from_zero:
            if getattr(self, name) < 0:
                raise FoveateError(f"{name}={getattr(self, name)} is below 0; the smallest is {name}=0")
        for name in self.shares:
            if not 0 <= getattr(self, name) < 1:
                raise FoveateError(f"{name}={getattr(self, name)} is no share in [0, 1)")

    def targets(self, done: float, step: int = 0) -> tuple[Keep, ...]:
        """What each module aims at in a step, when so much of the training, from 0 to 1, is done."""
        raise NotImplementedError(f"{type(self).__name__} has no targets()")

    def drawn(self, budgets: Sequence[tuple[Keep, ...]], step: int) -> tuple[Keep, ...]:
        """One of several budgets, drawn for a step."""
        return random.Random(f"budget {self.seed} {step}").choice(list(budgets))

    def asked(self) -> str:
        """What is aimed at, in words."""
        raise NotImplementedError(f"{type(self).__name__} has no asked()")


@dataclass(frozen=True)
class StagedSettings(Settings):
    """How to train modules that drop tokens stage by stage.

    Attributes:
        layers: blocks that run before each module; None is the paper's, scaled.
        ratios: shares of the visual tokens to keep at each.
        budgets: in place of `ratios`, several of them, counts or shares of the visual tokens for each module; each step
            draws one, and the modules are told it: their scores are shifted so that it is met on average. What
            inference reads, the order of the scores, stays free.
        causal_weight, ratio_weight: of the losses of the answers and of the kept shares.
        ratio_loss: "mse" (LVPruning's eq. 11) or "huber" (the sentence below it).
        temperature: of the Gumbel-softmax; not stated.
        decision_clip: cut the causal loss's gradient with respect to one decision of one row at this; None, as in the
            papers, cuts none and leaves outliers to `clip`, which scales everything else down with them.
    """

    paper_layers: ClassVar[tuple[int, ...]] = ()
    method: ClassVar[str] = ""
    positive: ClassVar[tuple[str, ...]] = (*Settings.positive, "temperature")
    from_zero: ClassVar[tuple[str, ...]] = (*Settings.from_zero, "causal_weight", "ratio_weight")

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] = (0.5, 0.3, 0.1)
    budgets: tuple[tuple[Keep, ...], ...] = ()
    causal_weight: float = 1.0
    ratio_weight: float = 2.0
    ratio_loss: RatioLoss = "mse"
    temperature: float = 1.0
    decision_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratios or not all(0 < ratio <= 1 for ratio in self.ratios):
            raise FoveateError(f"ratios={self.ratios} are not all shares in (0, 1]")
        if any(later > earlier for earlier, later in pairwise(self.ratios)):
            raise FoveateError(f"ratios={self.ratios} rise, but a token that has left does not come back")
        stages = self.paper_layers if self.layers is None else self.layers
        if len(stages) != len(self.ratios):
            raise FoveateError(f"{len(self.ratios)} ratios {self.ratios} for {len(stages)} layers {stages}")
        for budget in self.budgets:
            if len(budget) != len(stages):
                raise FoveateError(f"budgets: {len(budget)} of {budget} for {len(stages)} modules; give one for each")
            for keep in budget:
                check_keep(keep, f"budgets: {keep} of {budget}")
            if any(type(one) is type(two) and two > one for one, two in pairwise(budget)):
                raise FoveateError(f"budgets: {budget} rises, but a token that has left does not come back")

    def targets(self, done: float, step: int = 0) -> tuple[Keep, ...]:
        """One of `budgets`, or `ratios`."""
        return self.drawn(self.budgets, step) if self.budgets else self.ratios

    def asked(self) -> str:
        if self.budgets:
            return f"budgets {', '.join(map(joined, self.budgets))}"
        return f"ratios {joined(self.ratios)}"


def joined(budget: Sequence[Keep]) -> str:
    """A budget as users write it."""
    return "/".join(map(str, budget))
