"""Families whose row leaves sizes of a model open: it is pruned all the same, and a warning says what is assumed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from models import tiny

import foveate
from foveate.core import FoveateError
from foveate.evaluate.check import check
from foveate.families import decoders, reading, rows
from foveate.families.shapes import ModelShape

EVERYWHERE = ["tome:r=1", "fopru:keep=0.5", "fastv:layer=2,keep=0.5", "h2o"]
DECODER = (
    "the decoder's blocks are dense and gated (the shape of a 'llama' decoder is not known: DECODERS in "
    "families/decoders.py is where to add it)"
)
ENCODER = (
    "what encoder and projector compute is not counted (the shape of a 'llava' model is not known: `shape` of the "
    "family's row, in families/rows.py, is where to name its reader)"
)


@pytest.fixture
def no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {kind: sizes for kind, sizes in decoders.DECODERS.items() if kind != "llama"}
    monkeypatch.setattr(decoders, "DECODERS", known)


@pytest.fixture
def no_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    first = dataclasses.replace(rows.FAMILIES[0], shape=None)
    for module in (rows, reading, foveate.families):
        monkeypatch.setattr(module, "FAMILIES", (first, *rows.FAMILIES[1:]))


def answer(model: Any, given: Any) -> torch.Tensor:
    out = model.generate(**given, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits)


def warned(model: Any, method: str) -> tuple[Any, str]:
    with pytest.warns(UserWarning, match="^llava-1.5: not all sizes are known") as caught:
        handle = foveate.prune(model, method)
    (warning,) = caught
    return handle, str(warning.message)


@pytest.mark.parametrize("method", EVERYWHERE)
@pytest.mark.parametrize(("missing", "said"), [("no_decoder", DECODER), ("no_reader", ENCODER)])
def test_it_is_pruned_as_with_all_sizes(missing: str, said: str, method: str, request: pytest.FixtureRequest) -> None:
    model = tiny.model(blocks=6)
    given = tiny.inputs(model, "3i4", "2i1i5")
    with foveate.prune(model, method) as full:
        wanted = answer(model, given)
    request.getfixturevalue(missing)
    model = tiny.model(blocks=6)  # sizes of the first one have been read
    handle, message = warned(model, method)
    with handle as trace:
        assert torch.equal(answer(model, given), wanted)
    assert message == (
        "llava-1.5: not all sizes are known, and where it counts what pruning saves, this is assumed: "
        f"{said}. What is pruned does not depend on it"
    )
    assert trace.latest.budget.tokens == full.latest.budget.tokens
    if missing == "no_decoder":  # this one is dense and gated
        assert trace.latest.budget == full.latest.budget
    else:
        assert 0 < trace.latest.budget.prefill_flops < full.latest.budget.prefill_flops


@pytest.mark.usefixtures("no_decoder", "no_reader")
def test_both_are_named() -> None:
    handle, message = warned(tiny.model(), "random:keep=0.5")
    handle.discard()
    assert f"{DECODER}; {ENCODER}" in message


@pytest.mark.usefixtures("no_reader")
def test_an_encoder_of_another_kind() -> None:
    """A reader there is, but the encoder's row is missing: only a configuration can be read so far."""
    config = tiny.model("llava-next").config.to_dict()
    config["vision_config"]["model_type"] = "eye"
    shape, assumed = reading.read_or_assume(config, rows.FAMILIES[1], 6)
    assert (shape.tower.layers, shape.tower.width) == (6, 1)
    assert shape.decoder == ModelShape.from_config(tiny.model("llava-next").config).decoder
    (said,) = assumed
    assert said.startswith("what encoder and projector compute is not counted (the shape of a 'eye' tower is not known")


@pytest.mark.usefixtures("no_decoder")
def test_the_check_reports_it() -> None:
    model = tiny.model()
    found = check(model, tiny.inputs(model, "3i4"))
    assert (found.has_row, found.family, found.assumed) == (True, "llava-1.5", (DECODER,))
    assert [outcome for outcome in found.outcomes if not outcome.passed] == []


@pytest.mark.usefixtures("no_decoder")
def test_a_size_that_is_not_stated_is_refused() -> None:
    config = tiny.model().config.to_dict()
    config["text_config"]["intermediate_size"] = None
    with pytest.raises(FoveateError, match="the llama config states intermediate_size=None, which is no size"):
        reading.read_or_assume(config, rows.FAMILIES[0], 4)


@pytest.mark.usefixtures("no_reader")
def test_an_estimate_wants_to_know() -> None:
    """Only what runs anyway goes on with assumptions."""
    with pytest.raises(FoveateError, match="the shape of a 'llava' model is not known"):
        ModelShape.from_config(tiny.model().config)
