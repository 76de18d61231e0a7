"""MMTok: its worked example, what covers what, text it may read, tiles, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from models.batches import assert_rows_stand_alone
from references.worked import PATCHES, UNEVEN, assert_every_tile_stands_alone, assert_picks, kept, randn, seen, waves
from torch import Tensor

from foveate.core import Block, FoveateError, Signals
from foveate.methods.mmtok import MMTok


def signals(features: Tensor, hidden: Tensor, text: Tensor, **more: Any) -> Signals:
    batch, tokens, _ = features.shape
    everything = torch.ones(text.shape[:2], dtype=torch.bool)
    settings: dict[str, Any] = dict(text_mask=everything, after_image=everything)
    tower = {"read": Block(hidden=hidden)}
    return seen(batch, tokens, features=features, text=text, tower=tower, **(settings | more))


EXAMPLE = signals(waves(0.71, 36, 8), PATCHES, waves(1.3, 3, 8))
PICKS = [31, 29, 27, 12, 22, 3, 32, 6]
RANDOM = signals(randn(2, 36, 8), randn(2, 36, 12, seed=1), randn(2, 5, 8, seed=2))


def test_the_worked_example() -> None:
    assert_picks(MMTok(), EXAMPLE, PICKS)


def covers(method: MMTok, shown: Signals, image: int) -> Tensor:
    """(m + N, N) in float64: the shares that a token gives to words and patches, by their number and weight."""
    normal = torch.nn.functional.normalize
    assert shown.features is not None and shown.text is not None and shown.tower["read"].hidden is not None
    assert shown.text_mask is not None and shown.after_image is not None
    words = shown.text[image][shown.text_mask[image] & shown.after_image[image]].double()
    features, hidden = shown.features[image].double(), shown.tower["read"].hidden[image].double()
    of_words = normal(words, dim=-1) @ normal(features, dim=-1).T / method.text_temperature
    of_patches = normal(hidden, dim=-1) @ normal(hidden, dim=-1).T / method.vision_temperature
    parts = (of_words.softmax(-1) / len(words), method.weight * of_patches.softmax(-1) / len(hidden))
    return torch.cat(parts)


@pytest.mark.parametrize("fields", [{}, {"weight": 3.0}, {"text_temperature": 0.5, "vision_temperature": 0.05}])
def test_every_pick_adds_most_and_adds_ever_less(fields: dict[str, float]) -> None:
    method = MMTok(**fields)
    table = covers(method, RANDOM, 0)
    picks: list[int] = []
    gains: list[float] = []
    best = torch.zeros(len(table), dtype=torch.float64)
    while len(picks) < 12:
        gain = (table - best[:, None]).clamp(min=0).sum(dim=0)
        picks.append(int(gain.argmax()))
        gains.append(float(gain.max()))
        best = torch.maximum(best, table[:, picks[-1]])
    assert gains == sorted(gains, reverse=True)
    one = dataclasses.replace(
        RANDOM,
        index=RANDOM.index[:1],
        features=RANDOM.features[:1],
        text=RANDOM.text[:1],
        text_mask=RANDOM.text_mask[:1],
        after_image=RANDOM.after_image[:1],
        tower={"read": Block(hidden=RANDOM.tower["read"].hidden[:1])},
    )
    assert_picks(method, one, picks)


def test_a_word_is_covered_by_what_it_resembles() -> None:
    features = torch.eye(6)[None]
    shown = signals(features, torch.ones(1, 6, 3), features[:, 4:5] * 7)
    assert kept(MMTok(keep=1), shown) == [[4]]
    two = signals(features, torch.ones(1, 6, 3), features[:, [4, 2]])
    assert kept(MMTok(keep=2), two) == [[2, 4]]
    assert kept(MMTok(keep=3), two) == [[0, 2, 4]], "copies: the lowest index"


def test_only_text_after_the_image_is_read() -> None:
    """What stands before the image and what pads the row would change the picks, were it read."""
    text = torch.cat([randn(1, 2, 8), EXAMPLE.text, torch.full((1, 2, 8), torch.nan)], dim=1)
    mask = torch.tensor([[True] * 5 + [False] * 2])
    after = torch.tensor([[False] * 2 + [True] * 5])
    shown = signals(EXAMPLE.features, PATCHES, text, text_mask=mask, after_image=after)
    assert_picks(MMTok(), shown, PICKS)
    all_text = signals(EXAMPLE.features, PATCHES, text[:, :5])
    assert kept(MMTok(keep=4), all_text) != [sorted(PICKS[:4])]


def test_an_image_without_text_behind_it_is_refused() -> None:
    after = torch.ones(2, 5, dtype=torch.bool)
    after[1] = False
    with pytest.raises(FoveateError, match="MMTok reads the text after the image, but image 1 is followed by none"):
        MMTok().select(dataclasses.replace(RANDOM, after_image=after))
    with pytest.raises(FoveateError, match="image 0 is followed by none"):
        MMTok().select(signals(EXAMPLE.features, PATCHES, torch.zeros(1, 0, 8)))


@pytest.mark.parametrize("keep", [1, 3, 10, 17, 36])
def test_tiles_of_any_size(keep: int) -> None:
    assert_every_tile_stands_alone(MMTok(keep=keep), RANDOM, UNEVEN)


def test_tiles_may_compete() -> None:
    tiled = dataclasses.replace(EXAMPLE, tile=UNEVEN[:1])
    assert_picks(MMTok(budget="image"), tiled, PICKS)
    assert kept(MMTok(keep=8), tiled) != [sorted(PICKS)]


def test_rows_of_different_questions_stand_alone() -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2:] = False
    shown = dataclasses.replace(RANDOM, text_mask=mask, index=RANDOM.index.flip(1))
    assert_rows_stand_alone(MMTok(keep=9), [shown])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"text_temperature": 0.0},
            "text_temperature=0.0 is no positive number; the usual one is text_temperature=0.02",
        ),
        ({"vision_temperature": -1}, "vision_temperature=-1 is no positive number"),
        ({"weight": float("inf")}, "weight=inf is no positive number; the usual one is weight=0.5"),
        ({"budget": "row"}, "budget='row' is not among its choices"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        MMTok(**fields)
