"""How LVPruning's decision modules are trained (section 3.2): their settings, and what they bring to the trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from foveate.core import FoveateError, Keep
from foveate.depths import check_depths, scaled_layers
from foveate.modules import lvpruning as modules
from foveate.train.conversations import Row
from foveate.train.held_out import Examiner, HeldOut
from foveate.train.learner import Learner
from foveate.train.losses import MARGIN
from foveate.train.memory import divide
from foveate.train.settings import StagedSettings
from foveate.train.softened import Softened, check_trains
from foveate.train.trainer import Recipe, Report, Rows, train

LAYERS = (1, 8, 16)
"""The paper's depths in a decoder of 32 blocks."""


@dataclass(frozen=True)
class Settings(StagedSettings):
    """How to train; the defaults are the paper's (section 4.1), and DynamicViT's where it states none.

    With `budgets` and no causal loss, each stage keeps what inference would keep, blocks behind the last module do not
    run, and hints alone teach.

    Attributes:
        hint_weight: of a third loss that the paper does not have: the scores are to put the tokens that the question is
            about first and those that distract from it last. Scenes know them; other data say nothing. 0 is none.
        even_weight: of a fourth one: how much of the budget is to be spread evenly; scenes know what is best. It gives
            the modules heads that say so, and so needs `budgets`. 0 is neither.
        classes: give the modules borders: what they score only says whether a token is wanted, distracts or neither, as
            the hints teach, and in each class inference takes tokens evenly over the picture. Needs `hint_weight`.
        anneal: share of the steps in which the shares to aim at fall from 1 to `ratios`; the modules then begin by
            keeping nine tokens of ten. What matters shows clearest while little is missing. 0, as in the paper, aims
            at `ratios` from the start.
        visual_share: of each picture's tokens that a step looks at, drawn at random; below 1 it is cheaper.
        answers: let the modules read the answers as well; they then know what is asked for beforehand.
        checkpointing: recompute decoder layers in the backward pass; None is where too few rows fit otherwise.
        check_steps: steps between two examinations on held-out rows; None is never.
        above_random: the kind of held-out question that is to stay above `random` at the same layers; training stops
            where it is twice in a row below. None never stops.
    """

    paper_layers: ClassVar[tuple[int, ...]] = LAYERS
    method: ClassVar[str] = "LVPruning"
    from_one: ClassVar[tuple[str, ...]] = (*StagedSettings.from_one, "check_steps")
    from_zero: ClassVar[tuple[str, ...]] = (*StagedSettings.from_zero, "hint_weight", "even_weight")
    shares: ClassVar[tuple[str, ...]] = (*StagedSettings.shares, "anneal")

    hint_weight: float = 0.0
    even_weight: float = 0.0
    classes: bool = False
    anneal: float = 0.0
    visual_share: float = 1.0
    answers: bool = False
    checkpointing: bool | None = None
    check_steps: int | None = None
    above_random: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.visual_share <= 1:
            raise FoveateError(f"visual_share={self.visual_share} is no share in (0, 1]; the nearest is 1.0")
        if self.even_weight and not self.budgets:
            raise FoveateError("even_weight= teaches how much of a budget is spread evenly; give budgets= with it")
        if self.classes and not self.hint_weight:
            raise FoveateError("classes= are those that hints teach; give hint_weight= with it")
        if self.budgets and not self.causal_weight and not self.hint_weight:
            raise FoveateError("causal_weight=0 with budgets= leaves hints alone to teach; give hint_weight= with it")

    def targets(self, done: float, step: int = 0) -> tuple[Keep, ...]:
        """What to aim at when so much of the training, from 0 to 1, is done: one of `budgets`, drawn for each step."""
        if self.budgets:
            return self.drawn(self.budgets, step)
        left = max(0.0, 1 - done / self.anneal) if self.anneal else 0.0
        return tuple(ratio + (1 - ratio) * left for ratio in self.ratios)

    def depths(self, blocks: int) -> tuple[int, ...]:
        """Where the modules stand in a decoder of `blocks` blocks."""
        if self.layers is None:
            return scaled_layers(LAYERS, 32, blocks)
        check_depths(self.layers, blocks, "LVPruning")
        return self.layers


class _Recipe(Recipe):
    """Decision modules between decoder blocks."""

    folder: ClassVar[str] = modules.FOLDER
    title: ClassVar[str] = "Decision modules of LVPruning"
    settings: Settings

    def check(self) -> None:
        check_trains(self.base, bool(self.settings.checkpointing))

    def divided(self, rows: Rows, processes: int, tell: Callable[[str], None]) -> Settings:
        settings = self.settings
        division = divide(
            self.base,
            rows.extent(),
            self._depths(),
            batch=settings.batch,
            processes=processes,
            micro=settings.micro,
            checkpointing=settings.checkpointing,
            bf16=settings.bf16,
        )
        tell(str(division))
        return dataclasses.replace(settings, micro=division.micro, checkpointing=division.checkpointing)

    def _depths(self) -> tuple[int, ...]:
        return self.settings.depths(len(self.base.get_decoder().layers))

    def build(self) -> PreTrainedModel:
        """New modules, or those of `start`, whose heads for evenness may be new."""
        settings, base = self.settings, self.base
        before = None if settings.start is None else modules.load(settings.start)
        gates = modules.for_model(
            base.config,
            layers=self._depths(),
            seed=settings.seed,
            ratios=list(settings.ratios),
            answers=settings.answers,
            evenness=bool(settings.even_weight or (settings.budgets and before and before.config.evenness)),
            borders=[-MARGIN, MARGIN] if settings.classes else [],
            base_name=self.name,
        )
        if before is not None:
            before.check(base.config)
            if list(before.config.layers) != list(gates.config.layers):
                raise FoveateError(
                    f"start={settings.start!r} holds modules after {list(before.config.layers)} blocks, not "
                    f"{list(gates.config.layers)}; give the same layers"
                )
            given = before.float().state_dict()
            gates.load_state_dict({key: given.get(key, value) for key, value in gates.state_dict().items()})
        elif settings.anneal:
            gates.start_keeping(0.9)
        return gates

    def learner(self, gates: PreTrainedModel, rows: int) -> Learner:
        settings = self.settings
        assert isinstance(gates, modules.LVPruningModules)
        return Softened(
            self.base,
            gates,
            settings.ratios,
            causal_weight=settings.causal_weight,
            ratio_weight=settings.ratio_weight,
            hint_weight=settings.hint_weight,
            even_weight=settings.even_weight,
            told=bool(settings.budgets),
            ratio_kind=settings.ratio_loss,
            temperature=settings.temperature,
            share=settings.visual_share,
            limit=None if settings.decision_clip is None else settings.decision_clip / rows,
            answers=settings.answers,
            checkpointing=bool(settings.checkpointing),
        )

    def save(self, gates: PreTrainedModel, folder: Path, card: str) -> None:
        assert isinstance(gates, modules.LVPruningModules)
        modules.save(gates, folder, card)

    def shape(self, gates: PreTrainedModel) -> str:
        shape = gates.config
        return (
            f"Cross-attention modules (https://arxiv.org/abs/2501.13652) after {', '.join(map(str, shape.layers))} of "
            f"{shape.base_layers} decoder blocks of width {shape.width}; the model itself is unchanged."
        )

    def call(self) -> str:
        return "foveate.prune(model, foveate.LVPruning.from_pretrained(FOLDER, keep=(0.5, 0.3, 0.1)))"


def train_lvpruning(
    base: Any,
    rows: Rows,
    out: str | Path,
    settings: Settings | None = None,
    *,
    name: str = "",
    held_out: Sequence[Row] = (),
    **options: Any,
) -> Path:
    """Train decision modules for `base` and return their folder, `out`/lvpruning.

    Args:
        base: a loaded vision-language model; it is frozen, and not a bit of it changes.
        rows: `Conversations` or `SceneQuestions`.
        settings: the paper's where None.
        name: what the model is called, for the modules' configuration.
        held_out: rows that are never trained on, to be answered every `settings.check_steps` steps beside `random` and
            `uniform` at the same layers; the result is a line of the log.
        options: further arguments of `foveate.train.trainer.train`.

    Raises:
        FoveateError: as `train`.
    """
    settings = settings or Settings()

    def examine(learner: Learner, pad: int, report: Report | None) -> Examiner | None:
        if not held_out or settings.check_steps is None:
            return None
        assert isinstance(learner, Softened)
        judged = HeldOut(held_out, settings.budgets or (settings.ratios,), pad=pad)
        return Examiner(judged, learner, settings.check_steps, above_random=settings.above_random, report=report)

    return train(_Recipe(base, settings, name), rows, out, examine=examine, **options)
