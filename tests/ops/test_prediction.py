"""Tokens that their neighbours predict, by hand and against a loop that follows the paper token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops.prediction import unpredicted


def raster(*rows: str) -> tuple[Tensor, tuple[int, int]]:
    """One value a token, a digit each; in tenths."""
    values = torch.tensor([[float(digit) / 10 for digit in row] for row in rows])
    return values.flatten()[None, :, None], (len(rows), len(rows[0]))


def kept(*rows: str, threshold: float = 0.0, anchored: bool = True) -> list[str]:
    pixels, grid = raster(*rows)
    stays = unpredicted(pixels, grid, threshold, "max", anchored)[0].view(grid)
    return ["".join("x" if one else "." for one in row) for row in stays.tolist()]


def distance(left: Tensor, right: Tensor, metric: str) -> float:
    difference = (left - right).abs()
    if metric == "max":
        return float(difference.max())
    return float(difference.mean() if metric == "mae" else difference.square().mean().sqrt())


def one_by_one(image: Tensor, grid: tuple[int, int], threshold: float, metric: str, anchored: bool) -> list[bool]:
    """(N, P) of one picture."""
    height, width = grid
    values = image.clone().view(height, width, -1)
    stays = []
    for y in range(height):
        for x in range(width):
            own = image.view(height, width, -1)[y, x]
            if y == x == 0:
                stays.append(True)
                continue
            guess = values[y, x - 1] if x else values[y - 1, 0]
            if x and y:
                corner = values[y - 1, x - 1]
                same_left = distance(corner, guess, metric) <= threshold
                if same_left and not distance(corner, values[y - 1, x], metric) <= threshold:
                    guess = values[y - 1, x]
            stays.append(not distance(own, guess, metric) <= threshold)
            if anchored and not stays[-1]:
                values[y, x] = guess
    return stays


def test_a_plain_page_keeps_its_first_token() -> None:
    assert kept("999", "999") == ["x..", "..."]


def test_a_box_keeps_its_corners() -> None:
    """Below a corner the edge is followed downwards, so that only where it turns something is unforeseen."""
    assert kept("99999", "91199", "91199", "99999") == ["x....", ".x.x.", ".....", ".x..."]


def test_the_first_column_is_foretold_from_above() -> None:
    assert kept("1", "1", "2") == ["x", ".", "x"]


def test_small_steps_add_up_unless_they_are_anchored() -> None:
    assert kept("12345", threshold=0.11) == ["x.x.x"]
    assert kept("12345", threshold=0.11, anchored=False) == ["x...."]


def test_a_token_at_the_threshold_is_the_same() -> None:
    pixels = torch.tensor([[[0.25], [0.5], [0.875]]])
    assert unpredicted(pixels, (1, 3), 0.25).tolist() == [[True, False, True]]


@pytest.mark.parametrize(("metric", "apart"), [("max", 0.5), ("mae", 0.125), ("rmse", 0.25)])
def test_each_metric(metric: str, apart: float) -> None:
    pixels = torch.zeros(1, 2, 4)
    pixels[0, 1, 2] = 0.5
    assert unpredicted(pixels, (1, 2), apart, metric).tolist() == [[True, False]]  # type: ignore[arg-type]
    assert unpredicted(pixels, (1, 2), apart - 0.01, metric).tolist() == [[True, True]]  # type: ignore[arg-type]


@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 10_000),
    metric=st.sampled_from(["max", "mae", "rmse"]),
    threshold=st.sampled_from([0.0, 0.0625, 0.125, 0.25]),
    anchored=st.booleans(),
)
def test_pictures_with_edges_and_slopes(
    grid: tuple[int, int], seed: int, metric: str, threshold: float, anchored: bool
) -> None:
    """Eighths, so that distances are often the threshold to the bit."""
    generator = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1]
    pixels = torch.randint(0, 4, (2, tokens, 4), generator=generator).float() / 8
    repeats = torch.rand(2, tokens, 1, generator=generator) < 0.6
    pixels[:, 1:] = pixels[:, :-1].where(repeats[:, 1:], pixels[:, 1:])
    expected = [one_by_one(image, grid, threshold, metric, anchored) for image in pixels]
    assert unpredicted(pixels, grid, threshold, metric, anchored).tolist() == expected  # type: ignore[arg-type]


@given(grid=st.tuples(st.integers(1, 6), st.integers(1, 6)), seed=st.integers(0, 1000))
def test_what_is_dropped_can_be_drawn_again(grid: tuple[int, int], seed: int) -> None:
    """At threshold 0 the kept tokens and the rule give the picture back, to the bit."""
    height, width = grid
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 2, (1, height * width, 3), generator=generator).float()
    stays = unpredicted(pixels, grid, 0.0)[0].view(grid)
    drawn = pixels[0].view(height, width, 3).where(stays[..., None], torch.nan)
    for y in range(height):
        for x in range(width):
            if not stays[y, x]:
                guess = drawn[y, x - 1] if x else drawn[y - 1, 0]
                above = x and y and torch.equal(drawn[y - 1, x - 1], guess)
                if above and not torch.equal(drawn[y - 1, x - 1], drawn[y - 1, x]):
                    guess = drawn[y - 1, x]
                drawn[y, x] = guess
    assert torch.equal(drawn.view(-1, 3), pixels[0])
