"""Random: exact counts, one draw per seed and size, and the same for an image in a batch as alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core import FoveateError, Signals
from foveate.methods.random import Random


def draw(method: Random, tokens: int = 36, batch: int = 1, **more: Any) -> list[list[int]]:
    seen = Signals(**{"original": tokens, "index": torch.arange(tokens).expand(batch, tokens), **more})
    selection = method.select(seen)
    selection.check(seen.original, seen.shape[0], str(method))
    return [row.tolist() for row in selection.indices]


@given(tokens=st.integers(1, 100), seed=st.integers(0, 10**20), data=st.data())
def test_exactly_as_many_as_counted(tokens: int, seed: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, tokens) | st.floats(0, 1, exclude_min=True))
    method = Random(keep=keep, seed=seed)
    (row,) = draw(method, tokens)
    assert method.count(tokens) == (len(row),)


def test_every_image_keeps_what_it_keeps_alone() -> None:
    (alone,) = draw(Random(keep=9))
    assert draw(Random(keep=9), batch=3) == [alone] * 3


def test_the_draw_depends_on_the_seed_and_on_nothing_else() -> None:
    first = draw(Random(keep=9, seed=1))
    torch.manual_seed(77)
    torch.rand(5)
    assert draw(Random(keep=9, seed=1)) == first
    assert draw(Random(keep=9, seed=2)) != first
    assert len({tuple(draw(Random(keep=9, seed=seed))[0]) for seed in range(30)}) == 30


def test_a_later_stage_draws_from_what_is_left() -> None:
    left = torch.tensor([[1, 4, 9, 16], [3, 5, 7, 35]])
    first, second = draw(Random(keep=2), original=36, index=left)
    assert len(first) == 2 and set(first) <= {1, 4, 9, 16}
    assert [left[0].tolist().index(one) for one in first] == [left[1].tolist().index(one) for one in second]


def test_everything_can_be_kept() -> None:
    assert draw(Random(keep=1.0), 5) == draw(Random(keep=5), 5) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "seed=-1 is negative; the smallest is seed=0"),
        ({"seed": 1.5}, "seed=1.5 is no whole number; the smallest is seed=0"),
        ({"seed": True}, "seed=True is no whole number; the smallest is seed=0"),
        ({"seed": None}, "seed=None is no whole number; the smallest is seed=0"),
        ({"keep": 2.0}, "keep=2.0 is no share in (0, 1]; the nearest is keep=1.0; write 2 without a point for tokens"),
    ],
)
def test_a_wrong_field_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError) as error:
        Random(**settings)
    assert str(error.value) == message


def test_more_than_is_left_is_refused() -> None:
    with pytest.raises(FoveateError, match="keep=9 asks for 9 tokens but 4 of its 36 tokens are left"):
        draw(Random(keep=9), original=36, index=torch.tensor([[1, 4, 9, 16]]))
