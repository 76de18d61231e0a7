"""EADP: its worked example, both spaces against plain float64, smoothing, shares of tiles, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from models.batches import assert_rows_stand_alone
from references.worked import UNEVEN, assert_picks, kept, randn, seen, waves
from torch import Tensor

from foveate.core import FoveateError, Signals
from foveate.methods.eadp import EADP


def decoder(features: Tensor, text: Tensor, **more: Any) -> Signals:
    batch, tokens, _ = features.shape
    everything = torch.ones(text.shape[:2], dtype=torch.bool)
    settings: dict[str, Any] = dict(text_mask=everything, after_image=everything, grid=(6, 6) if tokens == 36 else None)
    return seen(batch, tokens, features=features, text=text, **(settings | more))


def clip(seed: int = 0, batch: int = 2, tokens: int = 36, words: int = 14, **more: Any) -> Signals:
    """Two pieces of text, of whose positions the first and the last two are no words."""
    mask = torch.ones(batch, words, dtype=torch.bool)
    mask[:, [0, -1, -2]] = False
    settings: dict[str, Any] = dict(grid=(6, 6) if tokens == 36 else None, word_mask=mask)
    return seen(
        batch,
        tokens,
        features=randn(batch, tokens, 12, seed=seed),
        image_clip=randn(batch, tokens, 8, seed=seed + 1),
        text_clip=randn(batch, 2, 8, seed=seed + 2),
        word_clip=randn(batch, words, 8, seed=seed + 3),
        **(settings | more),
    )


EXAMPLE = decoder(waves(0.71, 36, 8), waves(1.3, 10, 8))
PICKS = [5, 19, 35, 26, 33, 30, 18, 29]


def test_the_worked_example() -> None:
    """Of the code, which negates."""
    assert_picks(EADP(space="decoder", relevance="negated"), EXAMPLE, PICKS)
    assert_picks(EADP(space="decoder", official=True), EXAMPLE, PICKS)
    assert kept(EADP(space="decoder", keep=8), EXAMPLE) != [sorted(PICKS)]


# ---------------------------------------------------------------------------------------------------------------------
# a plain reference for one image, float64


def cosine(first: Tensor, second: Tensor) -> Tensor:
    normal = torch.nn.functional.normalize
    return normal(first.double(), dim=-1) @ normal(second.double(), dim=-1).T


def stretched(whole: Tensor, words: Tensor) -> Tensor:
    """(N,) and (N, L) of the words that count."""
    shares = (100 * words).softmax(dim=0)
    entropy = -(shares * shares.log()).sum(dim=0)
    sharp = entropy.argsort()[: max(1, int(0.2 * words.shape[1]))]
    local = words[:, sharp] @ (-entropy[sharp] / 0.01).softmax(dim=0)
    both = 0.5 * whole + 0.5 * local
    return (both - both.min() + 1e-6) / (both.max() - both.min() + 1e-6)


def blurred(values: Tensor, height: int, width: int) -> Tensor:
    """Cell by cell; beyond the border stands what is as far within it."""
    cells, out = values.view(height, width), torch.zeros(height, width, dtype=torch.float64)
    whole = (1 + 2 * math.exp(-0.5)) ** 2
    for row in range(height):
        for column in range(width):
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    y, x = abs(row + down), abs(column + right)
                    y, x = min(y, 2 * (height - 1) - y), min(x, 2 * (width - 1) - x)
                    out[row, column] += math.exp(-(down**2 + right**2) / 2) / whole * cells[y, x]
    return out.flatten()


def greedily(features: Tensor, importance: Tensor, count: int) -> tuple[list[int], list[float]]:
    """Picks and their gains."""
    similarity = (cosine(features, features) + 1) / 2
    best = torch.zeros(len(features), dtype=torch.float64)
    picks: list[int] = []
    gains: list[float] = []
    while len(picks) < count:
        gain = (importance[:, None] * (similarity - best[:, None]).clamp(min=0)).sum(dim=0)
        gain[picks] = -1.0
        picks.append(int(gain.argmax()))
        gains.append(float(gain.max()))
        best = torch.maximum(best, similarity[picks[-1]])
    return picks, gains


def single(shown: Signals, image: int) -> Signals:
    fields = {f.name: getattr(shown, f.name) for f in dataclasses.fields(shown)}
    return Signals(**{k: v[image : image + 1] if isinstance(v, Tensor) else v for k, v in fields.items()})


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("beta", [None, 2.0, 0.0])
def test_joint_space_by_the_definition(sign: int, beta: float | None) -> None:
    relevance: Any = "direct" if sign > 0 else "negated"
    method, shown = EADP(beta=beta, relevance=relevance), clip()
    for image in range(2):
        tokens, mask = shown.image_clip[image], shown.word_mask[image]
        whole = sign * cosine(tokens, shown.text_clip[image]).mean(dim=1)
        words = sign * cosine(tokens, shown.word_clip[image][mask])
        importance = blurred(stretched(whole, words), 6, 6) ** (1.0 if beta is None else beta)
        torch.testing.assert_close(method.importance(shown)[image].double(), importance, rtol=1e-3, atol=1e-5)
        picks, gains = greedily(shown.features[image], importance, 12)
        assert gains == sorted(gains, reverse=True)
        assert_picks(method, single(shown, image), picks)


def test_the_code_reads_every_position() -> None:
    """The start token is made the sharpest of all."""
    shown = clip()
    shown.word_clip[:, 0] = -shown.image_clip[:, 5]
    whole = -cosine(shown.image_clip[0], shown.text_clip[0]).mean(dim=1)
    words = -cosine(shown.image_clip[0], shown.word_clip[0])
    expected = blurred(stretched(whole, words), 6, 6)
    got = EADP(official=True).importance(shown)[0].double()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    words_only = EADP(relevance="negated").importance(shown)[0].double()
    assert not torch.allclose(words_only, expected, atol=1e-3)


def test_the_decoders_space_by_the_definition() -> None:
    features, text = randn(1, 36, 8), randn(1, 9, 8, seed=1)
    mask = torch.tensor([[True] * 8 + [False]])
    after = torch.tensor([[False] + [True] * 8])
    text[0, 8] = torch.nan  # padding
    shown = decoder(features, text, text_mask=mask, after_image=after)
    words = text[0, 1:8]
    likeness = cosine(features[0], words)
    whole = cosine(features[0], words.mean(dim=0, keepdim=True))[:, 0]
    importance = blurred(stretched(whole, likeness), 6, 6) ** 2
    got = EADP(space="decoder").importance(shown)[0].double()
    torch.testing.assert_close(got, importance, rtol=1e-3, atol=1e-5)
    assert_picks(EADP(space="decoder"), shown, greedily(features[0], importance, 10)[0])
    assert EADP(space="decoder", beta=1.0).importance(shown)[0].double().square().allclose(got, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# smoothing


def plain(shown: Signals, image: int) -> Tensor:
    """Relevance before it is smoothed."""
    tokens, mask = shown.image_clip[image], shown.word_mask[image]
    whole = cosine(tokens, shown.text_clip[image]).mean(dim=1)
    return stretched(whole, cosine(tokens, shown.word_clip[image][mask]))


def test_smoothing_follows_the_raster_and_not_the_order() -> None:
    shown = clip()
    moved = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    shuffled = dataclasses.replace(
        shown, index=moved.repeat(2, 1), features=shown.features[:, moved], image_clip=shown.image_clip[:, moved]
    )
    torch.testing.assert_close(EADP().importance(shuffled), EADP().importance(shown)[:, moved])
    assert kept(EADP(keep=9), shuffled) == kept(EADP(keep=9), shown)


@pytest.mark.parametrize("more", [{"grid": None}, {"grid": None, "original": 50}, {"grid": (6, 6), "original": 50}])
def test_where_there_is_no_raster_nothing_is_smoothed(more: dict[str, Any]) -> None:
    shown = clip(**more)
    torch.testing.assert_close(EADP().importance(shown)[1].double(), plain(shown, 1), rtol=1e-3, atol=1e-5)
    assert len(kept(EADP(keep=0.2), shown)[0]) == round(0.2 * shown.original)


def test_tiles_that_are_squares_are_smoothed_each() -> None:
    """16 tokens of tile 0, 9 of tile 1, and 11, which are no square, of tile 2; tiles 1 and 2 stand row by row."""
    tile = torch.tensor([0] * 16 + ([1, 1, 1] + [2] * 3) * 3 + [2] * 2)
    shown = clip(tile=tile.repeat(2, 1), grid=None)
    expected = plain(shown, 0)
    for number, side in ((0, 4), (1, 3)):
        expected[tile == number] = blurred(expected[tile == number], side, side)
    torch.testing.assert_close(EADP().importance(shown)[0].double(), expected, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# tiles


def test_a_tiles_share_is_that_of_its_relevance() -> None:
    shown = clip(tile=UNEVEN)
    importance = EADP().importance(shown)
    for keep in (4, 5, 11, 24, 36):
        answers = kept(EADP(keep=keep), shown)
        for image, answer in enumerate(answers):
            counts = torch.bincount(UNEVEN[image, answer], minlength=4)
            mass = torch.stack([importance[image][UNEVEN[image] == number].sum() for number in range(4)])
            sizes = torch.bincount(UNEVEN[image], minlength=4)
            quota = keep * mass / mass.sum()
            assert len(answer) == keep
            assert bool((counts >= (sizes > 0)).all()), "at least one token of each tile"
            if keep <= 11:
                assert bool(((counts - quota).abs() < 1).logical_or(counts == 1).all())
            for number in range(4):
                places = (UNEVEN[image] == number).nonzero().flatten()
                own, _ = greedily(
                    shown.features[image][places], importance[image][places].double(), int(counts[number])
                )
                assert sorted(places[own].tolist()) == [one for one in answer if UNEVEN[image, one] == number]


def test_fewer_tokens_than_tiles() -> None:
    shown = clip(tile=UNEVEN)
    assert [len(row) for row in kept(EADP(keep=2), shown)] == [2, 2]


def test_tiles_may_compete() -> None:
    """Where nothing is smoothed, tiles make no difference then."""
    shown = clip(original=40, grid=None)
    tiled = dataclasses.replace(shown, tile=UNEVEN)
    assert kept(EADP(keep=9, budget="image"), tiled) == kept(EADP(keep=9), shown)
    assert kept(EADP(keep=9), tiled) != kept(EADP(keep=9), shown)


def test_rows_stand_alone() -> None:
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[1, 3:] = False
    for fields in ({}, {"tile": UNEVEN}):
        shown = clip(word_mask=mask, **fields)
        for official in (False, True):
            assert_rows_stand_alone(EADP(keep=9, official=official), [shown])


# ---------------------------------------------------------------------------------------------------------------------
# what it needs and refuses


def test_each_space_needs_its_own() -> None:
    assert EADP().needs == ("features", "image_clip", "text_clip", "word_clip", "word_mask")
    assert EADP(space="decoder").needs == ("features", "text", "text_mask", "after_image")


def test_a_question_without_words_is_refused() -> None:
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(FoveateError, match="EADP reads the words of the question, but it has none"):
        EADP().select(clip(word_mask=mask))
    after = torch.zeros(1, 10, dtype=torch.bool)
    with pytest.raises(FoveateError, match="EADP reads the text after the image, but image 0 is followed by none"):
        EADP(space="decoder").select(dataclasses.replace(EXAMPLE, after_image=after))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": "pixels"}, "space='pixels' is not among its choices"),
        ({"beta": -1.0}, r"beta=-1.0 is no number in \[0, 8\]; the nearest is beta=0.0"),
        ({"relevance": "plus"}, "relevance='plus' is not among its choices"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        EADP(**fields)


def test_degenerate_pictures() -> None:
    same = clip(batch=1, tokens=9)
    same = dataclasses.replace(same, features=torch.ones(1, 9, 4), image_clip=torch.ones(1, 9, 8))
    assert kept(EADP(keep=4), same) == [[0, 1, 2, 3]]
    zero = dataclasses.replace(same, features=torch.zeros(1, 9, 4), image_clip=torch.zeros(1, 9, 8))
    assert kept(EADP(keep=4), zero) == [[0, 1, 2, 3]]
    assert kept(EADP(keep=1.0), clip()) == [list(range(36))] * 2
