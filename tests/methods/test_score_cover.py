"""SCoRe: its worked examples, its limits, tiles, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references.worked import (
    ATTENTION,
    PATCHES,
    UNEVEN,
    assert_every_tile_stands_alone,
    assert_picks,
    kept,
    randn,
    salient,
)

from foveate.core import FoveateError
from foveate.methods.score_cover import ScoreCover


@pytest.mark.parametrize(
    ("alpha", "picks"), [(0.8, [32, 8, 1, 16, 17, 0, 9, 25]), (0.0, [32, 8, 3, 34, 11, 1, 16, 28])]
)
def test_the_worked_example(alpha: float, picks: list[int]) -> None:
    assert_picks(ScoreCover(alpha=alpha), salient(), picks)


def test_by_hand() -> None:
    """From 0 degrees, distances at 60 and 180 degrees are 1/2 and 2; times 0.9 and 0.2 that is 0.45 and 0.4."""
    hidden = torch.tensor([[[1.0, 0.0], [0.5, 0.75**0.5], [-1.0, 0.0]]])
    attention = torch.tensor([[[1.0, 0.9, 0.2]]])
    assert kept(ScoreCover(keep=2, alpha=1.0), salient(hidden, attention)) == [[0, 1]]
    assert kept(ScoreCover(keep=2, alpha=0.5), salient(hidden, attention)) == [[0, 2]]


def test_where_all_are_equally_far_the_attention_decides() -> None:
    order = ATTENTION[0, 0].argsort(descending=True)[:8].tolist()
    assert_picks(ScoreCover(alpha=0.01), salient(torch.eye(36)[None]), order)
    assert_picks(ScoreCover(alpha=8.0), salient(torch.eye(36)[None] + 0.1), order)


def test_heads_are_averaged_and_only_ratios_matter() -> None:
    heads = torch.rand(2, 3, 36, generator=torch.Generator().manual_seed(0))
    hidden = randn(2, 36, 12)
    expected = kept(ScoreCover(keep=9), salient(hidden, heads))
    assert kept(ScoreCover(keep=9), salient(hidden, heads.mean(dim=1, keepdim=True))) == expected
    sizes = torch.tensor([[[4.0]], [[0.25]]])
    assert kept(ScoreCover(keep=9), salient(hidden * sizes, heads * sizes)) == expected


@pytest.mark.parametrize("keep", [1, 3, 10, 17, 36])
def test_tiles_of_any_size(keep: int) -> None:
    heads = torch.rand(2, 3, 36, generator=torch.Generator().manual_seed(0))
    assert_every_tile_stands_alone(ScoreCover(keep=keep), salient(randn(2, 36, 12), heads), UNEVEN)


def test_tiles_may_compete() -> None:
    whole = kept(ScoreCover(keep=9), salient())
    assert kept(ScoreCover(keep=9, budget="image"), salient(tile=UNEVEN[:1])) == whole
    assert kept(ScoreCover(keep=9), salient(tile=UNEVEN[:1])) != whole


@given(keep=st.integers(1, 12), zeros=st.sets(st.integers(0, 11)), width=st.sampled_from([1, 3, 20]))
def test_patches_without_attention_or_length(keep: int, zeros: set[int], width: int) -> None:
    attention, hidden = torch.full((1, 1, 12), 0.1), randn(1, 12, width)
    attention[0, 0, list(zeros)] = 0.0
    hidden[0, list(zeros)[:3]] = 0.0
    answer = kept(ScoreCover(keep=keep), salient(hidden, attention))[0]
    assert len(answer) == keep
    if keep <= 12 - len(zeros) and width == 20:
        assert not set(answer) & zeros


def test_counts() -> None:
    assert ScoreCover().count(576) == (64,)
    assert ScoreCover().count(2880, tiles=5) == (320,)
    assert ScoreCover(keep=7).count(2880, tiles=5) == (7,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": -0.5}, r"alpha=-0.5 is no number in \[0, 8\]; the nearest is alpha=0.0"),
        ({"alpha": 20}, "the nearest is alpha=8.0"),
        ({"alpha": True}, "alpha=True is no number"),
        ({"budget": "row"}, "budget='row' is not among its choices"),
        ({"keep": 1.5}, "keep=1.5 is no share"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        ScoreCover(**fields)


def test_everything_may_stay() -> None:
    assert kept(ScoreCover(keep=1.0), salient(PATCHES)) == [list(range(36))]
