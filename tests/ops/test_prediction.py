"""Tokens that their neighbours predict, by hand and against a loop that follows the paper token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import predicted
from torch import Tensor

from foveate.ops.prediction import _on_device, unpredicted
from foveate.ops.repeats import Metric


def raster(*rows: str) -> tuple[Tensor, tuple[int, int]]:
    """One value a token, a digit each; in tenths."""
    values = torch.tensor([[float(digit) / 10 for digit in row] for row in rows])
    return values.flatten()[None, :, None], (len(rows), len(rows[0]))


def kept(*rows: str, threshold: float = 0.0, anchored: bool = True) -> list[str]:
    pixels, grid = raster(*rows)
    stays = unpredicted(pixels, grid, threshold, "max", anchored)[0].view(grid)
    return ["".join("x" if one else "." for one in row) for row in stays.tolist()]


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


def drawn(frames: int, grid: tuple[int, int], seed: int, wide: bool) -> Tensor:
    """(F, N, P) of eighths, so that distances are often the threshold to the bit; tokens and frames repeat.

    A wide token holds its four values many times, and now and then one that differs.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1]
    pixels = torch.randint(0, 4, (frames, tokens, 4), generator=generator).float() / 8
    if wide:
        pixels = pixels.repeat(1, 1, 75)
    repeats = torch.rand(frames, tokens, 1, generator=generator) < 0.6
    pixels[:, 1:] = pixels[:, :-1].where(repeats[:, 1:], pixels[:, 1:])
    stands = torch.rand(frames, tokens, 1, generator=generator) < 0.7
    for frame in range(1, frames):
        pixels[frame] = pixels[frame - 1].where(stands[frame], pixels[frame])
    where = torch.randint(0, pixels.shape[2], (frames, tokens, 1), generator=generator)
    differ = torch.rand(frames, tokens, 1, generator=generator) < 0.3
    return pixels.scatter_add(2, where, differ.float() / 8)


@given(
    frames=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 10_000),
    metric=st.sampled_from(["max", "mae", "rmse"]),
    threshold=st.sampled_from([0.0, 0.0625, 0.125, 0.25]),
    anchored=st.booleans(),
    wide=st.booleans(),
)
def test_pictures_and_videos_with_edges_and_slopes(
    frames: int, grid: tuple[int, int], seed: int, metric: Metric, threshold: float, anchored: bool, wide: bool
) -> None:
    pixels = drawn(frames, grid, seed, wide)
    apart = [predicted.one_by_one(image, grid, threshold, metric, anchored)[0] for image in pixels]
    assert unpredicted(pixels, grid, threshold, metric, anchored).tolist() == apart
    in_time = predicted.of_video(pixels, grid, threshold, metric, anchored)
    assert unpredicted(pixels, grid, threshold, metric, anchored, frames=True).tolist() == in_time


@given(frames=st.integers(1, 3), grid=st.tuples(st.integers(1, 6), st.integers(1, 6)), seed=st.integers(0, 10_000))
def test_a_device_compares_what_a_host_compares(frames: int, grid: tuple[int, int], seed: int) -> None:
    """All at once where they are, instead of a few values first."""
    pixels = drawn(frames, grid, seed, wide=True)
    for threshold in (0.0, 0.125):
        for in_time in (False, True):
            host = unpredicted(pixels, grid, threshold, "max", False, in_time)
            assert torch.equal(_on_device(pixels, grid, threshold, "max", in_time), host)


def test_slopes_as_large_as_pages() -> None:
    """Beyond what is compared at a time; most tokens are like others without being equal."""
    ramp = torch.linspace(0, 1, 40)[None, :, None] * torch.linspace(0.5, 1, 30)[:, None, None]
    pixels = (ramp + torch.zeros(300)).flatten(0, 1)[None].repeat(2, 1, 1)
    pixels[1, ::7, 5] += 0.01
    for metric in ("max", "mae"):
        expected = predicted.of_video(pixels, (30, 40), 0.1, metric, True)
        assert unpredicted(pixels, (30, 40), 0.1, metric, True, frames=True).tolist() == expected  # type: ignore[arg-type]


def test_zeros_of_both_signs_are_equal() -> None:
    pixels = torch.zeros(1, 4, 300)
    pixels[0, 1, 7] = -0.0
    pixels[0, 3, 7] = 1e-30
    assert unpredicted(pixels, (1, 4), 0.0).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    pixels = torch.zeros(1, 3, 300, dtype=dtype)
    pixels[0, 2, 1] = 0.5
    assert unpredicted(pixels, (1, 3), 0.0).tolist() == [[True, False, True]]
    assert unpredicted(pixels, (1, 3), 0.5).tolist() == [[True, False, False]]


def test_what_stands_still_is_foretold_by_the_frame_before() -> None:
    """By hand: two by three tokens. A digit that changes is unforeseen, and what stands around it is not."""
    pixels = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 6], [1, 2, 3, 4, 9, 6]]).float()[..., None]
    stays = unpredicted(pixels, (2, 3), 0.0, frames=True)
    assert stays[0].all()
    # The first of a frame always stays. Behind the digit that changed, the next is foretold by the one to its left.
    assert stays[1].tolist() == [True, False, False, False, True, True]
    assert stays[2].tolist() == [True, False, False, False, False, False]
    assert unpredicted(pixels, (2, 3), 0.0).all(), "by themselves all differ"


@given(grid=st.tuples(st.integers(1, 6), st.integers(1, 6)), seed=st.integers(0, 1000), frames=st.integers(1, 3))
def test_what_is_dropped_can_be_drawn_again(grid: tuple[int, int], seed: int, frames: int) -> None:
    """At threshold 0 the kept tokens and the rule give picture and video back, to the bit."""
    height, width = grid
    pixels = drawn(frames, grid, seed, wide=False)
    stays = unpredicted(pixels, grid, 0.0, frames=True).view(frames, height, width)
    whole = pixels.view(frames, height, width, -1).where(stays[..., None], torch.nan)
    for frame, image in enumerate(whole):
        past = whole[frame - 1] if frame else None
        for y in range(height):
            for x in range(width):
                if stays[frame, y, x]:
                    continue
                guess = image[y, x - 1] if x else image[y - 1, 0]
                above = x and y and torch.equal(image[y - 1, x - 1], guess)
                if above and not torch.equal(image[y - 1, x - 1], image[y - 1, x]):
                    guess = image[y - 1, x]
                beside = [(y, x - 1)] * (x > 0) + [(y - 1, x)] * (y > 0)
                if past is not None and all(torch.equal(image[place], past[place]) for place in beside):
                    guess = past[y, x]
                image[y, x] = guess
    assert torch.equal(whole.view(pixels.shape), pixels)
