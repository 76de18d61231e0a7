"""What a token drops from all layers at once: the same as from one layer after the other, and nothing large moves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny
from torch import Tensor

import foveate
from foveate.runtime.decoder import together

SPEC = "h2o:heavy=4,recent=3"
STEPS = 7


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "fits", lambda layer, number, held: False)


def entries(cache: Any, number: int) -> dict[str, Tensor]:
    """What one layer holds, in order of age, whichever slots it is in."""
    held, layer = cache.timeline.held[number], cache.layers[number]
    order = torch.arange(held.ages.shape[2]).expand_as(held.ages) if held.order is None else held.order
    index = order[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
    return {
        "ages": held.ages.float(),
        "scores": held.scores,
        "keys": layer.keys.gather(2, index),
        "values": layer.values.gather(2, index),
    }


def answered(model: Any, given: dict[str, Tensor], **options: Any) -> Any:
    return model.generate(
        **given, max_new_tokens=STEPS, min_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True, **options
    )


def made(options: dict[str, Any], rows: tuple[str, ...]) -> tuple[Tensor, Tensor, list[dict[str, Tensor]], Any]:
    model = tiny.model()
    with foveate.prune(model, SPEC):
        out = answered(model, tiny.inputs(model, *rows), **options)
        cache = next(value for name, value in out.items() if hasattr(value, "timeline"))
        return out.sequences, torch.stack(out.logits), [entries(cache, number) for number in range(4)], cache


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "do_sample": False}], ids=["greedy", "beams"])
@pytest.mark.parametrize("rows", [("3i4",), ("3i4", "5i2")])
@torch.no_grad()
def test_the_same_leave_as_one_by_one(
    rows: tuple[str, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    together_made = made(options, rows)
    orders = [held.order for held in together_made[3].timeline.held.values()]
    one_by_one(monkeypatch)
    wanted = made(options, rows)
    assert all(held.order is None for held in wanted[3].timeline.held.values())
    if rows == ("3i4",):
        assert all(order is not None for order in orders), "the way under test was not taken"
    assert torch.equal(together_made[0], wanted[0])
    torch.testing.assert_close(together_made[1:3], wanted[1:3], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_token_is_written_where_one_has_left() -> None:
    """From the second token on, keys and values stay in the tensors that the first one made."""
    model, places = tiny.model(), []
    given = tiny.inputs(model, "3i4")

    def watch(ids: Tensor, scores: Tensor) -> Tensor:
        cache = model._foveate_handle._calls.shortened.cache
        places.append([layer.keys.data_ptr() for layer in cache.layers])
        assert {layer.keys.shape[2] for layer in cache.layers} == {7}
        return scores

    with foveate.prune(model, SPEC):
        answered(model, given, logits_processor=[watch])
    assert len(places) == STEPS
    assert all(one == places[1] for one in places[1:])


@torch.no_grad()
def test_what_somebody_puts_in_the_place_of_a_layers_tensors_is_read() -> None:
    """From the second token on all layers share one tensor; one that was given another leaves it for a while."""
    model, shared = tiny.model(), []
    given = tiny.inputs(model, "3i4")

    def answer(swap: bool) -> Tensor:
        def watch(ids: Tensor, scores: Tensor) -> Tensor:
            layers = model._foveate_handle._calls.shortened.cache.layers
            shared.append(len({layer.keys.untyped_storage().data_ptr() for layer in layers}) == 1)
            if swap and len(shared) == 4:
                layers[1].keys = layers[1].keys.clone()
            return scores

        with foveate.prune(model, SPEC):
            shared.clear()
            return torch.stack(answered(model, given, logits_processor=[watch]).logits)

    wanted = answer(swap=False)
    assert shared == [False, *[True] * (STEPS - 1)]
    torch.testing.assert_close(answer(swap=True), wanted, atol=1e-5, rtol=0)
    assert shared == [False, *[True] * (STEPS - 1)]


@pytest.mark.parametrize("again", [lambda cache: cache, copy.deepcopy], ids=["itself", "a copy"])
@torch.no_grad()
def test_a_second_turn_finds_the_entries_in_order(again: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def turns() -> Tensor:
        model = tiny.model()
        given = tiny.inputs(model, "3i4")
        with foveate.prune(model, SPEC):
            first = answered(model, given)
            name, cache = next((name, value) for name, value in first.items() if hasattr(value, "timeline"))
            ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
            second = answered(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **{name: again(cache)})
            return torch.stack(second.logits)

    got = turns()
    one_by_one(monkeypatch)
    torch.testing.assert_close(got, turns(), atol=1e-5, rtol=0)
