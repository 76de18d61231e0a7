"""Grouping tokens by density peaks: hand-worked heaps, ties, coinciding tokens, and the means that stand for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.ops.merging import cluster_means, density_peaks


def groups(cluster: torch.Tensor) -> set[frozenset[int]]:
    return {frozenset((cluster == number).nonzero().flatten().tolist()) for number in cluster.unique().tolist()}


def test_heaps_are_told_apart() -> None:
    points = torch.tensor([[0.0], [9], [0.2], [9.2], [0.1], [4.0]])
    assert groups(density_peaks(points, 2, torch.zeros(6))) == {frozenset({0, 2, 4, 5}), frozenset({1, 3})}


def test_centres_by_hand() -> None:
    """Densities over the 2 nearest, itself included: exp(-[1, 1, 4, 16] / 2) for 0 1 3 7 on a line.

    The first of the two densest counts as the denser: gaps to the nearest denser token are 7 (the largest distance), 1,
    2 and 4, gap times density 4.2, 0.61, 0.27 and 0.0013: centres 0 and 1, and 3 and 7 are nearer to 1.
    """
    points = torch.tensor([[0.0], [1], [3], [7]])
    assert density_peaks(points, 2, torch.zeros(4)).tolist() == [0, 1, 1, 1]


def test_noise_decides_between_equally_dense_tokens() -> None:
    points = torch.tensor([[0.0], [1.0]])
    assert density_peaks(points, 1, torch.zeros(2)).tolist() == [0, 0]
    points = torch.tensor([[0.0], [1], [2], [3]])  # at such distances noise of 1 outweighs the densities
    first = density_peaks(points, 2, torch.tensor([1.0, 0, 0, 0]))
    last = density_peaks(points, 2, torch.tensor([0.0, 0, 0, 1.0]))
    assert first[0] == 0 and last[3] == 0, "the noisiest token is the first centre"


def test_distances_are_divided_by_the_root_of_the_width() -> None:
    torch.manual_seed(0)
    points = torch.randn(12, 3)
    wide = points.repeat(1, 4)
    noise = 0.3 * torch.rand(12)  # the noise makes the scale of the densities matter
    assert torch.equal(density_peaks(points, 4, noise), density_peaks(wide, 4, noise))
    assert not torch.equal(density_peaks(points, 4, noise), density_peaks(2 * points, 4, noise))


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_as_many_clusters_as_tokens_leave_each_alone(tokens: int) -> None:
    cluster = density_peaks(torch.rand(tokens, 3), tokens, torch.zeros(tokens))
    assert sorted(cluster.tolist()) == list(range(tokens))


@given(st.integers(1, 20), st.data())
def test_no_cluster_is_empty_even_where_tokens_coincide(tokens: int, data: st.DataObject) -> None:
    clusters = data.draw(st.integers(1, tokens))
    values = data.draw(st.lists(st.integers(0, 2), min_size=2 * tokens, max_size=2 * tokens))
    points = torch.tensor(values, dtype=torch.float32).reshape(tokens, 2)
    cluster = density_peaks(points, clusters, torch.zeros(tokens))
    assert set(cluster.tolist()) == set(range(clusters))
    means = cluster_means(points, cluster, clusters)
    assert means.isfinite().all()
    torch.testing.assert_close(
        means * torch.bincount(cluster)[:, None], torch.zeros_like(means).index_add(0, cluster, points)
    )


def test_means_by_hand_in_the_dtype_of_the_tokens() -> None:
    points = torch.tensor([[1.0, 0], [3, 0], [5, 8]]).to(torch.bfloat16)
    means = cluster_means(points, torch.tensor([1, 1, 0]), 2)
    assert means.dtype == torch.bfloat16 and means.tolist() == [[5, 8], [2, 0]]
