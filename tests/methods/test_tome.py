"""ToMe: hand-worked merges, the order inside the encoder and behind it, and what it takes and refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from models.batches import assert_rows_stand_alone
from torch import Tensor

from foveate.core import Block, FoveateError, Signals
from foveate.methods.tome import ToMe
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(degrees: list[float], *, cls: bool = False, **given: Any) -> Signals:
    """One image of tokens 0, 10, 20, ... whose keys (two equal heads) point to these degrees."""
    radians = torch.tensor(degrees).deg2rad()
    keys = torch.stack([radians.cos(), radians.sin()], dim=-1).expand(1, 2, -1, -1)
    count = len(degrees)
    hidden = 10.0 * torch.arange(count)[None, :, None]
    block = Block(hidden=hidden, keys=keys, cls=torch.ones(1, 1) if cls else None)
    fields = {"index": torch.arange(count)[None], "original": count, "size": torch.ones(1, count), **given}
    return Signals(tower={"latest": block}, **fields)


def values(rows: list[Tensor] | None) -> list[float]:
    assert rows is not None
    return rows[0].flatten().tolist()


def test_similar_patches_become_their_mean() -> None:
    """Even patches at 0, 50 and 90 degrees, odd ones at 10 and 85: patches 4 and 3 merge, where 3 stood."""
    answer = ToMe(keep=4).select(signals([0, 10, 50, 85, 90]))
    assert answer.indices[0].tolist() == [0, 1, 2, 3]
    assert values(answer.features) == [0, 10, 20, 35]
    assert answer.groups is not None and answer.groups[0].tolist() == [0, 1, 2, 3, 3]
    assert answer.ordered and answer.extra is None


def test_behind_cls_the_turns_begin_with_the_second_set() -> None:
    answer = ToMe(keep=4).select(signals([0, 50, 10, 85, 90], cls=True))
    assert answer.indices[0].tolist() == [0, 1, 2, 4]
    assert values(answer.features) == [0, 10, 20, 35]


def test_before_the_last_block_tokens_stand_as_in_the_code() -> None:
    """The rest of the first set, most similar first, then the second set."""
    answer = ToMe(r=1).select(signals([0, 10, 50, 85, 90], stages=2))
    assert answer.indices[0].tolist() == [0, 2, 1, 3]
    assert not answer.ordered
    assert answer.groups is not None and answer.groups[0].tolist() == [0, 2, 1, 3, 3]


def test_the_last_block_puts_them_back_into_raster_order() -> None:
    index = torch.tensor([[0, 4, 1, 3]])
    answer = ToMe(r=1).select(signals([0, 80, 5, 90], index=index, original=5, stage=1, stages=2))
    assert answer.indices[0].tolist() == [0, 3, 4]
    assert answer.groups is not None and answer.groups[0].tolist() == [0, 2, 2, 1]
    nothing = ToMe(r=0).select(signals([0, 80, 5, 90], index=index, original=5, stage=1, stages=2))
    assert nothing.indices[0].tolist() == [0, 1, 3, 4] and nothing.features is None and nothing.ordered


def test_a_block_that_merges_nothing_changes_nothing() -> None:
    for stage in (0, 1):
        answer = ToMe(keep=1.0).select(signals([0, 10, 20], stage=stage, stages=2))
        assert answer.indices[0].tolist() == [0, 1, 2]
        assert answer.features is None and answer.groups is None
        assert answer.ordered == (stage == 1), "an order is promised by the last block alone, which restores it"
    index = torch.tensor([[2, 0, 1]])
    answer = ToMe(r=0).select(signals([0, 10, 20], index=index, stages=2))
    assert answer.indices[0].tolist() == [2, 0, 1] and not answer.ordered


def test_sizes_weigh_the_mean() -> None:
    size = torch.tensor([[3.0, 1, 1, 1]])
    answer = ToMe(keep=3).select(signals([0, 1, 50, 90], size=size))
    assert values(answer.features) == [(0 * 3 + 10) / 4, 20, 30]


def test_a_row_in_a_batch_is_the_row_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    block = Block(
        hidden=torch.randn(3, 20, 4, generator=generator),
        keys=torch.randn(3, 2, 20, 5, generator=generator),
        cls=torch.randn(3, 4, generator=generator),
    )
    index = torch.arange(20).expand(3, 20)
    seen = Signals(original=20, index=index, size=torch.ones(3, 20), tower={"latest": block}, stages=2)
    assert_rows_stand_alone(ToMe(keep=12), [seen, dataclasses.replace(seen, stage=1)])


def test_the_features_keep_their_precision() -> None:
    shown = signals([0, 10, 50, 85, 90])
    block = shown.tower["latest"]
    assert block.hidden is not None and block.keys is not None
    half = Block(hidden=block.hidden.bfloat16(), keys=block.keys.bfloat16())
    answer = ToMe(keep=4).select(dataclasses.replace(shown, tower={"latest": half}))
    assert answer.features is not None and answer.features[0].dtype == torch.bfloat16


def test_specs() -> None:
    assert ToMe() == ToMe(keep=0.5) == parse("tome")
    for method in (ToMe(keep=144), ToMe(r=16), ToMe(r=(4, 2)), ToMe(keep=0.25, proportional=False)):
        assert parse(format_spec(method)) == method
    assert format_spec(ToMe(r=(4, 2))) == "tome:r=4/2"


def test_refusals() -> None:
    with pytest.raises(FoveateError, match="ToMe: keep=4 and r=4; give one of them"):
        ToMe(keep=4, r=4)
    with pytest.raises(FoveateError, match="1 blocks that each merge away at most half reach 3 to 5"):
        ToMe(keep=2).select(signals([0, 10, 50, 85, 90]))
