"""Judges modules while they train: answers to rows that are never trained on, beside rivals at the same layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import TrainerCallback

from foveate.core import FoveateError, Keep
from foveate.train.budgets import shared
from foveate.train.conversations import Row, collate
from foveate.train.losses import IGNORED
from foveate.train.softened import Pass, Softened, Stages, shares_of

Rival: TypeAlias = Literal["random", "uniform"]
RIVALS: tuple[Rival, ...] = ("random", "uniform")
"""What else chooses at the same layers: noise, and an even lattice."""

_SURE = 50.0  # odds of a share that is all but 1


class HeldOut:
    """Rows that are never trained on, and the budgets that they are answered at.

    Every stage keeps what inference would keep; an answer counts by the share of its tokens that are the most likely
    ones, each given the right ones before it.

    Args:
        rows: what to answer; accuracies are told by their `kind`, and for all.
        budgets: tokens or shares of the visual tokens for each module.
        pad: id of the padding token.
        batch: rows at once.

    Raises:
        FoveateError: no rows, or no budget.
    """

    def __init__(self, rows: Sequence[Row], budgets: Sequence[Sequence[Keep]], *, pad: int, batch: int = 8) -> None:
        if not rows or not budgets:
            raise FoveateError(f"{len(rows)} rows and {len(budgets)} budgets leave nothing to judge; give one of each")
        self.rows, self.budgets, self.pad, self.batch = list(rows), [tuple(budget) for budget in budgets], pad, batch
        self._rivals: dict[Rival, dict[str, float]] = {}

    def beside(self, softened: Softened) -> dict[str, dict[str, float]]:
        """Accuracies of the modules and of each rival, by kind of question; rivals are asked once."""
        for rival in RIVALS:
            if rival not in self._rivals:
                self._rivals[rival] = self.accuracy(softened, rival)
        return {"modules": self.accuracy(softened), **{str(rival): found for rival, found in self._rivals.items()}}

    @torch.no_grad()
    def accuracy(self, softened: Softened, rival: Rival | None = None) -> dict[str, float]:
        """Share of right answers by kind of question, and "all": the mean over rows and budgets."""
        right: dict[str, list[float]] = defaultdict(list)
        device = next(softened.parameters()).device
        noise = torch.Generator().manual_seed(0)
        for budget in self.budgets:
            for start in range(0, len(self.rows), self.batch):
                rows = self.rows[start : start + self.batch]
                given = {name: value.to(device) for name, value in collate(rows, self.pad).items()}
                for row, hit in zip(rows, _answered(softened, given, budget, rival, noise).tolist(), strict=True):
                    for kind in {row.kind or "all", "all"}:
                        right[kind].append(hit)
        return {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}


def _answered(
    softened: Softened, given: dict[str, Tensor], budget: Sequence[Keep], rival: Rival | None, noise: torch.Generator
) -> Tensor:
    """(B,) share of each answer's tokens that the model would say."""
    ids, mask, labels = (given.pop(name) for name in ("input_ids", "attention_mask", "labels"))
    features = given.pop("features", None)
    more = {name: value for name, value in given.items() if name not in ("wanted", "even")}
    rows = softened.whole(ids, mask, labels, features, None, more)
    passing = Pass(softened.text(rows), rows.seen.visual)
    stages = Stages(passing.present, rows.ranks, shares_of(budget, rows.whole))

    def choose(stage: int, visual: Tensor, text: Tensor, read: Tensor) -> Tensor:
        left = stages.left()
        odds = None
        if rival is None:
            visual, text = softened.fitted(visual, text)
            scores = softened.gates(stage, visual, text, read)
            gap = softened.ordered(scores[..., 0] - scores[..., 1], rows.ranks)
            odds = softened.gates.even_odds(stage, text, read, stages.shares[stage])
        else:
            gap = torch.rand(left.shape, generator=noise).to(left.device)
            odds = torch.full((len(left),), _SURE, device=left.device) if rival == "uniform" else None
        count = stages.shares[stage] * passing.present.sum(dim=1)
        return stages.decided(shared(gap, odds, rows.ranks, left, count), gap, odds, left)

    logits = passing.run(softened.base, softened.gates.config.layers, choose, rows)
    assert logits is not None
    wanted = labels[:, labels.shape[1] - logits.shape[1] + 1 :]
    told = wanted != IGNORED
    hit = (logits[:, :-1].argmax(dim=-1) == wanted) & told
    return hit.sum(dim=1) / told.sum(dim=1).clamp(min=1)


class Examiner(TrainerCallback):
    """Judges every so many steps, tells the result, and stops training that makes things worse.

    Args:
        held_out: what is asked.
        softened: whose modules are asked.
        steps: between two examinations.
        above_random: a kind of question that is to stay above `random`: training stops, with everything saved, where
            two examinations in a row, the first one of a run not counted, find it below. None never stops.
        report: called with each result, in the first process.

    Attributes:
        below: examinations in a row that found it below; a resumed run goes on with them.
    """

    def __init__(
        self,
        held_out: HeldOut,
        softened: Softened,
        steps: int,
        *,
        above_random: str | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.held_out, self.softened, self.steps = held_out, softened, steps
        self.above_random, self.report = above_random, report
        self.below = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step is done."""
        if state.global_step % self.steps and state.global_step < state.max_steps:
            return
        found = self.held_out.beside(self.softened)
        if self.report is not None:
            told = {f"{who} {kind}": 100 * share for who, by_kind in found.items() for kind, share in by_kind.items()}
            self.report({"step": state.global_step, **told})
        if self.above_random is None or state.global_step <= self.steps:
            return
        mine, chance = (found[who].get(self.above_random) for who in ("modules", "random"))
        self.below = self.below + 1 if mine is not None and chance is not None and mine < chance else 0
        if self.below >= 2:
            control.should_save = control.should_training_stop = True
