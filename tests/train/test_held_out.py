"""Examinations while modules train: what inference would keep is judged, and training stops where it does harm."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny

import foveate
from foveate.core import FoveateError
from foveate.methods.lvpruning import LVPruning
from foveate.modules.lvpruning import for_model
from foveate.train.conversations import Row
from foveate.train.held_out import Examiner, HeldOut
from foveate.train.losses import IGNORED
from foveate.train.softened import Softened


def rows(model: Any, count: int = 6) -> list[Row]:
    made = []
    for number in range(count):
        given = tiny.inputs(model, f"2i{4 + number % 3}", seed=number)
        ids = given["input_ids"][0]
        labels = ids.clone()
        labels[:-2] = IGNORED
        made.append(Row(ids, labels, {"pixel_values": given["pixel_values"]}, kind="ab"[number % 2]))
    return made


@pytest.mark.parametrize(("evenness", "borders"), [(False, []), (True, []), (True, [-0.5, 0.5])])
def test_an_answer_is_the_one_that_pruning_gives(evenness: bool, borders: list[float]) -> None:
    model = tiny.model()
    gates = for_model(model.config, layers=(1, 2, 3), seed=3, evenness=evenness, borders=borders)
    held_out = HeldOut(rows(model), [(0.5, 0.3, 0.1)], pad=0, batch=2)
    softened = Softened(model, gates, (0.5, 0.3, 0.1))
    method = LVPruning(path="random")
    object.__setattr__(method, "modules", gates)
    object.__setattr__(method, "path", "given")
    right = []
    for row in held_out.rows:
        with foveate.prune(model, method):
            # The prompt alone is read, so that the answer's tokens must not be there when the stages choose.
            prompt = row.ids[:-2][None]
            first = model(input_ids=prompt, pixel_values=row.given["pixel_values"]).logits[0, -1].argmax()
        right.append(float(first == row.labels[-2]))
    found = held_out.accuracy(softened)
    assert set(found) == {"a", "b", "all"} and 0 <= found["all"] <= 1
    lowest, highest = sum(right) / 12, (sum(right) + 6) / 12  # the second token is right or not
    assert lowest - 1e-6 <= found["all"] <= highest + 1e-6


def test_rivals_are_asked_once() -> None:
    model = tiny.model()
    held_out = HeldOut(rows(model), [(4, 4, 4)], pad=0)
    softened = Softened(model, for_model(model.config, layers=(1, 2, 3)), (0.5, 0.3, 0.1))
    first = held_out.beside(softened)
    assert set(first) == {"modules", "random", "uniform"}
    asked: list[Any] = []
    softened.gates.register_forward_pre_hook(lambda *given: asked.append(given))
    assert held_out.beside(softened) == first
    assert len(asked) == 3, "one batch, three stages: the rivals were not asked again, and ask no modules"


@pytest.mark.parametrize(
    ("mine", "stops"),
    [([0.1, 0.1, 0.1], [False, False, True]), ([0.1, 0.6, 0.1], [False] * 3), ([0.6, 0.1, 0.1], [False, False, True])],
)
def test_training_stops_where_a_kind_stays_below_random(mine: list[float], stops: list[bool]) -> None:
    found = iter(mine)
    held_out: Any = SimpleNamespace(beside=lambda softened: {"modules": {"a": next(found)}, "random": {"a": 0.5}})
    lines: list[dict[str, Any]] = []
    examiner = Examiner(held_out, torch.nn.Identity(), 2, above_random="a", report=lines.append)  # type: ignore[arg-type]
    seen = []
    for step in range(1, 7):
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        examiner.on_step_end(None, SimpleNamespace(global_step=step, max_steps=9), control)
        assert control.should_save == control.should_training_stop
        if step % 2 == 0:
            seen.append(control.should_training_stop)
    assert seen == stops
    assert [line["step"] for line in lines] == [2, 4, 6] and lines[0]["random a"] == 50.0


def test_nothing_to_judge_is_refused() -> None:
    with pytest.raises(FoveateError, match="0 rows and 1 budgets leave nothing to judge"):
        HeldOut([], [(4, 4, 4)], pad=0)
