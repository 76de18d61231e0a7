"""From numbers to indices, by hand and as properties: who stays, who wins a tie, how a budget is shared."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.core import FoveateError
from foveate.ops.subsets import (
    best_and_even,
    cell_centres,
    descending,
    even_order,
    in_classes,
    lattice,
    outlier_counts,
    outliers,
    random_subset,
    split_budget,
    top_k,
    top_k_by_tile,
)

CPU = torch.device("cpu")
# Few values, so that ties are the rule.
TIED = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 2.0])


@st.composite
def score_rows(draw: st.DrawFn, values: st.SearchStrategy[float] = TIED) -> Tensor:
    """(B, N) scores of 1 to 4 images."""
    tokens = draw(st.integers(1, 12))
    rows = st.lists(st.lists(values, min_size=tokens, max_size=tokens), min_size=1, max_size=4)
    return torch.tensor(draw(rows))


def best(row: list[float]) -> list[int]:
    """Positions from the highest to the lowest, the lowest index first among equals."""
    return sorted(range(len(row)), key=lambda place: (-row[place], place))


# ---------------------------------------------------------------------------------------------------------------------
# order


def test_descending_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.5, 0.2], [3.0, 3.0, 3.0, 3.0], [-1.0, 0.0, -0.0, 2.0]])
    assert descending(scores).tolist() == [[1, 2, 3, 0], [0, 1, 2, 3], [3, 1, 2, 0]]


def test_top_k_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.5, 0.2], [3.0, 3.0, 3.0, 3.0]])
    assert top_k(scores, 1).tolist() == [[1], [0]]
    assert top_k(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert top_k(scores, 3).tolist() == [[1, 2, 3], [0, 1, 2]]
    assert top_k(scores, 4).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


@given(scores=score_rows(), data=st.data())
def test_top_k_is_the_head_of_the_stable_order(scores: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, scores.shape[1]))
    kept = top_k(scores, k)
    assert kept.dtype == torch.int64
    assert kept.tolist() == [sorted(best(row)[:k]) for row in scores.tolist()]


@given(scores=score_rows(), data=st.data())
def test_a_row_in_a_batch_keeps_what_it_keeps_alone(scores: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, scores.shape[1]))
    assert top_k(scores, k).tolist() == [top_k(row[None], k)[0].tolist() for row in scores]


@given(data=st.data())
def test_the_order_of_the_tokens_does_not_matter_without_ties(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=12, unique=True))
    scores = torch.tensor([values])
    moved = torch.tensor(data.draw(st.permutations(range(len(values)))))
    k = data.draw(st.integers(1, len(values)))
    assert set(moved[top_k(scores[:, moved], k)[0]].tolist()) == set(top_k(scores, k)[0].tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_scores_of_any_type(dtype: torch.dtype) -> None:
    assert top_k(torch.tensor([[1, 3, 2, 3]], dtype=dtype), 2).tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("row", "bad"),
    [([0.0, math.nan, 1.0, 2.0], 1), ([math.inf, 1.0, -math.inf, 2.0], 2), ([math.nan] * 4, 4)],
)
def test_scores_that_have_no_order_are_refused(row: list[float], bad: int) -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0], row])
    for choose in (descending, lambda scores: top_k(scores, 2)):
        with pytest.raises(FoveateError) as error:
            choose(scores)
        assert str(error.value) == f"{bad} of 8 scores are NaN or infinite; finite scores are needed to choose"


# ---------------------------------------------------------------------------------------------------------------------
# tiles


@pytest.mark.parametrize(
    ("total", "capacity", "shares"),
    [
        (0, [4, 4, 4], [0, 0, 0]),
        (1, [4, 4, 4], [1, 0, 0]),
        (9, [4, 4, 4], [3, 3, 3]),
        (10, [4, 4, 4], [4, 3, 3]),
        (11, [4, 4, 4], [4, 4, 3]),  # the base takes one of the two and is full
        (12, [4, 4, 4], [4, 4, 4]),
        (5, [576] * 5, [1, 1, 1, 1, 1]),
        (8, [576] * 5, [4, 1, 1, 1, 1]),
        (5, [1, 9, 9], [1, 2, 2]),
        (6, [1, 9, 9], [1, 3, 2]),  # the first with room stands in for the full base
        (11, [9, 1, 9], [5, 1, 5]),  # what the small tile cannot take is shared too
        (3, [0, 4, 4], [0, 2, 1]),
        (4, [7], [4]),
    ],
)
def test_split_budget_by_hand(total: int, capacity: list[int], shares: list[int]) -> None:
    assert split_budget(total, capacity) == shares


@given(capacity=st.lists(st.integers(0, 40), min_size=1, max_size=6), share=st.floats(0, 1))
def test_a_budget_is_shared_exactly_and_evenly(capacity: list[int], share: float) -> None:
    total = round(share * sum(capacity))
    given_capacity = list(capacity)
    shares = split_budget(total, capacity)
    assert capacity == given_capacity
    assert sum(shares) == total
    assert all(0 <= one <= most for one, most in zip(shares, capacity, strict=True))
    # Water filled to one level: below its level a tile is full, and above it stands only the remainder.
    level = max(height for height in range(total + 1) if sum(min(height, most) for most in capacity) <= total)
    above = [tile for tile, one in enumerate(shares) if one > level]
    assert all(one >= min(level, most) for one, most in zip(shares, capacity, strict=True))
    assert all(shares[tile] == capacity[tile] for tile in above[:-1])
    assert above == [tile for tile, most in enumerate(capacity) if most > level][: len(above)]


def test_more_than_the_tiles_hold_is_refused() -> None:
    with pytest.raises(FoveateError, match=r"^13 tokens are asked of 3 tiles that hold 12$"):
        split_budget(13, [4, 4, 4])


def test_top_k_by_tile_by_hand() -> None:
    #                       tile 0           tile 1
    scores = torch.tensor([[9.0, 8.0, 7.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 5.0, 5.0, 5.0]])
    tile = torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(2, 6)
    assert [row.tolist() for row in top_k_by_tile(scores, tile, [[3, 3]] * 2, 2)] == [[0, 5], [0, 3]]
    assert [row.tolist() for row in top_k_by_tile(scores, tile, [[3, 3]] * 2, 3)] == [[0, 1, 5], [0, 1, 3]]
    assert [row.tolist() for row in top_k_by_tile(scores, tile, [[3, 3]] * 2, 5)] == [[0, 1, 2, 4, 5], [0, 1, 2, 3, 4]]


@given(scores=score_rows(), data=st.data())
def test_every_tile_keeps_its_best(scores: Tensor, data: st.DataObject) -> None:
    batch, tokens = scores.shape
    numbers = st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens)
    tile = torch.tensor([data.draw(numbers) for _ in range(batch)])
    k = data.draw(st.integers(1, tokens))
    kept = top_k_by_tile(scores, tile, [row.bincount().tolist() for row in tile], k)
    for row, tiles, chosen in zip(scores.tolist(), tile.tolist(), kept, strict=True):
        shares = split_budget(k, [tiles.count(number) for number in range(max(tiles) + 1)])
        wanted = [
            place
            for number, share in enumerate(shares)
            for place in [place for place in best(row) if tiles[place] == number][:share]
        ]
        assert chosen.tolist() == sorted(wanted)
        assert chosen.numel() == k


# ---------------------------------------------------------------------------------------------------------------------
# lattices


@pytest.mark.parametrize(
    ("height", "width", "cells", "picture"),
    [
        (2, 2, 1, "00 00"),
        (2, 2, 4, "01 23"),
        (2, 2, 2, "00 11"),
        (4, 4, 4, "0011 0011 2233 2233"),
        (3, 3, 5, "001 223 444"),
        (3, 3, 9, "012 345 678"),
        (2, 3, 2, "000 111"),
        (1, 5, 2, "00011"),
        (5, 1, 2, "0 0 0 1 1"),
        (2, 4, 3, "0011 2222"),
        (4, 2, 3, "00 00 11 22"),
    ],
)
def test_lattice_by_hand(height: int, width: int, cells: int, picture: str) -> None:
    assert lattice(height, width, cells).tolist() == [int(cell) for cell in picture.replace(" ", "")]


def test_a_quarter_of_the_clip_grid_is_two_by_two_blocks() -> None:
    row, column = torch.arange(24)[:, None], torch.arange(24)
    assert torch.equal(lattice(24, 24, 144), (row // 2 * 12 + column // 2).flatten())
    assert torch.equal(lattice(24, 24, 576), torch.arange(576))


@st.composite
def cut_grids(draw: st.DrawFn) -> tuple[int, int, int]:
    """Height, width and a number of cells."""
    height, width = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    return height, width, draw(st.integers(1, height * width))


@given(cut_grids())
def test_cells_are_rectangles_as_even_as_possible(cut: tuple[int, int, int]) -> None:
    height, width, cells = cut
    cell = lattice(height, width, cells).view(height, width)
    heights, widths = set(), {}
    for number in range(cells):
        rows, columns = (cell == number).nonzero(as_tuple=True)
        tall, wide = (int(axis.max() - axis.min()) + 1 for axis in (rows, columns))
        assert rows.numel() == tall * wide
        heights.add(tall)
        widths.setdefault(int(rows.min()), set()).add(wide)
    assert cell.max() == cells - 1
    assert max(heights) - min(heights) <= 1
    assert all(max(band) - min(band) <= 1 for band in widths.values())
    first = [cell.flatten().tolist().index(number) for number in range(cells)]
    assert first == sorted(first)


@pytest.mark.parametrize("cells", [0, -1, 7])
def test_a_grid_has_no_other_number_of_cells(cells: int) -> None:
    with pytest.raises(FoveateError, match=rf"^a 2 x 3 grid has 1 to 6 cells, not {cells}$"):
        lattice(2, 3, cells)


def test_cell_centres_by_hand() -> None:
    assert cell_centres(lattice(3, 3, 1), (3, 3)).tolist() == [4]
    assert cell_centres(lattice(4, 4, 4), (4, 4)).tolist() == [0, 2, 8, 10]  # all four are as near; the first wins
    assert cell_centres(lattice(3, 3, 5), (3, 3)).tolist() == [0, 2, 3, 5, 7]
    assert cell_centres(lattice(1, 5, 2), (1, 5)).tolist() == [1, 3]
    assert cell_centres(lattice(6, 6, 4), (6, 6)).tolist() == [7, 10, 25, 28]


@given(cut_grids())
def test_a_centre_is_the_token_of_its_cell_nearest_to_the_middle(cut: tuple[int, int, int]) -> None:
    height, width, cells = cut
    cell = lattice(height, width, cells)
    wanted = []
    for number in range(cells):
        places = [divmod(place, width) for place, one in enumerate(cell.tolist()) if one == number]
        row = Fraction(sum(place[0] for place in places), len(places))
        column = Fraction(sum(place[1] for place in places), len(places))
        near = min(places, key=lambda place: ((place[0] - row) ** 2 + (place[1] - column) ** 2, place))
        wanted.append(near[0] * width + near[1])
    assert cell_centres(cell, (height, width)).tolist() == wanted


# ---------------------------------------------------------------------------------------------------------------------
# chance


@given(tokens=st.integers(1, 700), seed=st.integers(0, 10**30), data=st.data())
def test_a_random_subset_is_exact_distinct_and_ascending(tokens: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, tokens))
    state = torch.get_rng_state()
    chosen = random_subset(tokens, k, seed, CPU).tolist()
    assert torch.equal(torch.get_rng_state(), state)
    assert len(chosen) == k
    assert chosen == sorted(set(chosen))
    assert chosen[0] >= 0 and chosen[-1] < tokens
    torch.rand(3)
    assert random_subset(tokens, k, seed, CPU).tolist() == chosen


def test_seeds_and_sizes_draw_differently() -> None:
    draws = {tuple(random_subset(576, 64, seed, CPU).tolist()) for seed in range(50)}
    assert len(draws) == 50
    assert random_subset(576, 64, 0, CPU).tolist() != random_subset(577, 64, 0, CPU).tolist()


def test_every_token_is_drawn_about_as_often() -> None:
    seeds, tokens, k = 2000, 40, 10
    drawn = torch.stack([random_subset(tokens, k, seed, CPU) for seed in range(seeds)]).flatten()
    count = torch.bincount(drawn, minlength=tokens).double()
    expected, variance = seeds * k / tokens, seeds * (k / tokens) * (1 - k / tokens)
    assert (count - expected).abs().max() < 4.5 * math.sqrt(variance)


# ---------------------------------------------------------------------------------------------------------------------
# outliers


def counted(scores: torch.Tensor, together: bool = False) -> list[int]:
    return outlier_counts(outliers(scores, together), (len(scores), scores.shape[1]))


def test_outliers_lie_above_the_upper_fence() -> None:
    """Quartiles of 0 1 2 3 x are 1 and 3, the fence is 6 and does not count itself."""
    assert counted(torch.tensor([[3.0, 6, 0, 2, 1], [3, 6.01, 0, 2, 1], [7, 7, 7, 7, 7]])) == [0, 1, 0]
    assert counted(torch.tensor([[4.0]])) == [0]


def test_quartiles_are_interpolated() -> None:
    """Of 0 2 4 x they are 1.5 and 3 + x / 4, the fence 5.25 + 0.625 x, which x passes at 14."""
    assert counted(torch.tensor([[0.0, 2, 4, 13.9], [0, 2, 4, 14.1]])) == [0, 1]
    # Of 0 0 0 0 2 4 10 x they are 0 and 5.5, the fence 13.75.
    assert counted(torch.tensor([[0.0, 2, 4, 10, 13.7, 0, 0, 0], [0, 2, 4, 10, 13.8, 0, 0, 0]])) == [0, 1]


def test_one_fence_for_all_rows_couples_them() -> None:
    """Of both rows together 3 of 16 lie out, which makes int(8 * 3 / 16) in each, though all of them are in one."""
    scores = torch.zeros(2, 8)
    scores[0, :3] = 5.0
    assert counted(scores) == [0, 0], "alone, three of eight are the quarter that sets the fence"
    assert counted(scores, together=True) == [1, 1]
    assert counted(scores[:1], together=True) == [0]


@given(tokens=st.integers(1, 60), seed=st.integers(0, 1000))
def test_never_more_than_a_quarter_are_outliers(tokens: int, seed: int) -> None:
    scores = torch.randn(3, tokens, generator=torch.Generator().manual_seed(seed)).exp().softmax(dim=-1)
    for count, row in zip(counted(scores), scores.double(), strict=True):
        assert 0 <= count <= tokens / 4
        low, high = row.quantile(0.25), row.quantile(0.75)
        above = row - (high + 1.5 * (high - low))
        assert (above > 1e-6).sum() <= count <= (above > -1e-6).sum()


def test_an_even_order_of_a_line_halves_what_is_left_open() -> None:
    order = even_order(1, 9).argsort().tolist()
    assert {order[1], order[2]} <= {0, 8} or order[0] in {0, 8}, "the ends are farthest from anything inside"
    assert sorted(order) == list(range(9))


@pytest.mark.parametrize(("height", "width"), [(24, 24), (7, 11), (1, 30)])
@pytest.mark.parametrize("share", [0.06, 0.25, 0.6])
def test_every_beginning_of_an_even_order_covers_the_grid_better_than_most_draws(
    height: int, width: int, share: float
) -> None:
    """The largest distance from any token to the nearest chosen one, which a farthest-first order keeps small."""
    tokens = height * width
    places = torch.stack([torch.arange(tokens) // width, torch.arange(tokens) % width], dim=1).float()
    apart = torch.cdist(places, places)
    count = max(2, round(share * tokens))
    chosen = even_order(height, width) < count
    drawn = [apart[:, random_subset(tokens, count, seed, places.device)].amin(dim=1).amax() for seed in range(9)]
    reached = apart[:, chosen].amin(dim=1).amax()
    assert reached < sorted(drawn)[4]
    closest = apart[chosen][:, chosen].fill_diagonal_(torch.inf).min()
    assert reached <= closest, "no token is farther from all chosen ones than these are from each other"


def test_of_scores_in_classes_only_the_side_of_each_border_counts() -> None:
    scores = torch.tensor([[2.5, 9.0, -1.0, 0.0, -7.0, 2.0]])
    rank = torch.tensor([[5, 0, 4, 1, 2, 3]])
    made = in_classes(scores, (-2.0, 2.0), rank)
    assert made.argsort(descending=True).tolist() == [[1, 0, 3, 5, 2, 4]], "two above both, three between, one below"
    with pytest.raises(FoveateError, match="1 of 6 scores are NaN or infinite"):
        in_classes(scores.masked_fill(scores == 9.0, float("nan")), (-2.0, 2.0), rank)


def test_the_best_stay_and_the_rest_come_in_even_order() -> None:
    scores = torch.tensor([[5.0, 1, 9, 0, 2, 3], [5.0, 1, 9, 0, 2, 3], [5.0, 1, 9, 0, 2, 3]])
    rank = torch.tensor([[3, 1, 0, 5, 2, 4]] * 3)
    chosen = best_and_even(scores, rank, 4, [0, 2, 4])
    assert chosen.tolist() == [[0, 2, 4, 5], [0, 1, 2, 4], [0, 1, 2, 4]]
