"""SCOPE: its worked examples, its gains, tiles, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from models.batches import assert_rows_stand_alone
from references.worked import PATCHES, UNEVEN, assert_every_tile_stands_alone, assert_picks, kept, randn, salient

from foveate.core import FoveateError
from foveate.methods.scope import SCOPE


@pytest.mark.parametrize(
    ("alpha", "picks"), [(1.0, [32, 0, 17, 1, 9, 16, 31, 25]), (0.0, [5, 35, 19, 22, 32, 13, 21, 31])]
)
def test_the_worked_example(alpha: float, picks: list[int]) -> None:
    assert_picks(SCOPE(alpha=alpha), salient(), picks)


def test_by_hand() -> None:
    """Patches at 0, 60 and 90 degrees cover 1.5, 2.37 and 1.87; beside the first both others add 1.37."""
    hidden = torch.tensor([[[1.0, 0.0], [0.5, 0.75**0.5], [0.0, 1.0]]])

    def keeps(keep: int, *attention: float, alpha: float = 1.0) -> list[int]:
        return kept(SCOPE(keep=keep, alpha=alpha), salient(hidden, torch.tensor([[attention]])))[0]

    assert keeps(1, 1.0, 1.0, 1.0) == [1]
    assert keeps(1, 1.7, 1.0, 1.0) == [0], "1.5 * 1.7 = 2.55"
    assert keeps(1, 1.7, 1.0, 1.0, alpha=0.5) == [1], "1.5 * 1.3 = 1.96"
    assert keeps(2, 2.0, 1.1, 1.0) == [0, 1]
    assert keeps(2, 2.0, 1.0, 1.1) == [0, 2]


def test_copies_are_covered_already() -> None:
    half = randn(1, 6, 40)
    shown = salient(torch.cat([half, half], dim=1), torch.ones(1, 1, 12))
    assert {token % 6 for token in kept(SCOPE(keep=6), shown)[0]} == set(range(6))


def test_only_ratios_of_attention_and_directions_matter() -> None:
    heads = torch.rand(2, 3, 36, generator=torch.Generator().manual_seed(0))
    hidden, sizes = randn(2, 36, 12), torch.tensor([[[4.0]], [[0.25]]])
    expected = kept(SCOPE(keep=9), salient(hidden, heads))
    assert kept(SCOPE(keep=9), salient(hidden * sizes, heads * sizes)) == expected
    assert kept(SCOPE(keep=9), salient(hidden, heads.sum(dim=1, keepdim=True))) == expected
    moved = torch.randperm(36, generator=torch.Generator().manual_seed(1))
    shown = salient(hidden[:, moved], heads[..., moved], index=moved.repeat(2, 1))
    assert kept(SCOPE(keep=9), shown) == expected


@pytest.mark.parametrize("keep", [1, 3, 10, 17, 36])
def test_tiles_of_any_size(keep: int) -> None:
    heads = torch.rand(2, 3, 36, generator=torch.Generator().manual_seed(0))
    assert_every_tile_stands_alone(SCOPE(keep=keep), salient(randn(2, 36, 12), heads), UNEVEN)


def test_the_total_is_exact_over_tiles() -> None:
    """Five tiles of 8 with 12 tokens: 4 of the base and 2 of each other; rounding down would keep 10."""
    tile = torch.arange(5).repeat_interleave(8)[None]
    answer = kept(SCOPE(keep=12), salient(randn(1, 40, 6), torch.ones(1, 1, 40), tile=tile))[0]
    assert torch.bincount(tile[0, answer]).tolist() == [4, 2, 2, 2, 2]
    whole = kept(SCOPE(keep=12, budget="image"), salient(randn(1, 40, 6), torch.ones(1, 1, 40), tile=tile))
    assert whole == kept(SCOPE(keep=12), salient(randn(1, 40, 6), torch.ones(1, 1, 40)))


def test_rows_stand_alone_at_a_later_stage() -> None:
    index = torch.stack([torch.randperm(50)[:36].sort().values for _ in range(2)])
    shown = salient(randn(2, 36, 12), torch.rand(2, 3, 36), index=index, original=50)
    assert_rows_stand_alone(SCOPE(keep=0.2), [shown])
    assert len(kept(SCOPE(keep=0.2), shown)[0]) == 10


def test_everything_and_nothing() -> None:
    assert kept(SCOPE(keep=36), salient(PATCHES)) == [list(range(36))]
    assert kept(SCOPE(keep=5), salient(PATCHES, torch.zeros(1, 1, 36))) == [[0, 1, 2, 3, 4]]
    with pytest.raises(FoveateError, match=r"alpha=-1 is no number in \[0, 8\]"):
        SCOPE(alpha=-1)
    with pytest.raises(FoveateError, match="scores are NaN or infinite"):
        SCOPE(keep=5).select(salient(PATCHES, torch.full((1, 1, 36), torch.nan)))
