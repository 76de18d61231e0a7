"""Pools of tokens that compete: whole images, and tiles of any number and size."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops.tiles import by_tile, whole_images

# Tiles of 3, 1 and 2 tokens in one image; of 2 and 4, without tile 1, in the other.
TILE = torch.tensor([[0, 2, 0, 1, 2, 0], [2, 2, 0, 2, 0, 2]])


def counts(tile: Tensor) -> list[list[int]]:
    return [row.bincount().tolist() for row in tile]


def test_an_image_is_one_pool_as_it_stands() -> None:
    pools = whole_images(torch.tensor([[4, 5, 6], [1, 2, 3]]))
    values = torch.rand(2, 3, 4)
    assert pools.take(values) is values and pools.shared(values) is values
    assert pools.sizes == [[3], [3]] and pools.free is None
    chosen = pools.chosen(torch.tensor([[2, 0, 1], [1, 0, 2]]), [[2], [1]])
    assert [row.tolist() for row in chosen] == [[0, 2], [1]]


def test_tiles_are_pools_padded_to_the_longest() -> None:
    pools = by_tile(TILE, counts(TILE))
    assert pools.sizes == [[3, 1, 2], [2, 4]]
    assert pools.image.tolist() == [0, 0, 0, 1, 1]
    assert pools.place.tolist() == [[0, 2, 5, 0], [3, 3, 3, 3], [1, 4, 1, 1], [2, 4, 2, 2], [0, 1, 3, 5]]
    assert pools.free is not None
    assert pools.free.sum(dim=1).tolist() == [3, 1, 2, 2, 4]
    assert pools.without_padding(torch.ones(5, 4)).sum(dim=1).tolist() == [3, 1, 2, 2, 4]
    values = torch.arange(12).view(2, 6)
    assert pools.take(values)[3:].tolist() == [[8, 10, 8, 8], [6, 7, 9, 11]]
    assert pools.take(values[..., None]).shape == (5, 4, 1)
    assert pools.shared(torch.tensor([[7], [9]])).tolist() == [[7], [7], [7], [9], [9]]


def test_the_first_picks_of_each_pool_stay() -> None:
    picks = torch.tensor([[2, 0], [0, 0], [1, 0], [1, 0], [3, 1]])
    chosen = by_tile(TILE, counts(TILE)).chosen(picks, [[1, 1, 2], [0, 2]])
    assert [row.tolist() for row in chosen] == [[1, 3, 4, 5], [1, 5]]


def test_tiles_of_one_size_need_no_padding() -> None:
    pools = by_tile(torch.tensor([[1, 0, 0, 1]]), [[2, 2]])
    assert pools.free is None and not pools.whole
    ones = torch.ones(2, 2)
    assert pools.without_padding(ones) is ones


@given(st.lists(st.lists(st.integers(0, 3), min_size=8, max_size=8), min_size=1, max_size=3))
def test_every_token_is_in_one_pool(rows: list[list[int]]) -> None:
    pools = by_tile(torch.tensor(rows), counts(torch.tensor(rows)))
    free = torch.ones_like(pools.place, dtype=torch.bool) if pools.free is None else pools.free
    for image, row in enumerate(rows):
        own = (pools.image == image).nonzero().flatten().tolist()
        found = [pools.place[pool][free[pool]].tolist() for pool in own]
        expected = [[n for n, tile in enumerate(row) if tile == number] for number in sorted(set(row))]
        assert found == expected
        assert pools.sizes[image] == list(map(len, expected))
