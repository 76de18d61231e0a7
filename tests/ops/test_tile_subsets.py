"""Budgets and choices over the tiles of an image: by hand, exact sums, and each tile by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.core import FoveateError
from foveate.ops.subsets import (
    best_of_tiles,
    descending,
    each_tile,
    split_budget,
    split_by_size,
    split_in_proportion,
    top_k_by_tile,
)


def test_the_best_of_each_tile_by_hand() -> None:
    order = torch.tensor([4, 1, 0, 3, 2, 5])
    tile = torch.tensor([0, 0, 1, 1, 2, 2])
    assert best_of_tiles(order, tile, [2, 2, 2], [1, 2, 0]).tolist() == [1, 3, 2]
    assert best_of_tiles(order, tile, [2, 2, 2], [0, 1, 1]).tolist() == [4, 3]
    assert best_of_tiles(order, tile, [2, 2, 2], [2, 2, 2]).tolist() == order.tolist()
    assert best_of_tiles(order, tile // 2 * 2, [4, 0, 2], [2, 0, 1]).tolist() == [4, 1, 0]


# ---------------------------------------------------------------------------------------------------------------------
# in proportion


@pytest.mark.parametrize(
    ("total", "weights", "capacity", "shares"),
    [
        (10, [1.0, 1.0], [9, 9], [5, 5]),
        (10, [3.0, 1.0], [9, 9], [8, 2]),  # 7.5 and 2.5: the lowest place takes the remainder
        (7, [1.0, 1.0, 1.0], [9, 9, 9], [3, 2, 2]),
        (5, [1.0, 2.0, 3.0], [9, 9, 9], [1, 2, 2]),  # 0.83, 1.67, 2.5: largest remainders first
        (10, [3.0, 1.0], [4, 9], [4, 6]),  # 7.5 do not fit; what is over goes to the other
        (9, [8.0, 1.0, 1.0], [3, 9, 9], [3, 3, 3]),
        (3, [0.0, 0.0, 0.0], [9, 9, 9], [1, 1, 1]),
        (4, [1.0, 0.0], [2, 9], [2, 2]),
        (3, [-1.0, 1.0], [9, 9], [0, 3]),
        (0, [1.0, 1.0], [1, 1], [0, 0]),
        (0, [], [], []),
    ],
)
def test_shares_in_proportion_by_hand(total: int, weights: list[float], capacity: list[int], shares: list[int]) -> None:
    assert split_in_proportion(total, weights, capacity) == shares


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(FoveateError, match="8 tokens are asked of 2 tiles that hold 7"):
        split_in_proportion(8, [1.0, 1.0], [3, 4])


@given(data=st.data())
def test_shares_in_proportion_always_add_up(data: st.DataObject) -> None:
    capacity = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    number = len(capacity)
    weights = data.draw(st.lists(st.floats(0, 1e6) | st.just(0.0), min_size=number, max_size=number))
    total = data.draw(st.integers(0, sum(capacity)))
    shares = split_in_proportion(total, weights, capacity)
    assert sum(shares) == total
    assert all(0 <= share <= most for share, most in zip(shares, capacity, strict=True))
    roomy = split_in_proportion(total, weights, [total] * number)
    if sum(weights):
        exact = [total * weight / sum(weights) for weight in weights]
        assert all(abs(share - fair) < 1 + 1e-9 for share, fair in zip(roomy, exact, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# each tile


@st.composite
def tiled(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(B, N) scores and tile numbers, tiles in any order and of any size."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    size = batch * tokens
    tile = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))).view(batch, tokens)
    scores = torch.tensor(draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))).view(batch, tokens)
    return scores.float(), tile


@given(shown=tiled(), data=st.data())
def test_choosing_by_score_in_each_tile_is_the_top_k_by_tile(shown: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    scores, tile = shown
    kept = data.draw(st.integers(1, scores.shape[1]))

    def choose(images: Tensor, positions: Tensor, count: int) -> Tensor:
        assert images.shape == positions.shape[:1]
        assert 1 <= count <= positions.shape[1]
        assert (positions[:, 1:] > positions[:, :-1]).all()
        numbers = tile[images[:, None], positions]
        assert (numbers == numbers[:, :1]).all(), "one tile at a time"
        return descending(scores[images[:, None], positions])[:, :count]

    counts = [row.bincount().tolist() for row in tile]
    chosen = each_tile(tile, counts, kept, choose)
    expected = top_k_by_tile(scores, tile, counts, kept)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(chosen, expected, strict=True))
    for row, tiles in zip(chosen, tile, strict=True):
        sizes = torch.bincount(tiles).tolist()
        assert torch.bincount(tiles[row], minlength=len(sizes)).tolist() == split_budget(kept, sizes)


def test_tiles_of_one_size_and_share_are_asked_about_together() -> None:
    tile = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 2)
    asked = []

    def choose(images: Tensor, positions: Tensor, count: int) -> Tensor:
        asked.append((images.tolist(), positions[:, 0].tolist(), count))
        return torch.zeros(len(images), count, dtype=torch.int64) + torch.arange(count)

    chosen = each_tile(tile, [[3, 3, 3]] * 2, 7, choose)
    assert asked == [([0, 1], [0, 0], 3), ([0, 0, 1, 1], [3, 6, 3, 6], 2)]
    assert [row.tolist() for row in chosen] == [[0, 1, 2, 3, 4, 6, 7]] * 2


# ---------------------------------------------------------------------------------------------------------------------
# by size


@pytest.mark.parametrize(
    ("total", "sizes", "least", "shares"),
    [
        (3, [4, 2, 2], 1, [1, 1, 1]),
        (4, [4, 2, 2], 1, [2, 1, 1]),
        (5, [4, 2, 2], 1, [3, 1, 1]),  # 4/2, 2/1 and 2/1 are equally high: the lowest place
        (6, [4, 2, 2], 1, [3, 2, 1]),  # 4/3, 2/1, 2/1
        (7, [4, 2, 2], 1, [3, 2, 2]),
        (8, [4, 2, 2], 1, [4, 2, 2]),
        (6, [16, 1, 16], 2, [3, 1, 2]),
        (9, [9], 1, [9]),
    ],
)
def test_shares_by_size_by_hand(total: int, sizes: list[int], least: int, shares: list[int]) -> None:
    assert split_by_size(total, sizes, least) == shares


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.data())
def test_shares_by_size_add_up_and_never_fall_with_the_total(sizes: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(len(sizes), sum(sizes)))
    shares = split_by_size(total, sizes)
    assert sum(shares) == total
    assert all(1 <= share <= size for share, size in zip(shares, sizes, strict=True))
    if total < sum(sizes):
        more = split_by_size(total + 1, sizes)
        assert all(later >= earlier for later, earlier in zip(more, shares, strict=True))
    # A tile of more tokens has no fewer, and equal ones differ by one at most.
    for one, size in zip(shares, sizes, strict=True):
        for other, other_size in zip(shares, sizes, strict=True):
            assert size < other_size or one >= other - (size == other_size)
