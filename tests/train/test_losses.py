"""The losses by hand."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.train.losses import IGNORED, causal_loss, even_loss, hint_loss, kept_shares, ratio_loss

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


def softplus(value: float) -> float:
    return math.log(1 + math.exp(value))


def test_hints_put_wanted_tokens_first_and_distracting_ones_last() -> None:
    scores, wanted = torch.tensor([[2.0, 0.0, 0.0, -1.0]]), torch.tensor([[1, 0, 0, -1]])
    wants = 0.5 * math.log(2) + 0.5 * (2 * softplus(-2) + softplus(-3)) / 3  # the border at 2
    distracts = 0.5 * (softplus(-4) + 2 * softplus(-2)) / 3 + 0.5 * softplus(1)  # the one at -2
    first = (wants + distracts) / 2 + softplus(-3)  # the wanted one lies 3 above the distracting one
    assert hint_loss([scores], wanted).item() == pytest.approx(first)
    again = (math.log(1 + math.exp(2)) + math.log(1 + math.exp(-2))) / 4  # 0 for all: each border is 2 away
    flat = hint_loss([torch.zeros(1, 4)], wanted).item()
    assert flat == pytest.approx(2 * again + math.log(2))
    assert hint_loss([scores, torch.zeros(1, 4)], wanted).item() == pytest.approx((first + flat) / 2)


def test_hints_judge_what_a_stage_could_choose_and_rows_that_want_something() -> None:
    scores, wanted = torch.tensor([[2.0, 0.0, 9.0], [5.0, -5.0, 5.0]]), torch.tensor([[1, 0, -1], [0, 0, 0]])
    left = torch.tensor([[True, True, False], [True, True, True]])
    loss = hint_loss([scores], wanted, [left]).item()
    wants = 0.5 * math.log(2) + 0.5 * softplus(-2)
    stays = 0.5 * (softplus(-4) + softplus(-2)) / 2
    assert loss == pytest.approx((wants + stays) / 2)
    assert hint_loss([scores], torch.zeros(2, 3)).item() == 0.0


def test_shares_spread_evenly_are_judged_where_rows_say_so() -> None:
    odds = [torch.tensor([0.0, 3.0]), torch.tensor([2.0, 1.0])]
    even = [torch.tensor([0.25, torch.nan]), torch.tensor([1.0, torch.nan])]
    assert even_loss(odds, even).item() == pytest.approx((math.log(2) + softplus(-2)) / 2)
    assert even_loss(odds, [torch.full((2,), torch.nan)] * 2).item() == 0.0


def test_shares_can_be_asked_of_each_row() -> None:
    wanted = torch.tensor([[0.5, 0.5], [0.25, 1.0]])
    assert ratio_loss(DECISIONS, PRESENT, wanted).item() == pytest.approx((0 + 0.25 + 0 + 0.25) / 4)
