"""Who leaves because others are alike, and who stands beside whom in a raster: by hand and against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops import subsets
from foveate.ops.subsets import grid_neighbours, least_similar, with_neighbours, without_duplicates

# ---------------------------------------------------------------------------------------------------------------------
# duplicates


def symmetric(tokens: int, pairs: dict[tuple[int, int], float]) -> Tensor:
    similarity = torch.eye(tokens)
    for (one, other), value in pairs.items():
        similarity[one, other] = similarity[other, one] = value
    return similarity[None]


def test_a_round_by_hand() -> None:
    """Even places hold 3, 5, 1; odd ones 0, 4. Likeness to the odd ones: .2, .9, .5; 5 leaves, then 1 before 3."""
    similarity = symmetric(6, {(3, 0): 0.2, (3, 4): 0.1, (5, 0): 0.9, (1, 4): 0.5, (1, 3): 0.99})
    order = torch.tensor([[3, 0, 5, 4, 1]])
    assert without_duplicates(similarity, order, 4, removed=8).tolist() == [[1, 3, 0, 4]]
    assert without_duplicates(similarity, order, 5).tolist() == [[3, 0, 5, 4, 1]], "nothing is too many"
    # 5 leaves. Of 1, 3, 0, 4 the even places hold 1 and 0; 1 is like 3 (.99), 0 like 3 (.2): 1 leaves, 0 comes first.
    assert without_duplicates(similarity, order, 3, removed=1).tolist() == [[0, 3, 4]]
    assert without_duplicates(similarity, order, 0).tolist() == [[]]


def test_a_round_removes_no_more_than_it_may() -> None:
    order = torch.arange(20)[None]
    left = without_duplicates(torch.ones(1, 20, 20), order, 12, removed=8)
    assert left.tolist() == [[16, 18, *range(1, 20, 2)]], "of equal ones the first leave"


def rounds(similarity: Tensor, order: list[int], keep: int, removed: int) -> list[int]:
    while len(order) > keep > 0:
        even, odd = order[::2], order[1::2]
        likeness = {a: max(float(similarity[a, b]) for b in odd) for a in even}
        by_likeness = sorted(even, key=lambda a: (-likeness[a], even.index(a)))
        order = by_likeness[min(removed, len(order) - keep, len(even)) :] + odd
    return order[:keep]


@given(data=st.data())
def test_duplicates_leave_as_in_a_loop(data: st.DataObject) -> None:
    tokens, batch = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 3))
    keep, removed = data.draw(st.integers(0, tokens)), data.draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    similarity = torch.randint(0, 5, (batch, tokens, tokens), generator=generator) / 4
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)])
    left = without_duplicates(similarity, order, keep, removed)
    assert left.tolist() == [
        rounds(alike, row, keep, removed) for alike, row in zip(similarity, order.tolist(), strict=True)
    ]


@pytest.mark.parametrize("removed", [1, 8])
def test_lists_of_neighbours_find_what_comparing_all_finds(removed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three neighbours a token, two at first: often none is listed at the other kind of place, and lists grow old."""
    monkeypatch.setattr(subsets, "NEAR", 12)
    monkeypatch.setattr(subsets._Neighbours, "FEW", 3)
    monkeypatch.setattr(subsets._Neighbours, "FIRST", 2)
    features = torch.randn(2, 90, 5, generator=torch.Generator().manual_seed(removed))
    similarity = features @ features.mT
    order = torch.stack([torch.randperm(90, generator=torch.Generator().manual_seed(seed))[:80] for seed in (0, 1)])
    left = without_duplicates(similarity, order, 5, removed)
    assert left.tolist() == [
        rounds(alike, row, 5, removed) for alike, row in zip(similarity, order.tolist(), strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# pivots


def test_pivots_choose_in_turn_by_hand() -> None:
    """The first pivot takes 3 (-.5), then 2 (0); the second wants 3 too, which is gone, and takes 4 (.1)."""
    similarity = torch.tensor([[[0.9, 0.8, 0.0, -0.5, 0.7], [0.9, 0.3, 0.2, -0.9, 0.1]]])
    taken = torch.tensor([[True, False, False, False, False]])
    assert least_similar(similarity, torch.tensor([[2, 1]]), taken).tolist() == [[True, False, True, True, True]]
    assert least_similar(similarity, torch.tensor([[0, 1]]), taken).tolist() == [[True, False, False, True, False]]
    assert taken.tolist() == [[True, False, False, False, False]], "the caller's mask is his"


def test_of_equally_unlike_tokens_the_first_is_taken() -> None:
    taken = torch.tensor([[False, True, False, False]])
    assert least_similar(torch.zeros(1, 1, 4), torch.tensor([[2]]), taken).tolist() == [[True, True, True, False]]


@given(data=st.data())
def test_pivots_choose_as_in_a_loop(data: st.DataObject) -> None:
    tokens, batch, pivots = data.draw(st.integers(1, 10)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    similarity = torch.randint(0, 4, (batch, pivots, tokens), generator=generator) / 4
    taken = torch.rand(batch, tokens, generator=generator) < 0.3
    quota = torch.zeros(batch, pivots, dtype=torch.int64)
    expected = taken.clone()
    for row in range(batch):
        for pivot in range(pivots):
            free = [token for token in range(tokens) if not expected[row, token]]
            quota[row, pivot] = data.draw(st.integers(0, len(free)))
            free.sort(key=lambda token: (float(similarity[row, pivot, token]), token))
            expected[row, free[: int(quota[row, pivot])]] = True
    assert torch.equal(least_similar(similarity, quota, taken), expected)


# ---------------------------------------------------------------------------------------------------------------------
# neighbours


def test_neighbours_in_a_raster_by_hand() -> None:
    """Left, right, above, below in 2 rows of 3."""
    assert grid_neighbours((2, 3)).tolist() == [
        [-1, 1, -1, 3],
        [0, 2, -1, 4],
        [1, -1, -1, 5],
        [-1, 4, 0, -1],
        [3, 5, 1, -1],
        [4, -1, 2, -1],
    ]


def test_neighbours_of_rows_that_run_on() -> None:
    assert grid_neighbours((2, 3), wrap=True).tolist() == [
        [0, 1, 0, 3],
        [0, 2, 0, 4],
        [1, 3, 0, 5],
        [2, 4, 0, 5],
        [3, 5, 1, 5],
        [4, 5, 2, 5],
    ]


def test_a_raster_of_one_token_has_no_neighbours() -> None:
    assert grid_neighbours((1, 1)).tolist() == [[-1] * 4]
    assert with_neighbours(torch.tensor([[0]]), grid_neighbours((1, 1))).tolist() == [[True]]


def test_the_chosen_and_their_neighbours_are_marked() -> None:
    marked = with_neighbours(torch.tensor([[0], [4]]), grid_neighbours((3, 3)))
    assert [row.nonzero().flatten().tolist() for row in marked] == [[0, 1, 3], [1, 3, 4, 5, 7]]
    both = with_neighbours(torch.tensor([[2, 6]]), grid_neighbours((3, 3)))
    assert both[0].nonzero().flatten().tolist() == [1, 2, 3, 5, 6, 7]
    assert not with_neighbours(torch.empty(2, 0, dtype=torch.int64), grid_neighbours((3, 3))).any()
