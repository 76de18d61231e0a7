"""PyramidDrop: its counts and depths as published, hand-worked stages, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.batches import assert_rows_stand_alone
from torch import Tensor

from foveate.core import Block, FoveateError, Signals
from foveate.methods.pyramiddrop import PyramidDrop
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(attention: Tensor, index: Tensor, original: int, stage: int) -> Signals:
    return Signals(original=original, index=index, stage=stage, decoder=Block(next_query=attention))


def test_counts_are_of_the_original_tokens_and_round_down() -> None:
    assert PyramidDrop().count(576) == (288, 144, 72)
    assert PyramidDrop(keep=(1 / 3, 1 / 6, 1 / 9)).count(576) == (192, 96, 64)
    assert PyramidDrop().count(15) == (7, 3, 1)
    assert PyramidDrop().count(3) == (1, 1, 1), "one token stays even where a share rounds down to none"
    assert PyramidDrop(keep=(100, 50, 50)).count(576) == (100, 50, 50)


@pytest.mark.parametrize(
    ("layers", "depths"), [(32, (8, 16, 24)), (40, (10, 20, 30)), (28, (7, 14, 21)), (6, (2, 3, 4)), (4, (1, 2, 3))]
)
def test_the_depths_scale_with_the_decoder(layers: int, depths: tuple[int, ...]) -> None:
    assert PyramidDrop().depths(layers) == depths


def test_given_depths_are_taken_as_they_are() -> None:
    assert PyramidDrop(layers=(1, 5), keep=(0.5, 0.1)).depths(6) == (1, 5)


def test_each_stage_ranks_what_the_one_before_left() -> None:
    method = PyramidDrop(layers=(1, 2), keep=(0.5, 0.25))
    first = signals(torch.tensor([[[1.0, 8, 2, 7, 3, 6, 4, 5]]]), torch.arange(8)[None], 8, 0)
    assert method.select(first).indices[0].tolist() == [1, 3, 5, 7]
    second = signals(torch.tensor([[[0.0, 1, 3, 2], [2.0, 2, 2, 2]]]), torch.tensor([[1, 3, 5, 7]]), 8, 1)
    assert method.select(second).indices[0].tolist() == [5, 7]


def test_equal_scores_keep_the_lowest_indices() -> None:
    shown = signals(torch.zeros(1, 2, 8), torch.arange(8)[None], 8, 0)
    assert PyramidDrop().select(shown).indices[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PyramidDrop(keep=(0.25, 0.5, 0.1)), r"rises from 0\.25 to 0\.5; the most is 0\.25"),
        (lambda: PyramidDrop(keep=(64, 65, 1)), "rises from 64 to 65"),
        (lambda: PyramidDrop(keep=(0.5, 0.25)), r"2 budgets \(0\.5, 0\.25\) for 3 layers; the paper's layers are"),
        (lambda: PyramidDrop(layers=(8, 16)), r"3 budgets .* for 2 layers$"),
        (lambda: PyramidDrop(layers=(8, 8, 9)), r"layers \(8, 8, 9\) do not rise strictly; nearest: \(8, 9\)"),
        (lambda: PyramidDrop(layers=(0, 1, 2)), "layer=0 is below 1"),
        (lambda: PyramidDrop(keep=(0.5, 0.25, 1.5)), r"keep of stage 2=1\.5 is no share"),
        (lambda: PyramidDrop(keep=(0.5, 300, 100)).count(576), "keep=300 asks for 300 tokens but 288 of its 576"),
        (lambda: PyramidDrop(layers=(1, 2, 9)).depths(8), r"layer=9 is outside 1\.\.7 of a decoder of 8 blocks"),
        (lambda: PyramidDrop().depths(3), "3 stages need a decoder of at least 4 blocks, not 3"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        make()


def test_more_than_an_earlier_method_left_is_refused() -> None:
    shown = signals(torch.rand(1, 2, 3), torch.tensor([[0, 3, 5]]), 8, 0)
    with pytest.raises(FoveateError, match="asks for 4 tokens but 3 of its 8 tokens are left"):
        PyramidDrop().select(shown)


def test_a_spec_survives_the_round_trip() -> None:
    for method in (PyramidDrop(), PyramidDrop(layers=(2,), keep=(64,)), PyramidDrop(keep=(1.0, 0.5, 3))):
        assert parse(format_spec(method)) == method


@given(st.data())
def test_exactly_count_tokens_stay_ascending_and_rows_stand_alone(data: st.DataObject) -> None:
    batch, heads, tokens = (data.draw(st.integers(1, most)) for most in (3, 4, 20))
    shares = tuple(sorted(data.draw(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=3)), reverse=True))
    method = PyramidDrop(layers=tuple(range(1, len(shares) + 1)), keep=shares)
    counts = method.count(tokens)
    assert counts is not None
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    index = torch.arange(tokens).repeat(batch, 1)
    for stage, count in enumerate(counts):
        attention = torch.randint(0, 4, (batch, heads, index.shape[1]), generator=generator) / 4
        (selection,) = assert_rows_stand_alone(method, [signals(attention, index, tokens, stage)])
        selection.check(tokens, batch, "pyramiddrop")
        assert [len(kept) for kept in selection.indices] == [count] * batch
        assert all(torch.isin(kept, row).all() for kept, row in zip(selection.indices, index, strict=True))
        index = torch.stack(selection.indices)
