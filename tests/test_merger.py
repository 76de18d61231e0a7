"""Merger: what one number per block, a budget, and an encoder's blocks make of each other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core import FoveateError, Selection, Signals
from foveate.forms import Merger


@dataclass(frozen=True)
class Plain(Merger):
    """Plain: nothing of its own."""


@dataclass(frozen=True)
class Beside(Merger):
    """Beside: with one token that joins the patches."""

    beside: ClassVar[int] = 1


@pytest.mark.parametrize(
    ("method", "tokens", "blocks", "merges"),
    [
        (Plain(keep=144), 576, 24, (18,) * 24),
        (Plain(keep=144), 576, 23, (19,) * 22 + (14,)),
        (Plain(keep=16), 576, 23, (25,) * 22 + (10,)),
        (Plain(keep=0.25), 576, 24, (18,) * 24),
        (Plain(keep=1.0), 576, 3, (0, 0, 0)),
        (Plain(keep=3), 8, 2, (3, 2)),
        (Plain(keep=2), 9, 3, (3, 3, 1)),
        (Plain(keep=2), 8, 2, (4, 2)),  # 3 and 3 would be more than half of 5
        (Plain(keep=1), 1, 2, (0, 0)),
        (Plain(r=13), 576, 23, (13,) * 23),
        (Plain(r=4), 9, 3, (4, 2, 1)),
        (Plain(r=(2, 9)), 9, 4, (2, 3, 0, 0)),
        (Beside(keep=278), 576, 23, (13,) * 23),
        (Beside(keep=9), 36, 3, (10, 10, 8)),
        (Beside(keep=36), 36, 3, (0, 0, 0)),
        (Beside(keep=35), 36, 3, (1, 1, 0)),
    ],
    ids=str,
)
def test_schedules(method: Merger, tokens: int, blocks: int, merges: tuple[int, ...]) -> None:
    assert method.schedule(tokens, blocks) == merges


@given(tokens=st.integers(1, 700), blocks=st.integers(1, 30), data=st.data(), kind=st.sampled_from([Plain, Beside]))
def test_a_schedule_gets_there_or_says_what_does(tokens: int, blocks: int, data: Any, kind: type[Merger]) -> None:
    keep = data.draw(st.integers(1, tokens))
    method = kind(keep=keep)
    try:
        merges = method.schedule(tokens, blocks)
    except FoveateError as error:
        least = int(str(error).rpartition("the least is keep=")[2])
        assert least > keep
        if "leaves no patch" in str(error):
            assert (kind, keep, least) == (Beside, 1, 2)
        else:
            assert sum(kind(keep=least).schedule(tokens, blocks)) > 0
        return
    left = tokens
    for merged in merges:
        assert 0 <= merged <= left // 2
        left -= merged
    assert left + (kind.beside if left < tokens else 0) == keep == method.count(tokens)[0]  # type: ignore[index]
    assert all(earlier >= later for earlier, later in pairwise(merges))


def test_counts() -> None:
    assert Plain(keep=0.5).count(9) == (4,)
    assert Plain(r=3).count(36) is None and Plain(r=3).adaptive
    assert Plain(r=(3, 2)).count(36) == (31,) and not Plain(r=(3, 2)).adaptive
    assert Beside(r=(3, 2)).count(36) == (32,)
    assert Beside(r=(0, 0)).count(36) == (36,)
    assert Plain(r=(30, 30)).count(36) == (9,), "no block merges more than half"
    assert Plain(r=(3, 2)).count(36, None, 3) is None, "each tile merges as many, and how many it has is not known"
    assert Plain(keep=9).count(36, None, 3) == (9,)
    assert not Plain(keep=3).adaptive
    with pytest.raises(FoveateError, match="the most is keep=36"):
        Plain(keep=37).count(36)


def test_depths_are_all_blocks() -> None:
    assert Plain(keep=3).depths(4) == (0, 1, 2, 3)
    assert Plain(r=(1, 2)).depths(2) == (0, 1)
    with pytest.raises(FoveateError, match=r"Plain: r names 2 blocks; 1 run up to the one .* so the most is 1"):
        Plain(r=(1, 2)).depths(1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "keep=None and r=None; give one of them"),
        ({"keep": 3, "r": 3}, "keep=3 and r=3; give one of them"),
        ({"keep": 0}, "below 1 token"),
        ({"keep": 1.5}, "no share"),
        ({"r": -1}, "r=-1 is no number of patches from 0; the smallest is r=0"),
        ({"r": (1, True)}, "r=True is no number of patches"),
        ({"r": (1, 2.0)}, r"r=2\.0 is no number of patches"),
    ],
)
def test_fields_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        Plain(**fields)


def at(left: int, stage: int, stages: int = 3, original: int = 36) -> Signals:
    return Signals(original=original, index=torch.arange(left)[None], stage=stage, stages=stages)


def test_the_block_at_hand() -> None:
    method = Plain(keep=20)
    assert [method.merges(at(left, stage)) for left, stage in ((36, 0), (30, 1), (24, 2))] == [6, 6, 4]
    # Another method has dropped some: what is left is planned anew.
    assert [method.merges(at(left, stage)) for left, stage in ((29, 1), (24, 2), (23, 2))] == [5, 4, 3]
    assert method.merges(at(20, 1)) == 0
    assert [Plain(r=9).merges(at(left, 1)) for left in (36, 7)] == [9, 3]
    assert [Plain(r=(1, 9)).merges(at(36, stage)) for stage in range(3)] == [1, 9, 0]
    # A budget that only became reachable because tokens were dropped.
    assert Plain(keep=2).merges(at(4, 2)) == 2
    with pytest.raises(FoveateError, match=r"1 blocks .* reach 3 to 5; the least is keep=3"):
        Plain(keep=2).merges(at(5, 2))


def test_an_extra_token_joins_wherever_patches_have_left() -> None:
    assert Beside(keep=7).merges(at(7, 2)) == 1
    assert Beside(keep=36).merges(at(36, 2)) == 0


def test_there_is_no_companion_unless_a_method_has_one() -> None:
    assert Plain(keep=3).companion(0, torch.zeros(1, 2), None) is None


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        (torch.tensor([0, 1, -1, 1]), None),
        (torch.tensor([0, 2]), r"group 2 is outside -1\.\.1"),
        (torch.tensor([0, -2]), r"group -2 is outside -1\.\.1"),
        (torch.tensor([0.0, 1.0]), r"groups are torch\.float32 of shape \(2,\); they must be torch\.int64"),
        (torch.tensor([[0, 1]]), r"groups are torch\.int64 of shape \(1, 2\)"),
    ],
)
def test_groups_are_checked(groups: torch.Tensor, problem: str | None) -> None:
    selection = Selection([torch.tensor([3, 5])], groups=[groups])
    if problem is None:
        selection.check(6, 1, "it")
        return
    with pytest.raises(FoveateError, match=f"it, image 0: {problem}"):
        selection.check(6, 1, "it")
    with pytest.raises(FoveateError, match="it gave groups for 2 images but was asked for 1"):
        dataclasses.replace(selection, groups=[groups] * 2).check(6, 1, "it")
