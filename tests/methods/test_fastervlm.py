"""FasterVLM: hand-worked rankings, budgets over tiles, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.batches import assert_rows_stand_alone
from torch import Tensor

from foveate.core import Block, FoveateError, Signals
from foveate.methods.fastervlm import FasterVLM
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(attention: Tensor, index: Tensor | None = None, **more: Any) -> Signals:
    batch, _, tokens = attention.shape
    index = torch.arange(tokens).repeat(batch, 1) if index is None else index
    more.setdefault("original", tokens)
    return Signals(index=index, tower={"read": Block(cls_attention=attention)}, **more)


def kept(method: FasterVLM, shown: Signals) -> list[list[int]]:
    return [row.tolist() for row in method.select(shown).indices]


def test_the_mean_over_heads_decides() -> None:
    attention = torch.tensor([[[0.5, 0.1, 0.0, 0.2], [0.0, 0.1, 0.4, 0.3]]])  # means .25 .1 .2 .25
    assert kept(FasterVLM(keep=3), signals(attention)) == [[0, 2, 3]]
    assert kept(FasterVLM(keep=1), signals(attention)) == [[0]], "the lowest index wins a tie"


def test_tokens_are_named_by_their_original_index() -> None:
    shown = signals(torch.tensor([[[0.1, 0.4, 0.2, 0.3]]]), index=torch.tensor([[12, 3, 11, 2]]), original=16)
    assert kept(FasterVLM(keep=2), shown) == [[2, 3]]


@pytest.mark.parametrize(("keep", "tokens"), [(0.25, 144), (0.1, 58), (0.05, 29), (64, 64), (1.0, 576), (0.0001, 1)])
def test_shares_are_rounded(keep: float, tokens: int) -> None:
    assert FasterVLM(keep=keep).count(576) == (tokens,)


def test_a_share_is_rounded_once() -> None:
    assert FasterVLM(keep=0.1).count(2880, tiles=5) == (288,), "not 58 of each tile"
    assert FasterVLM(keep=0.1, budget="image").count(2880, tiles=5) == (288,)
    assert FasterVLM(keep=0.1).count(2879, tiles=5) == (288,), "tiles of different sizes"
    assert FasterVLM(keep=290).count(2880, tiles=5) == (290,)


ROWS = torch.tensor([[[0.1, 0.2, 0.9, 0.8, 0.7, 0.6]]])
TILE = torch.tensor([[0, 0, 0, 1, 1, 1]])


def test_every_tile_keeps_its_share() -> None:
    shown = signals(ROWS, tile=TILE)
    assert kept(FasterVLM(keep=4), shown) == [[1, 2, 3, 4]]
    assert kept(FasterVLM(keep=3), shown) == [[1, 2, 3]], "the remainder goes to the base tile"
    assert kept(FasterVLM(keep=0.34), shown) == [[2, 3]], "one of three in each"
    assert kept(FasterVLM(keep=3, budget="image"), shown) == [[2, 3, 4]]


def test_tiles_after_an_earlier_stage() -> None:
    shown = signals(ROWS[..., 1:], index=torch.tensor([[1, 2, 3, 4, 5]]), tile=TILE[:, 1:], original=6)
    assert kept(FasterVLM(keep=5), shown) == [[1, 2, 3, 4, 5]]
    with pytest.raises(FoveateError, match="asks for 6 tokens but 5 of its 6 tokens are left"):
        FasterVLM(keep=6).select(shown)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 0}, "keep=0 is below 1 token"),
        ({"budget": "tiles"}, "budget='tiles' is not among its choices; did you mean 'tile'"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        FasterVLM(**fields)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(FoveateError, match="1 of 3 scores are NaN or infinite"):
        FasterVLM(keep=1).select(signals(torch.tensor([[[0.1, torch.inf, 0.2]]])))


def test_a_spec_survives_the_round_trip() -> None:
    for method in (FasterVLM(), FasterVLM(keep=64, budget="image")):
        assert parse(format_spec(method)) == method


@given(data=st.data())
def test_exactly_count_tokens_stay_and_rows_stand_alone(data: st.DataObject) -> None:
    batch, tokens, tiles = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    method = FasterVLM(keep=data.draw(st.integers(1, tokens) | st.floats(0.01, 1.0)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    attention = torch.randint(0, 4, (batch, 2, tokens), generator=generator) / 4
    shown = signals(attention)
    if tiles > 1 and tokens % tiles == 0:
        shown = signals(attention, tile=(torch.arange(tokens) * tiles // tokens).repeat(batch, 1))
    (selection,) = assert_rows_stand_alone(method, [shown])
    selection.check(tokens, batch, "fastervlm")
    assert {(len(row),) for row in selection.indices} == {method.count(tokens, tiles=shown.tiles)}
