"""Numbers per token made of likeness, worked by hand and by loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops.likeness import between_extremes, by_sharpest_words, smoothed, spread_over


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_values_are_stretched_to_one() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [-1.0, -1.0, -1.0]])
    expected = torch.tensor([[0.5 / 2.5, 1.5 / 2.5, 1.0], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(between_extremes(values, 0.5), expected)
    torch.testing.assert_close(between_extremes(values, 1.0, dim=(0, 1))[0], torch.tensor([3 / 5, 4 / 5, 1.0]))
    assert bool((between_extremes(values, 1e-6) > 0).all())


def test_a_word_spreads_itself_over_the_tokens() -> None:
    """Cosines 1, 0 and -1 over a temperature of 1 / log 2: weights 4, 2 and 1."""
    tokens = torch.tensor([[[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]]])
    shares = spread_over(torch.tensor([[[3.0, 0.0]]]), tokens, 1 / math.log(2))
    torch.testing.assert_close(shares, torch.tensor([[[4 / 7, 2 / 7, 1 / 7]]]))
    free = torch.tensor([[True, False, True]])
    shares = spread_over(torch.tensor([[[3.0, 0.0]]]), tokens, 1 / math.log(2), free)
    torch.testing.assert_close(shares, torch.tensor([[[4 / 5, 0.0, 1 / 5]]]))


def sharpest_by_loops(likeness: list[list[float]], words: list[int]) -> list[float]:
    """One image: (N, W) cosines and the words that count."""
    entropy = {}
    for word in words:
        weights = [math.exp(100 * row[word]) for row in likeness]
        shares = [weight / sum(weights) for weight in weights]
        entropy[word] = -sum(share * math.log(share) for share in shares if share)
    kept = sorted(words, key=lambda word: (entropy[word], word))[: max(1, int(0.2 * len(words)))]
    lowest = min(entropy[word] for word in kept)
    weight = {word: math.exp((lowest - entropy[word]) / 0.01) for word in kept}
    return [sum(weight[word] * row[word] for word in kept) / sum(weight.values()) for row in likeness]


@given(seed=st.integers(0, 999), words=st.integers(1, 16), tokens=st.integers(1, 6))
def test_the_sharpest_words_speak(seed: int, words: int, tokens: int) -> None:
    """Differences in likeness are small, so that entropies differ by little more than the weights' temperature."""
    likeness = 0.02 * rand(2, tokens, words, seed=seed)
    mask = torch.ones(2, words, dtype=torch.bool)
    mask[1] = rand(words, seed=seed) < 0.6
    mask[1, -1] = True
    found = by_sharpest_words(likeness, mask)
    for image in range(2):
        own = mask[image].nonzero().flatten().tolist()
        expected = torch.tensor(sharpest_by_loops(likeness[image].double().tolist(), own))
        torch.testing.assert_close(found[image], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("words", "kept"), [(1, 1), (4, 1), (5, 1), (9, 1), (10, 2), (15, 3), (77, 15)])
def test_a_fifth_of_the_words_is_kept(words: int, kept: int) -> None:
    """Word w is at 1 for token w alone, so that all are equally sharp: the first ones are kept and weigh the same."""
    likeness = torch.eye(words + 1)[None, :, :words]
    found = by_sharpest_words(likeness, torch.ones(1, words, dtype=torch.bool))[0]
    expected = torch.zeros(words + 1)
    expected[:kept] = 1 / kept
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (6, 4)])
def test_smoothing_is_a_mirrored_gaussian(grid: tuple[int, int]) -> None:
    height, width = grid
    values = rand(2, height * width)
    kernel = {step: math.exp(-step * step / 2) for step in (-1, 0, 1)}
    whole = sum(kernel.values()) ** 2

    def mirrored(place: int, size: int) -> int:
        return 2 * (size - 1) - place if place >= size else abs(place)

    for image in range(2):
        cells = values[image].view(grid).double().tolist()
        expected = [
            sum(
                kernel[down] * kernel[right] * cells[mirrored(row + down, height)][mirrored(column + right, width)]
                for down in kernel
                for right in kernel
            )
            / whole
            for row in range(height)
            for column in range(width)
        ]
        torch.testing.assert_close(smoothed(values, grid)[image], torch.tensor(expected))


def test_a_single_row_is_not_smoothed() -> None:
    values = rand(1, 6)
    assert torch.equal(smoothed(values, (1, 6)), values) and torch.equal(smoothed(values, (6, 1)), values)
    torch.testing.assert_close(smoothed(torch.ones(1, 6), (2, 3)), torch.ones(1, 6))
