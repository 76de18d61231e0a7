"""Rasters cut into windows, and the tokens that the windows give in turn: by hand and against a plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core import FoveateError
from foveate.ops.windows import best_of_windows, windows


def test_a_raster_that_divides() -> None:
    cut = windows((24, 24), 4).reshape(24, 24)
    for row in range(4):
        for column in range(4):
            of_window = cut[6 * row : 6 * row + 6, 6 * column : 6 * column + 6]
            assert (of_window == 4 * row + column).all()


def test_a_raster_that_does_not_divide() -> None:
    assert windows((3, 5), 2).reshape(3, 5).tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [2, 2, 2, 3, 3]]


def test_a_raster_of_few_rows_has_as_many_windows_downwards() -> None:
    assert windows((1, 6), 4).tolist() == [0, 0, 1, 2, 2, 3]
    assert windows((2, 2), 4).tolist() == [0, 1, 2, 3]


@given(height=st.integers(1, 30), width=st.integers(1, 30), side=st.integers(1, 6))
def test_every_window_has_tokens_and_about_as_many_rows(height: int, width: int, side: int) -> None:
    cut = windows((height, width), side)
    assert sorted(cut.unique().tolist()) == list(range(min(side, height) * min(side, width)))
    rows = cut.reshape(height, width)[:, 0].bincount()
    tall = rows[rows > 0]
    assert tall.max() - tall.min() <= 1


def test_the_windows_give_their_best_in_turn() -> None:
    """Windows of 2 x 2: [9 8 / 7 6], [1 2 / 3 0], [5 5 / 5 5], [4 0 / 0 0], as they stand in the raster."""
    scores = torch.tensor([[9.0, 8, 1, 2, 7, 6, 3, 0, 5, 5, 4, 0, 5, 5, 0, 0]])
    chosen = best_of_windows(scores, (4, 4), 2, 16)[0].tolist()
    assert chosen[:4] == [0, 8, 10, 6], "the best of each: 9, 5 (the first of four), 4 and 3"
    assert chosen[4:8] == [1, 9, 3, 11], "8, 5, 2 and 0, again the first of three"
    assert sorted(chosen) == list(range(16))
    assert best_of_windows(scores, (4, 4), 2, 6)[0].tolist() == chosen[:6]
    assert best_of_windows(scores, (4, 4), 2, 0).shape == (1, 0)


@given(
    height=st.integers(1, 7), width=st.integers(1, 7), side=st.integers(1, 4), seed=st.integers(0, 99), data=st.data()
)
def test_as_a_plain_loop_would(height: int, width: int, side: int, seed: int, data: st.DataObject) -> None:
    tokens = height * width
    count = data.draw(st.integers(0, tokens))
    scores = torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    cut = windows((height, width), side).tolist()
    got = best_of_windows(scores, (height, width), side, count).tolist()
    for row, values in zip(got, scores.tolist(), strict=True):
        waiting: dict[int, list[int]] = {}
        for token in sorted(range(tokens), key=lambda token: (-values[token], token)):
            waiting.setdefault(cut[token], []).append(token)
        expected: list[int] = []
        while any(waiting.values()):
            turn = [queue.pop(0) for queue in waiting.values() if queue]
            expected += sorted(turn, key=lambda token: (-values[token], token))
        assert row == expected[:count]


def test_scores_without_an_order_are_refused() -> None:
    with pytest.raises(FoveateError, match="1 of 4 scores are NaN or infinite"):
        best_of_windows(torch.tensor([[0.0, float("nan"), 1.0, 2.0]]), (2, 2), 2, 2)
