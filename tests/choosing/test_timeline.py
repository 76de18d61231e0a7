"""What a layer holds while tokens come: counted until somebody asks, and then as if each had been appended."""

from __future__ import annotations

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.choosing.timeline import Held


def held() -> Held:
    """Two rows and heads of three slots, of which one is padding."""
    ages = torch.tensor([[[0, 2, 5], [1, 2, 5]], [[0, 0, 4], [0, 0, 5]]])
    valid = torch.tensor([[True, True, True], [False, True, True]])
    return Held(ages, valid, None, [3, 2], [3, 2])


@given(st.lists(st.tuples(st.integers(6, 9), st.sampled_from(["none", "ages", "valid", "cut", "rows", "copy"]))))
def test_tokens_that_come_are_appended(coming: list[tuple[int, str]]) -> None:
    one, ages, valid, counts = held(), held().ages, held().valid, [3, 2]
    for age, then in coming:
        one.come(age)
        ages = torch.cat([ages, torch.full((*ages.shape[:2], 1), age)], dim=2)
        valid, counts = torch.cat([valid, torch.ones(len(valid), 1, dtype=torch.bool)], dim=1), [n + 1 for n in counts]
        if then == "rows":
            one.select_rows(torch.tensor([1, 0]), [1, 0])
            ages, valid, counts = ages.flip(0), valid.flip(0), counts[::-1]
        elif then == "cut":
            one.cut(3)
            ages, valid = ages[:, :, -3:], valid[:, -3:]
            counts = valid.sum(dim=1).tolist()
        elif then == "copy":
            one = copy.deepcopy(one)
        elif then != "none":
            assert torch.equal(getattr(one, then), {"ages": ages, "valid": valid}[then])
        assert (one.entries, one.counts, one.unpadded) == (ages.shape[2], counts, bool(valid.all()))
    assert torch.equal(one.ages, ages)
    assert torch.equal(one.valid, valid)


def test_other_tensors_take_the_place_of_what_came() -> None:
    one = held()
    one.come(6)
    one.ages = torch.zeros(2, 2, 4, dtype=torch.long)
    assert one.entries == 4
    assert one.valid.shape == (2, 4)
