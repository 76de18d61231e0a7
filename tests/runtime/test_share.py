"""Rivals that look at one encoding: each answers as it would alone, and the encoder runs once."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from untouched import untouched

import foveate
from foveate.core import FoveateError
from foveate.prune import share_encoding

RIVALS = ("fopru:keep=9", "random:keep=9", "fopru:keep=12+fastv:layer=2,keep=5")
NEEDS = {need for rival in RIVALS for stage in foveate.spec.parse_stages(rival) for need in stage.needs}


class Counter:
    """Counts how often a module runs."""

    def __init__(self, module: Any) -> None:
        self.runs = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.runs += 1


def answers(model: Any, rival: str, given: dict[str, Any]) -> tuple[Any, list[list[int]]]:
    with foveate.prune(model, rival) as trace:
        out = model.generate(**given, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits), [image.kept.tolist() for image in trace.images]


def test_each_answers_as_it_would_alone() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i1i5")
    alone = [answers(model, rival, given) for rival in RIVALS]
    with untouched(model), share_encoding(model, NEEDS):
        together = [answers(model, rival, given) for rival in RIVALS]
    for (logits, kept), (logits_alone, kept_alone) in zip(together, alone, strict=True):
        assert kept == kept_alone
        assert torch.equal(logits, logits_alone)


def test_the_encoder_runs_once_for_the_same_pictures() -> None:
    model = tiny.model()
    counter = Counter(tiny.vision(model).encoder.layers[0])
    first, second = tiny.inputs(model, "3i4"), tiny.inputs(model, "3i4", seed=1)
    with share_encoding(model, NEEDS):
        for given in (first, first, {**first, "pixel_values": first["pixel_values"].clone()}):
            for rival in RIVALS:
                answers(model, rival, given)
        assert counter.runs == 1
        model.generate(**first, max_new_tokens=1)
        assert counter.runs == 1
        kept = answers(model, RIVALS[0], second)[1]
        assert counter.runs == 2
        assert answers(model, RIVALS[0], first)[1] != kept
        assert counter.runs == 3
    assert kept == answers(model, RIVALS[0], second)[1]
    assert counter.runs == 4


def test_a_direct_call_shares_too() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    counter = Counter(tiny.vision(model).encoder.layers[0])
    with foveate.prune(model, RIVALS[0]), torch.no_grad():
        alone = model(**given).logits
    with share_encoding(model, NEEDS), torch.no_grad():
        for _ in range(2):
            with foveate.prune(model, RIVALS[0]):
                assert torch.equal(model(**given).logits, alone)
    assert counter.runs == 2


def test_what_changes_the_encoding_cannot_share_it() -> None:
    model = tiny.model(blocks=6)
    with (
        untouched(model),
        share_encoding(model, ()),
        pytest.raises(FoveateError, match=r"image_text_interaction.* changes the encoding, so it cannot share it"),
    ):
        foveate.prune(model, "image_text_interaction").start()


def test_a_model_that_is_being_pruned_shares_nothing() -> None:
    model = tiny.model()
    with (
        foveate.prune(model, RIVALS[0]),
        pytest.raises(FoveateError, match="share its encoding before a handle is started"),
        share_encoding(model, ()),
    ):
        pass
