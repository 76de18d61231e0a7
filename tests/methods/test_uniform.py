"""Uniform: the middle token of every cell of an even lattice, and even spacing where the grid is lost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core import FoveateError, Grid, Signals
from foveate.methods.uniform import Uniform


def kept(method: Uniform, tokens: int, grid: Grid | None = None, **more: Any) -> list[list[int]]:
    seen = Signals(**{"original": tokens, "index": torch.arange(tokens)[None], "grid": grid, **more})
    selection = method.select(seen)
    selection.check(seen.original, seen.shape[0], str(method))
    return [row.tolist() for row in selection.indices]


@pytest.mark.parametrize(
    ("keep", "grid", "wanted"),
    [
        (1, (3, 3), [4]),
        (4, (6, 6), [7, 10, 25, 28]),
        (0.25, (4, 4), [0, 2, 8, 10]),  # all four of a block are as near to its middle; the first stays
        (5, (3, 3), [0, 2, 3, 5, 7]),
        (2, (1, 5), [1, 3]),
        (1.0, (2, 3), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_the_middles_of_the_cells(keep: float, grid: Grid, wanted: list[int]) -> None:
    assert kept(Uniform(keep=keep), grid[0] * grid[1], grid) == [wanted]


def test_a_quarter_of_the_clip_grid_is_every_second_row_and_column() -> None:
    wanted = [row * 24 + column for row in range(0, 24, 2) for column in range(0, 24, 2)]
    assert kept(Uniform(keep=0.25), 576, (24, 24)) == [wanted]


@pytest.mark.parametrize(
    ("keep", "tokens", "wanted"),
    [
        (5, 10, [1, 3, 5, 7, 9]),
        (1, 10, [5]),
        (3, 10, [1, 5, 8]),
        (4, 4, [0, 1, 2, 3]),
        (0.5, 6, [1, 3, 5]),
    ],
)
def test_tokens_without_a_grid_are_spaced_evenly(keep: float, tokens: int, wanted: list[int]) -> None:
    assert kept(Uniform(keep=keep), tokens) == [wanted]


def test_a_later_stage_spaces_what_is_left() -> None:
    left = torch.tensor([[2, 3, 30, 31, 32, 33], [0, 5, 10, 15, 20, 25]])
    assert kept(Uniform(keep=3), 36, index=left) == [[3, 31, 33], [5, 15, 25]]


@given(height=st.integers(1, 9), width=st.integers(1, 9), whole=st.booleans(), data=st.data())
def test_exactly_as_many_as_counted_and_nowhere_a_hole(
    height: int, width: int, whole: bool, data: st.DataObject
) -> None:
    tokens = height * width
    keep = data.draw(st.integers(1, tokens) | st.floats(0, 1, exclude_min=True))
    method = Uniform(keep=keep)
    (row,) = kept(method, tokens, (height, width) if whole else None)
    assert method.count(tokens) == (len(row),)
    if not whole:
        edges = [-1, *row, tokens]
        assert max(later - earlier for earlier, later in pairwise(edges)) <= tokens / len(row) + 1


def test_more_than_is_left_is_refused() -> None:
    with pytest.raises(FoveateError, match="keep=9 asks for 9 tokens but 4 of its 36 tokens are left"):
        kept(Uniform(keep=9), 36, index=torch.tensor([[1, 4, 9, 16]]))
    with pytest.raises(FoveateError, match="keep=False is neither"):
        Uniform(keep=False)
