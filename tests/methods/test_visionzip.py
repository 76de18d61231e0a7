"""VisionZip: hand-worked context, counts, the place of CLS, tiles, and a plain reference in float64."""

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
from foveate.methods.visionzip import VisionZip
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(attention: list[float], keys: Tensor, tokens: Tensor, tile: list[int] | None = None) -> Signals:
    """One image of one head; CLS is -1."""
    read = Block(
        hidden=tokens[None],
        cls=-torch.ones(1, tokens.shape[1]),
        cls_attention=torch.tensor(attention)[None, None],
        keys=keys[None, None],
    )
    count = len(attention)
    tiles = None if tile is None else torch.tensor([tile])
    return Signals(count, torch.arange(count)[None], tile=tiles, tower={"read": read})


# Of 8 patches 3 and 6 lead; 0 1 2 4 5 7 remain, of which every third, 0 and 4, is a target; the keys of 1 and 5 point
# where that of 0 does, those of 2 and 7 where that of 4 does.
ATTENTION = [0.1, 0.1, 0.1, 0.3, 0.0, 0.1, 0.2, 0.1]
KEYS = torch.tensor([[1.0, 0], [2, 0], [0, 1], [9, 9], [0, 5], [3, 1], [9, 9], [1, 2]])
EIGHT = signals(ATTENTION, KEYS, torch.arange(8.0)[:, None])


def values(selection: Selection) -> list[float]:
    assert selection.features is not None
    found: list[float] = selection.features[0][:, 0].tolist()
    return found


def test_targets_become_means_and_cls_stands_at_the_first_free_index() -> None:
    selection = VisionZip(keep=5, contextual=2).select(EIGHT)
    assert selection.space == "encoded" and selection.ordered
    assert selection.indices[0].tolist() == [0, 1, 3, 4, 6], "targets 0 and 4, dominant 3 and 6, CLS at 1"
    assert values(selection) == pytest.approx([(0 + 1 + 5) / 3, -1, 3, (4 + 2 + 7) / 3, 6])
    assert selection.extra is not None
    assert selection.extra[0].tolist() == [False, True, False, False, False]


def test_the_code_adds_the_mean_to_the_target() -> None:
    selection = VisionZip(keep=5, contextual=2, official=True).select(EIGHT)
    assert selection.indices[0].tolist() == [0, 1, 3, 4, 6]
    assert values(selection) == pytest.approx([0 + (1 + 5) / 2, -1, 3, 4 + (2 + 7) / 2, 6])


def test_a_target_that_nobody_joins_stays_as_it_is() -> None:
    keys = torch.tensor([[1.0, 0], [2, 0], [1, 0], [9, 9], [-1, 5], [3, 1], [9, 9], [1, 0]])
    for official in (False, True):
        method = VisionZip(keep=5, contextual=2, official=official)
        selection = method.select(signals(ATTENTION, keys, torch.arange(8.0)[:, None]))
        assert values(selection)[3] == 4.0


def test_the_smallest_budgets_begin_with_cls() -> None:
    assert values(VisionZip(keep=1).select(EIGHT)) == [-1]
    assert VisionZip(keep=1).select(EIGHT).indices[0].tolist() == [0]
    two = VisionZip(keep=2).select(EIGHT)
    assert two.indices[0].tolist() == [0, 3] and values(two) == [-1, 3]
    three = VisionZip(keep=3).select(EIGHT)
    assert three.indices[0].tolist() == [0, 1, 3], "the only target is the first that remains, CLS stands behind it"
    assert values(three) == pytest.approx([(0 + 1 + 2 + 4 + 5 + 6 + 7) / 7, -1, 3])


def test_all_go_on_as_they_are_without_cls() -> None:
    selection = VisionZip(keep=8).select(EIGHT)
    assert selection.indices[0].tolist() == list(range(8))
    assert selection.features is None and selection.extra is None


@pytest.mark.parametrize(
    ("keep", "contextual"), [(1, 0), (2, 0), (3, 1), (4, 1), (9, 1), (10, 2), (64, 10), (128, 20), (192, 30)]
)
def test_contextual_tokens_are_ten_of_64(keep: int, contextual: int) -> None:
    """Told by CLS and dominant patches going on as they are."""
    method = VisionZip(keep=keep)
    seen = synthetic.signals(method, 1, (24, 24))
    assert method.count(576) == (keep,)
    selection = method.select(seen)
    assert selection.features is not None
    merged = 0
    for index, features, extra in zip(selection.indices[0], selection.features[0], selection.extra[0], strict=True):
        if not extra:
            merged += not torch.equal(features, seen.tower["read"].hidden[0, index])
    assert merged == contextual


def test_more_context_than_there_is_room_for() -> None:
    message = "contextual=10 leaves no token of the 10 that keep=10 asks for to CLS; the most is contextual=9"
    with pytest.raises(FoveateError, match=message):
        VisionZip(keep=10, contextual=10)
    with pytest.raises(FoveateError, match=r"leaves no token of the 4 that keep=0\.5 asks for"):
        VisionZip(keep=0.5, contextual=4).count(8)
    with pytest.raises(FoveateError, match=r"leaves no token of the 4 that keep=0\.5 asks for"):
        VisionZip(keep=0.5, contextual=4).select(EIGHT)
    for contextual in (-1, 2.0, True):
        with pytest.raises(FoveateError, match="is no number of tokens; the least is contextual=0"):
            VisionZip(contextual=contextual)  # type: ignore[arg-type]
    with pytest.raises(FoveateError, match="keep=64 asks for 64 tokens but the image has 8"):
        VisionZip().select(EIGHT)
    with pytest.raises(FoveateError, match="budget='half' is not among its choices"):
        VisionZip(budget="half")  # type: ignore[arg-type]


def test_all_but_cls_may_be_context() -> None:
    selection = VisionZip(keep=3, contextual=2).select(EIGHT)
    assert selection.indices[0].tolist() == [0, 1, 4], "targets are 0 and 4 of all 8"


def test_no_context_at_all() -> None:
    selection = VisionZip(keep=3, contextual=0).select(EIGHT)
    assert selection.indices[0].tolist() == [0, 3, 6] and values(selection) == [-1, 3, 6]


# ---------------------------------------------------------------------------------------------------------------------
# tiles


def test_every_tile_has_its_share_and_the_first_has_cls() -> None:
    """7 of three tiles of 4: 3, 2 and 2. Tile 0 keeps CLS, its best and a mean; the others their two best."""
    attention = [0.0, 0.9, 0.1, 0.2, 0.5, 0.0, 0.0, 0.6, 0.0, 0.3, 0.3, 0.3]
    seen = signals(attention, torch.ones(12, 2), torch.arange(12.0)[:, None], tile=[0] * 4 + [1] * 4 + [2] * 4)
    selection = VisionZip(keep=7).select(seen)
    assert selection.indices[0].tolist() == [0, 1, 2, 4, 7, 9, 10]
    assert values(selection) == pytest.approx([(0 + 2 + 3) / 3, 1, -1, 4, 7, 9, 10])
    assert selection.extra is not None and selection.extra[0].nonzero().flatten().tolist() == [2]
    at_once = VisionZip(keep=7, budget="image").select(seen)
    assert at_once.indices[0].tolist() == [0, 1, 2, 4, 7, 9, 10]
    assert values(at_once) == pytest.approx([(0 + 2 + 3 + 5 + 6 + 8 + 11) / 7, 1, -1, 4, 7, 9, 10])


def test_context_of_tiles() -> None:
    """2 each: a target and CLS, a target and the best of what is left."""
    attention = [0.0, 0.9, 0.1, 0.2, 0.5, 0.0, 0.0, 0.6]
    seen = signals(attention, torch.ones(8, 2), torch.arange(8.0)[:, None], tile=[0] * 4 + [1] * 4)
    selection = VisionZip(keep=4, contextual=1).select(seen)
    assert selection.indices[0].tolist() == [0, 1, 4, 7]
    assert values(selection) == pytest.approx([1.5, -1, 5, 7])


def test_shares_of_tiles_are_rounded_once() -> None:
    assert VisionZip(keep=0.3).count(20, tiles=4) == (6,), "not 2 of 5 in each"
    assert VisionZip(keep=0.3, budget="image").count(20, tiles=4) == (6,)
    assert VisionZip(keep=64).count(2880, tiles=5) == (64,)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    contextual=st.none() | st.integers(0, 3),
    official=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_tiles_get_the_count(
    sizes: list[int], contextual: int | None, official: bool, seed: int, data: st.DataObject
) -> None:
    tokens = sum(sizes)
    keep = data.draw(st.integers(1, tokens))
    given = None if contextual is None else min(contextual, keep - 1)
    method = VisionZip(keep=keep, contextual=given, official=official)
    generator = torch.Generator().manual_seed(seed)
    tile = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    tile = torch.stack([tile[torch.randperm(tokens, generator=generator)] for _ in range(2)])
    seen = dataclasses.replace(synthetic.signals(method, 2, (1, tokens), seed), tile=tile)
    selection = method.select(seen)
    selection.check(tokens, 2, "visionzip")
    assert [row.numel() for row in selection.indices] == [keep, keep]
    if len(sizes) > 1:
        assert_rows_stand_alone(method, [seen])


# ---------------------------------------------------------------------------------------------------------------------
# what patches receive


def received(keep: int, **more: Any) -> VisionZip:
    return VisionZip(keep=keep, attention="received", **more)


def as_received(seen: Signals) -> Signals:
    """The same numbers as attention that patches receive, and nothing of CLS."""
    read = seen.tower["read"]
    assert read.cls_attention is not None
    own = Block(hidden=read.hidden, keys=read.keys, received=read.cls_attention.mean(dim=1))
    return dataclasses.replace(seen, tower={"read": own})


WITHOUT_CLS = as_received(EIGHT)


def test_without_cls_all_are_dominant_or_contextual() -> None:
    """3, 6 and 0 lead; of 1 2 4 5 7 every second is a target, 1 and 4; 5 joins 1, and 2 and 7 join 4."""
    method = received(5, contextual=2)
    assert method.needs == ("tower.read.hidden", "tower.read.received", "tower.read.keys")
    selection = method.select(WITHOUT_CLS)
    assert selection.space == "encoded"
    assert selection.indices[0].tolist() == [0, 1, 3, 4, 6]
    assert values(selection) == pytest.approx([0, (1 + 5) / 2, 3, (4 + 2 + 7) / 3, 6])
    assert selection.extra is not None and not selection.extra[0].any()


def test_the_smallest_budgets_begin_with_the_best_patch() -> None:
    one, two = received(1).select(WITHOUT_CLS), received(2).select(WITHOUT_CLS)
    assert one.indices[0].tolist() == [3] and values(one) == [3]
    assert two.indices[0].tolist() == [0, 3] and values(two) == pytest.approx([(0 + 1 + 2 + 4 + 5 + 6 + 7) / 7, 3])


def test_every_tile_has_a_share_without_cls() -> None:
    """2 each: the best, and the mean of the others at the first of them."""
    attention = [0.0, 0.9, 0.1, 0.2, 0.5, 0.0, 0.0, 0.6]
    seen = signals(attention, torch.ones(8, 2), torch.arange(8.0)[:, None], tile=[0] * 4 + [1] * 4)
    selection = received(4).select(as_received(seen))
    assert selection.indices[0].tolist() == [0, 1, 4, 7]
    assert values(selection) == pytest.approx([5 / 3, 1, 5, 7])


def test_context_is_merged_behind_the_projector() -> None:
    """The choice and the keys are the encoder's, the tokens the projector's."""
    method = received(5, contextual=2, space="projected")
    assert method.needs == ("features", "tower.read.received", "tower.read.keys") and not method.encoded
    seen = dataclasses.replace(WITHOUT_CLS, features=100 + torch.arange(8.0)[None, :, None])
    selection = method.select(seen)
    assert selection.space == "projected" and selection.indices[0].tolist() == [0, 1, 3, 4, 6]
    assert values(selection) == pytest.approx([100, 103, 103, 100 + 13 / 3, 106])
    assert received(8, space="projected").select(seen).features is None


def test_one_dominant_patch_stays() -> None:
    message = "contextual=4 leaves no token of the 4 that keep=4 asks for to dominant patches; the most is contextual=3"
    with pytest.raises(FoveateError, match=message):
        received(4, contextual=4)


# ---------------------------------------------------------------------------------------------------------------------
# any input


def reference(seen: Signals, keep: int, contextual: int) -> dict[int, tuple[Tensor, bool]]:
    """What stands at which place of the first image and whether it is CLS, written out in float64."""
    read = seen.tower["read"]
    hidden, keys = read.hidden[0].double(), read.keys[0].double().mean(dim=0)
    attention = read.cls_attention[0].double().mean(dim=0).tolist()
    best = sorted(range(len(hidden)), key=lambda place: (-attention[place], place))[: keep - 1 - contextual]
    remaining = [place for place in range(len(hidden)) if place not in best]
    targets = [remaining[number * (len(remaining) // contextual)] for number in range(contextual)]
    groups: dict[int, list[Tensor]] = {target: [hidden[target]] for target in targets}
    joining = [place for place in remaining if place not in targets]
    for place in joining if targets else []:
        near = [torch.cosine_similarity(keys[place], keys[target], dim=0).item() for target in targets]
        groups[targets[near.index(max(near))]].append(hidden[place])
    made = {place: (hidden[place], False) for place in best}
    made.update({target: (torch.stack(group).mean(dim=0), False) for target, group in groups.items()})
    return {**made, joining[0]: (read.cls[0].double(), True)}


@given(grid=st.tuples(st.integers(1, 6), st.integers(1, 6)), seed=st.integers(0, 99), data=st.data())
def test_as_the_plain_reference(grid: tuple[int, int], seed: int, data: st.DataObject) -> None:
    tokens = grid[0] * grid[1]
    keep = data.draw(st.integers(1, tokens))
    contextual = data.draw(st.integers(0, keep - 1))
    method = VisionZip(keep=keep, contextual=contextual)
    seen = synthetic.signals(method, 1, grid, seed)
    selection = method.select(seen)
    if keep == tokens:
        assert selection.features is None
        return
    assert selection.features is not None and selection.extra is not None
    expected = reference(seen, keep, contextual)
    assert selection.indices[0].tolist() == sorted(expected)
    wanted = torch.stack([expected[place][0] for place in sorted(expected)])
    torch.testing.assert_close(selection.features[0].double(), wanted, rtol=1e-4, atol=1e-5)
    assert selection.extra[0].tolist() == [expected[place][1] for place in sorted(expected)]


@pytest.mark.parametrize("value", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("keep", [1, 2, 3, 7, 15, 16])
def test_tokens_that_are_all_alike(value: float, keep: int) -> None:
    method = VisionZip(keep=keep)
    seen = synthetic.signals(method, 2, (4, 4))
    same = {
        name: torch.full_like(tensor, value) for name, tensor in vars(seen.tower["read"]).items() if tensor is not None
    }
    selection = method.select(dataclasses.replace(seen, tower={"read": Block(**same)}))
    selection.check(16, 2, "visionzip")
    assert [row.numel() for row in selection.indices] == [keep] * 2


def test_half_precision_comes_back_as_it_came() -> None:
    method = VisionZip(keep=6)
    seen = synthetic.signals(method, 1, (4, 4))
    half = Block(**{name: None if value is None else value.half() for name, value in vars(seen.tower["read"]).items()})
    selection = method.select(dataclasses.replace(seen, tower={"read": half}))
    assert selection.features is not None and selection.features[0].dtype == torch.float16


def test_a_row_alone_is_what_it_is_in_the_batch() -> None:
    method = VisionZip(keep=9)
    assert_rows_stand_alone(method, [synthetic.signals(method, 3, (6, 6))])


def test_tokens_that_have_left_are_not_taken_up_again() -> None:
    """Left are the odd ones of 16, in no order; raster order decides about targets and the place of CLS."""
    method = VisionZip(keep=5, contextual=2)
    whole = synthetic.signals(method, 1, (4, 4))
    order = torch.tensor([5, 1, 15, 9, 3, 7, 13, 11])
    got = method.select(synthetic.narrowed(whole, Selection([order], ordered=False), 0))
    expected = method.select(synthetic.narrowed(whole, Selection([order.sort().values]), 0))
    assert torch.equal(got.indices[0], expected.indices[0])
    assert set(got.indices[0].tolist()) <= set(order.tolist())
    torch.testing.assert_close(got.features[0], expected.features[0])


@pytest.mark.parametrize(
    "text",
    [
        "visionzip:keep=64",
        "visionzip:keep=0.25,contextual=3,budget=image,official=true",
        "visionzip:keep=64,attention=received,space=projected",
    ],
)
def test_a_method_is_written_as_it_is_read(text: str) -> None:
    assert format_spec(parse(text)) == text
