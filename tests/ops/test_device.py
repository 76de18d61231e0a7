"""What is counted on the device and read later: nothing gets lost on the way, and the first fault is the one raised."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from foveate.core import FoveateError
from foveate.ops import device
from foveate.ops.device import Complaints, Steps, noting, on_host, refuse_any, taken
from foveate.ops.subsets import top_k

NAN = torch.tensor([[1.0, float("nan"), float("inf")]])


def read(complaints: Complaints) -> None:
    complaints.refuse(on_host(complaints.counts()))


def test_values_of_several_kinds_are_read_as_they_are() -> None:
    given = [
        torch.tensor([[3, -1]]),
        torch.tensor([True, False]),
        torch.tensor(7, dtype=torch.int32),
        torch.ones(0).long(),
        torch.tensor([0.1, -0.0, float("inf"), 1e-45]),
        torch.tensor([[0.3, 7.0]], dtype=torch.bfloat16).T,
        torch.tensor(1 / 3, dtype=torch.float64),
    ]
    for found, value in zip(on_host(given), given, strict=True):
        assert found.dtype == value.dtype
        assert torch.equal(found, value)
        assert not value.is_floating_point() or torch.equal(found.signbit(), value.signbit())
    assert on_host([]) == []
    assert on_host([torch.tensor([float("nan")]), torch.ones(1)])[0].isnan()


def test_steps_are_taken_together_a_round_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three that ask twice, once and never: two reads, each of whoever still asks."""

    def adding(*asked: Sequence[int]) -> Steps[int]:
        total = 0
        for numbers in asked:
            total += sum(one.item() for one in (yield [torch.tensor(number) for number in numbers]))
        return total

    reads: list[int] = []
    monkeypatch.setattr(device, "on_host", lambda values: reads.append(len(values)) or on_host(values))
    assert taken([adding([1, 2], [4]), adding([8]), adding()]) == [7, 8, 0]
    assert [count for count in reads if count] == [3, 1]
    assert taken([]) == []


def test_a_fault_is_refused_at_once_where_nobody_notes_it() -> None:
    refuse_any(torch.tensor(0), "{} of them")
    with pytest.raises(FoveateError, match=r"^2 of 3 scores are NaN or infinite; "):
        top_k(NAN, 1)


def test_a_noted_fault_is_refused_when_it_is_read_and_only_once() -> None:
    complaints = Complaints()
    with noting(complaints):
        top_k(torch.ones(1, 3), 1)
        assert top_k(NAN, 2).shape == (1, 2)
        top_k(NAN, 1)
    with pytest.raises(FoveateError, match=r"^4 of 3 scores"):
        read(complaints)
    read(complaints)


def test_the_first_of_several_faults_is_raised() -> None:
    complaints = Complaints()
    with noting(complaints):
        refuse_any(torch.tensor(0), "none of these: {}")
        refuse_any(torch.tensor(1), "{} first")
        refuse_any(torch.tensor(1), "{} second")
    with pytest.raises(FoveateError, match=r"^1 first$"):
        read(complaints)


def test_a_fault_comes_before_what_it_leads_to() -> None:
    def fail(scores: Tensor) -> None:
        with noting(Complaints()):
            top_k(scores, 1)
            raise IndexError("of what was chosen by it")

    with pytest.raises(FoveateError, match=r"^2 of 3 scores"):
        fail(NAN)
    with pytest.raises(IndexError, match="chosen"):
        fail(torch.ones(1, 3))
