"""FastV: hand-worked rankings, the rule of its counts, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.batches import assert_rows_stand_alone
from torch import Tensor

from foveate.core import Block, FoveateError, Signals
from foveate.methods.fastv import FastV
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(attention: Tensor, index: Tensor | None = None, original: int | None = None) -> Signals:
    batch, _, tokens = attention.shape
    index = torch.arange(tokens).repeat(batch, 1) if index is None else index
    return Signals(original=original or tokens, index=index, decoder=Block(last_query=attention))


def test_the_mean_over_heads_decides() -> None:
    attention = torch.tensor([[[0.5, 0.1, 0.0, 0.2], [0.0, 0.1, 0.4, 0.3]]])  # means .25 .1 .2 .25
    assert FastV(keep=3).select(signals(attention)).indices[0].tolist() == [0, 2, 3]
    assert FastV(keep=1).select(signals(attention)).indices[0].tolist() == [0], "the lowest index wins a tie"


def test_tokens_are_named_by_their_original_index() -> None:
    attention = torch.tensor([[[0.1, 0.4, 0.2, 0.3]]])
    shown = signals(attention, index=torch.tensor([[2, 3, 11, 12]]), original=16)
    assert FastV(keep=2).select(shown).indices[0].tolist() == [3, 12]


def test_equal_scores_keep_the_lowest_indices() -> None:
    assert FastV(keep=3).select(signals(torch.full((1, 2, 6), 0.1))).indices[0].tolist() == [0, 1, 2]


def test_a_single_token_stays() -> None:
    assert FastV(keep=0.01).select(signals(torch.rand(1, 4, 1))).indices[0].tolist() == [0]


@pytest.mark.parametrize(
    ("keep", "original", "kept"),
    [(1 - 2 / 3, 576, 192), (1 - 8 / 9, 576, 64), (0.5, 5, 2), (0.5, 7, 4), (0.001, 576, 1), (1.0, 7, 7), (7, 7, 7)],
)
def test_shares_round_half_to_even(keep: float, original: int, kept: int) -> None:
    assert FastV(keep=keep).count(original) == (kept,)


def test_the_first_blocks_run_in_full() -> None:
    assert FastV().depths(32) == (2,)
    assert FastV(layer=3).depths(4) == (3,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FastV(layer=0), "FastV: layer=0 is below 1"),
        (lambda: FastV(layer=True), "FastV: layer=True is no whole number"),
        (lambda: FastV(layer=2.0), "FastV: layer=2.0 is no whole number"),  # type: ignore[arg-type]
        (lambda: FastV(keep=0), "keep=0 is below 1 token"),
        (lambda: FastV(layer=32).depths(32), r"FastV: layer=32 is outside 1\.\.31 of a decoder of 32 blocks"),
        (lambda: FastV(keep=9).count(8), "keep=9 asks for 9 tokens but the image has 8 tokens"),
    ],
)
def test_what_cannot_be_is_refused(make: object, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        make()  # type: ignore[operator]


def test_more_than_an_earlier_stage_left_is_refused() -> None:
    shown = signals(torch.rand(1, 2, 4), index=torch.tensor([[0, 3, 5, 7]]), original=8)
    with pytest.raises(FoveateError, match="asks for 6 tokens but 4 of its 8 tokens are left"):
        FastV(keep=0.75).select(shown)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(FoveateError, match="1 of 3 scores are NaN or infinite"):
        FastV(keep=1).select(signals(torch.tensor([[[0.1, torch.nan, 0.2]]])))


def test_half_precision_ranks_as_its_values_do() -> None:
    attention = torch.rand(1, 4, 32).half()
    chosen = FastV(keep=8).select(signals(attention)).indices[0]
    assert torch.equal(chosen, FastV(keep=8).select(signals(attention.float())).indices[0])


def test_a_spec_survives_the_round_trip() -> None:
    for method in (FastV(), FastV(keep=64, layer=3), FastV(keep=1.0)):
        assert parse(format_spec(method)) == method


@given(st.data())
def test_exactly_count_tokens_stay_ascending_and_rows_stand_alone(data: st.DataObject) -> None:
    batch, heads, tokens = (data.draw(st.integers(1, most)) for most in (3, 4, 12))
    keep = data.draw(st.one_of(st.integers(1, tokens), st.floats(0.01, 1.0)))
    values = st.lists(st.integers(0, 3), min_size=batch * heads * tokens, max_size=batch * heads * tokens)
    attention = torch.tensor(data.draw(values)).reshape(batch, heads, tokens) / 4
    method, shown = FastV(keep=keep), signals(attention)
    (selection,) = assert_rows_stand_alone(method, [shown])
    selection.check(tokens, batch, "fastv")
    assert {(len(kept),) for kept in selection.indices} == {method.count(tokens)}
    for kept, mean in zip(selection.indices, attention.sum(dim=1), strict=True):
        dropped = mean[~torch.isin(torch.arange(tokens), kept)]
        assert not len(dropped) or mean[kept].min() >= dropped.max()
