"""H2O: hand-worked evictions, a written-out simulation of whole generations, its budgets and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.batches import assert_rows_stand_alone
from torch import Tensor

from foveate.core import CacheBlock, FoveateError, Signals
from foveate.methods.h2o import H2O
from foveate.ops.scores import causal_received
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(scores: Tensor, age: Tensor | None = None, prompt_length: int | None = None) -> Signals:
    age = torch.arange(scores.shape[-1]).expand(scores.shape) if age is None else age
    cache = CacheBlock(scores=scores, age=age, prompt_length=prompt_length or scores.shape[-1])
    return Signals(original=1, index=torch.zeros(scores.shape[0], 1, dtype=torch.int64), cache=cache)


def test_the_heavy_of_the_older_and_all_recent_entries_stay() -> None:
    scores = torch.tensor([[[5.0, 1, 4, 2, 9, 0]]])
    assert H2O(heavy=2, recent=2).select(signals(scores)).positions.tolist() == [[[0, 2, 4, 5]]]


def test_every_head_decides_for_itself() -> None:
    scores = torch.tensor([[[3.0, 2, 1, 0, 0], [1.0, 2, 3, 0, 0]]])
    assert H2O(heavy=1, recent=1).select(signals(scores)).positions.tolist() == [[[0, 4], [2, 4]]]


def test_positions_are_those_of_the_timeline() -> None:
    age = torch.tensor([[[2, 3, 7, 20, 21], [0, 1, 2, 20, 21]]])
    scores = torch.tensor([[[1.0, 5, 2, 0, 0], [1.0, 5, 6, 0, 0]]])
    kept = H2O(heavy=2, recent=1).select(signals(scores, age, prompt_length=20)).positions
    assert kept.tolist() == [[[3, 7, 21], [1, 2, 21]]]


def test_equal_scores_keep_the_oldest() -> None:
    assert H2O(heavy=2, recent=1).select(signals(torch.ones(1, 1, 6))).positions.tolist() == [[[0, 1, 5]]]


def test_nothing_leaves_while_the_budget_holds_all() -> None:
    for method in (H2O(heavy=3, recent=3), H2O(heavy=0.5, recent=0.5), H2O(heavy=40, recent=1)):
        assert method.select(signals(torch.rand(2, 2, 6))).positions.tolist() == [[list(range(6))] * 2] * 2


@pytest.mark.parametrize(
    ("heavy", "recent", "prompt", "budget"),
    [
        (0.1, 0.1, 636, (63, 63)),
        (0.5, 0.5, 187, (94, 93)),  # shares that add up to 1 hold the whole prompt
        (0.7, 0.3, 11, (8, 3)),
        (0.1, 0.9, 1, (1, 1)),
        (0.1, 0.1, 5, (1, 1)),
        (64, 32, 636, (64, 32)),
        (64, 0.1, 636, (64, 63)),
        (0.1, 32, 636, (63, 32)),
        (0.4, 0.4, 187, (74, 74)),
    ],
)
def test_shares_are_of_the_prompt_and_round_down(
    heavy: float, recent: float, prompt: int, budget: tuple[int, int]
) -> None:
    assert H2O(heavy=heavy, recent=recent).budget(prompt) == budget


def test_no_token_leaves_before_the_cache() -> None:
    assert H2O().count(576) == () and H2O().depths(32) == () and H2O.when == "decode"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: H2O(heavy=0), "heavy=0 is below 1 token"),
        (lambda: H2O(recent=1.5), r"recent=1\.5 is no share"),
        (lambda: H2O(heavy=True), "heavy=True is neither"),
        (
            lambda: H2O(heavy=1, recent=1).select(signals(torch.tensor([[[0.0, torch.nan, 1, 1]]]))),
            "1 of 3 scores are NaN or infinite",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        make()


def test_a_spec_survives_the_round_trip() -> None:
    for method in (H2O(), H2O(heavy=64, recent=0.5)):
        assert parse(format_spec(method)) == method


def simulate(queries: Tensor, keys: Tensor, prompt: int, heavy: int, recent: int) -> list[list[int]]:
    """Entries held after the prompt and after each further token, for one head, written out entry by entry."""
    held: list[int] = []
    score: dict[int, float] = {}
    history = []
    for first, last in [(0, prompt), *((token, token + 1) for token in range(prompt, len(queries)))]:
        held += range(first, last)
        for token in range(first, last):
            seen = [entry for entry in held if entry <= token]
            logits = torch.stack([queries[token] @ keys[entry] for entry in seen]) * queries.shape[1] ** -0.5
            for entry, share in zip(seen, logits.softmax(dim=0).tolist(), strict=True):
                score[entry] = score.get(entry, 0.0) + share
        if len(held) > heavy + recent:
            older = sorted(held[:-recent], key=lambda entry: (-score[entry], entry))
            held = sorted(older[:heavy]) + held[-recent:]
        history.append(list(held))
    return history


def test_a_whole_generation_evicts_what_the_written_out_simulation_evicts() -> None:
    torch.manual_seed(1)
    prompt, steps, heavy, recent = 12, 10, 4, 3
    queries, keys = torch.randn(2, 2, prompt + steps, 4), torch.randn(2, 2, prompt + steps, 4)  # (B, H, L, d)
    method = H2O(heavy=heavy, recent=recent)
    expected = [[simulate(queries[b, h], keys[b, h], prompt, heavy, recent) for h in range(2)] for b in range(2)]
    held = torch.arange(0).expand(2, 2, 0)
    scores = torch.zeros(2, 2, 0)
    for step, (first, last) in enumerate([(0, prompt), *((t, t + 1) for t in range(prompt, prompt + steps))]):
        new = torch.arange(first, last).expand(2, 2, -1)
        held = torch.cat([held, new], dim=-1)
        present = keys.gather(2, held[..., None].expand(-1, -1, -1, 4))
        scores = torch.nn.functional.pad(scores, (0, last - first))
        scores = scores + causal_received(queries[:, :, first:last], present, scale=0.5)
        kept = method.select(signals(scores, held, prompt)).positions
        scores = scores.gather(2, torch.searchsorted(held.contiguous(), kept))
        held = kept
        assert held.tolist() == [[expected[b][h][step] for h in range(2)] for b in range(2)]
    assert held.shape[-1] == heavy + recent


@given(st.data())
def test_exactly_the_budget_stays_ascending_and_rows_stand_alone(data: st.DataObject) -> None:
    batch, heads, length = (data.draw(st.integers(1, most)) for most in (3, 3, 16))
    budgets = st.one_of(st.integers(1, 8), st.floats(0.01, 1.0))
    method = H2O(heavy=data.draw(budgets), recent=data.draw(budgets))
    prompt = data.draw(st.integers(1, length))
    values = data.draw(st.lists(st.integers(0, 5), min_size=batch * heads * length, max_size=batch * heads * length))
    scores = torch.tensor(values).reshape(batch, heads, length) / 4
    age = 2 * torch.arange(length).expand(scores.shape) + 1
    (kept,) = assert_rows_stand_alone(method, [signals(scores, age, prompt)])
    heavy, recent = method.budget(prompt)
    assert kept.positions.shape == (batch, heads, min(length, heavy + recent))
    assert (kept.positions[..., 1:] > kept.positions[..., :-1]).all()
    assert torch.isin(age[..., max(0, length - recent) :], kept.positions).all()
