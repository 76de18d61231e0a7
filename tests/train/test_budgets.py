"""Decisions that meet a budget: exactly without noise, on average with it, and gradients of the chance to stay."""

from __future__ import annotations

import pytest
import torch

from foveate.ops.subsets import best_and_even, even_order
from foveate.train.budgets import shared, threshold
from foveate.train.masks import gumbel

LEFT = torch.tensor([[True] * 16, [True] * 12 + [False] * 4])


def gaps(seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(2, 16, generator=torch.Generator().manual_seed(seed))


def ranks() -> torch.Tensor:
    return even_order(4, 4).expand(2, 16)


def test_the_threshold_keeps_so_many_on_average() -> None:
    count = torch.tensor([4.0, 7.5])
    cut = threshold(gaps(), LEFT, count)
    chance = ((gaps() - cut[:, None]).sigmoid() * LEFT).sum(dim=1)
    torch.testing.assert_close(chance, count, atol=1e-3, rtol=0)
    everything = threshold(gaps(), LEFT, torch.tensor([16.0, 12.0]))
    assert ((gaps() - everything[:, None]).sigmoid()[LEFT] > 0.99).all()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_without_noise_the_decisions_are_those_of_inference(share: float) -> None:
    odds = torch.full((2,), share).logit(eps=1e-6)
    made = shared(gaps(), odds, ranks(), LEFT, torch.tensor([8.0, 4.0]))
    for row, keep in enumerate((8, 4)):
        places = LEFT[row].nonzero()[:, 0]
        even = [round(share * keep)]
        kept = places[best_and_even(gaps()[row, places][None], ranks()[row, places][None], keep, even)[0]]
        assert torch.equal(made[row].nonzero()[:, 0], kept)
    assert made[~LEFT].abs().max() == 0


def test_with_noise_the_budget_is_met_on_average_and_nothing_comes_back() -> None:
    draw, sums = torch.Generator().manual_seed(3), []
    for _ in range(400):
        noise = gumbel(torch.empty(2, 16, 2), draw).diff(dim=-1)[..., 0]
        made = shared(gaps(), torch.zeros(2), ranks(), LEFT, torch.tensor([8.0, 6.0]), noise)
        assert set(made.unique().tolist()) <= {0.0, 1.0} and made[~LEFT].abs().max() == 0
        sums.append(made.sum(dim=1))
    torch.testing.assert_close(torch.stack(sums).mean(dim=0), torch.tensor([8.0, 6.0]), atol=0.25, rtol=0)


def test_a_token_that_helps_pulls_its_score_up_and_the_share_by_where_it_stands() -> None:
    scores, odds = gaps().requires_grad_(), torch.zeros(2, requires_grad=True)
    helps = torch.zeros(2, 16)
    best, worst = int(gaps()[0].argmax()), int(gaps()[0].argmin())
    helps[0, worst] = 1.0
    made = shared(scores, odds, ranks(), LEFT, torch.tensor([8.0, 6.0]))
    (made * helps).sum().backward()
    assert scores.grad is not None and odds.grad is not None
    assert scores.grad[0, worst] > 0 and scores.grad[1].abs().max() == 0
    assert odds.grad[0] > 0, "a token with the lowest score is reached by the lattice alone"
    scores.grad = odds.grad = None
    helps[0, worst], helps[0, best] = 0.0, 1.0
    (shared(scores, odds, ranks(), LEFT, torch.tensor([4.0, 6.0])) * helps).sum().backward()
    assert odds.grad[0] < 0, "one with the highest is more surely reached by its score"
