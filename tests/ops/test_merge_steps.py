"""Merge steps of ToMe and CrossGET: hand-worked pairs, weights and ties, and loops over tokens on random ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from references import merging_by_hand
from references.merging_by_hand import Token
from torch import Tensor

from foveate.core import FoveateError
from foveate.ops import merging
from foveate.ops.merging import (
    Matching,
    bipartite_merge,
    complete_matching,
    ensemble_merge,
    in_raster_order,
    similarity_rank,
)


def angles(*degrees: float) -> Tensor:
    """(1, N, 2) unit vectors."""
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=-1)[None]


def numbers(*values: float) -> Tensor:
    """(1, N, 1)."""
    return torch.tensor(values, dtype=torch.float32)[None, :, None]


def ones(count: int) -> Tensor:
    return torch.ones(1, count)


# ---------------------------------------------------------------------------------------------------------------------
# ToMe


def test_the_most_similar_pair_merges() -> None:
    """Even tokens at 0, 50 and 90 degrees look at odd ones at 10 and 85: 90 is 5 from 85, 0 is 10 from 10."""
    metric = angles(0, 10, 50, 85, 90)
    merged = bipartite_merge(numbers(1, 2, 3, 4, 5), metric, ones(5), 1)
    # What stays of the even ones stands by falling similarity: 0 (10 degrees away) before 50 (35 away).
    assert merged.representative.tolist() == [[0, 2, 1, 3]]
    assert merged.features.flatten().tolist() == [1, 3, 2, 4.5]
    assert merged.size.tolist() == [[1, 1, 1, 2]]
    assert merged.group.tolist() == [[0, 2, 1, 3, 3]]


def test_behind_cls_the_others_may_merge_and_keep_their_order() -> None:
    """Token 0 is the second in the row: tokens 1 and 3 have edges, to 0, 2 and 4."""
    merged = bipartite_merge(numbers(1, 2, 3, 4, 5), angles(0, 50, 10, 85, 90), ones(5), 1, behind_cls=True)
    assert merged.representative.tolist() == [[1, 0, 2, 4]]
    assert merged.features.flatten().tolist() == [2, 1, 3, 4.5]
    assert merged.group.tolist() == [[1, 0, 2, 3, 3]]


def test_means_are_weighted_by_size_and_several_may_join() -> None:
    metric = angles(0, 1, 2, 90)
    merged = bipartite_merge(numbers(8, 2, 5, 0), metric, torch.tensor([[3.0, 1, 2, 1]]), 2)
    assert merged.representative.tolist() == [[1, 3]]
    assert merged.features.flatten().tolist() == [(8 * 3 + 2 + 5 * 2) / 6, 0]
    assert merged.size.tolist() == [[6, 1]]
    assert merged.group.tolist() == [[0, 0, 0, 1]]


def test_of_equal_similarities_the_first_counts() -> None:
    """All tokens alike: the first even token merges into the first odd one."""
    merged = bipartite_merge(numbers(*range(6)), angles(*[30.0] * 6), ones(6), 1)
    assert merged.group.tolist() == [[2, 2, 0, 3, 1, 4]]


def test_nothing_to_merge_leaves_every_bit() -> None:
    tokens = torch.randn(2, 5, 3).bfloat16()
    merged = bipartite_merge(tokens, torch.randn(2, 5, 4), torch.ones(2, 5), 0)
    assert merged.features is tokens
    assert merged.representative.tolist() == merged.group.tolist() == [[0, 1, 2, 3, 4]] * 2


@given(
    count=st.integers(2, 12),
    share=st.floats(0, 1),
    cls=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_step_equals_loops_over_tokens(count: int, share: float, cls: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, count, 3, generator=generator)
    metric = torch.randn(2, count, 4, generator=generator)
    size = torch.randint(1, 9, (2, count), generator=generator).float()
    r = max(1, round(share * (count // 2)))
    merged = bipartite_merge(tokens, metric, size, r, behind_cls=cls)
    for row in range(2):
        members = iter(range(10**6))
        patches = [
            Token(tokens[row, place], place, [next(members) for _ in range(int(size[row, place]))])
            for place in range(count)
        ]
        start = [Token(torch.zeros(3), None)] if cls else []
        with_cls = torch.cat([torch.zeros(len(start), 4), metric[row]])
        expected = merging_by_hand.step(start + patches, with_cls, r, len(start))
        assert merged.representative[row].tolist() == [token.index for token in expected]
        torch.testing.assert_close(merged.features[row], torch.stack([token.row for token in expected]))
        assert merged.size[row].tolist() == [token.size for token in expected]
        for place, token in enumerate(patches):
            assert set(token.members) <= set(expected[int(merged.group[row, place])].members)


@pytest.mark.parametrize("cls", [False, True])
def test_rows_of_the_table_may_come_some_at_a_time(cls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last part is shorter, and equal similarities stand in several parts."""
    generator = torch.Generator().manual_seed(3)
    metric = torch.randint(-1, 2, (2, 37, 4), generator=generator).float()
    tokens = torch.randn(2, 37, 3, generator=generator)
    whole = bipartite_merge(tokens, metric, torch.ones(2, 37), 9, cls)
    monkeypatch.setattr(merging, "CHUNK_VALUES", 2 * 18 * 5)
    parts = bipartite_merge(tokens, metric, torch.ones(2, 37), 9, cls)
    assert torch.equal(parts.representative, whole.representative)
    assert torch.equal(parts.group, whole.group)
    assert torch.equal(parts.features, whole.features)


def test_sums_are_kept() -> None:
    """Size-weighted totals do not change, whatever merges."""
    tokens, size = torch.randn(3, 40, 5), torch.randint(1, 4, (3, 40)).float()
    merged = bipartite_merge(tokens, torch.randn(3, 40, 6), size, 17)
    before = (tokens * size[..., None]).sum(dim=1)
    torch.testing.assert_close((merged.features * merged.size[..., None]).sum(dim=1), before, atol=1e-4, rtol=1e-4)
    assert merged.size.sum(dim=1).tolist() == size.sum(dim=1).tolist()


def test_half_precision_is_summed_in_float32() -> None:
    tokens = torch.tensor([[[1.0], [256.0], [1.0], [0.0]]]).bfloat16()
    size = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    merged = bipartite_merge(tokens, angles(0, 1, 2, 90), size, 2)
    assert merged.features.dtype == torch.bfloat16
    assert merged.features[0, 0].item() == torch.tensor(258 / 3).bfloat16().item()


def test_no_number_is_no_similarity() -> None:
    with pytest.raises(FoveateError, match="NaN or infinite"):
        bipartite_merge(torch.zeros(1, 4, 2), torch.full((1, 4, 2), torch.nan), ones(4), 1)
    zeros = bipartite_merge(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), ones(4), 2)
    assert zeros.size.tolist() == [[3, 1]], "a vector without direction is as near to one as to another"


# ---------------------------------------------------------------------------------------------------------------------
# CrossGET


def test_ranks_follow_the_highest_similarity() -> None:
    """Tokens at 0 and 20 are nearest to each other, 45 to 20 (25 away), 100 to 45 (55 away)."""
    assert similarity_rank(angles(45, 0, 100, 20)).tolist() == [[2, 0, 3, 1]]


def test_a_token_may_look_at_lower_ranks_only() -> None:
    """0 and 20 are nearest neighbours: the first of them ranks first and may look at the other, not the reverse.

    Best lower-ranked similarities: 0 -> 20 (cos 20), 20 -> 45 (cos 25), 45 -> 100 (cos 55), 100 -> none.
    """
    metric, importance = angles(0, 20, 45, 100), torch.tensor([[0.0, 0.0, 0.0, -9.0]])
    matching = complete_matching(metric, importance, 2)
    assert matching.source.tolist() == [[0, 1]], "the lowest importance of all has nothing to look at"
    # Among those that stay, 0 and 20 are both nearest to 45.
    assert matching.destination.tolist() == [[2, 2]]


def test_importance_saves_a_token() -> None:
    metric = angles(0, 20, 45, 100)
    important = torch.tensor([[5.0, 0.0, 0.0, 0.0]])
    matching = complete_matching(metric, important, 1)
    assert matching.source.tolist() == [[1]]
    assert matching.destination.tolist() == [[0]], "its destination may rank above it"
    weight = 1 / (1 + math.exp(5))
    torch.testing.assert_close(matching.weight, torch.tensor([[[weight, 1 - weight]]]))


def test_a_given_order_of_ties_counts() -> None:
    metric, importance = angles(0, 20, 45, 100), torch.zeros(1, 4)
    other_way = complete_matching(metric, importance, 1, rank=torch.tensor([[1, 0, 2, 3]]))
    assert complete_matching(metric, importance, 1).source.tolist() == [[0]]
    assert other_way.source.tolist() == [[1]]


def pairs(source: list[int], destination: list[int], weight: list[list[float]]) -> Matching:
    return Matching(torch.tensor([source]), torch.tensor([destination]), torch.tensor([weight]))


def test_an_ensemble_by_hand() -> None:
    """Tokens 4 (size 2) and 10 merge into 6 with weights 1/4, 3/4 and 1/2, 1/2.

    6 becomes 6 + (0.5 * 8 + 0.5 * 6) + (1 * 10 + 0 * 6) = 23, over the sizes 1 + 2 + 1.
    """
    matching = pairs([0, 3], [1, 1], [[0.25, 0.75], [0.5, 0.5]])
    merged = ensemble_merge(numbers(4, 6, 7, 10), torch.tensor([[2.0, 1, 1, 1]]), matching)
    assert merged.features.flatten().tolist() == [23 / 4, 7]
    assert merged.size.tolist() == [[4, 1]]
    assert merged.representative.tolist() == [[1, 2]]
    assert merged.group.tolist() == [[0, 0, 1, 0]]


def test_equal_importance_is_the_mean_weighted_by_size() -> None:
    matching = pairs([0], [2], [[0.5, 0.5]])
    merged = ensemble_merge(numbers(4, 6, 10), torch.tensor([[3.0, 1, 1]]), matching)
    assert merged.features.flatten().tolist() == [6, (12 + 10) / 4]


@example(count=10, share=1.0, seed=0)  # whose products round differently on both sides of the diagonal
@given(count=st.integers(2, 12), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_an_ensemble_equals_loops_over_tokens(count: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, count, 3, generator=generator)
    metric = torch.randn(2, count, 4, generator=generator)
    importance = torch.rand(2, count, generator=generator)
    size = torch.randint(1, 9, (2, count), generator=generator).float()
    r = max(1, round(share * (count // 2)))
    merged = ensemble_merge(tokens, size, complete_matching(metric, importance, r))
    for row in range(2):
        members = iter(range(10**6))
        patches = [
            Token(tokens[row, place], place, [next(members) for _ in range(int(size[row, place]))])
            for place in range(count)
        ]
        expected = merging_by_hand.ensemble(patches, metric[row], importance[row].tolist(), r)
        assert merged.representative[row].tolist() == [token.index for token in expected]
        torch.testing.assert_close(merged.features[row], torch.stack([token.row for token in expected]))
        assert merged.size[row].tolist() == [token.size for token in expected]
        for place, token in enumerate(patches):
            assert set(token.members) <= set(expected[int(merged.group[row, place])].members)


def test_importance_must_be_finite() -> None:
    with pytest.raises(FoveateError, match="importance of a token is NaN or infinite"):
        complete_matching(angles(0, 1, 2), torch.tensor([[0.0, torch.inf, 0.0]]), 1)


# ---------------------------------------------------------------------------------------------------------------------
# order


def test_groups_follow_their_tokens_into_raster_order() -> None:
    index = torch.tensor([[7, 2, 5]])
    group = torch.tensor([[0, 1, 2, -1, 0]]).clamp(min=0)
    found = in_raster_order(index, numbers(70, 20, 50), group)
    assert [one.flatten().tolist() for one in found] == [[2, 5, 7], [20, 50, 70], [2, 0, 1, 2, 2]]
