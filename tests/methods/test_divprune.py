"""DivPrune: by hand, its rounding, and where its official code goes wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models.batches import assert_rows_stand_alone
from references.worked import assert_picks, kept, randn, seen, waves

from foveate.core import FoveateError
from foveate.methods.divprune import DivPrune
from foveate.spec import parse


@pytest.mark.parametrize(
    ("keep", "original", "count"),
    [(0.098, 576, 56), (0.5, 5, 2), (0.5, 7, 4), (0.25, 10, 2), (1 / 9, 576, 64), (0.001, 576, 1), (1.0, 9, 9)],
)
def test_shares_are_rounded_half_to_even(keep: float, original: int, count: int) -> None:
    assert DivPrune(keep=keep).count(original) == (count,)
    assert DivPrune() == parse("divprune:keep=0.098")


def test_by_hand() -> None:
    """Neighbours are 10, 10, 40, 50 and 40 degrees away; 180 is taken first, then 0, 90, 130 and 10."""
    radians = torch.tensor([0.0, 10.0, 90.0, 180.0, 130.0]).deg2rad()
    features = torch.stack([radians.cos(), radians.sin()], dim=-1)[None]
    assert_picks(DivPrune(), seen(1, 5, features=features), [3, 0, 2, 4, 1])


def test_the_picks_are_those_of_the_definition() -> None:
    features = waves(0.71, 36, 8)
    unit = torch.nn.functional.normalize(features[0].double(), dim=-1)
    distance = 1 - unit @ unit.T
    picks = [int(distance.clone().fill_diagonal_(9.0).amin(dim=0).argmax())]
    while len(picks) < 12:
        picks.append(int(distance[picks].amin(dim=0).index_fill(0, torch.tensor(picks), -1.0).argmax()))
    assert_picks(DivPrune(), seen(1, 36, features=features), picks)


def test_copies_do_not_come_out_twice() -> None:
    """Of 40 tokens 20 are copies: 30 picks hold each of the 20 and 10 copies."""
    half = randn(1, 20, 16)
    answer = kept(DivPrune(keep=30), seen(1, 40, features=torch.cat([half, half], dim=1)))[0]
    assert {token % 20 for token in answer} == set(range(20))


def test_a_zero_token_does_not_spoil_the_others() -> None:
    features = randn(1, 12, 8)
    features[0, 5] = 0.0
    assert len(kept(DivPrune(keep=7), seen(1, 12, features=features))[0]) == 7


def test_original_indices_come_back_and_rows_stand_alone() -> None:
    features = randn(3, 9, 6)
    index = torch.stack([torch.randperm(20)[:9] for _ in range(3)])
    shown = seen(3, 9, features=features, index=index, original=20, tile=torch.zeros(3, 9, dtype=torch.int64))
    assert_rows_stand_alone(DivPrune(keep=4), [shown])
    plain = kept(DivPrune(keep=4), seen(3, 9, features=features))
    expected = [sorted(row[places].tolist()) for row, places in zip(index, plain, strict=True)]
    assert kept(DivPrune(keep=4), shown) == expected
    assert kept(DivPrune(keep=0.2), shown) == expected, "a share of the original 20"


def test_what_cannot_be_is_refused() -> None:
    shown = seen(1, 4, features=randn(1, 4, 3))
    with pytest.raises(FoveateError, match="keep=5 asks for 5 tokens but the image has 4 tokens; the most is keep=4"):
        DivPrune(keep=5).select(shown)
    with pytest.raises(FoveateError, match="keep=0 is below 1 token"):
        DivPrune(keep=0)
    broken = dataclasses.replace(shown, features=torch.full((1, 4, 3), torch.nan))
    with pytest.raises(FoveateError, match="4 of 4 vectors hold NaN or infinity"):
        DivPrune(keep=2).select(broken)


def test_keeping_everything_needs_no_choice() -> None:
    shown = seen(1, 4, features=torch.full((1, 4, 3), torch.nan), index=torch.tensor([[7, 1, 3, 2]]), original=9)
    assert kept(DivPrune(keep=4), shown) == [[1, 2, 3, 7]]
