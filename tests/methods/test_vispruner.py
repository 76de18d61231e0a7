"""VisPruner: hand-worked choices, lists of odd length and tiny budgets, tiles, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.batches import assert_rows_stand_alone
from torch import Tensor

from foveate.core import Block, FoveateError, Signals
from foveate.methods.vispruner import VisPruner
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(attention: Tensor, hidden: Tensor, index: Tensor | None = None, **more: Any) -> Signals:
    """(B, N) attention of one head, (B, N, E)."""
    batch, tokens = attention.shape
    index = torch.arange(tokens).repeat(batch, 1) if index is None else index
    more.setdefault("original", tokens)
    return Signals(index=index, tower={"read": Block(cls_attention=attention[:, None], hidden=hidden)}, **more)


def kept(method: VisPruner, shown: Signals) -> list[list[int]]:
    return [row.tolist() for row in method.select(shown).indices]


def angles(*degrees: float) -> Tensor:
    """(1, N, 2) directions, of different lengths."""
    rows = [[(1 + n) * math.cos(math.radians(d)), (1 + n) * math.sin(math.radians(d))] for n, d in enumerate(degrees)]
    return torch.tensor([rows])


# In falling attention 5, 0, 3, 1, 4, 2.
ATTENTION = torch.tensor([[0.5, 0.3, 0.1, 0.4, 0.2, 0.6]])


def test_important_tokens_and_survivors_by_hand() -> None:
    """5 and 0 are important. Of 3, 1, 4, 2 the even places hold 3 and 4: 3 is 10 degrees from 1, 4 is 70 from 2."""
    shown = signals(ATTENTION, angles(0, 20, 100, 30, 170, 0))
    assert kept(VisPruner(keep=5, ratio=0.5), shown) == [[0, 1, 2, 4, 5]]


def test_all_heads_count_alike() -> None:
    attention = torch.tensor([[[0.9, 0.1, 0.2], [0.0, 0.1, 0.9]]])  # means .45 .1 .55
    shown = Signals(
        original=3,
        index=torch.arange(3)[None],
        tower={"read": Block(cls_attention=attention, hidden=torch.eye(3)[None])},
    )
    assert kept(VisPruner(keep=1), shown) == [[2]]


def test_the_smallest_budget_is_the_token_that_cls_attends_to_most() -> None:
    shown = signals(ATTENTION, angles(0, 20, 100, 30, 170, 0))
    assert kept(VisPruner(keep=1), shown) == [[5]]
    assert kept(VisPruner(keep=1, ratio=0.01), shown) == [[5]]


def test_the_extremes_of_the_ratio() -> None:
    hidden = angles(0, 20, 100, 30, 170, 0)
    assert kept(VisPruner(keep=3, ratio=1.0), signals(ATTENTION, hidden)) == [[0, 3, 5]]
    # Of 5, 0, 3, 1, 4, 2 the even places hold 5 (0 degrees from 0), 3 (10 from 1) and 4 (70 from 2): all three leave.
    assert kept(VisPruner(keep=3, ratio=0.0), signals(ATTENTION, hidden)) == [[0, 1, 2]]


def test_tokens_are_named_by_their_original_index() -> None:
    hidden = angles(0, 20, 100, 30, 170, 0)
    index = torch.tensor([[11, 9, 7, 5, 3, 1]])
    assert kept(VisPruner(keep=5), signals(ATTENTION, hidden, index=index, original=12)) == [[1, 3, 7, 9, 11]]


def test_each_tile_is_pruned_by_itself() -> None:
    generator = torch.Generator().manual_seed(5)
    attention, hidden = torch.rand(2, 40, generator=generator), torch.randn(2, 40, 6, generator=generator)
    tile = torch.tensor([0] * 16 + [1] * 16 + [2] * 8).repeat(2, 1)
    got = kept(VisPruner(keep=22), signals(attention, hidden, tile=tile))
    for row in range(2):
        parts = []
        # 22 over three tiles: 7 each, the remainder to the base; all of them fit.
        for place, share in ((slice(0, 16), 8), (slice(16, 32), 7), (slice(32, 40), 7)):
            alone = signals(attention[row : row + 1, place], hidden[row : row + 1, place])
            parts += [place.start + token for token in kept(VisPruner(keep=share), alone)[0]]
        assert got[row] == parts
    whole = kept(VisPruner(keep=22, budget="image"), signals(attention, hidden, tile=tile))
    assert whole == kept(VisPruner(keep=22), signals(attention, hidden))


def test_counts() -> None:
    assert VisPruner().count(576) == (192,)
    assert VisPruner(keep=0.1).count(2880, tiles=5) == (288,)
    assert VisPruner(keep=0.1, budget="image").count(2880, tiles=5) == (288,)


def test_half_precision_is_compared_in_float32() -> None:
    generator = torch.Generator().manual_seed(2)
    attention, hidden = torch.rand(1, 60, generator=generator), 300 * torch.randn(1, 60, 64, generator=generator)
    half = signals(attention.half(), hidden.half())
    full = signals(attention.half().float(), hidden.half().float())
    assert kept(VisPruner(keep=20), half) == kept(VisPruner(keep=20), full)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 1.5}, "keep=1.5 is no share"),
        ({"ratio": 1.2}, r"ratio=1.2 is no share in \[0, 1\]; the paper's is ratio=0.5"),
        ({"ratio": True}, "ratio=True is no share"),
        ({"ratio": "half"}, "ratio='half' is no share"),
        ({"budget": "pile"}, "did you mean 'tile'"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        VisPruner(**fields)


def test_more_than_is_left_is_refused() -> None:
    shown = signals(ATTENTION, angles(0, 20, 100, 30, 170, 0), original=12)
    with pytest.raises(FoveateError, match="asks for 9 tokens but 6 of its 12 tokens are left"):
        VisPruner(keep=0.75).select(shown)


def test_a_spec_survives_the_round_trip() -> None:
    for method in (VisPruner(), VisPruner(keep=64, ratio=0.25, budget="image")):
        assert parse(format_spec(method)) == method


@given(data=st.data())
def test_exactly_count_tokens_stay_whatever_the_picture(data: st.DataObject) -> None:
    """Odd lists, budgets of one token, equal attention, duplicates and tokens of length 0."""
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 30))
    keep, ratio = (
        data.draw(st.integers(1, tokens) | st.floats(0.01, 1.0)),
        data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    attention = torch.randint(0, 3, (batch, tokens), generator=generator) / 3
    hidden = torch.randint(-1, 2, (batch, tokens, 3), generator=generator).float()
    method = VisPruner(keep=keep, ratio=ratio)
    (selection,) = assert_rows_stand_alone(method, [signals(attention, hidden)])
    selection.check(tokens, batch, "vispruner")
    assert {(len(row),) for row in selection.indices} == {method.count(tokens)}
