"""Tuning: the cheapest candidate within the drop is found, confirmed on questions of its own, or nothing is said."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest

from foveate.core import FoveateError
from foveate.evaluate.candidates import joined, smaller
from foveate.evaluate.scenes_task import parse_rivals
from foveate.evaluate.tuning import ROUNDS, Reached, Search, sizes
from foveate.spec import format as format_spec
from foveate.spec import parse_stages

QUESTIONS = 400


class Made:
    """Answers that are right with a chance that a candidate's name and budget give; 100 tokens a picture."""

    def __init__(self, holds: Mapping[str, float]) -> None:
        self.holds = holds  # by method the budget below which it loses: all of what is missing
        self.asked: list[tuple[int, tuple[str, ...]]] = []

    def chance(self, spec: str) -> tuple[float, float]:
        (stage,) = parse_stages(spec)
        name, keep = spec.partition(":")[0], float(stage.keep)  # type: ignore[attr-defined]
        return 0.9 * min(1.0, keep / self.holds[name]), keep

    def __call__(self, specs: Mapping[str, Any], number: int) -> dict[str, Reached]:
        self.asked.append((number, tuple(specs)))
        count = [*sizes(QUESTIONS), QUESTIONS][number]
        found = {"none": Reached([], 100.0, 1.0)}
        for spec in specs:
            chance, keep = (0.9, 1.0) if spec == "none" else self.chance(spec)
            # The same questions are hard for all.
            draw = random.Random(number)
            found[spec] = Reached([float(draw.random() < chance) for _ in range(count)], 100 * keep, keep)
        return found


def search(holds: Mapping[str, float], *specs: str, drop: float = 0.01, most: float | None = None) -> Search:
    made = Search(Made(holds), drop, most)
    made.run(joined(parse_rivals(specs)))
    return made


def test_candidates_that_do_not_fit_leave_the_search() -> None:
    """Whether at the start, below a survivor, or on the fresh questions."""
    ask = Made({"random": 0.1, "uniform": 0.1, "fopru": 0.1})

    def fitting(specs: Mapping[str, Any], number: int) -> dict[str, Reached]:
        unfit = {"fopru:keep=0.5", "random:keep=0.375"} | ({"uniform:keep=0.375"} if number == ROUNDS else set())
        return {spec: reached for spec, reached in ask(specs, number).items() if spec not in unfit}

    done = Search(fitting, 0.01)
    done.run(joined(parse_rivals(["fopru:keep=0.5", "random:keep=0.5", "uniform:keep=0.5"])))
    assert not done.all.keys() & {"fopru:keep=0.5", "random:keep=0.375", "uniform:keep=0.375"}
    assert done.found is not None and {row["spec"] for row in done.rows()} == done.all.keys() - {"none"}


def test_the_fewest_tokens_within_the_drop_are_found() -> None:
    """`uniform` holds down to 12 % here, from 50 % in steps of three quarters, and the others to much more."""
    done = search(
        {"random": 0.4, "uniform": 0.12, "fopru": 0.6}, "random:keep=0.5", "uniform:keep=0.5", "fopru:keep=0.5"
    )
    assert done.found is not None and done.found.startswith("uniform")
    (stage,) = parse_stages(done.found)
    assert 0.5 * 0.75**ROUNDS <= stage.keep < 0.5  # type: ignore[attr-defined]
    row = next(row for row in done.rows() if row["spec"] == done.found)
    assert row["front"] and row["fresh"]["mean"] >= -0.01 and row["drop"]["mean"] >= -0.01
    cheaper = [one for one in done.rows() if one["fresh"] and one["equivalent_tokens"] < row["equivalent_tokens"]]
    assert all(one["fresh"]["mean"] < -0.01 for one in cheaper)


def test_every_candidate_is_compared_on_the_questions_that_it_was_asked() -> None:
    done = search(
        {"random": 0.2, "uniform": 0.3}, *(f"random:keep={keep}" for keep in (0.9, 0.6, 0.3, 0.25, 0.1, 0.05))
    )
    for spec, standing in done.all.items():
        assert len(standing.scores) in (50, 100, 200, 400), spec
    halved = [len(specs) for number, specs in done.ask.asked if number == 0]
    assert halved[0] == 7
    assert done.found in {row["spec"] for row in done.rows()}


def test_what_does_not_hold_on_fresh_questions_is_not_said() -> None:
    class Lucky(Made):
        def __call__(self, specs: Mapping[str, Any], number: int) -> dict[str, Reached]:
            self.holds = {"random": 0.01 if number < ROUNDS else 5.0}
            return super().__call__(specs, number)

    done = Search(Lucky({}), 0.01)
    done.run(joined(parse_rivals(["random:keep=0.5"])))
    assert done.found is None
    assert all(row["fresh"] is None or row["fresh"]["mean"] < -0.01 for row in done.rows())


def test_a_cost_that_is_too_high_is_not_taken() -> None:
    done = search({"random": 0.6, "uniform": 0.1}, "random:keep=0.9", "uniform:keep=0.2", most=0.25)
    assert done.found is not None and done.found.startswith("uniform")
    assert search({"random": 0.6}, "random:keep=0.9", most=0.25).found is None


@pytest.mark.parametrize(
    ("spec", "lowered"),
    [
        ("fopru:keep=0.25", "fopru:keep=0.1875"),
        ("fopru:keep=64", "fopru:keep=48"),
        ("pyramiddrop:keep=0.5/0.25/0.125", "pyramiddrop:keep=0.375/0.1875/0.0938"),
        ("divprune:keep=0.4+fastv:keep=0.2", "divprune:keep=0.3+fastv:keep=0.15"),
        ("fopru:keep=1", None),
    ],
)
def test_a_smaller_budget(spec: str, lowered: str | None) -> None:
    found = smaller(parse_stages(spec))
    assert found == (None if lowered is None else parse_stages(lowered))
    assert found is None or format_spec(found) == lowered


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: sizes(15), "15 questions are too few to tune by; the fewest is 16"),
        (lambda: joined(parse_rivals(["pixelprune"])), "pixelprune has no budget to tune"),
        (lambda: search({}), "no method that runs on this model has a budget to tune"),
    ],
)
def test_refusals(act: Any, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        act()


def test_the_rounds_share_the_questions() -> None:
    assert sizes(400) == [50, 50, 100, 200] and sum(sizes(403)) == 403
