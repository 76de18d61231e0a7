"""Scores read inside the decoder and from its cache: causal sums and windows against maps that are written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.core import FoveateError
from foveate.ops import scores
from foveate.ops.scores import causal_received, cls_similarity, rated, text_raters, window_attention
from foveate.ops.subsets import heavy_and_recent


def causal_map(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """(B, H, M, L) with the keys repeated for every query head."""
    repeated = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    new, length = queries.shape[2], keys.shape[2]
    mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
    return (queries @ repeated.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf).softmax(dim=-1)


@pytest.mark.parametrize(("heads", "shared", "new"), [(4, 4, 9), (4, 2, 9), (6, 1, 9), (4, 2, 3), (4, 2, 1)])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
def test_causal_sums_equal_those_of_the_map(
    heads: int, shared: int, new: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "CHUNK_VALUES", chunk)
    queries, keys = torch.randn(2, heads, new, 8), torch.randn(2, shared, 9, 8)
    expected = causal_map(queries, keys, 0.3).sum(dim=2).unflatten(1, (shared, -1)).mean(dim=2)
    received = causal_received(queries, keys, 0.3)
    torch.testing.assert_close(received, expected)
    torch.testing.assert_close(received.sum(dim=-1), torch.full((2, shared), float(new)))


def test_causal_sums_by_hand() -> None:
    """Equal logits: the first token gives itself 1, the second both a half, the third a third each."""
    received = causal_received(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), 1.0)
    torch.testing.assert_close(received, torch.tensor([[[11 / 6, 5 / 6, 1 / 3]]]))


def test_sums_of_later_queries_add_up() -> None:
    queries, keys = torch.randn(1, 4, 10, 8), torch.randn(1, 2, 10, 8)
    first = torch.nn.functional.pad(causal_received(queries[:, :, :6], keys[:, :, :6], 1.0), (0, 4))
    torch.testing.assert_close(
        first + causal_received(queries[:, :, 6:], keys, 1.0), causal_received(queries, keys, 1.0)
    )


@pytest.mark.parametrize("shared", [4, 2, 1])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_windows_equal_those_of_the_map(shared: int, kernel: int) -> None:
    queries, keys = torch.randn(2, 4, 3, 8), torch.randn(2, shared, 12, 8)
    looked_at = causal_map(queries, keys, 8**-0.5)[..., :9].sum(dim=2).unflatten(1, (shared, -1)).mean(dim=2)
    padded = torch.nn.functional.pad(looked_at, (kernel // 2, kernel // 2))
    expected = padded.unfold(-1, kernel, 1).mean(dim=-1)
    torch.testing.assert_close(window_attention(queries, keys, kernel), expected)


def test_half_precision_is_summed_in_float32() -> None:
    queries, keys = torch.randn(1, 4, 5, 8).bfloat16(), torch.randn(1, 2, 5, 8).bfloat16()
    assert causal_received(queries, keys, 1.0).dtype == torch.float32
    assert window_attention(queries[:, :, -1:], keys, 1).dtype == torch.float32


def test_every_head_keeps_its_heavy_entries_and_all_newer_ones() -> None:
    older = torch.tensor([[[1.0, 3, 2], [3, 1, 3]]])
    assert heavy_and_recent(older, 5, 1).tolist() == [[[1, 3, 4], [0, 3, 4]]]
    assert heavy_and_recent(older, 5, 2).tolist() == [[[1, 2, 3, 4], [0, 2, 3, 4]]], "all but one"
    assert heavy_and_recent(older, 5, 0).tolist() == [[[3, 4], [3, 4]]]
    assert heavy_and_recent(older, 5, 3).tolist() == [[[0, 1, 2, 3, 4]] * 2]
    assert heavy_and_recent(older[..., :0], 5, 0).tolist() == [[[0, 1, 2, 3, 4]] * 2]


@given(data=st.data(), count=st.integers(2, 9), newer=st.integers(0, 3))
def test_the_entry_that_leaves_is_the_last_of_the_lowest(data: st.DataObject, count: int, newer: int) -> None:
    """As a stable order from the highest to the lowest has it, also among equal scores."""
    scores = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    order = sorted(range(count), key=lambda slot: -scores[slot])
    expected = [*sorted(order[:-1]), *range(count, count + newer)]
    found = heavy_and_recent(torch.tensor([[scores]], dtype=torch.float32), count + newer, count - 1)
    assert found.tolist() == [[expected]]


def test_an_entry_leaves_only_by_numbers() -> None:
    with pytest.raises(FoveateError, match=r"1 of 3 scores are NaN"):
        heavy_and_recent(torch.tensor([[[1.0, torch.nan, 2.0]]]), 3, 2)


def test_raters_by_hand() -> None:
    """Row 0: shares 1/2 and 1/2 of each, none above the mean; row 1: e / (e + 1) of the first."""
    features = torch.tensor([[[1.0, 0]], [[1.0, 0]]])
    text = torch.tensor([[[0.0, 3], [0, 5], [9, 9]], [[1.0, 0], [0, 1], [9, 9]]])
    mask = torch.tensor([[True, True, False]] * 2)
    assert text_raters(features, text, mask).tolist() == [[True, True, False], [True, False, False]]


def test_visual_tokens_vote_with_equal_weight() -> None:
    """Shares of the first word: 0.9 from one visual token, 0.45 from two; the mean of 0.6 is above a half."""
    odds = torch.tensor([[9.0], [9 / 11], [9 / 11]]).log()
    chosen = text_raters(odds[None], torch.tensor([[[1.0], [0.0]]]), torch.ones(1, 2, dtype=torch.bool))
    assert chosen.tolist() == [[True, False]]


def test_ratings_by_hand() -> None:
    attention = torch.tensor([[[[0.1, 0.2], [0.3, 0.5], [torch.nan, torch.nan]], [[0.3, 0.0], [0.1, 0.1], [9.0, 9.0]]]])
    raters = torch.tensor([[True, True, False]])
    torch.testing.assert_close(rated(attention, raters), torch.tensor([[0.2, 0.2]]))
    torch.testing.assert_close(rated(attention, torch.tensor([[False, True, False]])), torch.tensor([[0.2, 0.3]]))


def test_similarity_by_hand() -> None:
    """Products with CLS 2 ln 3 and 0 over the root of 4: weights 3 and 1."""
    hidden = torch.zeros(1, 2, 4)
    hidden[0, 0, 0] = 2 * torch.tensor(3.0).log()
    similarity = cls_similarity(hidden, torch.tensor([[1.0, 5, 5, 5]]))
    torch.testing.assert_close(similarity, torch.tensor([[0.75, 0.25]]))
