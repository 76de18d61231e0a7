"""Training's way between decoder layers: what it is shown, what it may change, and what is refused."""

from __future__ import annotations

import pytest
import torch
from models import tiny
from models.untouched import untouched
from torch import Tensor

import foveate
from foveate.core import FoveateError
from foveate.runtime.decoder.soften import soften


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [("3i4",), ("3i4", "2i9")])
def test_the_models_own_mask_comes_back_the_same(attn: str, rows: tuple[str, ...]) -> None:
    model = tiny.model(attn=attn)
    given = tiny.inputs(model, *rows)
    seen: list[tuple[int, tuple[int, ...]]] = []

    def same(number: int, hidden: Tensor, mask: Tensor) -> Tensor:
        seen.append((number, tuple(hidden.shape)))
        assert mask.dtype == torch.float32 and mask.shape[-2:] == (hidden.shape[1],) * 2
        return mask

    with torch.no_grad(), untouched(model):
        stock = model(**given, use_cache=False).logits
        with soften(model, same):
            again = model(**given, use_cache=False).logits
    real = given["attention_mask"].bool()
    torch.testing.assert_close(again[real], stock[real], atol=1e-5, rtol=1e-5)
    batch, length = given["input_ids"].shape
    assert seen == [(number, (batch, length, 32)) for number in range(4)]


def test_none_leaves_the_mask_as_it_is() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i9")
    with torch.no_grad():
        stock = model(**given, use_cache=False).logits
        with soften(model, lambda number, hidden, mask: None):
            assert torch.equal(model(**given, use_cache=False).logits, stock)


def test_hooks_are_gone_after_an_exception() -> None:
    model = tiny.model()

    def explode(number: int, hidden: Tensor, mask: Tensor) -> Tensor:
        raise RuntimeError("in the middle")

    with untouched(model), pytest.raises(RuntimeError, match="in the middle"), soften(model, explode):
        model(**tiny.inputs(model, "3i4"))


def test_what_cannot_be_trained_with_is_refused() -> None:
    model = tiny.model()
    with (
        foveate.prune(model, "uniform:keep=9"),
        pytest.raises(FoveateError, match="is being pruned"),
        soften(model, _no),
    ):
        pass
    with (
        pytest.raises(FoveateError, match="load the model with dtype=bfloat16, or dtype=float32"),
        soften(tiny.model().half(), _no),
    ):
        pass
    model.get_decoder().config._attn_implementation = "flash_attention_2"
    with pytest.raises(FoveateError, match="load the model with sdpa or eager"), soften(model, _no):
        pass


def _no(number: int, hidden: Tensor, mask: Tensor) -> None:
    return None
