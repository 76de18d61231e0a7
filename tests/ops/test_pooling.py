"""Sums over neighbours and means with what joined: by hand, with repeated places, ties and tokens of no length."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.ops.pooling import joined, most_similar, nearest_neighbours, others, take, weighted_sums


def test_values_at_places() -> None:
    places = torch.tensor([[2, 0], [1, 1]])
    assert take(torch.tensor([[5, 6, 7], [8, 9, 10]]), places).tolist() == [[7, 5], [9, 9]]
    wide = torch.arange(12.0).reshape(2, 3, 2)
    assert take(wide, places).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]


@given(tokens=st.integers(1, 12), seed=st.integers(0, 1000), data=st.data())
def test_the_other_places_ascend(tokens: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, tokens))
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack([torch.randperm(tokens, generator=generator)[:count] for _ in range(2)])
    for row, rest in zip(places.tolist(), others(places, tokens).tolist(), strict=True):
        assert rest == [place for place in range(tokens) if place not in row]


POINTS = torch.tensor([[[1.0, 0.0], [5.0, 0.0], [1.0, 1.0], [0.0, 0.0], [-1.0, 0.1], [0.0, 3.0]]])


def test_the_most_similar_neighbours_come_first() -> None:
    """Token 0 looks right: 1 too (length does not count), 2 at 45 degrees, 3 has no length, 5 up, 4 away."""
    of, among = torch.tensor([[0, 5]]), torch.tensor([[1, 2, 3, 4]])
    assert nearest_neighbours(POINTS, of, among, 4).tolist() == [[[1, 2, 3, 4], [2, 4, 1, 3]]]
    assert nearest_neighbours(POINTS, of, among, 0).shape == (1, 2, 0)


def test_a_token_is_no_neighbour_of_its_own_but_its_repetition_is() -> None:
    of = torch.tensor([[0]])
    assert nearest_neighbours(POINTS, of, torch.tensor([[5, 0, 1]]), 2).tolist() == [[[1, 5]]]
    assert nearest_neighbours(POINTS, of, torch.tensor([[0, 5, 0, 1]]), 3).tolist() == [[[0, 1, 5]]]


def test_the_first_candidate_wins_a_tie() -> None:
    same = torch.ones(1, 5, 3)
    assert nearest_neighbours(same, torch.tensor([[4]]), torch.tensor([[2, 0, 3, 1]]), 3).tolist() == [[[2, 0, 3]]]
    assert most_similar(same, torch.tensor([[0, 1]]), torch.tensor([[4, 3, 2]])).tolist() == [[0, 0]]


def test_weighted_sums_add_up_repeated_places() -> None:
    tokens = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])
    places, weights = torch.tensor([[[0, 2], [1, 1]]]), torch.tensor([[[1.0, 0.5], [0.25, 2.0]]])
    assert weighted_sums(tokens, places, weights).tolist() == [[[2.5, 25.0], [4.5, 45.0]]]
    assert weighted_sums(tokens, places[:, :, :0], weights[:, :, :0]).tolist() == [[[0.0, 0.0], [0.0, 0.0]]]
    assert weighted_sums(tokens, places[:, :0], weights[:, :0]).shape == (1, 0, 2)


def test_what_leaves_joins_what_it_resembles() -> None:
    leaving, staying = torch.tensor([[1, 4, 3]]), torch.tensor([[5, 0]])
    target = most_similar(POINTS, leaving, staying)
    assert target.tolist() == [[1, 0, 0]], "a token of no length is as near to all, the first wins"
    sums, numbers = joined(torch.tensor([[[1.0], [2.0], [4.0]]]), target, 2)
    assert sums.tolist() == [[[6.0], [1.0]]] and numbers.tolist() == [[[2.0], [1.0]]]
    sums, numbers = joined(torch.zeros(1, 0, 3), torch.zeros(1, 0, dtype=torch.int64), 2)
    assert sums.tolist() == [[[0.0] * 3] * 2] and numbers.tolist() == [[[0.0]] * 2]


def test_half_precision_is_summed_in_single() -> None:
    """4096 times 1 + 1/128, which bfloat16 holds exactly but whose running sum it could not."""
    tokens = torch.full((1, 4096, 1), 1.0078125, dtype=torch.bfloat16)
    sums, numbers = joined(tokens, torch.zeros(1, 4096, dtype=torch.int64), 1)
    assert sums.item() == 4128.0 and numbers.item() == 4096.0
    everything = torch.arange(4096)[None, None]
    assert weighted_sums(tokens, everything, torch.ones(1, 1, 4096)).item() == 4128.0
