"""PruMerge: hand-worked merges, counts of its own, a plain reference in float64, and inputs that break averages."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import synthetic
from models.batches import assert_rows_stand_alone
from torch import Tensor

from foveate.core import Block, FoveateError, Selection, Signals
from foveate.methods.prumerge import PruMerge
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(weights: list[list[float]], tokens: Tensor, lean: list[float] | None = None) -> Signals:
    """Images whose patches get attention in proportion to `weights`, CLS getting 1; keys of angle `lean` to the side.

    One head of width 2: the logit is the key's first number, the query being (sqrt 2, 0).
    """
    logits = torch.tensor(weights).log()
    side = torch.zeros_like(logits) if lean is None else torch.tensor(lean).expand_as(logits)
    batch, count = logits.shape
    last = Block(
        keys=torch.stack([logits, side], dim=-1)[:, None],
        key_cls=torch.zeros(batch, 1, 2),
        query_cls=torch.tensor([math.sqrt(2.0), 0.0]).expand(batch, 1, 2),
    )
    index = torch.arange(count).repeat(batch, 1)
    return Signals(count, index, tower={"read": Block(hidden=tokens.expand(batch, -1, -1)), "last": last})


# Token 0 leads; its key points along (1, 0), as does that of token 1; 2 and 3 point up and down.
FOUR = signals([[6.0, 2.0, 1.0, 3.0]], torch.tensor([[[10.0], [20.0], [30.0], [40.0]]]), lean=[0.0, 0.0, 1.0, -9.0])


def values(selection: Selection) -> list[list[float]]:
    assert selection.features is not None
    return [row[:, 0].tolist() for row in selection.features]


def test_an_average_by_attention_of_itself_and_what_is_near() -> None:
    """(6 * 10 + 2 * 20) / 8, and of the rest (2 * 20 + 1 * 30 + 3 * 40) / 6, at the last index."""
    selection = PruMerge(keep=2, neighbours=1).select(FOUR)
    assert selection.indices[0].tolist() == [0, 3]
    assert selection.extra is not None and selection.extra[0].tolist() == [False, True]
    assert selection.space == "encoded"
    assert values(selection)[0] == pytest.approx([12.5, 190 / 6])


def test_the_rest_takes_the_largest_index_that_is_free() -> None:
    """Patches 0 and 3 stay, so that the rest stands at 2, between them: (2 * 20 + 1 * 30) / 3.

    Token 1 joins both: its key points where that of 0 does, and that of 2 points away from that of 3.
    """
    selection = PruMerge(keep=3, neighbours=1).select(FOUR)
    assert selection.indices[0].tolist() == [0, 2, 3]
    assert selection.extra is not None and selection.extra[0].tolist() == [False, True, False]
    assert values(selection)[0] == pytest.approx([12.5, 70 / 3, (3 * 40 + 2 * 20) / 5])


def test_the_code_adds_neighbours_and_draws_them_from_the_kept_too() -> None:
    """Attention is over 13. Token 0 is nearest to 1; 0 and 1 are equally near to 3, and 0, which stays, comes first."""
    selection = PruMerge(keep=3, neighbours=1, official=True).select(FOUR)
    assert selection.indices[0].tolist() == [0, 2, 3]
    assert values(selection)[0] == pytest.approx([10 + 2 / 13 * 20, (2 * 20 + 1 * 30) / 13, 40 + 6 / 13 * 10])


def test_one_token_is_the_average_of_all() -> None:
    selection = PruMerge(keep=1).select(FOUR)
    assert selection.indices[0].tolist() == [3]
    assert values(selection)[0] == pytest.approx([(60 + 40 + 30 + 120) / 12])


def test_all_go_on_as_they_are() -> None:
    for official in (False, True):
        selection = PruMerge(keep=4, official=official).select(FOUR)
        assert selection.indices[0].tolist() == [0, 1, 2, 3]
        assert selection.features is None and selection.extra is None


# ---------------------------------------------------------------------------------------------------------------------
# the image's own count

PLAIN, TWO, FIVE = [1.0] * 20, [1.0] * 18 + [50.0, 60.0], [9.0] * 5 + [1.0] * 15


def test_the_outliers_and_the_rest() -> None:
    seen = signals([PLAIN, TWO, FIVE], torch.arange(20.0)[None, :, None])
    selection = PruMerge().select(seen)
    assert [row.tolist() for row in selection.indices] == [[19], [17, 18, 19], [0, 1, 2, 3, 4, 19]]
    assert selection.extra is not None
    assert [row.tolist().index(True) for row in selection.extra] == [0, 0, 5]
    assert values(selection)[0] == pytest.approx([9.5]), "of a picture without outliers the mean"


def test_the_code_counts_outliers_over_the_batch() -> None:
    """2 of 40 lie above the common fence: int(20 * 2 / 40) of each image, also of the one without any."""
    seen = signals([PLAIN, TWO], torch.arange(20.0)[None, :, None])
    assert [row.numel() for row in PruMerge(official=True).select(seen).indices] == [2, 2]
    assert [row.numel() for row in PruMerge().select(seen).indices] == [1, 3]


def test_what_fixes_the_count() -> None:
    assert PruMerge().count(576) is None and PruMerge().adaptive
    assert PruMerge(official=True).count(576) is None
    fixed = PruMerge(keep=0.25)
    assert fixed.count(576) == (144,) and not fixed.adaptive
    assert PruMerge(keep=0.0001).count(576) == (1,)
    assert PruMerge.adaptive


# ---------------------------------------------------------------------------------------------------------------------
# what patches receive, and merging behind the projector


def as_received(weights: list[list[float]], seen: Signals) -> Signals:
    """The keys and tokens of `seen`, these sums of attention, and nothing of CLS."""
    last = Block(keys=seen.tower["last"].keys, received=torch.tensor(weights) / 100)
    return dataclasses.replace(seen, tower={"read": seen.tower["read"], "last": last})


def test_what_is_received_in_the_last_block_ranks_and_weighs() -> None:
    """2 stays. Its key is as far from that of 0 as from that of 1, so that 0 joins it: (6 * 30 + 1 * 10) / 7."""
    method = PruMerge(keep=2, neighbours=1, attention="received")
    assert method.needs == ("tower.read.hidden", "tower.last.keys", "tower.last.received")
    selection = method.select(as_received([[1.0, 2.0, 6.0, 3.0]], FOUR))
    assert selection.indices[0].tolist() == [2, 3] and selection.space == "encoded"
    assert values(selection)[0] == pytest.approx([190 / 7, (10 + 2 * 20 + 3 * 40) / 6])


def test_what_is_received_has_outliers_too() -> None:
    seen = as_received([PLAIN, TWO, FIVE], signals([PLAIN] * 3, torch.arange(20.0)[None, :, None]))
    selection = PruMerge(attention="received").select(seen)
    assert [row.tolist() for row in selection.indices] == [[19], [17, 18, 19], [0, 1, 2, 3, 4, 19]]


def test_a_patch_may_receive_nothing() -> None:
    selection = PruMerge(keep=2, neighbours=1, attention="received").select(as_received([[0.0, 5.0, 0.0, 0.0]], FOUR))
    assert selection.indices[0].tolist() == [1, 3]
    assert values(selection)[0] == pytest.approx([20, (10 + 30 + 40) / 3])


@pytest.mark.parametrize("attention", ["cls", "received"])
def test_tokens_are_merged_behind_the_projector(attention: Any) -> None:
    method = PruMerge(keep=2, neighbours=1, attention=attention, space="projected")
    assert method.needs[:2] == ("features", "tower.last.keys") and not method.encoded
    seen = FOUR if attention == "cls" else as_received([[6.0, 2.0, 1.0, 3.0]], FOUR)
    features = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    selection = method.select(Signals(4, seen.index, features=features, tower={"last": seen.tower["last"]}))
    assert selection.indices[0].tolist() == [0, 3] and selection.space == "projected"
    assert values(selection)[0] == pytest.approx([1.25, 19 / 6])


# ---------------------------------------------------------------------------------------------------------------------
# any input


def reference(seen: Signals, row: int, kept: int, neighbours: int) -> dict[int, Tensor]:
    """What stands at which place, written out in float64."""
    last, tokens = seen.tower["last"], seen.tower["read"].hidden[row].double()
    query, own = last.query_cls[row].double().flatten(), last.key_cls[row].double().flatten()
    keys = torch.stack([last.keys[row, :, place].double().flatten() for place in range(len(tokens))])
    logits = torch.cat([own[None] @ query, keys @ query]) / math.sqrt(len(query))
    attention = logits.softmax(dim=0)[1:]
    order = sorted(range(len(tokens)), key=lambda place: (-attention[place].item(), place))
    best, pruned = order[:kept], sorted(order[kept:])
    made = {}
    for place in best:
        alike = {other: torch.cosine_similarity(keys[place], keys[other], dim=0).item() for other in pruned}
        group = [place, *sorted(pruned, key=lambda other: (-alike[other], other))[:neighbours]]
        made[place] = sum(attention[one] * tokens[one] for one in group) / attention[group].sum()
    made[pruned[-1]] = sum(attention[one] * tokens[one] for one in pruned) / attention[pruned].sum()
    return made


@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    neighbours=st.integers(1, 40),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_as_the_plain_reference(grid: tuple[int, int], neighbours: int, seed: int, data: st.DataObject) -> None:
    tokens = grid[0] * grid[1]
    keep = data.draw(st.integers(1, tokens))
    method = PruMerge(keep=keep, neighbours=neighbours)
    seen = synthetic.signals(method, 2, grid, seed)
    selection = method.select(seen)
    if keep == tokens:
        assert selection.features is None
        return
    assert selection.features is not None
    for row in range(2):
        expected = reference(seen, row, keep - 1, neighbours)
        assert selection.indices[row].tolist() == sorted(expected)
        wanted = torch.stack([expected[place] for place in sorted(expected)])
        torch.testing.assert_close(selection.features[row].double(), wanted, rtol=1e-4, atol=1e-5)


ODD = {
    "zeros": lambda shape, _: torch.zeros(shape),
    "equal": lambda shape, _: torch.ones(shape),
    "huge": lambda shape, generator: 1e6 * torch.randn(shape, generator=generator),
    "copies": lambda shape, generator: torch.randn(1, generator=generator).sign() * torch.ones(shape),
    "few": lambda shape, generator: torch.randint(0, 2, shape, generator=generator).float(),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("official", [False, True])
@given(tokens=st.integers(1, 40), keep=st.none() | st.integers(1, 40), seed=st.integers(0, 9))
def test_odd_inputs_leave_the_count_exact(kind: str, official: bool, tokens: int, keep: int | None, seed: int) -> None:
    method = PruMerge(keep=None if keep is None else min(keep, tokens), official=official)
    seen = synthetic.signals(method, 2, (1, tokens))
    generator = torch.Generator().manual_seed(seed)
    last = Block(
        **{n: None if v is None else ODD[kind](v.shape, generator) for n, v in vars(seen.tower["last"]).items()}
    )
    selection = method.select(dataclasses.replace(seen, tower={**seen.tower, "last": last}))
    selection.check(tokens, 2, "prumerge")
    if keep is not None:
        assert [row.numel() for row in selection.indices] == [min(keep, tokens)] * 2


def test_a_row_alone_is_what_it_is_in_the_batch() -> None:
    for method in (PruMerge(), PruMerge(keep=9), PruMerge(keep=9, official=True)):
        assert_rows_stand_alone(method, [synthetic.signals(method, 3, (6, 6))])


def test_half_precision_comes_back_as_it_came() -> None:
    method = PruMerge(keep=5)
    seen = synthetic.signals(method, 1, (4, 4))
    half = {
        name: Block(**{n: None if v is None else v.bfloat16() for n, v in vars(block).items()})
        for name, block in seen.tower.items()
    }
    full = {
        name: Block(**{n: None if v is None else v.float() for n, v in vars(block).items()})
        for name, block in half.items()
    }
    got = method.select(dataclasses.replace(seen, tower=half))
    exact = method.select(dataclasses.replace(seen, tower=full))
    assert got.features is not None and exact.features is not None
    assert got.features[0].dtype == torch.bfloat16
    assert torch.equal(got.features[0], exact.features[0].bfloat16())


def test_tokens_that_have_left_are_not_taken_up_again() -> None:
    """Of 16 tokens those at odd places are left, in no order: the rest stands at the last of them that is free."""
    method = PruMerge(keep=3)
    whole = synthetic.signals(method, 2, (4, 4))
    order = torch.tensor([5, 1, 15, 9, 3, 7, 13, 11])
    seen = synthetic.narrowed(whole, Selection([order, order.flip(0)], ordered=False), 0)
    sorted_ = synthetic.narrowed(whole, Selection([order.sort().values] * 2), 0)
    got, expected = method.select(seen), method.select(sorted_)
    for row in range(2):
        assert torch.equal(got.indices[row], expected.indices[row])
        assert set(got.indices[row].tolist()) <= set(order.tolist())
        free = set(order.tolist()) - set(got.indices[row][~got.extra[row]].tolist())
        assert got.indices[row][got.extra[row]].tolist() == [max(free)]
        torch.testing.assert_close(got.features[row], expected.features[row])


# ---------------------------------------------------------------------------------------------------------------------
# what is refused, and text


@pytest.mark.parametrize("neighbours", [0, -1, 1.5, True])
def test_a_number_of_neighbours_that_is_none(neighbours: object) -> None:
    with pytest.raises(FoveateError, match="is no number of patches; the least is neighbours=1"):
        PruMerge(neighbours=neighbours)  # type: ignore[arg-type]


def test_budgets_that_cannot_be_met() -> None:
    with pytest.raises(FoveateError, match="keep=0 is below 1 token"):
        PruMerge(keep=0)
    with pytest.raises(FoveateError, match="keep=5 asks for 5 tokens but the image has 4 tokens; the most is keep=4"):
        PruMerge(keep=5).select(FOUR)


def test_attention_without_an_order_is_refused() -> None:
    with pytest.raises(FoveateError, match="scores are NaN or infinite"):
        PruMerge(keep=2).select(signals([[1.0, math.nan, 1.0]], torch.ones(1, 3, 1)))


@pytest.mark.parametrize("text", ["prumerge", "prumerge:keep=64", "prumerge:keep=0.25,neighbours=8,official=true"])
def test_a_method_is_written_as_it_is_read(text: str) -> None:
    assert format_spec(parse(text)) in {text, text + ":keep=none"}
    assert parse(format_spec(parse(text))) == parse(text)
