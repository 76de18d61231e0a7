"""The smallest budget within a wanted drop: successive halving on the same questions, confirmed on fresh ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from foveate.core import FoveateError, Method
from foveate.evaluate.candidates import smaller
from foveate.evaluate.front import front
from foveate.evaluate.paired import Difference, difference
from foveate.evaluate.scenes_task import NONE
from foveate.spec import format as format_spec

Stages: TypeAlias = "tuple[Method, ...]"

ROUNDS = 4
"""Of halving; the first two ask an eighth of the questions each, the next a quarter, the last a half."""

QUESTIONS = 400
"""Of a search about scenes, where nothing else is wanted."""

FINALISTS = 8
"""Candidates that answer fresh questions, at most."""

_FEWEST = 4  # survivors of a round, so that a lucky one is not left alone


@dataclass(frozen=True)
class Reached:
    """What a candidate reached in one round.

    Attributes:
        scores: of each question, in an order that all candidates of the round share.
        tokens: visual tokens averaged over the decoder's layers and the pictures.
        cost: share of the FLOPs of the unpruned prefill.
    """

    scores: list[float]
    tokens: float
    cost: float


Ask: TypeAlias = Callable[[Mapping[str, "Stages"], int], Mapping[str, Reached]]
"""From candidates by spec, and the number of a round, to what each reached on that round's questions; `ROUNDS` is the
number of the fresh questions. Whoever asks may add the unpruned model, and leave out what does not fit a picture."""


@dataclass
class Standing:
    """What a candidate reached so far, over all rounds that it took part in."""

    stages: Stages
    scores: list[float] = field(default_factory=list)
    tokens: float = 0.0
    cost: float = 1.0
    fresh: Difference | None = None


@dataclass
class Search:
    """A search as it went.

    Attributes:
        drop: what may be lost of the mean score of the unpruned model, as a share of 1.
        most: share of the unpruned prefill's FLOPs that a spec may cost; None is any.
        all: every candidate that was asked, by spec, the unpruned model among them.
        alive: those that are still in it.
        found: the spec that was looked for, or None.
    """

    ask: Ask
    drop: float
    most: float | None = None
    told: Callable[[str], None] = lambda text: None
    all: dict[str, Standing] = field(default_factory=lambda: {NONE: Standing(())})
    alive: list[str] = field(default_factory=list)
    found: str | None = None

    def run(self, candidates: Mapping[str, Stages]) -> None:
        """Halve, look below what survives, and confirm.

        Raises:
            FoveateError: no candidate, or one that cannot be asked.
        """
        if not candidates:
            raise FoveateError("no method that runs on this model has a budget to tune; foveate methods lists them")
        self.all |= {spec: Standing(stages) for spec, stages in candidates.items()}
        self.alive = [*candidates]
        for number in range(ROUNDS):
            self.told(f"round {number + 1} of {ROUNDS}, candidates: {len(self.alive)}")
            self._take_part([NONE, *self.alive], number)
            self.alive = self._best()
            if number < ROUNDS - 1:
                self._look_below(number)
        self._confirm()

    def difference(self, spec: str) -> Difference:
        """A candidate's scores less the unpruned model's on the questions that it was asked."""
        scores = self.all[spec].scores
        return difference(scores, self.all[NONE].scores[: len(scores)])

    def rows(self) -> list[dict[str, Any]]:
        """A row for each candidate of values that JSON can hold, by rising tokens."""
        made: list[dict[str, Any]] = []
        for spec in sorted(self.all.keys() - {NONE}, key=lambda spec: (self.all[spec].tokens, spec)):
            standing = self.all[spec]
            fresh = None if standing.fresh is None else dataclasses.asdict(standing.fresh)
            figures = {"equivalent_tokens": standing.tokens, "prefill_flops_share": standing.cost}
            found = dataclasses.asdict(self.difference(spec))
            made.append({"spec": spec, "questions": len(standing.scores), **figures, "drop": found, "fresh": fresh})
        best = front([(row["equivalent_tokens"], row["drop"]["mean"]) for row in made])
        return [{**row, "front": number in best} for number, row in enumerate(made)]

    def _take_part(self, specs: Sequence[str], number: int) -> None:
        asked = {spec: self.all[spec].stages for spec in specs}
        answered = self.ask(asked, number)
        self._leave([spec for spec in asked if spec not in answered])
        for spec, reached in answered.items():
            if spec in asked:
                standing = self.all[spec]
                before, more = len(standing.scores), len(reached.scores)
                standing.tokens = (standing.tokens * before + reached.tokens * more) / (before + more)
                standing.cost = (standing.cost * before + reached.cost * more) / (before + more)
                standing.scores += reached.scores

    def _leave(self, specs: Sequence[str]) -> None:
        for spec in specs:
            del self.all[spec]
        self.alive = [spec for spec in self.alive if spec in self.all]

    def _best(self) -> list[str]:
        """The better half: those within the drop by rising tokens, then the others by what they lose."""
        order = []
        for spec in self.alive:
            found, standing = self.difference(spec), self.all[spec]
            surely_out = found.interval[1] < -self.drop or (self.most is not None and standing.cost > self.most)
            if not surely_out:
                within = found.mean >= -self.drop
                order.append((not within, standing.tokens if within else -found.mean, spec))
        count = max(_FEWEST, math.ceil(len(self.alive) / 2))
        return [spec for *_, spec in sorted(order)[:count]]

    def _look_below(self, number: int) -> None:
        """Let a smaller budget of each survivor within the drop catch up with the rounds so far."""
        below = {}
        for spec in self.alive:
            if self.difference(spec).mean >= -self.drop:
                stages = smaller(self.all[spec].stages)
                if stages is not None and format_spec(stages) not in self.all:
                    below[format_spec(stages)] = stages
        self.all |= {spec: Standing(stages) for spec, stages in below.items()}
        if below:
            self.told(f"smaller budgets: {len(below)}")
            for before in range(number + 1):
                self._take_part([spec for spec in below if spec in self.all], before)
        self.alive += [spec for spec in below if spec in self.all]

    def _confirm(self) -> None:
        """Ask the cheapest of those within the drop fresh questions; the first that holds there too is the one."""
        inside = [spec for spec in self.alive if self.difference(spec).mean >= -self.drop]
        finalists = sorted(inside, key=lambda spec: (self.all[spec].tokens, spec))[:FINALISTS]
        if not finalists:
            return
        self.told(f"fresh questions, finalists: {len(finalists)}")
        reached = self.ask({spec: self.all[spec].stages for spec in [NONE, *finalists]}, ROUNDS)
        self._leave([spec for spec in finalists if spec not in reached])
        for spec in (spec for spec in finalists if spec in reached):
            self.all[spec].fresh = found = difference(reached[spec].scores, reached[NONE].scores)
            if self.found is None and found.mean >= -self.drop:
                self.found = spec


def sizes(questions: int) -> list[int]:
    """Questions of each round of `questions` in all.

    Raises:
        FoveateError: too few to be shared.
    """
    if questions < 2**ROUNDS:
        raise FoveateError(f"{questions} questions are too few to tune by; the fewest is {2**ROUNDS}")
    shares = [questions // 8, questions // 8, questions // 4]
    return [*shares, questions - sum(shares)]
