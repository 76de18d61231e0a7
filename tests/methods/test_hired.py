"""HiRED: hand-worked budgets over tiles, where the tiles lie, the authors' variant, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.batches import assert_rows_stand_alone
from torch import Tensor

from foveate.core import Block, FoveateError, Signals
from foveate.methods.hired import HiRED
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(read: Tensor, first: Tensor | None = None, index: Tensor | None = None, **more: Any) -> Signals:
    """(B, N) attention of one head in the block that is read and in the first block."""
    batch, tokens = read.shape
    first = torch.zeros_like(read) if first is None else first
    index = torch.arange(tokens).repeat(batch, 1) if index is None else index
    tower: dict[int | str, Block] = {
        0: Block(cls_attention=first[:, None]),
        "read": Block(cls_attention=read[:, None]),
    }
    more.setdefault("original", tokens)
    return Signals(index=index, tower=tower, **more)


def tiled(base: list[float], tiles: int, read: Tensor | None = None, **more: Any) -> Signals:
    """One image of equally large tiles; `base` is what the first block pays to each token of the base tile."""
    tokens = len(base)
    first = torch.cat([torch.tensor(base), torch.full(((tiles - 1) * tokens,), 7.0)])[None]
    tile = torch.arange(tiles).repeat_interleave(tokens)[None]
    return signals(torch.rand(first.shape) if read is None else read, first, tile=tile, **more)


def budgets(method: HiRED, shown: Signals, total: int) -> list[int]:
    first = shown.tower[0].cls_attention
    assert first is not None
    (found,) = method.budgets(method.contents(first.sum(dim=1), shown), shown.by_tile(), total)
    return found


def per_tile(method: HiRED, shown: Signals) -> list[int]:
    assert shown.tile is not None
    (kept,) = method.select(shown).indices
    return torch.bincount(shown.tile[0][kept], minlength=shown.tiles).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# one tile


def test_the_sum_over_heads_decides() -> None:
    attention = torch.tensor([[[0.5, 0.1, 0.0, 0.2], [0.0, 0.1, 0.4, 0.3]]])
    nothing = Block(cls_attention=torch.full_like(attention, 0.25))
    shown = Signals(original=4, index=torch.arange(4)[None], tower={0: nothing, "read": Block(cls_attention=attention)})
    assert [row.tolist() for row in HiRED(keep=3).select(shown).indices] == [[0, 2, 3]]
    assert [row.tolist() for row in HiRED(keep=1, official=True).select(shown).indices] == [[0]]


def test_one_tile_is_no_different_from_none() -> None:
    read = torch.rand(2, 9)
    plain = HiRED(keep=4).select(signals(read)).indices
    tile = HiRED(keep=4).select(signals(read, tile=torch.zeros(2, 9, dtype=torch.int64))).indices
    assert all(torch.equal(*rows) for rows in zip(plain, tile, strict=True))


@pytest.mark.parametrize(("keep", "tokens", "kept"), [(0.2, 2880, 576), (0.11, 2880, 316), (0.3, 9, 2), (0.01, 9, 1)])
def test_shares_are_cut(keep: float, tokens: int, kept: int) -> None:
    assert HiRED(keep=keep).count(tokens) == (kept,)
    assert HiRED(keep=keep, official=True).count(tokens) is None
    assert HiRED(keep=keep, official=True).adaptive and not HiRED(keep=keep).adaptive


def test_a_later_stage_names_tokens_by_their_original_index() -> None:
    shown = signals(torch.tensor([[0.1, 0.4, 0.3]]), index=torch.tensor([[9, 4, 2]]), original=10)
    assert HiRED(keep=2).select(shown).indices[0].tolist() == [2, 4]


# ---------------------------------------------------------------------------------------------------------------------
# several tiles

# 2 x 2 tokens of the base tile stand for one of 2 x 2 tiles each; sums by quarter 6, 1, 2, 3.
QUARTERS = [3.0, 1.0, 0.5, 0.0, 1.0, 1.0, 0.5, 0.0, 0.0, 2.0, 1.0, 0.0, 0.0, 0.0, 2.0, 0.0]


def test_the_budget_follows_the_attention_on_each_part_of_the_base_tile() -> None:
    """Half of 24 is the base tile's; 12 are shared 6 : 1 : 2 : 3."""
    shown = tiled(QUARTERS, tiles=5)
    assert budgets(HiRED(), shown, 24) == [12, 6, 1, 2, 3]
    assert per_tile(HiRED(keep=24), shown) == [12, 6, 1, 2, 3]


def test_what_cannot_be_shared_goes_to_the_largest_remainders() -> None:
    """10 of 21 to the base; 11 in twelfths: 5.5, .92, 1.83, 2.75 are 5, 1, 2, 3."""
    assert budgets(HiRED(), tiled(QUARTERS, tiles=5), 21) == [10, 5, 1, 2, 3]


def test_every_tile_keeps_its_best() -> None:
    read = torch.rand(1, 80, generator=torch.Generator().manual_seed(1))
    shown = tiled(QUARTERS, tiles=5, read=read)
    (kept,) = HiRED(keep=24).select(shown).indices
    expected = []
    for tile, share in enumerate([12, 6, 1, 2, 3]):
        part = read[0, 16 * tile : 16 * tile + 16]
        expected += sorted(16 * tile + int(place) for place in part.argsort(descending=True)[:share])
    assert kept.tolist() == expected


def test_full_tiles_hand_on_what_they_cannot_take() -> None:
    one_part = [1.0, 0.0, 0.0, 0.0]
    assert budgets(HiRED(), tiled(one_part, tiles=5), 12) == [4, 4, 2, 1, 1]  # half would be 6: the base has 4
    assert budgets(HiRED(alpha=0.0), tiled(one_part, tiles=5), 18) == [2, 4, 4, 4, 4]
    assert budgets(HiRED(alpha=1.0), tiled(one_part, tiles=5), 3) == [3, 0, 0, 0, 0]
    assert budgets(HiRED(), tiled([0.0] * 4, tiles=5), 8) == [4, 1, 1, 1, 1]


def test_all_tokens_stay_as_they_are() -> None:
    assert HiRED(keep=1.0).select(tiled(QUARTERS, tiles=5)).indices[0].tolist() == list(range(80))
    assert HiRED(keep=1.0, official=True).select(tiled(QUARTERS, tiles=5)).indices[0].tolist() == list(range(80))


# Columns of the base tile: 1, 3 and 0, 4; rows: 4, 4 and 0, 0.
WIDE = [1.0, 2.0, 0.0, 1.0, 0.0, 1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("layout", "grid", "shares"),
    [
        (None, None, [4, 4]),  # two tiles beside each other
        ((1, 2), None, [4, 4]),
        ((2, 1), None, [8, 0]),
        (None, (4, 8), [4, 4]),
        (None, (8, 4), [8, 0]),
        ((1, 2), (8, 4), [4, 4]),  # what is said counts more than what is guessed
    ],
)
def test_where_the_tiles_lie(layout: Any, grid: Any, shares: list[int]) -> None:
    shown = tiled(WIDE, tiles=3, grid=grid)
    assert budgets(HiRED(layout=layout), shown, 16) == [8, *shares]


@pytest.mark.parametrize(
    ("others", "grid", "layout"),
    [
        (1, None, (1, 1)),
        (2, None, (1, 2)),
        (3, None, (1, 3)),
        (4, None, (2, 2)),
        (6, None, (2, 3)),
        (4, (24, 90), (1, 4)),
        (6, (40, 24), (3, 2)),
        (3, (60, 24), (3, 1)),
    ],
)
def test_the_layout_nearest_to_the_grid_or_to_a_square(others: int, grid: Any, layout: tuple[int, int]) -> None:
    assert HiRED()._layout(others, tiled([1.0], tiles=others + 1, grid=grid)) == layout


def test_parts_of_a_base_tile_that_does_not_divide_evenly() -> None:
    """3 x 3 into 1 x 2: columns 0 and 1, and column 2."""
    content = HiRED()._content(torch.arange(9.0), (1, 2))
    assert content.tolist() == [0 + 1 + 3 + 4 + 6 + 7, 2 + 5 + 8]


def test_the_base_tile_is_read_in_raster_order() -> None:
    order = torch.tensor([3, 1, 0, 2, *range(4, 20)])
    shown = tiled([1.0, 2.0, 4.0, 8.0], tiles=5)
    first = shown.tower[0].cls_attention
    assert first is not None
    shuffled = signals(torch.rand(1, 20), first[:, 0][:, order], index=order[None], tile=shown.tile)
    assert budgets(HiRED(alpha=0.0), shuffled, 7) == budgets(HiRED(alpha=0.0), shown, 7) == [0, 0, 1, 2, 4]


def test_the_tiles_of_every_image_are_its_own() -> None:
    first = torch.cat([tiled(base, tiles=5).tower[0].cls_attention for base in (QUARTERS, QUARTERS[::-1])])[:, 0]
    tile = torch.arange(5).repeat_interleave(16).repeat(2, 1)
    shown = signals(torch.rand(2, 80), first, tile=tile)
    (selection,) = assert_rows_stand_alone(HiRED(keep=24), [shown])
    assert [torch.bincount(tile[0][kept]).tolist() for kept in selection.indices] == [
        [12, 6, 1, 2, 3],
        [12, 3, 2, 1, 6],
    ]


# ---------------------------------------------------------------------------------------------------------------------
# the authors' code


def test_the_authors_count_tokens_in_runs_and_cut() -> None:
    """The 8 highest of 16 lie 4, 2, 2, 0 in the four rows; 11 in eighths are 5.5, 2.75, 2.75, 0."""
    base = [9.0, 9.0, 9.0, 9.0, 0.0, 8.0, 8.0, 0.0, 7.0, 7.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1]
    shown = tiled(base, tiles=5)
    assert budgets(HiRED(official=True), shown, 21) == [10, 5, 2, 2, 0]
    assert per_tile(HiRED(keep=21, official=True), shown) == [10, 5, 2, 2, 0]
    assert sum(budgets(HiRED(), shown, 21)) == 21


def test_the_authors_cut_leaves_one_token_at_least() -> None:
    assert budgets(HiRED(official=True), tiled(QUARTERS, tiles=5), 1) == [1, 0, 0, 0, 0]


def test_the_authors_budget_may_find_no_marked_token() -> None:
    assert budgets(HiRED(alpha=1.0, official=True), tiled(QUARTERS, tiles=5), 18) == [16, 0, 0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# what patches receive


def test_both_blocks_read_what_is_received() -> None:
    """The first block's shares the budget as in `test_the_budget_follows_...`, the other's ranks within every tile."""
    method = HiRED(keep=24, attention="received")
    assert method.needs == ("tower.0.received", "tower.read.received")
    shown = tiled(QUARTERS, tiles=5, read=torch.rand(1, 80, generator=torch.Generator().manual_seed(1)))
    as_received = {block: Block(received=shown.tower[block].cls_attention[:, 0]) for block in (0, "read")}
    seen = dataclasses.replace(shown, tower=as_received)
    assert per_tile(method, seen) == [12, 6, 1, 2, 3]
    assert torch.equal(method.select(seen).indices[0], HiRED(keep=24).select(shown).indices[0])


def test_the_patch_that_receives_most_is_kept() -> None:
    block = Block(received=torch.tensor([[0.5, 0.1, 0.4]]))
    shown = Signals(3, torch.arange(3)[None], tower={0: block, "read": block})
    assert HiRED(keep=2, attention="received").select(shown).indices[0].tolist() == [0, 2]


# ---------------------------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 0.0}, "keep=0.0 is no share"),
        ({"alpha": -0.1}, r"alpha=-0.1 is no share in \[0, 1\]; the paper's is alpha=0.5"),
        ({"alpha": True}, "alpha=True is no share"),
        ({"layout": (2,)}, r"layout=\(2,\) is not \(rows, columns\)"),
        ({"layout": (2, 0)}, "is not .rows, columns. of whole numbers from 1"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        HiRED(**fields)


def test_pictures_that_it_cannot_share_a_budget_over_are_refused() -> None:
    with pytest.raises(
        FoveateError, match="arranges 6 tiles, but beside its base tile the image has 4; the nearest is"
    ):
        HiRED(layout=(2, 3)).select(tiled(QUARTERS, tiles=5))
    with pytest.raises(FoveateError, match="needs the whole grid of the image's base tile"):
        HiRED(keep=20).select(tiled(QUARTERS, tiles=5, original=100))
    with pytest.raises(FoveateError, match=r"square base tile \(tile 0\), but this one has 6 tokens"):
        HiRED(keep=10).select(tiled([1.0] * 6, tiles=3))
    with pytest.raises(FoveateError, match="1 of 80 scores are NaN or infinite"):
        HiRED(keep=10).select(tiled([torch.nan, *QUARTERS[1:]], tiles=5))
    with pytest.raises(FoveateError, match="keep=81 asks for 81 tokens but the image has 80 tokens"):
        HiRED(keep=81).select(tiled(QUARTERS, tiles=5))


def test_a_spec_survives_the_round_trip() -> None:
    for method in (HiRED(), HiRED(keep=64, alpha=0.25, layout=(2, 2), official=True)):
        assert parse(format_spec(method)) == method


@given(data=st.data())
def test_exactly_count_tokens_stay(data: st.DataObject) -> None:
    batch, side, others = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 5))
    sizes = [side * side, *data.draw(st.lists(st.integers(1, 9), min_size=others, max_size=others))]
    tile = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)]).repeat(batch, 1)
    tokens = sum(sizes)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    read, first = torch.randint(0, 3, (2, batch, tokens), generator=generator) / 3
    keep = data.draw(st.integers(1, tokens) | st.floats(0.01, 1.0))
    method = HiRED(keep=keep, alpha=data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])))
    (selection,) = assert_rows_stand_alone(method, [signals(read, first, tile=tile)])
    selection.check(tokens, batch, "hired")
    assert {(len(row),) for row in selection.indices} == {method.count(tokens, tiles=others + 1)}
    official = HiRED(keep=keep, alpha=method.alpha, official=True).select(signals(read, first, tile=tile))
    assert all((1,) <= (len(row),) <= (method.asked(tokens) or ()) for row in official.indices)
