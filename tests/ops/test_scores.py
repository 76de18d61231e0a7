"""Sums over attention maps that are never kept, against the maps themselves in float64 and against numbers by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.core import FoveateError
from foveate.ops import scores
from foveate.ops.scores import attention_sums, less_dispersed, more_dispersed, row_attention, unsplit_cls_attention
from foveate.ops.subsets import descending

LN2 = math.log(2.0)


def explicit(queries: Tensor, keys: Tensor, scale: float, skip: int) -> dict[str, Tensor]:
    """The three vectors read off the whole map, (B, H, skip + N, skip + N) in float64."""
    scaled = torch.einsum("bhmd,bhnd->bhmn", queries.double(), keys.double()) * scale
    mean = scaled.softmax(dim=-1).mean(dim=1)
    patches = mean[:, skip:, skip:]
    return {
        "received": patches.mean(dim=1),
        "given": patches.mean(dim=2),
        "received_all": mean[:, :, skip:].mean(dim=1),
    }


def heads(*values: list[float]) -> Tensor:
    """(1, H, N, 1) queries or keys of width 1."""
    return torch.tensor(values)[None, :, :, None]


def drawn(batch: int, count: int, tokens: int, width: int, seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = torch.randn(2, batch, count, tokens, width, generator=generator) * spread
    return queries, keys


# ---------------------------------------------------------------------------------------------------------------------
# by hand


def test_two_patches_without_cls() -> None:
    # Query 0 looks at both alike; query 1 gives 1/3 and 2/3.
    sums = attention_sums(heads([0.0, 1.0]), heads([0.0, LN2]), scale=1.0)
    assert sums.received.tolist() == [pytest.approx([5 / 12, 7 / 12])]
    assert sums.given.tolist() == [pytest.approx([1 / 2, 1 / 2])]  # each row sums to 1: nothing to tell apart
    assert sums.received_all.tolist() == [pytest.approx([5 / 12, 7 / 12])]


def test_two_patches_behind_cls() -> None:
    # Rows of the map: CLS 1/4 1/4 1/2, first patch 1/3 1/3 1/3, second patch 1/4 1/4 1/2.
    sums = attention_sums(heads([1.0, 0.0, 1.0]), heads([0.0, 0.0, LN2]), scale=1.0, skip=1)
    assert sums.received.tolist() == [pytest.approx([7 / 24, 5 / 12])]
    assert sums.given.tolist() == [pytest.approx([1 / 3, 3 / 8])]
    assert sums.received_all.tolist() == [pytest.approx([5 / 18, 4 / 9])]


def test_heads_are_averaged() -> None:
    # The second head looks everywhere alike.
    sums = attention_sums(heads([1.0, 0.0, 1.0], [0.0] * 3), heads([0.0, 0.0, LN2], [5.0] * 3), scale=1.0, skip=1)
    assert sums.received.tolist() == [pytest.approx([(7 / 24 + 1 / 3) / 2, (5 / 12 + 1 / 3) / 2])]
    assert sums.given.tolist() == [pytest.approx([1 / 3, (3 / 8 + 1 / 3) / 2])]


def test_the_scale_multiplies_the_logits() -> None:
    doubled = attention_sums(heads([0.0, 2.0]), heads([0.0, LN2]), scale=0.5)
    assert doubled.received.tolist() == [pytest.approx([5 / 12, 7 / 12])]


def test_row_attention_by_hand() -> None:
    rows = row_attention(heads([1.0, 0.0]), heads([0.0, 0.0, LN2]), scale=1.0)
    assert rows.shape == (1, 1, 2, 3)
    assert rows[0, 0].tolist() == [pytest.approx([1 / 4, 1 / 4, 1 / 2]), pytest.approx([1 / 3] * 3)]


# ---------------------------------------------------------------------------------------------------------------------
# against the whole map


@given(
    batch=st.integers(1, 3),
    count=st.integers(1, 3),
    tokens=st.integers(1, 17),
    width=st.integers(1, 5),
    skip=st.integers(0, 2),
    rows=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_sums_in_chunks_equal_the_sums_of_the_map(
    batch: int, count: int, tokens: int, width: int, skip: int, rows: int, seed: int
) -> None:
    queries, keys = drawn(batch, count, skip + tokens, width, seed)
    with pytest.MonkeyPatch.context() as patch:
        # rows = 0: even a single row is above the limit, and one row at a time it is.
        patch.setattr(scores, "CHUNK_VALUES", rows * batch * count * (skip + tokens))
        sums = attention_sums(queries, keys, scale=width**-0.5, skip=skip)
    for name, wanted in explicit(queries, keys, width**-0.5, skip).items():
        found = getattr(sums, name)
        assert found.shape == (batch, tokens)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("rows", [1, 7, 100, 10**6])
def test_a_grid_of_the_real_size(rows: int, skip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = drawn(2, 3, skip + 144, 16)
    monkeypatch.setattr(scores, "CHUNK_VALUES", rows * 2 * 3 * (skip + 144))
    sums = attention_sums(queries, keys, 0.25, skip)
    for name, wanted in explicit(queries, keys, 0.25, skip).items():
        torch.testing.assert_close(getattr(sums, name).double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("skip", [0, 1])
def test_huge_logits_do_not_overflow(skip: int) -> None:
    queries, keys = drawn(1, 2, skip + 30, 8, spread=100.0)
    sums = attention_sums(queries, keys, 1.0, skip)
    for name, wanted in explicit(queries, keys, 1.0, skip).items():
        torch.testing.assert_close(getattr(sums, name).double(), wanted, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("spread", "subtracted"), [(2.0, False), (9.0, True)])
def test_the_maximum_is_taken_away_where_it_must_be(
    spread: float, subtracted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the lengths of queries and keys: where no exponential can be large, the sums are the same without."""
    queries, keys = drawn(1, 2, 30, 8, spread=spread)
    assert scores._bounded(queries, keys, 8**-0.5) is not subtracted
    sums = attention_sums(queries, keys, 8**-0.5, skip=1)
    monkeypatch.setattr(scores, "HARMLESS", 0.0)
    either = attention_sums(queries, keys, 8**-0.5, skip=1)
    for name in ("received", "given", "received_all"):
        torch.testing.assert_close(getattr(sums, name), getattr(either, name), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-3), (torch.float16, 1e-3), (torch.float64, 1e-6)])
def test_other_precisions_are_summed_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    queries, keys = (tensor.to(dtype) for tensor in drawn(2, 2, 41, 8, spread=1.0))
    sums = attention_sums(queries, keys, 8**-0.5, skip=1)
    for name, wanted in explicit(queries, keys, 8**-0.5, 1).items():
        assert getattr(sums, name).dtype == torch.float32
        torch.testing.assert_close(getattr(sums, name).double(), wanted, rtol=0, atol=tolerance)


def test_the_inputs_stay_as_they_are() -> None:
    queries, keys = drawn(1, 2, 20, 4)
    before = queries.clone(), keys.clone()
    attention_sums(queries, keys, 1.0, skip=1)
    row_attention(queries[:, :, :1], keys, 1.0)
    assert torch.equal(queries, before[0]) and torch.equal(keys, before[1])


@given(tokens=st.integers(1, 12), skip=st.integers(0, 1), seed=st.integers(0, 1000))
def test_what_is_given_is_received(tokens: int, skip: int, seed: int) -> None:
    sums = attention_sums(*drawn(2, 2, skip + tokens, 3, seed), 1.0, skip)
    torch.testing.assert_close(sums.received.sum(dim=-1), sums.given.sum(dim=-1))
    if not skip:
        torch.testing.assert_close(sums.received.sum(dim=-1), torch.ones(2))
        torch.testing.assert_close(sums.given, torch.full((2, tokens), 1 / tokens))
        torch.testing.assert_close(sums.received, sums.received_all)


@given(data=st.data(), skip=st.integers(0, 1), seed=st.integers(0, 1000))
def test_moving_the_patches_moves_their_sums(data: st.DataObject, skip: int, seed: int) -> None:
    tokens = data.draw(st.integers(1, 12))
    queries, keys = drawn(1, 2, skip + tokens, 3, seed)
    patches = torch.tensor(data.draw(st.permutations(range(tokens))))
    moved = torch.cat([torch.arange(skip), skip + patches])
    before = attention_sums(queries, keys, 1.0, skip)
    after = attention_sums(queries[:, :, moved], keys[:, :, moved], 1.0, skip)
    for name in ("received", "given", "received_all"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name)[:, patches], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 500, 1 << 24])
def test_an_image_in_a_batch_scores_as_it_does_alone(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "CHUNK_VALUES", chunk)
    queries, keys = drawn(4, 3, 26, 8)
    batch = attention_sums(queries, keys, 0.35, skip=1)
    for image in range(4):
        alone = attention_sums(queries[image : image + 1], keys[image : image + 1], 0.35, skip=1)
        for name in ("received", "given", "received_all"):
            torch.testing.assert_close(getattr(batch, name)[image], getattr(alone, name)[0], rtol=1e-5, atol=1e-7)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    padding=st.integers(0, 3),
    skip=st.integers(0, 1),
    rows=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_padding_neither_gives_nor_receives(lengths: list[int], padding: int, skip: int, rows: int, seed: int) -> None:
    total = skip + max(lengths) + padding
    queries, keys = drawn(len(lengths), 2, total, 3, seed)
    valid = torch.arange(total) < torch.tensor(lengths)[:, None] + skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "CHUNK_VALUES", rows * len(lengths) * 2 * total)
        padded = attention_sums(queries, keys, 0.6, skip, valid)
    for image, length in enumerate(lengths):
        one, own = slice(image, image + 1), slice(0, skip + length)
        alone = explicit(queries[one, :, own], keys[one, :, own], 0.6, skip)
        for name, wanted in alone.items():
            found = getattr(padded, name)[one].double()
            torch.testing.assert_close(found[:, :length], wanted, rtol=1e-5, atol=1e-6)
            assert torch.equal(found[:, length:], torch.zeros(1, total - skip - length, dtype=torch.float64))
        row = row_attention(queries[one, :, :1], keys[one], 0.6, valid[one])
        torch.testing.assert_close(row[..., own], row_attention(queries[one, :, :1], keys[one, :, own], 0.6))
        assert row[..., skip + length :].sum() == 0


@given(tokens=st.integers(1, 20), asking=st.integers(1, 4), seed=st.integers(0, 1000))
def test_row_attention_is_rows_of_the_map(tokens: int, asking: int, seed: int) -> None:
    queries, keys = drawn(2, 3, tokens + asking, 4, seed)
    rows = row_attention(queries[:, :, :asking].half().float(), keys[:, :, :tokens], 0.5)
    whole = torch.einsum("bhmd,bhnd->bhmn", queries[:, :, :asking].half().double(), keys[:, :, :tokens].double())
    torch.testing.assert_close(rows.double(), (whole * 0.5).softmax(dim=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_activation_does_not_pass_for_a_score(bad: float) -> None:
    queries, keys = drawn(1, 2, 9, 4)
    keys[0, 1, 5, 2] = bad
    with pytest.raises(FoveateError, match="scores are NaN or infinite"):
        descending(attention_sums(queries, keys, 1.0, skip=1).received)


# ---------------------------------------------------------------------------------------------------------------------
# memory


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(
        self, operation: Callable[..., Any], types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = operation(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.values = max(self.values, tensor.numel())
        return result


@pytest.mark.parametrize("skip", [0, 1])
def test_no_tensor_grows_with_the_square_of_the_tokens(skip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count, width, limit = 2, 4, 100_000
    monkeypatch.setattr(scores, "CHUNK_VALUES", limit)
    for tokens in (500, 2000):
        queries, keys = drawn(1, count, skip + tokens, width)
        with Largest() as largest:
            attention_sums(queries, keys, 0.5, skip)
        assert count * tokens <= largest.values <= limit < count * tokens**2


def test_at_least_a_row_is_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "CHUNK_VALUES", 1)
    queries, keys = drawn(2, 3, 50, 1)
    with Largest() as largest:
        attention_sums(queries, keys, 1.0)
    assert largest.values == 2 * 3 * 50


def test_the_watch_sees_a_whole_map() -> None:
    queries, keys = drawn(1, 2, 50, 4)
    with Largest() as largest:
        explicit(queries, keys, 1.0, 0)
    assert largest.values == 2 * 50 * 50


# ---------------------------------------------------------------------------------------------------------------------
# variance


FLAT, MILD, WILD = [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], [0.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("first", "second", "more"),
    [
        (WILD, MILD, WILD),
        (MILD, WILD, WILD),
        (FLAT, MILD, MILD),
        (MILD, [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]),  # a tie goes to the second, as equation 4 prints it
        (FLAT, [5.0, 5.0, 5.0], [5.0, 5.0, 5.0]),
        ([100.0, 100.0, 101.0], MILD, MILD),  # the mean does not count
    ],
)
def test_the_vector_that_varies_more(first: list[float], second: list[float], more: list[float]) -> None:
    less = first if more == second else second
    assert more_dispersed(torch.tensor([first]), torch.tensor([second])).tolist() == [more]
    assert less_dispersed(torch.tensor([first]), torch.tensor([second])).tolist() == [less]


def test_each_image_has_its_own_choice() -> None:
    first, second = torch.tensor([WILD, MILD, FLAT]), torch.tensor([MILD, WILD, FLAT])
    assert more_dispersed(first, second).tolist() == [WILD, WILD, FLAT]
    assert less_dispersed(first, second).tolist() == [MILD, MILD, FLAT]


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 1000))
def test_one_vector_is_chosen_and_the_other_rejected(batch: int, tokens: int, seed: int) -> None:
    first, second = torch.rand(2, batch, tokens, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    more, less = more_dispersed(first, second), less_dispersed(first, second)
    for row in range(batch):
        pair = sorted([first[row].tolist(), second[row].tolist()])
        assert sorted([more[row].tolist(), less[row].tolist()]) == pair
        assert more[row].var(unbiased=False) >= less[row].var(unbiased=False)


# ---------------------------------------------------------------------------------------------------------------------
# CLS attention at full width


def test_the_heads_of_cls_are_not_split() -> None:
    """Two heads of width 2, scale 1 / sqrt(4): logits 0 for CLS, ln 2 and ln 4 for the patches."""
    query = torch.tensor([[[2 * LN2, 0.0], [0.0, 2 * LN2]]])
    keys = torch.tensor([[[[1.0, 5.0], [1.0, 5.0]], [[5.0, 0.0], [5.0, 1.0]]]])
    found = unsplit_cls_attention(query, torch.zeros(1, 2, 2), keys)
    torch.testing.assert_close(found.exp(), torch.tensor([[2 / 7, 4 / 7]]))


def test_full_width_attention_is_that_of_one_head_of_all_widths() -> None:
    generator = torch.Generator().manual_seed(0)
    query, own, keys = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 4), (2, 3, 4), (2, 3, 9, 4)))
    wide = keys.transpose(1, 2).flatten(2)[:, None]
    whole = torch.cat([own.flatten(1)[:, None, None], wide], dim=2)
    expected = row_attention(query.flatten(1)[:, None, None], whole, 12**-0.5)[:, 0, 0, 1:]
    torch.testing.assert_close(unsplit_cls_attention(query, own, keys).exp(), expected)


def test_full_width_attention_survives_extreme_logits() -> None:
    keys = torch.tensor([[[[1e4], [-1e4], [0.0]]]])
    found = unsplit_cls_attention(torch.tensor([[[1e2]]]), torch.zeros(1, 1, 1), keys)
    assert found.isfinite().all()
    assert found.argmax() == 0


def test_a_bias_weighs_keys_as_if_they_stood_there_several_times() -> None:
    """The log of n added to a key's logits is that key n times, for what it receives and what it takes from others."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 1, 2, 4, 3, generator=generator)
    bias = torch.tensor([[0.0, 0.0, math.log(3), 0.0]])
    repeated = torch.cat([keys, keys[:, :, 2:3], keys[:, :, 2:3]], dim=2)
    several = torch.softmax(queries @ repeated.transpose(-1, -2), dim=-1)
    single = several[..., :4].clone()
    single[..., 2] += several[..., 4:].sum(dim=-1)
    sums = attention_sums(queries, keys, 1.0, skip=1, bias=bias)
    torch.testing.assert_close(sums.received, single.mean(dim=1)[:, 1:, 1:].mean(dim=1))
    torch.testing.assert_close(sums.given, single.mean(dim=1)[:, 1:, 1:].sum(dim=2) / 3)
    torch.testing.assert_close(sums.received_all, single.mean(dim=1)[:, :, 1:].mean(dim=1))
    torch.testing.assert_close(row_attention(queries[:, :, :1], keys, 1.0, bias=bias), single[:, :, :1])
