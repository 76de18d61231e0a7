"""Signals outside pruning: the blocks that were asked for, a model that stays as it was, and refusals."""

from __future__ import annotations

import pytest
import torch
from models import tiny
from models.untouched import untouched

import foveate
from foveate.core import FoveateError
from foveate.methods.image_text_interaction import ImageTextInteraction
from foveate.runtime.encoder.observe import observe

PIXELS = torch.randn(3, 3, tiny.IMAGE_SIDE, tiny.IMAGE_SIDE, generator=torch.Generator().manual_seed(1))


def test_the_named_blocks_are_seen_by_number_and_name() -> None:
    model = tiny.model()
    with untouched(model):
        seen = observe(model, PIXELS, ["tower.1.hidden", "tower.read.received", "tower.last.cls", "features"])
    assert {1, 2, 3, "read", "last"} <= seen.keys()
    assert 0 not in seen
    states = model.model.vision_tower(PIXELS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen[1].hidden, states[2][:, 1:])
    torch.testing.assert_close(seen["last"].cls, states[4][:, 0])
    assert seen["read"] is seen[2]
    assert seen[2].received is not None and seen[2].received.shape == (3, tiny.TOKENS)
    assert seen[2].hidden is None


def test_the_model_is_as_it_was_after_a_failure() -> None:
    model = tiny.model()
    with untouched(model), pytest.raises(RuntimeError):
        observe(model, PIXELS[:, :2], ["tower.0.hidden"])  # two channels


@pytest.mark.parametrize(
    ("tower", "need", "message"),
    [
        ("siglip", "tower.1.cls", "tower.1.cls cannot be read: llava-1.5 with siglip_vision_model does not have it"),
        ("clip", "tower.1.mood", "tower.1.mood cannot be read: llava-1.5 with clip_vision_model does not have it"),
        ("clip", "tower.4.hidden", r"encoder block 4 is outside 0\.\.3"),
    ],
)
def test_what_the_encoder_does_not_have_is_refused(tower: str, need: str, message: str) -> None:
    model = tiny.model(tower=tower)
    with untouched(model), pytest.raises(FoveateError, match=message):
        observe(model, PIXELS, [need])


def test_a_model_that_is_being_pruned_is_refused() -> None:
    model = tiny.model()
    with foveate.prune(model, "random:keep=4"), pytest.raises(FoveateError, match=r"being pruned.*stop\(\) the handle"):
        observe(model, PIXELS, ["tower.0.hidden"])


@pytest.mark.parametrize("where", [2, "output"])
def test_calibration_reads_what_pruning_reads(where: int) -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i1i5")
    method = ImageTextInteraction(where=where, visual_only=True)
    fitted = foveate.calibrate(model, method, given["pixel_values"], 9)
    with foveate.prune(model, fitted) as trace, torch.no_grad():
        model(**given)
    average = sum(image.after for image in trace.images) / len(trace.images)
    assert abs(average - 9) <= 0.5
