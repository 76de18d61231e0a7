"""FoPru against the paper's equations, worked by hand on maps of four patches, and its budgets, rows and tiles."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.core import Block, FoveateError, Grid, Selection, Signals
from foveate.methods.fopru import FoPru
from foveate.ops.scores import attention_sums

# Sixteenths: columns CLS, a, b, c, d; rows CLS, a, b, c, d. CLS takes the same from every patch, so that what patches
# give is constant (3/16) and what they receive varies. Mean of both heads.
RECEIVING = (
    [[8, 2, 2, 2, 2], [4, 3, 3, 4, 2], [4, 1, 6, 4, 1], [4, 3, 3, 4, 2], [4, 2, 4, 4, 2]],
    [[8, 2, 2, 2, 2], [4, 1, 5, 4, 2], [4, 1, 6, 4, 1], [4, 3, 3, 4, 2], [4, 2, 4, 4, 2]],
)
RECEIVED = [8 / 64, 17 / 64, 16 / 64, 7 / 64]
# Every column of the patches sums to 9; what CLS leaves to them varies.
GIVING = (
    [[4, 3, 3, 3, 3], [12, 1, 1, 1, 1], [8, 2, 2, 2, 2], [4, 3, 3, 3, 3], [4, 3, 3, 3, 3]],
    [[4, 3, 3, 3, 3], [12, 1, 1, 1, 1], [8, 2, 2, 2, 2], [4, 3, 3, 3, 3], [12, 1, 1, 1, 1]],
)
GIVEN = [1 / 16, 2 / 16, 3 / 16, 2 / 16]


def block_of(heads: Any) -> Block:
    """The block whose softmax gives exactly these maps: queries log(map), keys the identity."""
    weights = torch.tensor(heads, dtype=torch.float32)[None] / 16  # (1, H, 5, 5)
    assert torch.equal(weights.sum(dim=-1), torch.ones(1, 2, 5))
    sums = attention_sums(weights.log(), torch.eye(5).expand(1, 2, 5, 5), scale=1.0, skip=1)
    return Block(received=sums.received, given=sums.given)


def signals(received: list[Any], given: list[Any] | None = None, **more: Any) -> Signals:
    """Images with these scores; what is given is constant unless said, so that the received attention decides."""
    scores = torch.tensor(received, dtype=torch.float32)
    constant = torch.full_like(scores, 0.5) if given is None else torch.tensor(given, dtype=torch.float32)
    batch, tokens = scores.shape
    settings: dict[str, Any] = dict(original=tokens, index=torch.arange(tokens).expand(batch, tokens))
    return Signals(tower={"read": Block(received=scores, given=constant)}, **(settings | more))


def kept(method: FoPru, seen: Signals) -> list[list[int]]:
    selection = method.select(seen)
    assert selection.features is None and selection.extra is None
    assert selection.ordered is method.reorder
    selection.check(seen.original, seen.shape[0], str(method))
    return [row.tolist() for row in selection.indices]


def refusal(method: FoPru, seen: Signals) -> str:
    with pytest.raises(FoveateError) as error:
        method.select(seen)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# equations 2 to 4


def test_the_map_is_averaged_over_heads_then_over_each_side() -> None:
    receiving, giving = block_of(RECEIVING), block_of(GIVING)
    torch.testing.assert_close(receiving.received, torch.tensor([RECEIVED]))
    torch.testing.assert_close(receiving.given, torch.full((1, 4), 3 / 16))
    torch.testing.assert_close(giving.given, torch.tensor([GIVEN]))
    torch.testing.assert_close(giving.received, torch.tensor([[8 / 64] * 4]))


@pytest.mark.parametrize(
    ("received", "given", "direction", "order"),
    [
        (RECEIVED, [3 / 16] * 4, "high", [1, 2, 0, 3]),
        (RECEIVED, [3 / 16] * 4, "low", [0, 1, 2, 3]),  # constant: the lowest index wins
        ([9 / 64] * 4, GIVEN, "high", [2, 1, 3, 0]),
        ([9 / 64] * 4, GIVEN, "low", [0, 1, 2, 3]),
        ([1, 2, 3, 4], [4, 3, 2, 1], "high", [3, 2, 1, 0]),  # a tie goes to what is received
        ([1, 2, 3, 4], [4, 3, 2, 1], "low", [0, 1, 2, 3]),
        ([1, 2, 3, 4], [6, 4, 2, 0], "high", [0, 1, 2, 3]),
        ([1, 2, 3, 4], [6, 4, 2, 0], "low", [3, 2, 1, 0]),
    ],
)
def test_the_vector_of_larger_variance_ranks(
    received: list[float], given: list[float], direction: Any, order: list[int]
) -> None:
    for keep in range(1, 5):
        seen = signals([received], [given])
        assert kept(FoPru(keep=keep, direction=direction), seen) == [sorted(order[:keep])]
        assert kept(FoPru(keep=keep, direction=direction, reorder=False), seen) == [order[:keep]]


def test_from_the_map_to_the_tokens() -> None:
    index = torch.arange(4)[None]
    for heads, first, second in ((RECEIVING, 1, 2), (GIVING, 2, 1)):
        seen = Signals(original=4, index=index, tower={"read": block_of(heads)})
        assert kept(FoPru(keep=1), seen) == [[first]]
        assert kept(FoPru(keep=0.5), seen) == [sorted([first, second])]


def test_every_image_has_its_own_variance_rule() -> None:
    seen = signals([RECEIVED, [9 / 64] * 4], [[3 / 16] * 4, GIVEN])
    assert kept(FoPru(keep=1), seen) == [[1], [2]]
    assert kept(FoPru(keep=3, reorder=False), seen) == [[1, 2, 0], [2, 1, 3]]


@pytest.mark.parametrize("strategy", ["rank", "row"])
def test_scores_without_order_are_refused(strategy: Any) -> None:
    broken = signals([[0.1, float("nan"), 0.3, 0.4]], grid=(2, 2))
    assert "NaN or infinite; finite scores are needed to choose" in refusal(FoPru(keep=0.5, strategy=strategy), broken)


# ---------------------------------------------------------------------------------------------------------------------
# rank


@pytest.mark.parametrize(
    ("keep", "original", "count"),
    [(0.25, 576, 144), (0.11, 576, 63), (0.002, 576, 1), (0.027, 576, 16), (0.17, 576, 98), (64, 576, 64), (1.0, 7, 7)],
)
def test_how_many_rank_keeps(keep: float, original: int, count: int) -> None:
    assert FoPru(keep=keep).count(original) == (count,)


@st.composite
def scored(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(B, N) received and given attention, full of ties; no two vectors of one image vary alike unless equal."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    values = st.lists(st.integers(0, 4), min_size=batch * tokens, max_size=batch * tokens)
    received, given = (torch.tensor(draw(values), dtype=torch.float32).view(batch, tokens) for _ in range(2))
    return received, given


def variance(row: list[float]) -> float:
    """Times N squared: a whole number for whole numbers."""
    return len(row) * sum(value * value for value in row) - sum(row) ** 2


@given(scores=scored(), data=st.data())
def test_rank_is_a_stable_sort_of_the_vector_that_varies_more(
    scores: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    received, given = (one.tolist() for one in scores)
    tokens = len(received[0])
    keep = data.draw(st.integers(1, tokens) | st.floats(0, 1, exclude_min=True))
    direction = data.draw(st.sampled_from(["high", "low"]))
    method = FoPru(keep=keep, direction=direction, reorder=False)
    (count,) = method.count(tokens) or (None,)
    wanted = []
    for taken, handed in zip(received, given, strict=True):
        given_wins = variance(handed) > variance(taken)
        chosen = handed if given_wins == (direction == "high") else taken
        wanted.append(sorted(range(tokens), key=lambda token: (-chosen[token], token))[:count])
    # Two vectors that only rounding tells apart may fall either way.
    if all(variance(a) != variance(b) or a == b for a, b in zip(received, given, strict=True)):
        assert kept(method, signals(received, given)) == wanted


def test_a_later_stage_ranks_what_is_left() -> None:
    left = torch.tensor([[2, 5, 7, 11], [0, 1, 2, 3]])
    seen = signals([[0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4]], original=12, index=left)
    assert kept(FoPru(keep=2), seen) == [[2, 7], [2, 3]]
    assert kept(FoPru(keep=0.25), seen) == [[2, 7, 11], [1, 2, 3]]  # of the 12 original ones
    assert refusal(FoPru(keep=0.5), seen) == (
        "keep=0.5 asks for 6 tokens but 4 of its 12 tokens are left; the most is keep=4"
    )


# ---------------------------------------------------------------------------------------------------------------------
# row


def test_rows_of_highest_sum_stay_whole() -> None:
    # Row sums 6, 9, 7; the single highest token is in row 0.
    seen = signals([[5, 1, 0, 3, 3, 3, 1, 2, 4]], grid=(3, 3))
    assert kept(FoPru(keep=3, strategy="row"), seen) == [[3, 4, 5]]
    assert kept(FoPru(keep=6, strategy="row"), seen) == [[3, 4, 5, 6, 7, 8]]
    assert kept(FoPru(keep=0.34, strategy="row"), seen) == [[3, 4, 5]]
    assert kept(FoPru(keep=6, strategy="row", reorder=False), seen) == [[3, 4, 5, 6, 7, 8]]
    assert kept(FoPru(keep=9, strategy="row", reorder=False), seen) == [[3, 4, 5, 6, 7, 8, 0, 1, 2]]


def test_equal_rows_go_from_top_to_bottom() -> None:
    seen = signals([[1, 2, 2, 1, 3, 0, 1, 1]], grid=(4, 2))
    assert kept(FoPru(keep=2, strategy="row"), seen) == [[0, 1]]
    assert kept(FoPru(keep=6, strategy="row"), seen) == [[0, 1, 2, 3, 4, 5]]


def test_rows_of_each_image() -> None:
    seen = signals([[0, 0, 1, 1], [1, 1, 0, 0]], grid=(2, 2))
    assert kept(FoPru(keep=0.5, strategy="row"), seen) == [[2, 3], [0, 1]]


@pytest.mark.parametrize(
    ("keep", "grid", "count"),
    [
        (0.25, (24, 24), 144),
        (0.5, (3, 5), 10),  # 1.5 rows go to 2
        (0.5, (5, 3), 6),  # 2.5 rows go to 2
        (0.01, (24, 24), 24),  # at least one row
        (1.0, (4, 6), 24),
        (12, (4, 6), 12),
        (24, (4, 6), 24),
    ],
)
def test_how_many_row_keeps(keep: float, grid: Grid, count: int) -> None:
    tokens = grid[0] * grid[1]
    method = FoPru(keep=keep, strategy="row")
    assert method.count(tokens, grid) == (count,)
    assert [len(row) for row in kept(method, signals([list(range(tokens))], grid=grid))] == [count]


def test_a_square_is_assumed_where_no_grid_is_given() -> None:
    assert FoPru(keep=0.25, strategy="row").count(576) == (144,)
    with pytest.raises(FoveateError) as error:
        FoPru(keep=0.25, strategy="row").count(12)
    assert str(error.value) == (
        "FoPru strategy='row' needs the grid of the image; 12 tokens are no square, so pass grid=(h, w)"
    )
    assert FoPru(keep=0.25, strategy="row").count(12, grid=(4, 3)) == (3,)


@pytest.mark.parametrize(
    ("keep", "nearest"),
    [
        (100, "the nearest are keep=96 and keep=120"),
        (575, "the nearest are keep=552 and keep=576"),
        (5, "the nearest is keep=24"),
        (577, "the nearest is keep=576"),
        (600, "the nearest is keep=576"),
    ],
)
def test_whole_rows_only(keep: int, nearest: str) -> None:
    method = FoPru(keep=keep, strategy="row")
    message = f"FoPru strategy='row' keeps 1 to 24 whole rows of 24 tokens, but keep={keep}; {nearest}"
    with pytest.raises(FoveateError) as error:
        method.count(576, grid=(24, 24))
    assert str(error.value) == message
    assert refusal(method, signals([[0.0] * 576], grid=(24, 24))) == message
    for number in (int(word) for word in nearest.replace("keep=", " ").split() if word.isdigit()):
        assert FoPru(keep=number, strategy="row").count(576) == (number,)


def test_rows_need_the_whole_grid() -> None:
    seen = signals([[0.4, 0.1, 0.3, 0.2]], original=12, index=torch.tensor([[2, 5, 7, 11]]))
    assert refusal(FoPru(keep=0.5, strategy="row"), seen) == (
        "FoPru strategy='row' needs the whole grid of the image, but an earlier stage has taken tokens from it; put "
        "FoPru first or use strategy='rank'"
    )


# ---------------------------------------------------------------------------------------------------------------------
# tiles

#        tile 0               tile 1               tile 2
TILED = [0.1, 0.2, 0.3, 0.4, 0.9, 0.8, 0.7, 0.6, 0.5, 0.0, 0.0, 0.0]
TILE = torch.arange(3).repeat_interleave(4)[None]


@pytest.mark.parametrize(
    ("keep", "by_tile", "by_image"),
    [
        (0.25, [3, 4, 8], [4, 5, 6]),
        (0.2, [2, 3], [4, 5]),  # 2.4 of 12, not of each tile: fewer than there are tiles, so the base has both
        (0.4, [1, 2, 3, 4, 8], [4, 5, 6, 7, 8]),  # 4.8 of 12: two more than one of each tile
        (0.5, [2, 3, 4, 5, 8, 9], [3, 4, 5, 6, 7, 8]),
        (4, [2, 3, 4, 8], [4, 5, 6, 7]),  # the remainder is the base tile's
        (1, [3], [4]),
        (12, list(range(12)), list(range(12))),
        (1.0, list(range(12)), list(range(12))),
    ],
)
def test_a_budget_per_tile_or_per_image(keep: float, by_tile: list[int], by_image: list[int]) -> None:
    seen = signals([TILED], tile=TILE)
    assert kept(FoPru(keep=keep), seen) == [by_tile]
    assert kept(FoPru(keep=keep, budget="image"), seen) == [by_image]
    assert FoPru(keep=keep).count(12, tiles=3) == (len(by_tile),)
    assert FoPru(keep=keep, budget="image").count(12, tiles=3) == (len(by_image),)


@pytest.mark.parametrize("budget", ["tile", "image"])
def test_the_dial_is_a_share_of_the_image(budget: Literal["tile", "image"]) -> None:
    """However small its tiles are: half of 2 x 9 is 9, not twice round(4.5); the paper's 0.2 % of 5 x 576 are 5.76."""
    for keep, tokens, tiles, left in ((0.5, 18, 2, 9), (0.002, 2880, 5, 6), (0.1, 2880, 5, 288), (0.25, 2144, 5, 536)):
        assert FoPru(keep=keep, budget=budget).count(tokens, tiles=tiles) == (left,)


def test_tiles_without_reordering_stay_in_order_of_significance() -> None:
    seen = signals([TILED], tile=TILE)
    assert kept(FoPru(keep=0.5, reorder=False), seen) == [[4, 5, 8, 3, 2, 9]]


def test_a_tile_per_row_of_the_batch() -> None:
    tile = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    seen = signals([[4, 3, 2, 1], [4, 3, 2, 1]], tile=tile)
    assert kept(FoPru(keep=2), seen) == [[0, 2], [0, 1]]
    assert kept(FoPru(keep=3), seen) == [[0, 1, 2], [0, 1, 2]]  # the base of the second image has no more than one


@given(data=st.data(), tiles=st.integers(1, 4), each=st.integers(1, 9))
def test_tiles_of_one_size_share_exactly(data: st.DataObject, tiles: int, each: int) -> None:
    tokens = tiles * each
    keep = data.draw(st.integers(1, tokens) | st.floats(0, 1, exclude_min=True))
    budget = data.draw(st.sampled_from(["tile", "image"]))
    scores = data.draw(st.lists(st.integers(0, 9), min_size=tokens, max_size=tokens))
    tile = torch.arange(tiles).repeat_interleave(each)
    method = FoPru(keep=keep, budget=budget)
    (row,) = kept(method, signals([scores], tile=tile[None]))
    assert method.count(tokens, tiles=tiles) == (len(row),)
    if budget == "tile":
        shares = torch.bincount(tile[torch.tensor(row)], minlength=tiles).tolist()
        share, rest = divmod(len(row), tiles)
        if share + rest <= each:
            assert shares == [share + rest] + [share] * (tiles - 1)


def test_tiles_that_have_lost_tokens() -> None:
    left = torch.tensor([[0, 3, 4, 11]])
    seen = signals([[0.1, 0.4, 0.3, 0.2]], original=12, index=left, tile=torch.tensor([[0, 0, 1, 2]]))
    assert kept(FoPru(keep=3), seen) == [[3, 4, 11]]
    assert kept(FoPru(keep=0.25), seen) == [[3, 4, 11]]
    for keep, count in ((5, 5), (0.5, 6)):
        assert refusal(FoPru(keep=keep), seen) == (
            f"keep={keep} asks for {count} tokens but 4 of its 12 tokens are left; the most is keep=4"
        )


# ---------------------------------------------------------------------------------------------------------------------
# fields


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "keep=0 is below 1 token; the smallest budget is keep=1"),
        ({"keep": True}, "keep=True is neither a number of tokens (int) nor a share of them (float)"),
        ({"strategy": "rows"}, "strategy='rows' is not among its choices; did you mean 'row'? Choices: rank, row."),
        ({"direction": "up"}, "direction='up' is not among its choices; Choices: high, low."),
        ({"budget": None}, "budget=None is not among its choices; Choices: image, tile."),
    ],
)
def test_a_wrong_field_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError) as error:
        FoPru(**settings)
    assert str(error.value) == message


def test_more_than_the_image_has_is_refused() -> None:
    message = "keep=5 asks for 5 tokens but the image has 4 tokens; the most is keep=4"
    assert refusal(FoPru(keep=5), signals([[1, 2, 3, 4]])) == message
    assert refusal(FoPru(keep=5), signals([[1, 2, 3, 4]], tile=torch.tensor([[0, 0, 1, 1]]))) == message
    with pytest.raises(FoveateError, match="the most is keep=4"):
        FoPru(keep=5).count(4)


def test_the_answer_is_a_selection_of_original_tokens() -> None:
    selection = FoPru(keep=1).select(signals([[1, 2, 3, 4]]))
    assert isinstance(selection, Selection)
    assert selection.indices[0].dtype == torch.int64
    assert FoPru().needs == ("tower.read.received", "tower.read.given")
