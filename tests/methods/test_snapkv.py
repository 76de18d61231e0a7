"""SnapKV: hand-worked windows, a written-out reference with shared KV heads, its budgets and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.batches import assert_rows_stand_alone
from torch import Tensor

from foveate.core import CacheBlock, FoveateError, Signals
from foveate.methods.snapkv import SnapKV
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(queries: Tensor, keys: Tensor, age: Tensor | None = None) -> Signals:
    age = torch.arange(keys.shape[2]).expand(keys.shape[:3]) if age is None else age
    cache = CacheBlock(keys=keys, window_queries=queries, age=age, prompt_length=keys.shape[2])
    return Signals(original=1, index=torch.zeros(keys.shape[0], 1, dtype=torch.int64), cache=cache)


def reference(queries: Tensor, keys: Tensor, chosen: int, window: int, kernel: int) -> list[int]:
    """Positions that stay for one KV head and its query heads (G, w, d), written out entry by entry."""
    length, width = keys.shape
    looked_at = [0.0] * (length - window)
    for head in queries:
        for place, query in enumerate(head[-window:]):
            seen = length - window + place + 1
            shares = (keys[:seen] @ query / math.sqrt(width)).softmax(dim=0).tolist()
            for entry in range(length - window):
                looked_at[entry] += shares[entry] / len(queries)
    half = kernel // 2
    padded = [0.0] * half + looked_at + [0.0] * half
    pooled = [sum(padded[entry : entry + kernel]) / kernel for entry in range(length - window)]
    best = sorted(range(length - window), key=lambda entry: -pooled[entry])[:chosen]
    return sorted(best) + list(range(length - window, length))


def test_what_the_window_looks_at_stays_with_the_window() -> None:
    keys = torch.tensor([0.0, 3, 0, 2, 0, 0]).reshape(1, 1, 6, 1)
    shown = signals(torch.ones(1, 1, 1, 1), keys)
    assert SnapKV(capacity=2, window=1, kernel=1).select(shown).positions.tolist() == [[[1, 5]]]
    assert SnapKV(capacity=3, window=1, kernel=1).select(shown).positions.tolist() == [[[1, 3, 5]]]


def test_neighbours_share_their_scores() -> None:
    """Entry 2 stands between the two that are looked at, and has the highest mean of three."""
    keys = torch.tensor([0.0, 3, 0, 3, 0, 0, 0]).reshape(1, 1, 7, 1)
    shown = signals(torch.ones(1, 1, 1, 1), keys)
    assert SnapKV(capacity=2, window=1, kernel=3).select(shown).positions.tolist() == [[[2, 6]]]


def test_query_heads_that_share_a_kv_head_are_averaged() -> None:
    """The first query head looks a little more at entry 0, the second much more at entry 1."""
    keys = torch.tensor([[1.0, 0], [0, 1], [0, 0], [0, 0]]).reshape(1, 1, 4, 2)
    queries = torch.tensor([[[0.5, 0.0]], [[0.0, 3.0]]]).reshape(1, 2, 1, 2)
    method = SnapKV(capacity=2, window=1, kernel=1)
    assert method.select(signals(queries, keys)).positions.tolist() == [[[1, 3]]]
    repeated = method.select(signals(queries, keys.expand(1, 2, 4, 2))).positions
    assert repeated.tolist() == [[[0, 3], [1, 3]]], "heads of their own decide for themselves"


def test_only_the_last_queries_of_what_was_seen_look() -> None:
    keys = torch.tensor([[5.0, 0], [0, 5], [0, 0], [0, 0]]).reshape(1, 1, 4, 2)
    queries = torch.tensor([[9.0, 0], [0, 1]]).reshape(1, 1, 2, 2)
    assert SnapKV(capacity=2, window=1, kernel=1).select(signals(queries, keys)).positions.tolist() == [[[1, 3]]]


def test_equal_scores_keep_the_oldest_and_positions_are_those_of_the_timeline() -> None:
    age = torch.tensor([[[4, 5, 9, 11, 12]]])
    shown = signals(torch.zeros(1, 2, 2, 3), torch.rand(1, 1, 5, 3), age)
    assert SnapKV(capacity=4, window=2, kernel=1).select(shown).positions.tolist() == [[[4, 5, 11, 12]]]


def test_a_prompt_that_fits_is_left_alone() -> None:
    shown = signals(torch.rand(1, 2, 3, 4), torch.rand(1, 2, 8, 4))
    for method in (SnapKV(capacity=2048), SnapKV(capacity=8, window=3), SnapKV(capacity=1.0, window=3)):
        assert method.select(shown).positions.tolist() == [[list(range(8))] * 2]


@pytest.mark.parametrize(
    ("method", "prompt", "budget"),
    [
        (SnapKV(), 636, (127, 32)),
        (SnapKV(capacity=224), 636, (192, 32)),
        (SnapKV(capacity=0.5, window=8), 33, (8, 8)),
        (SnapKV(capacity=0.5, window=16), 33, (8, 8)),  # a window of 16 would leave nothing else: half
        (SnapKV(capacity=0.5, window=15), 33, (1, 15)),
        (SnapKV(capacity=0.01), 30, (0, 1)),
        (SnapKV(capacity=0.1), 30, (2, 1)),
    ],
)
def test_shares_are_of_the_prompt_and_round_down(method: SnapKV, prompt: int, budget: tuple[int, int]) -> None:
    assert method.budget(prompt) == budget


def test_no_token_leaves_before_the_cache() -> None:
    assert SnapKV().count(576) == () and SnapKV().depths(32) == () and SnapKV.when == "prefill"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SnapKV(capacity=32), "capacity=32 does not hold window=32 .* the least is capacity=33"),
        (lambda: SnapKV(capacity=0.0), r"capacity=0\.0 is no share"),
        (lambda: SnapKV(window=0), "window=0 is no whole number from 1"),
        (lambda: SnapKV(kernel=4), "kernel=4 is even; the nearest odd ones are 3 and 5"),
        (lambda: SnapKV(kernel=True), "kernel=True is no whole number"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        make()


def test_a_spec_survives_the_round_trip() -> None:
    for method in (SnapKV(), SnapKV(capacity=224, window=16, kernel=7)):
        assert parse(format_spec(method)) == method


@given(st.data())
def test_every_head_keeps_what_the_written_out_reference_keeps(data: st.DataObject) -> None:
    batch, heads, group, width = (data.draw(st.integers(1, most)) for most in (2, 2, 3, 4))
    length = data.draw(st.integers(2, 14))
    window = data.draw(st.integers(1, length - 1))
    kernel = data.draw(st.sampled_from([1, 3, 5]))
    method = SnapKV(capacity=data.draw(st.integers(window + 1, length)), window=window, kernel=kernel)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    queries = torch.randn(batch, heads * group, window, width, generator=generator)
    keys = torch.randn(batch, heads, length, width, generator=generator)
    (kept,) = assert_rows_stand_alone(method, [signals(queries, keys)])
    chosen, _ = method.budget(length)
    for row in range(batch):
        for head in range(heads):
            own = queries[row, head * group : (head + 1) * group].double()
            expected = reference(own, keys[row, head].double(), chosen, window, kernel)
            assert kept.positions[row, head].tolist() == expected
