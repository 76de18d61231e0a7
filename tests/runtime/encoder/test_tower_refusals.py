"""What a stage inside the encoder refuses, before any work where that can be known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from models.untouched import untouched
from references.encoder_by_hand import ROWS, Cut, Inside, RaggedCut, features_of

import foveate
from foveate import FoPru, FoveateError, ImageTextInteraction
from foveate.core import Method, Selection, Signals


@pytest.mark.parametrize("layer", [-2, 3])
def test_tokens_must_leave_before_the_block_that_is_read(layer: int) -> None:
    model = tiny.model(vision_feature_layer=layer)
    foveate.prune(model, ImageTextInteraction(where=2)).discard()
    with pytest.raises(
        FoveateError,
        match="image_text_interaction:where=3,visual_only=true acts after 3 encoder blocks; tokens must leave after 1 "
        "to 2 of them, before the block that the projector reads",
    ):
        foveate.prune(model, ImageTextInteraction(where=3))
    foveate.prune(tiny.model(vision_feature_layer=-1), ImageTextInteraction(where=3)).discard()
    for where in (4, 9):
        with pytest.raises(FoveateError, match=rf"where={where} is outside 1\.\.3 of an encoder of 4 blocks"):
            foveate.prune(model, ImageTextInteraction(where=where))


def test_a_projector_of_several_blocks_is_refused() -> None:
    model = tiny.model(vision_feature_layer=[-2, -1])
    with pytest.raises(FoveateError, match="a projector that reads several blocks cannot be shortened"):
        foveate.prune(model, ImageTextInteraction(where=1))


def test_an_encoder_without_cls_is_refused() -> None:
    model = tiny.model(tower="siglip")
    with pytest.raises(FoveateError, match=r"needs tower\.2/24\.cls, which llava-1\.5 with siglip_vision_model"):
        foveate.prune(model, ImageTextInteraction())
    with pytest.raises(FoveateError, match=r"needs tower\.read\.cls"):
        foveate.prune(model, ImageTextInteraction(where="output"))


@pytest.mark.parametrize("block", ["1", "read", "last"])
def test_a_stage_cannot_read_a_block_that_has_not_run(block: str) -> None:
    method = Inside(answer=lambda signals: Selection(list(signals.index)), wants=(f"tower.{block}.received",))
    with pytest.raises(
        FoveateError, match=f"reads block {block}, which has not run by then; it can read blocks 0 to 0"
    ):
        foveate.prune(tiny.model(), method)


@pytest.mark.parametrize("need", ["features", "text", "after_image"])
def test_a_stage_inside_sees_neither_text_nor_projected_tokens(need: str) -> None:
    method = Inside(answer=lambda signals: Selection(list(signals.index)), wants=(need,))
    with pytest.raises(FoveateError, match=f"needs {need} inside the encoder, which llava-1.5 with clip_vision_model"):
        foveate.prune(tiny.model(), method)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("method", [Cut(layers=(2,), keep=(9,)), FoPru(keep=9)])
def test_the_block_that_is_read_cannot_change_from_call_to_call(method: Method, direct: bool) -> None:
    """The features of an earlier block are not shortened, and "read" would name the wrong one."""
    model = tiny.model()
    given: dict[str, Any] = {**tiny.inputs(model, "3i4"), "vision_feature_layer": 1}
    with (
        untouched(model),
        foveate.prune(model, method),
        pytest.raises(FoveateError, match=r"vision_feature_layer=1 differs from the configuration's -2.*before prune"),
    ):
        model(**given) if direct else model.generate(**given, max_new_tokens=1)
    with foveate.prune(model, method) as trace:
        model.generate(**{**given, "vision_feature_layer": -2}, max_new_tokens=1)
    assert trace.images[0].after == 9


def test_a_later_stage_that_asks_for_more_than_is_left() -> None:
    model = tiny.model()
    with pytest.raises(FoveateError, match="FoPru asks for 20 tokens but 9 of the image's 36 are left"):
        foveate.prune(model, [Cut(layers=(1,), keep=(9,)), FoPru(keep=20)])
    _, call = features_of(model, tiny.inputs(model, *ROWS), [RaggedCut(layers=(1,)), FoPru(keep=16)])
    for image in call.images:
        assert image.after == min(16, image.stages[0].after)


def test_tokens_for_the_projector_do_not_fit_inside() -> None:
    model = tiny.model()

    def answer(signals: Signals) -> Selection:
        return Selection([row[:2] for row in signals.index], features=[torch.zeros(2, 32)], space="encoded")

    with (
        untouched(model),
        foveate.prune(model, Inside(answer=answer)),
        pytest.raises(FoveateError, match="tokens for the projector where only the block's own stream fits"),
    ):
        model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=1)
