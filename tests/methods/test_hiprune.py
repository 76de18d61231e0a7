"""HiPrune: the worked example, anchors and neighbours by hand, tiles, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.batches import assert_rows_stand_alone
from torch import Tensor

from foveate.core import Block, FoveateError, Grid, Signals
from foveate.methods.hiprune import HiPrune
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(
    objects: Tensor, deep: Tensor, grid: Grid | None, index: Tensor | None = None, block: Any = "8/24", **more: Any
) -> Signals:
    """(B, N) attention received in the middle block and in the one that is read."""
    batch, tokens = deep.shape
    index = torch.arange(tokens).repeat(batch, 1) if index is None else index
    tower = {block: Block(received_all=objects), "read": Block(received_all=deep)}
    more.setdefault("original", tokens)
    return Signals(index=index, grid=grid, tower=tower, **more)


def kept(method: HiPrune, shown: Signals) -> list[list[int]]:
    return [row.tolist() for row in method.select(shown).indices]


def wave(step: float) -> Tensor:
    """(1, 36) softmax of twice sin(step * j + 0.37 - 0.11 * j) for j = 1..36, float64."""
    j = np.arange(1, 37)
    return torch.from_numpy(2 * np.sin(step * j + 0.37 - 0.11 * j)).softmax(dim=0)[None]


@pytest.mark.parametrize("official", [False, True])
def test_the_worked_example(official: bool) -> None:
    """20 of 6 x 6: with a budget that small round(20 * 0.1 / 5) leaves no anchor, so that borders do not matter."""
    objects, deep = wave(0.9), wave(0.4)
    torch.testing.assert_close(objects[0, :3], torch.tensor([0.071193, 0.072945, 0.024867]).double(), atol=1e-6, rtol=0)
    shown = signals(objects, deep, (6, 6))
    assert kept(HiPrune(keep=20, official=official), shown) == [[*range(9), *range(20, 31)]]


def one_hot(tokens: int, *places: int) -> Tensor:
    """(1, N) falling from the first of `places` to the last, 0 elsewhere."""
    values = torch.zeros(1, tokens)
    for rank, place in enumerate(places):
        values[0, place] = 1 - 0.1 * rank
    return values


def test_an_anchor_brings_its_neighbours() -> None:
    """Of 4 x 5, token 7 with 2, 6, 8 and 12; the other block would keep 19, 18, 17 and so on."""
    shown = signals(one_hot(20, 7), torch.arange(20.0)[None] / 20, (4, 5))
    assert kept(HiPrune(keep=7, alpha=0.7), shown) == [[2, 6, 7, 8, 12, 18, 19]]
    assert kept(HiPrune(keep=7, alpha=0.0), shown) == [list(range(13, 20))]


def test_an_anchor_at_the_end_of_a_row_has_no_neighbour_in_the_next() -> None:
    """Token 4 closes the first row of five: 3 and 9 stand beside it, 5 does not."""
    shown = signals(one_hot(20, 4), torch.arange(20.0)[None] / 20, (4, 5))
    assert kept(HiPrune(keep=6, alpha=0.8), shown) == [[3, 4, 9, 17, 18, 19]]
    assert kept(HiPrune(keep=6, alpha=0.8, official=True), shown) == [[0, 3, 4, 5, 9, 19]], "-1 is clamped to 0"


def test_where_neighbours_are_too_many_anchors_come_first() -> None:
    """One anchor of a budget of 3: 4 with 1, 3, 5 and 7, of which the later block prefers 7 and 1; it likes 0 most."""
    shown = signals(one_hot(9, 4), one_hot(9, 0, 7, 1, 5), (3, 3))
    assert kept(HiPrune(keep=3, alpha=1.0), shown) == [[1, 4, 7]]


@pytest.mark.parametrize(("keep", "anchors"), [(192, 4), (128, 3), (64, 1), (32, 1), (26, 1), (25, 0)])
def test_the_number_of_anchors(keep: int, anchors: int) -> None:
    """They stand far behind the tokens that the later block likes."""
    places = [220 + 50 * number for number in range(7)]
    shown = signals(one_hot(576, *places), torch.linspace(1, 0, 576)[None], (24, 24))
    chosen = set(kept(HiPrune(keep=keep), shown)[0])
    whole = [{place, place - 1, place + 1, place - 24, place + 24} <= chosen for place in places]
    assert whole == [True] * anchors + [False] * (7 - anchors)
    assert chosen >= set(range(keep - 5 * anchors))


def test_tokens_are_placed_by_their_original_index() -> None:
    objects, deep = torch.rand(2, 20), torch.rand(2, 20)
    order = torch.stack([torch.randperm(20), torch.randperm(20)])
    method = HiPrune(keep=8, alpha=0.6)
    shuffled = signals(objects.gather(1, order), deep.gather(1, order), (4, 5), index=order)
    assert kept(method, shuffled) == kept(method, signals(objects, deep, (4, 5)))


def test_the_block_can_be_chosen() -> None:
    assert HiPrune().needs == ("tower.8/24.received_all", "tower.read.received_all")
    assert HiPrune(block=3).needs == ("tower.3.received_all", "tower.read.received_all")
    shown = signals(one_hot(20, 7), torch.zeros(1, 20), (4, 5), block=3)
    assert kept(HiPrune(keep=5, alpha=1.0, block=3), shown) == [[2, 6, 7, 8, 12]]


def test_every_tile_is_a_raster_of_its_own() -> None:
    """Two tiles of 3 x 3, one anchor in each: 4 with all its neighbours, and 17, the last one, with 14 and 16."""
    objects, deep = one_hot(18, 4, 17), torch.linspace(0, 1, 18)[None]
    tile = torch.tensor([[0] * 9 + [1] * 9])
    shown = signals(objects, deep, None, tile=tile)
    assert kept(HiPrune(keep=10, alpha=1.0), shown) == [[1, 3, 4, 5, 7, 13, 14, 15, 16, 17]]


def test_counts() -> None:
    assert HiPrune().count(576) == (192,)
    assert HiPrune(keep=0.1).count(2880, tiles=5) == (288,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 2.0}, "keep=2.0 is no share"),
        ({"alpha": 1.1}, r"alpha=1.1 is no share in \[0, 1\]; the paper's is alpha=0.1"),
        ({"alpha": False}, "alpha=False is no share"),
        ({"block": -1}, "block=-1 is no encoder block; the first is block=0, the paper's block=None"),
        ({"block": True}, "block=True is no encoder block"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        HiPrune(**fields)


def test_tokens_without_a_raster_are_refused() -> None:
    values = torch.rand(1, 12)
    with pytest.raises(FoveateError, match=r"HiPrune needs the whole grid of the image .* an earlier stage has taken"):
        HiPrune(keep=3).select(signals(values, values, None, original=16))
    with pytest.raises(FoveateError, match=r"whole grid of the image .* 12 of its tokens form no raster; put HiPrune"):
        HiPrune(keep=3).select(signals(values, values, None))
    tile = torch.tensor([[0] * 4 + [1] * 8])
    with pytest.raises(FoveateError, match="8 of its tokens form no raster"):
        HiPrune(keep=3).select(signals(values, values, None, tile=tile))
    trimmed = torch.tensor([[0] * 9 + [1] * 4])  # a square too, but not what the base is
    values = torch.rand(1, 13)
    with pytest.raises(FoveateError, match="4 of its tokens form no raster"):
        HiPrune(keep=3).select(signals(values, values, None, tile=trimmed))


def test_scores_that_are_no_numbers_are_refused() -> None:
    broken = torch.full((1, 4), torch.nan)
    for objects, deep in ((broken, torch.rand(1, 4)), (torch.rand(1, 4), broken)):
        with pytest.raises(FoveateError, match="4 of 4 scores are NaN or infinite"):
            HiPrune(keep=2).select(signals(objects, deep, (2, 2)))


def test_a_spec_survives_the_round_trip() -> None:
    for method in (HiPrune(), HiPrune(keep=64, alpha=0.2, block=15, official=True)):
        assert parse(format_spec(method)) == method


def in_loops(objects: list[float], deep: list[float], grid: Grid, count: int, alpha: float, official: bool) -> set[int]:
    """Of one image, as the paper's steps read; ties to the lowest index."""
    height, width = grid
    tokens = range(height * width)
    anchors = sorted(tokens, key=lambda token: (-objects[token], token))[: round(count * alpha / 5)]
    beside = set()
    for anchor in anchors:
        row, column = divmod(anchor, width)
        around = [(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
        if official:
            beside |= {min(max(anchor + step, 0), len(tokens) - 1) for step in (-1, 1, -width, width)}
        else:
            beside |= {r * width + c for r, c in around if 0 <= r < height and 0 <= c < width}
    tier = {token: 0 if token in anchors else 1 if token in beside else 2 for token in tokens}
    return set(sorted(tokens, key=lambda token: (tier[token], -deep[token], token))[:count])


@given(data=st.data())
def test_exactly_count_tokens_stay_as_in_loops(data: st.DataObject) -> None:
    grid = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    batch, tokens = data.draw(st.integers(1, 3)), grid[0] * grid[1]
    keep = data.draw(st.integers(1, tokens) | st.floats(0.01, 1.0))
    method = HiPrune(
        keep=keep, alpha=data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), official=data.draw(st.booleans())
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    objects, deep = torch.randint(0, 4, (2, batch, tokens), generator=generator) / 4
    (selection,) = assert_rows_stand_alone(method, [signals(objects, deep, grid)])
    selection.check(tokens, batch, "hiprune")
    (count,) = method.count(tokens) or ()
    for row in range(batch):
        assert set(selection.indices[row].tolist()) == in_loops(
            objects[row].tolist(), deep[row].tolist(), grid, count, method.alpha, method.official
        )
        assert len(selection.indices[row]) == count
