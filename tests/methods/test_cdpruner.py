"""CDPruner: relevance by hand and its sign, the set by determinants, tiles, and what happens beyond the rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from models.batches import assert_rows_stand_alone
from references.worked import UNEVEN, assert_every_tile_stands_alone, assert_picks, kept, randn, seen
from torch import Tensor

from foveate.core import FoveateError, Signals
from foveate.methods.cdpruner import CDPruner


def signals(features: Tensor, image: Tensor, text: Tensor, **more: Any) -> Signals:
    return seen(*features.shape[:2], features=features, image_clip=image, text_clip=text, **more)


RANDOM = signals(randn(2, 36, 24), randn(2, 36, 8, seed=1), randn(2, 3, 8, seed=2))
# Cosines to the question: 1, 0, -1 and 0.6.
CORNERS = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.6, 0.8]]])
QUESTION = torch.tensor([[[5.0, 0.0]]])


def test_relevance_is_the_stretched_cosine() -> None:
    shown = signals(torch.eye(4)[None], CORNERS, QUESTION)
    expected = torch.tensor([[1.0, 0.5, 0.0, 0.8]])
    torch.testing.assert_close(CDPruner().relevances(shown), expected, atol=1e-5, rtol=0)
    negated = torch.tensor([[0.0, 0.5, 1.0, 0.2]])
    for method in (CDPruner(relevance="negated"), CDPruner(official=True)):
        torch.testing.assert_close(method.relevances(shown), negated, atol=1e-5, rtol=0)
    assert bool((CDPruner().relevances(shown) > 0).all())
    assert_picks(CDPruner(), shown, [0, 3, 1, 2])
    assert_picks(CDPruner(official=True), shown, [2, 1, 3, 0])


def test_pieces_of_a_question_are_averaged() -> None:
    """Cosines to (1, 0) and (0, 1), mean: 0.5, 0.5, -0.5 and 0.7."""
    shown = signals(torch.eye(4)[None], CORNERS, torch.tensor([[[5.0, 0.0], [0.0, 1.0]]]))
    expected = torch.tensor([[1.0 / 1.2, 1.0 / 1.2, 0.0, 1.0]])
    torch.testing.assert_close(CDPruner().relevances(shown), expected, atol=1e-5, rtol=0)


def test_the_code_stretches_over_the_batch() -> None:
    """Beside an image whose cosines are 0.6 and 0.8 only."""
    other = torch.tensor([[[0.6, 0.8], [0.8, 0.6], [0.6, 0.8], [0.8, 0.6]]])
    batch = signals(torch.eye(4).expand(2, 4, 4), torch.cat([CORNERS, other]), QUESTION.expand(2, 1, 2))
    alone = CDPruner(relevance="negated").relevances(batch)
    torch.testing.assert_close(alone[1], torch.tensor([1.0, 0.0, 1.0, 0.0]), atol=1e-4, rtol=0)
    together = CDPruner(official=True).relevances(batch)
    torch.testing.assert_close(together[1], torch.tensor([0.2, 0.1, 0.2, 0.1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(together[0], alone[0])


def test_every_pick_makes_the_largest_determinant() -> None:
    shown = signals(RANDOM.features[:1], RANDOM.image_clip[:1], RANDOM.text_clip[:1])
    relevance = CDPruner().relevances(shown)[0].double().numpy()
    unit = torch.nn.functional.normalize(shown.features[0].double(), dim=-1).numpy()
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    picks: list[int] = []
    while len(picks) < 16:
        left = [token for token in range(36) if token not in picks]
        volume = [np.linalg.slogdet(kernel[np.ix_([*picks, token], [*picks, token])])[1] for token in left]
        picks.append(left[int(np.argmax(volume))])
    assert_picks(CDPruner(), shown, picks)


def test_a_question_that_says_nothing_leaves_diversity() -> None:
    shown = signals(torch.eye(5)[None], torch.ones(1, 5, 4), torch.randn(1, 1, 4))
    torch.testing.assert_close(CDPruner().relevances(shown), torch.ones(1, 5))
    assert kept(CDPruner(keep=3), shown) == [[0, 1, 2]]


@pytest.mark.parametrize("width", [1, 4, 32])
def test_more_tokens_than_the_rank(width: int) -> None:
    """The official code repeats tokens here."""
    shown = signals(randn(2, 100, width), randn(2, 100, 8, seed=1), randn(2, 1, 8, seed=2))
    for keep in (width, width + 1, 64, 100):
        assert [len(row) for row in kept(CDPruner(keep=keep), shown)] == [keep] * 2


def test_zero_tokens_copies_and_single_tokens() -> None:
    features = randn(1, 8, 6)
    features[0, 3] = 0.0
    features[0, 5:] = features[0, 4]
    image = randn(1, 8, 4, seed=1)
    image[0, 2] = 0.0
    shown = signals(features, image, randn(1, 1, 4, seed=2))
    for keep in range(1, 9):
        assert len(kept(CDPruner(keep=keep), shown)[0]) == keep
    assert kept(CDPruner(keep=1), signals(features[:, :1], image[:, :1], torch.zeros(1, 1, 4))) == [[0]]


def test_rows_stand_alone_unless_the_code_is_asked_for() -> None:
    image = randn(2, 36, 8, seed=1)
    image[1, :, 0] += 3.0
    shown = dataclasses.replace(RANDOM, image_clip=image, index=RANDOM.index.flip(1))
    for relevance in ("direct", "negated"):
        assert_rows_stand_alone(CDPruner(keep=9, relevance=relevance), [shown])


@pytest.mark.parametrize("keep", [3, 10, 17])
def test_tiles_compete_within_themselves(keep: int) -> None:
    """With one relevance for all, tiles stand alone; it is stretched over the image, not over the tile."""
    even = dataclasses.replace(RANDOM, image_clip=torch.ones(2, 36, 8))
    assert_every_tile_stands_alone(CDPruner(keep=keep), even, UNEVEN)
    tiled = dataclasses.replace(RANDOM, tile=UNEVEN)
    assert [len(row) for row in kept(CDPruner(keep=keep), tiled)] == [keep] * 2
    torch.testing.assert_close(CDPruner().relevances(tiled), CDPruner().relevances(RANDOM))
    assert kept(CDPruner(keep=keep, budget="image"), tiled) == kept(CDPruner(keep=keep), RANDOM)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(FoveateError, match="relevance='minus' is not among its choices"):
        CDPruner(relevance="minus")  # type: ignore[arg-type]
    with pytest.raises(FoveateError, match="keep=40 asks for 40 tokens but the image has 36"):
        CDPruner(keep=40).select(RANDOM)
    broken = dataclasses.replace(RANDOM, image_clip=RANDOM.image_clip * torch.nan)
    with pytest.raises(FoveateError, match="scores are NaN or infinite"):
        CDPruner(keep=4).select(broken)


def test_in_the_decoders_space_the_question_is_the_mean_of_the_text_after_the_image() -> None:
    """Words (9, 9) before it and (4, 0), (2, 0) behind: cosines 1, 0, -1 and 0.6 to (1, 0)."""
    text = torch.tensor([[[9.0, 9.0], [4.0, 0.0], [2.0, 0.0], [7.0, 7.0]]])
    shown = seen(
        1,
        4,
        features=CORNERS,
        text=text,
        text_mask=torch.tensor([[True, True, True, False]]),
        after_image=torch.tensor([[False, True, True, True]]),
    )
    method = CDPruner(space="decoder")
    assert method.needs == ("features", "text", "text_mask", "after_image")
    torch.testing.assert_close(method.relevances(shown), torch.tensor([[1.0, 0.5, 0.0, 0.8]]), atol=1e-5, rtol=0)
    clip = signals(CORNERS, CORNERS, QUESTION)
    assert method.select(shown).indices[0].tolist() == CDPruner().select(clip).indices[0].tolist()
    silent = dataclasses.replace(shown, after_image=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(FoveateError, match="CDPruner reads the text after the image, but image 0 is followed by none"):
        method.select(silent)


def test_the_authors_code_knows_clips_space_alone() -> None:
    with pytest.raises(FoveateError, match="compares in CLIP's joint space, not in space='decoder'; leave out one"):
        CDPruner(space="decoder", official=True)
