"""Cosines, and how distinctive a token's change is: by hand and against k-means in plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.ops import scores
from foveate.ops.scores import cosines, distinctiveness


def test_cosines_by_hand() -> None:
    first = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    second = torch.tensor([[[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]]])
    torch.testing.assert_close(cosines(first, second), torch.tensor([[[0.6, -0.8, 0.0], [0.0, 0.0, 0.0]]]))


@pytest.mark.parametrize("many", [2, 6, 13])
def test_cosines_in_parts_are_those_of_all_pairs(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last part is shorter; one vector is zero."""
    values = torch.randn(2, 13, 5, generator=torch.Generator().manual_seed(0))
    values[1, 4] = 0.0
    monkeypatch.setattr(scores, "MANY", many)
    expected = torch.nn.functional.cosine_similarity(values[:, :, None], values[:, None], dim=-1)
    torch.testing.assert_close(cosines(values, values), expected)
    torch.testing.assert_close(cosines(values, values.clone()), expected)


def test_cosines_of_half_precision_are_taken_in_float32() -> None:
    values = torch.full((1, 2, 64), 300.0, dtype=torch.float16)  # their squares overflow in float16
    found = cosines(values, values)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.ones(1, 2, 2))


def reference(change: np.ndarray, clusters: int, iterations: int, start: str) -> np.ndarray:
    """(N, E) -> (N,), float64."""
    length = np.linalg.norm(change, axis=1)
    unit = [row / max(size, 1e-30) for row, size in zip(change, length, strict=True)]
    tokens = range(len(unit))
    centres = [unit[int(length.argmax())]]
    if start == "lengths":
        spans, order = min(clusters, len(unit)), sorted(tokens, key=lambda i: -length[i])
        centres = [unit[order[math.floor((span + 0.5) * len(unit) / spans)]] for span in range(spans)]
    while len(centres) < min(clusters, len(unit)):
        nearest = [max(unit[i] @ centre for centre in centres) if length[i] else math.inf for i in tokens]
        centres.append(unit[int(np.argmin(nearest))])
    for _ in range(iterations):
        groups = [int(np.argmax([row @ centre for centre in centres])) for row in unit]
        for number in range(len(centres)):
            total = sum((unit[i] for i in tokens if groups[i] == number), np.zeros(change.shape[1]))
            if total.any():
                centres[number] = total / np.linalg.norm(total)
    return np.array([1 - max(unit[i] @ centre for centre in centres) if length[i] else 0 for i in tokens])


@pytest.mark.parametrize("start", ["farthest", "lengths"])
@pytest.mark.parametrize(
    ("tokens", "clusters", "iterations"), [(40, 8, 2), (12, 3, 1), (5, 8, 2), (1, 8, 2), (9, 1, 3)]
)
def test_distinctiveness_equals_k_means_in_a_loop(tokens: int, clusters: int, iterations: int, start: Any) -> None:
    generator = torch.Generator().manual_seed(tokens)
    change = torch.randn(3, tokens, 6, generator=generator)
    found = distinctiveness(change, clusters, iterations, start)
    expected = np.stack([reference(row.double().numpy(), clusters, iterations, start) for row in change])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_longest_change_and_then_the_farthest_are_centres() -> None:
    """Two centres: token 2 (longest), then token 0 (cosine 0 to it). Groups {2, 1} and {0, 3}, one round of means."""
    change = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 5.0], [3.0, 3.0 * math.sqrt(3) / 3]]])
    # Token 3 stands at 30 degrees, so the mean of {0, 3} at 15: cos 15 from both.
    away = 1 - math.cos(math.radians(15))
    torch.testing.assert_close(distinctiveness(change, 2, 1), torch.tensor([[away, 0.0, 0.0, away]]), atol=1e-6, rtol=0)


def test_a_direction_that_no_cluster_has_stands_out() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.eye(4)[torch.arange(40) % 2] + 0.01 * torch.randn(40, 4, generator=generator)
    common[17] = torch.tensor([0.5, 0.5, 0.6, 0.0])
    assert distinctiveness(common[None], clusters=2)[0].argmax() == 17


def test_no_change_is_not_distinctive() -> None:
    assert not distinctiveness(torch.zeros(2, 9, 3)).any()
    change = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(0))
    alone = distinctiveness(change, 3)
    padded = torch.cat([change, torch.zeros(1, 5, 4)], dim=1)
    found = distinctiveness(padded, 3)
    torch.testing.assert_close(found[:, :12], alone)
    assert not found[:, 12:].any()


def test_duplicates_and_opposites_do_no_harm() -> None:
    one = torch.tensor([1.0, 2.0, 2.0])
    same = distinctiveness(one.expand(1, 20, 3))
    torch.testing.assert_close(same, torch.zeros(1, 20), atol=1e-6, rtol=0)
    opposite: Tensor = torch.stack([one, -one] * 5)[None]
    assert distinctiveness(opposite, clusters=1).isfinite().all()


def test_scale_does_not_matter() -> None:
    change = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(distinctiveness(1e3 * change), distinctiveness(change))
