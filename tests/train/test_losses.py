"""Both losses by hand."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.train.losses import IGNORED, causal_loss, hint_loss, kept_shares, ratio_loss

DECISIONS = [torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]]), torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 1]])]
PRESENT = torch.tensor([[True] * 4, [True, True, False, False]])


def test_shares_count_the_tokens_of_each_row() -> None:
    assert kept_shares(DECISIONS, PRESENT).tolist() == [[0.5, 1.0], [0.25, 0.5]]
    assert kept_shares([torch.ones(1, 2)], torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[0.0]]


def test_the_ratio_loss_is_eq_11_for_each_row() -> None:
    loss = ratio_loss(DECISIONS, PRESENT, (0.5, 0.25))
    assert loss.item() == pytest.approx((0 + 0.25 + 0 + 0.0625) / 4)


def test_huber_is_quadratic_up_to_beta_and_linear_beyond() -> None:
    wide = [torch.tensor([[1.0, 1, 1, 1]]), torch.tensor([[1.0, 0, 0, 0]])]
    loss = ratio_loss(wide, PRESENT[:1], (0.2, 0.0), "huber")
    assert loss.item() == pytest.approx(((0.8 - 0.25) + 0.5 * 0.25**2 / 0.5) / 2)


def test_answers_are_predicted_one_place_before_them() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]]))
    labels = torch.tensor([[IGNORED, 1, IGNORED]])
    assert causal_loss(logits, labels).item() == pytest.approx(-math.log(0.25))
    assert causal_loss(logits, torch.tensor([[IGNORED, 1, 0]])).item() == pytest.approx(
        -(math.log(0.25) + math.log(0.1)) / 2
    )
    longer = torch.tensor([[IGNORED, IGNORED, IGNORED, 1, 0]])  # the logits are those of its last three places
    assert causal_loss(logits, longer).item() == pytest.approx(-(math.log(0.25) + math.log(0.1)) / 2)


def test_hints_weigh_wanted_tokens_and_others_by_half_each() -> None:
    scores, wanted = (
        [torch.tensor([[2.0, 0.0, 0.0, -1.0]]), torch.zeros(1, 4)],
        torch.tensor([[True, False, False, False]]),
    )
    first = 0.5 * math.log(1 + math.exp(-2)) + 0.5 * (2 * math.log(2) + math.log(1 + math.exp(-1))) / 3
    assert hint_loss(scores, wanted).item() == pytest.approx((first + math.log(2)) / 2)
    assert hint_loss(scores[1:], torch.zeros(1, 4, dtype=torch.bool)).isfinite()
