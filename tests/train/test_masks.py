"""Soft masks by hand, against eq. 9 written out, and straight-through decisions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.train.masks import columns, decide, soft_mask

LOWEST = torch.finfo(torch.float32).min


def causal(length: int) -> Tensor:
    return torch.zeros(length, length).masked_fill(~torch.ones(length, length).tril().bool(), LOWEST)[None, None]


def literal(scores: Tensor, allowed: Tensor, keys: Tensor) -> Tensor:
    """Eq. 7 and 9 as printed: exponentials of the causal scores times M, over their sum. (L, L), (L, L), (L,)."""
    length = len(keys)
    multiplier = torch.stack(
        [torch.stack([keys[j] * 0 + 1 if i == j else keys[j] for j in range(length)]) for i in range(length)]
    )
    weights = torch.exp(scores) * allowed * multiplier
    return weights / weights.sum(dim=-1, keepdim=True)


def test_the_mask_of_four_tokens_by_hand() -> None:
    """Text, a kept visual token, a dropped one, text; the third is padding for the last query."""
    original = causal(4)
    original[0, 0, 3, 0] = LOWEST
    mask = soft_mask(original, torch.tensor([[1.0, 1.0, 0.0, 1.0]]))[0, 0]
    gone = math.log(1e-9)
    expected = [
        [0, LOWEST, LOWEST, LOWEST],
        [0, 0, LOWEST, LOWEST],
        [0, 0, 0, LOWEST],  # it sees itself
        [LOWEST, 0, gone, 0],
    ]
    torch.testing.assert_close(mask, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert mask.isfinite().all()


def test_columns_put_each_decision_where_its_token_stands() -> None:
    places, present = torch.tensor([[1, 2, 4], [3, 0, 0]]), torch.tensor([[True] * 3, [True, False, False]])
    made = columns(torch.tensor([[0.0, 1.0, 0.25], [0.5, 0.0, 0.0]]), places, present, 5)
    assert made.tolist() == [[1, 0, 1, 1, 0.25], [1, 1, 1, 0.5, 1]]


@given(st.integers(0, 50), st.lists(st.sampled_from([0.0, 0.0, 0.3, 1.0]), min_size=3, max_size=6))
def test_forwards_and_backwards_equal_eq_9_written_literally(seed: int, decisions: list[float]) -> None:
    length = len(decisions)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(length, length, generator=generator, dtype=torch.float64)
    toward = torch.randn(length, length, generator=generator, dtype=torch.float64)
    mine, theirs = (torch.tensor(decisions, dtype=torch.float64, requires_grad=True) for _ in range(2))
    allowed = torch.ones(length, length, dtype=torch.float64).tril()
    attention = (scores + soft_mask(causal(length).double(), mine[None])[0, 0]).softmax(dim=-1)
    expected = literal(scores, allowed, theirs)
    torch.testing.assert_close(attention, expected, atol=1e-7, rtol=1e-7)
    (attention * toward).sum().backward()
    (expected * toward).sum().backward()
    assert theirs.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-5)
    assert bool((theirs.grad[1:-1] != 0).all()), "dropped tokens have a gradient as well"


def test_float32_gradients_of_dropped_tokens_are_those_of_eq_9() -> None:
    torch.manual_seed(1)
    scores, toward = torch.randn(5, 5), torch.randn(5, 5)
    keys = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], requires_grad=True)
    ((scores + soft_mask(causal(5), keys[None])[0, 0]).softmax(dim=-1) * toward).sum().backward()
    exact = keys.detach().double().requires_grad_()
    (literal(scores.double(), torch.ones(5, 5).tril(), exact) * toward).sum().backward()
    torch.testing.assert_close(keys.grad, exact.grad.float(), rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


def test_decisions_are_exactly_0_or_1_and_have_the_gradient_of_the_softmax() -> None:
    scores = torch.randn(2, 50, 2, requires_grad=True)
    made = decide(scores, temperature=0.7, generator=torch.Generator().manual_seed(3))
    assert set(made.flatten().tolist()) == {0.0, 1.0}
    made.sum().backward()
    again = scores.detach().clone().requires_grad_()
    uniform = torch.rand(again.shape, generator=torch.Generator().manual_seed(3))
    noisy = (again - torch.log(-torch.log(uniform))) / 0.7
    soft = noisy.softmax(dim=-1)[..., 0]
    assert torch.equal(made.detach() == 1, soft > 0.5)
    soft.sum().backward()
    torch.testing.assert_close(scores.grad, again.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("gap", "share"), [(0.0, 0.5), (2.0, 0.8808), (-2.0, 0.1192)])
def test_a_token_is_kept_as_often_as_its_scores_say(gap: float, share: float) -> None:
    scores = torch.tensor([gap, 0.0]).expand(1, 40_000, 2)
    kept = decide(scores, generator=torch.Generator().manual_seed(0)).mean().item()
    assert kept == pytest.approx(share, abs=0.01)
