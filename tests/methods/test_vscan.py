"""VScan: hand-worked scans and merging, both parts and their budgets, tiles, and a plain reference in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import synthetic
from models.batches import assert_rows_stand_alone
from torch import Tensor

from foveate.core import Block, FoveateError, Selection, Signals
from foveate.cost import equivalent_tokens, visual_per_layer
from foveate.methods.vscan import VScan
from foveate.ops.windows import windows
from foveate.spec import format as format_spec
from foveate.spec import parse

# A raster of 4 x 4: every token is a window of its own.
SHALLOW = torch.tensor([0.0, 0, 0, 0, 0, 9, 8, 0, 0, 0, 0, 0, 0, 0, 0, 7])
DEEP = torch.tensor([5.0, 0, 0, 0, 0, 9, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0])


def signals(shallow: Tensor, deep: Tensor, features: Tensor, **more: Any) -> Signals:
    """One image; attention of two heads, of which one is zero."""
    tower = {
        name: Block(cls_attention=torch.stack([one, torch.zeros_like(one)])[None])
        for name, one in (("5/24", shallow), ("read", deep))
    }
    count = len(features)
    given: dict[str, Any] = dict(grid=(4, 4), tower=tower, features=features[None])
    return Signals(count, torch.arange(count)[None], **{**given, **more})


def before(keep: Any, **more: Any) -> VScan:
    return VScan(keep=keep, where="input", **more)


def kept(method: VScan, seen: Signals) -> list[int]:
    found: list[int] = method.select(seen).indices[0].tolist()
    return found


ALIKE = torch.ones(16, 2)


def test_half_by_the_local_scan_and_half_by_the_global_one() -> None:
    """5 and 6 lead early on; what leads later is 5, which is taken already, then 0 and 7."""
    seen = signals(SHALLOW, DEEP, ALIKE)
    assert kept(before(4), seen) == [0, 5, 6, 7]
    assert kept(before(3), seen) == [0, 5, 7], "the odd one goes to the global scan"
    assert kept(before(1), seen) == [5]
    assert before(4).select(seen).space == "projected"


def test_the_local_scan_asks_every_window_first() -> None:
    """An 8 x 8 raster: the windows are blocks of 2 x 2. All that is loud early on stands in the first of them."""
    shallow, deep = torch.zeros(64), torch.zeros(64)
    shallow[[0, 1, 8, 9]] = torch.tensor([9.0, 8, 7, 6])
    shallow[63] = 1.0
    seen = signals(shallow, deep, torch.ones(64, 2), grid=(8, 8))
    chosen = kept(before(36), seen)
    local = windows((8, 8), 4)
    assert {0, 1, 63} <= set(chosen), "the best of the first window and of the last, then the second best of the first"
    assert len({int(local[token]) for token in chosen}) == 16
    assert kept(before(4), seen) == [0, 1, 2, 63], "of a turn that is not needed whole the loudest; then the first"


def test_the_others_join_what_they_resemble() -> None:
    """5 and 2 stay. Tokens that point up join 2, and so does 0, which has no length; the others join 5."""
    features = torch.zeros(16, 2)
    features[:, 0] = torch.arange(16.0)
    features[[2, 9, 12]] = torch.tensor([[0.0, 1], [0, 4], [0, 10]])
    deep = torch.zeros(16)
    deep[2] = 1.0
    selection = before(2).select(signals(SHALLOW, deep, features))
    assert selection.indices[0].tolist() == [2, 5]
    assert selection.features is not None
    right = [token for token in range(1, 16) if token not in (2, 9, 12)]
    expected = torch.tensor([[0.0, 15 / 4], [sum(right) / len(right), 0.0]])
    torch.testing.assert_close(selection.features[0], expected)


def test_all_go_on_as_they_are() -> None:
    selection = before(16).select(signals(SHALLOW, DEEP, ALIKE, grid=None))
    assert selection.indices[0].tolist() == list(range(16)) and selection.features is None


def test_the_stage_inside_the_decoder_ranks_by_the_next_block() -> None:
    attention = torch.tensor([[[0.1, 0.4, 0.0, 0.2], [0.3, 0.0, 0.1, 0.2]]])  # means 0.2 0.2 0.05 0.2
    seen = Signals(16, torch.tensor([[3, 8, 9, 14]]), decoder=Block(next_query=attention))
    assert kept(VScan(keep=2, where="layer"), seen) == [3, 8], "the lowest index on a tie"
    assert VScan(keep=2, where="layer").select(seen).features is None
    with pytest.raises(FoveateError, match="keep=5 asks for 5 tokens but 4 of its 16 tokens are left"):
        VScan(keep=5, where="layer").select(seen)


# ---------------------------------------------------------------------------------------------------------------------
# parts and budgets


def test_the_papers_budget_is_64_on_average() -> None:
    visual = visual_per_layer([VScan()], 576, 32)
    assert visual == (96,) * 16 + (32,) * 16
    assert equivalent_tokens(visual) == 64.0


def test_the_parts() -> None:
    whole = VScan(keep=(0.5, 0.125), block=2, layer=3, official=True)
    scans, stage = whole.parts()
    assert (scans.site, stage.site) == ("input", "layer")
    assert scans.needs == ("tower.2.cls_attention", "tower.read.cls_attention", "features")
    assert stage.needs == ("decoder.next_query",)
    assert (scans.depths(8), stage.depths(8)) == ((), (3,))
    assert (scans.count(16), stage.count(16)) == ((8 - 4,), (2,)), "16 windows give 4 // 16 each"
    assert parse(str(scans)) == scans and parse(str(stage)) == stage
    assert scans.parts() == (scans,) and stage.parts() == (stage,)
    assert whole.site == "input" and set(whole.needs) == {*scans.needs, *stage.needs}
    assert VScan().needs[0] == "tower.5/24.cls_attention"


def test_a_single_budget_is_followed_by_a_third_of_it() -> None:
    assert VScan(keep=96).count(576) == (96, 32)
    assert VScan(keep=100).count(576) == (100, 33)
    assert VScan(keep=2).count(576) == (2, 1)
    assert VScan(keep=0.5).count(576) == (288, 96)
    assert VScan(keep=(96, 0.05)).count(576) == (96, 29)


@pytest.mark.parametrize(("layers", "depth"), [(32, 16), (40, 20), (28, 14), (6, 3), (2, 1)])
def test_the_depth_scales_with_the_decoder(layers: int, depth: int) -> None:
    assert VScan(where="layer", keep=1).depths(layers) == (depth,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(keep=(32, 96)), "keep=(32, 96) rises from 32 to 96; the most is 32"),
        (dict(keep=(96, 32, 8)), "VScan has 2 budgets, before the decoder and inside it, not 3"),
        (dict(keep=(96, 0)), "VScan: keep inside the decoder=0 is below 1 token"),
        (dict(keep=(96, 32), where="input"), "where='input' has one budget, not keep=(96, 32); the nearest is keep=96"),
        (dict(keep=0), "keep=0 is below 1 token"),
        (dict(layer=0), "VScan: layer=0 is below 1"),
        (dict(block=-1), "block=-1 is no number of an encoder block; the least is block=0"),
        (dict(block=1.5), "block=1.5 is no number of an encoder block"),
        (dict(where="cache"), "where='cache' is not among its choices"),
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        VScan(**fields)
    assert message in str(caught.value)


def test_budgets_that_cannot_be_met() -> None:
    with pytest.raises(
        FoveateError, match="keep=96 asks for 96 tokens but the image has 16 tokens; the most is keep=16"
    ):
        VScan().count(16)
    with pytest.raises(FoveateError, match="keep inside the decoder=8 asks for 8 tokens but 4 of its 16"):
        VScan(keep=(0.25, 8)).count(16)


def test_tokens_that_form_no_raster_are_refused() -> None:
    with pytest.raises(FoveateError, match="VScan needs the whole grid of the image, but its tokens come from several"):
        before(4).select(signals(SHALLOW, DEEP, ALIKE, grid=None))


# ---------------------------------------------------------------------------------------------------------------------
# the authors' code


@pytest.mark.parametrize(("keep", "left"), [(48, 40), (96, 96), (100, 98), (144, 136), (64, 64), (31, 16), (1, 1)])
def test_the_code_loses_what_does_not_divide(keep: int, left: int) -> None:
    method = before(keep, official=True)
    assert method.count(576, (24, 24)) == method.count(576) == (left,)
    selection = method.select(synthetic.signals(method, 1, (24, 24)))
    assert selection.indices[0].numel() == left


def test_the_code_and_the_paper_agree_where_all_divides() -> None:
    seen = synthetic.signals(before(96), 2, (24, 24))
    ours, theirs = before(96).select(seen), before(96, official=True).select(seen)
    for row in range(2):
        assert torch.equal(ours.indices[row], theirs.indices[row])


# ---------------------------------------------------------------------------------------------------------------------
# what patches receive


def test_both_scans_read_what_is_received() -> None:
    """As `test_half_by_the_local_scan_and_half_by_the_global_one`."""
    method = before(4, attention="received")
    assert method.needs == ("tower.5/24.received", "tower.read.received", "features")
    tower = {"5/24": Block(received=SHALLOW[None]), "read": Block(received=DEEP[None])}
    seen = signals(SHALLOW, DEEP, ALIKE, tower=tower)
    assert kept(method, seen) == [0, 5, 6, 7] and method.select(seen).space == "projected"
    assert kept(before(3, attention="received"), seen) == [0, 5, 7]
    at_two = before(4, attention="received", block=2)
    tower = {2: Block(received=DEEP[None]), "read": Block(received=SHALLOW[None])}
    assert at_two.needs[0] == "tower.2.received"
    assert kept(at_two, signals(SHALLOW, DEEP, ALIKE, tower=tower)) == [0, 5, 6, 15]


def test_the_parts_know_what_is_read() -> None:
    scans, stage = VScan(attention="received").parts()
    assert scans.needs == ("tower.5/24.received", "tower.read.received", "features")
    assert stage.needs == ("decoder.next_query",)


# ---------------------------------------------------------------------------------------------------------------------
# tiles


def test_every_tile_is_scanned_on_its_own() -> None:
    """Two 4 x 4 tiles, of which the second stands first in the raster; 3 + 2 of 5, and no token joins another tile."""
    tile = torch.tensor([[1] * 16 + [0] * 16])
    shallow, deep = torch.cat([SHALLOW.flip(0), SHALLOW]), torch.cat([DEEP.flip(0), DEEP])
    features = torch.cat([torch.ones(16, 2), 3 * torch.ones(16, 2)])
    seen = signals(shallow, deep, features, grid=None, tile=tile)
    selection = before(5).select(seen)
    assert selection.indices[0].tolist() == [10, 15, 16, 21, 23]
    assert selection.features is not None
    assert selection.features[0][:, 0].tolist() == [1, 1, 3, 3, 3]
    assert before(0.25).count(32, tiles=2) == (8,)


def test_the_code_loses_other_numbers_of_other_tiles() -> None:
    """Shares of 4 and 1 lose the 2 that 16 windows cannot share; shares of 3, 1 and 1 the one that 9 cannot."""
    tile = torch.tensor([[0] * 16 + [1], [0] * 9 + [1] * 4 + [2] * 4])
    seen = synthetic.signals(before(5), 2, (1, 17))
    selection = before(5, official=True).select(dataclasses.replace(seen, grid=None, tile=tile))
    assert [row.numel() for row in selection.indices] == [3, 4]


def test_a_tile_without_a_known_raster_is_refused() -> None:
    tile = torch.tensor([[0] * 12 + [1] * 4])
    with pytest.raises(FoveateError, match="one of its tiles has 12 tokens, which are no square"):
        before(4).select(signals(SHALLOW, DEEP, ALIKE, grid=None, tile=tile))
    whole = before(4, budget="image").select(signals(SHALLOW, DEEP, ALIKE, tile=tile))
    assert whole.indices[0].tolist() == [0, 5, 6, 7]


@given(
    sides=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    official=st.booleans(),
    seed=st.integers(0, 50),
    data=st.data(),
)
def test_any_square_tiles_get_the_count(sides: list[int], official: bool, seed: int, data: st.DataObject) -> None:
    sizes = torch.tensor(sides) ** 2
    tokens = int(sizes.sum())
    keep = data.draw(st.integers(1, tokens))
    method = before(keep, official=official)
    seen = synthetic.signals(method, 2, (1, tokens), seed)
    tile = torch.arange(len(sides)).repeat_interleave(sizes).repeat(2, 1)
    selection = method.select(dataclasses.replace(seen, grid=None, tile=tile))
    selection.check(tokens, 2, "vscan")
    counted = method.count(tokens, tiles=len(sides))
    for row in selection.indices:
        assert row.numel() <= keep
        if len(set(sides)) == 1 or not official:
            assert (row.numel(),) == counted


# ---------------------------------------------------------------------------------------------------------------------
# any input


def reference(seen: Signals, row: int, keep: int) -> dict[int, Tensor]:
    """What stands at which place, written out in float64."""
    shallow, deep = (seen.tower[name].cls_attention[row].double().mean(dim=0).tolist() for name in ("5/24", "read"))
    features = seen.features[row].double()
    cut = windows(seen.grid, 4).tolist()
    waiting: dict[int, list[int]] = {}
    for token in sorted(range(len(features)), key=lambda token: (-shallow[token], token)):
        waiting.setdefault(cut[token], []).append(token)
    local: list[int] = []
    while len(local) < keep // 2:
        turn = sorted((queue.pop(0) for queue in waiting.values() if queue), key=lambda token: (-shallow[token], token))
        local += turn[: keep // 2 - len(local)]
    remaining = [token for token in range(len(features)) if token not in local]
    chosen = sorted(local + sorted(remaining, key=lambda token: (-deep[token], token))[: keep - keep // 2])
    groups = {token: [features[token]] for token in chosen}
    for token in set(range(len(features))) - set(chosen):
        near = [torch.cosine_similarity(features[token], features[other], dim=0).item() for other in chosen]
        groups[chosen[near.index(max(near))]].append(features[token])
    return {token: torch.stack(group).mean(dim=0) for token, group in groups.items()}


@given(grid=st.tuples(st.integers(1, 7), st.integers(1, 7)), seed=st.integers(0, 99), data=st.data())
def test_as_the_plain_reference(grid: tuple[int, int], seed: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, grid[0] * grid[1]))
    seen = synthetic.signals(before(keep), 2, grid, seed)
    selection = before(keep).select(seen)
    if selection.features is None:
        assert keep == grid[0] * grid[1]
        return
    for row in range(2):
        expected = reference(seen, row, keep)
        assert selection.indices[row].tolist() == sorted(expected)
        wanted = torch.stack([expected[token] for token in sorted(expected)])
        torch.testing.assert_close(selection.features[row].double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("keep", [1, 2, 15, 35])
def test_tokens_that_are_all_alike(value: float, keep: int) -> None:
    seen = synthetic.signals(before(keep), 2, (6, 6))
    flat = {name: Block(cls_attention=torch.zeros_like(block.cls_attention)) for name, block in seen.tower.items()}
    same = dataclasses.replace(seen, tower=flat, features=torch.full_like(seen.features, value))
    selection = before(keep).select(same)
    selection.check(36, 2, "vscan")
    assert [row.numel() for row in selection.indices] == [keep] * 2
    assert (selection.features[0] == value).all()


def test_half_precision_comes_back_as_it_came() -> None:
    seen = synthetic.signals(before(5), 1, (4, 4))
    selection = before(5).select(dataclasses.replace(seen, features=seen.features.bfloat16()))
    assert selection.features is not None and selection.features[0].dtype == torch.bfloat16


def test_a_row_alone_is_what_it_is_in_the_batch() -> None:
    for method in (before(9), before(9, official=True), VScan(keep=9, where="layer")):
        assert_rows_stand_alone(method, [synthetic.signals(method, 3, (6, 6))])


def test_a_stage_after_one_without_order_sees_the_raster() -> None:
    """All tokens are there, in another order."""
    whole = synthetic.signals(before(20), 1, (6, 6))
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    mixed = dataclasses.replace(synthetic.narrowed(whole, Selection([order], ordered=False), 0), grid=(6, 6))
    assert torch.equal(before(20).select(mixed).indices[0], before(20).select(whole).indices[0])


@pytest.mark.parametrize(
    "text", ["vscan:keep=96/32", "vscan:keep=0.5/0.25,layer=3,block=1,official=true", "vscan:keep=64,where=layer"]
)
def test_a_method_is_written_as_it_is_read(text: str) -> None:
    assert format_spec(parse(text)) == text
