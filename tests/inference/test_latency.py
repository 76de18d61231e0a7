"""Times are taken where tokens arrive; what is tested is which moments count, not how long they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny

from foveate.core import FoveateError
from foveate.inference import latency
from foveate.inference.answers import greedy
from foveate.inference.latency import Latency, Ticks, interleaved, medians, settled, timed


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows the given seconds one after the other."""
    shown: list[float] = []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: shown.pop(0))
    return shown


def test_the_prompt_is_no_token(clock: list[float]) -> None:
    clock[:] = [1.0, 2.0]
    ticks = Ticks()
    ticks.put(torch.tensor([[5, 6, 7]]))
    ticks.put(torch.tensor([8]))
    ticks.put(torch.tensor([9]))
    ticks.end()
    assert ticks.times == [1.0, 2.0]


def test_first_token_and_gaps(model: Any, clock: list[float]) -> None:
    inputs = tiny.inputs(model, "2i3")
    clock[:] = [10.0, 10.5, 10.6, 10.8, 10.9, 11.0]  # called, then four tokens, then the end
    output, taken = timed(model, inputs, max_new_tokens=4)
    assert torch.equal(output, greedy(model, inputs, max_new_tokens=4))
    assert taken.first_token_ms == pytest.approx(500)
    assert taken.per_token_ms == pytest.approx(100)  # the median of 100, 200 and 100
    assert taken.whole_ms == pytest.approx(1000)


def test_an_answer_of_one_token_has_no_gap(model: Any) -> None:
    assert timed(model, tiny.inputs(model, "2i3"), max_new_tokens=1)[1].per_token_ms is None


def test_a_full_answer_goes_past_its_end(model: Any) -> None:
    inputs = tiny.inputs(model, "2i3")
    ending = tiny.model()
    ending.generation_config.eos_token_id = int(greedy(model, inputs, max_new_tokens=1)[0, -1])
    length = inputs["input_ids"].shape[1]
    assert timed(ending, inputs, max_new_tokens=5)[0].shape[1] == length + 1
    assert timed(ending, inputs, max_new_tokens=5, full=True)[0].shape[1] == length + 5


@pytest.mark.parametrize(("quick", "runs"), [(1e9, 3), (0.0, 1)])
def test_only_a_quick_answer_is_repeated(model: Any, monkeypatch: pytest.MonkeyPatch, quick: float, runs: int) -> None:
    monkeypatch.setattr(latency, "QUICK", quick)
    assert settled(model, tiny.inputs(model, "2i3"), max_new_tokens=2)[1].runs == runs


def test_rivals_take_turns_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []
    times = {"a": iter([99.0, 3.0, 1.0, 2.0]), "b": iter([99.0, 6.0, 5.0, 4.0])}

    def run(name: str) -> Latency:
        order.append(name)
        return Latency(next(times[name]), 7.0)

    measured = interleaved({name: lambda name=name: run(name) for name in "ab"}, repeats=3)
    assert order == list("abababab")
    assert measured == {"a": Latency(2.0, 7.0, 3), "b": Latency(5.0, 7.0, 3)}


def test_nothing_is_measured_in_no_round() -> None:
    with pytest.raises(FoveateError, match="repeats=0 measures nothing; the smallest is repeats=1"):
        interleaved({}, repeats=0)


def test_medians_leave_out_calls_without_a_second_token() -> None:
    assert medians([Latency(1.0, None), Latency(3.0, 4.0)]) == Latency(2.0, 4.0, 2)
    assert medians([Latency(1.0, None)]) == Latency(1.0, None, 1)
