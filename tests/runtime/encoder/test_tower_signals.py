"""What stages see of an encoder that was pruned before them, and patches put back where projectors join neighbours."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from models import tiny
from models.doubles import Answer
from models.untouched import untouched
from references import reference
from references.encoder_by_hand import METHODS, READ, ROWS, Seen, attention_of, close, features_of, of_record
from torch import Tensor

import foveate
from foveate import FoPru
from foveate.core import Selection, Signals

# ---------------------------------------------------------------------------------------------------------------------
# what later stages see


FIELDS = ("hidden", "received", "given", "received_all", "keys")
OF_CLS = ("cls", "cls_attention", "key_cls", "query_cls")


@pytest.mark.parametrize(
    ("name", "attn"),
    [
        ("fixed", "sdpa"),
        ("two stages", "sdpa"),
        ("ragged", "sdpa"),
        ("ragged, two stages", "eager"),
        ("all of some", "sdpa"),
    ],
)
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_signals_are_those_of_an_explicit_softmax_over_what_is_left(name: str, tower: str, attn: str) -> None:
    method, depths = METHODS[name]
    model = tiny.model(tower=tower, attn=attn)
    cls = int(tower == "clip")
    given = tiny.inputs(model, *ROWS)
    caught: list[Signals] = []

    def answer(signals: Signals) -> Selection:
        caught.append(signals)
        return Selection(list(signals.index))

    fields = FIELDS + (OF_CLS if cls else ())
    wants = tuple(f"tower.{block}.{field}" for block in ("0", "1", "read") for field in fields)
    with (
        untouched(model),
        foveate.prune(model, [method, Answer(answer=answer, wants=wants)]) as trace,
        torch.no_grad(),
    ):
        model(**given)
    rows = {
        tuple(signals.index[place].tolist()): (signals, place)
        for signals in caught
        for place in range(signals.shape[0])
    }
    assert len(rows) == 4, "every picture kept something else"
    for image, pixels in zip(trace.images, given["pixel_values"], strict=True):
        seen = of_record(model, image, pixels, depths)
        signals, place = rows[tuple(image.kept.tolist())]
        index = torch.arange(36)  # on which a block ran
        for number in range(READ + 1):
            for depth, stage in zip(depths, image.stages, strict=False):
                index = stage.kept if depth == number else index
            where = [index.tolist().index(one) for one in image.kept.tolist()]
            shown = signals.tower["read" if number == READ else number]
            for field, value in expected_block(model, seen, number, where).items():
                close(getattr(shown, field)[place].double(), torch.as_tensor(value).double())


@torch.no_grad()
def expected_block(model: Any, seen: Seen, number: int, where: list[int]) -> dict[str, Any]:
    """Fields of one picture's block at some of the places that it ran on."""
    weights = attention_of(model, seen, number)
    cls = int(hasattr(model.model.vision_tower, "pre_layrnorm"))
    block = model.model.vision_tower.encoder.layers[number]
    output = block(seen.inputs[number][None], None)[0]
    keys = block.self_attn.k_proj(block.layer_norm1(seen.inputs[number])).unflatten(-1, (4, 8)).transpose(0, 1)
    patches = weights[:, cls:, cls:].mean(axis=0)
    found: dict[str, Any] = {
        "received": patches.mean(axis=0)[where],
        "given": patches.mean(axis=1)[where],
        "received_all": weights[:, :, cls:].mean(axis=(0, 1))[where],
        "hidden": output[cls:][where],
        "keys": keys[:, cls:][:, where],
    }
    if cls:
        found |= {"cls_attention": weights[:, 0, 1:][:, where], "cls": output[0], "key_cls": keys[:, 0]}
    return found


@pytest.mark.parametrize("name", ["fixed", "ragged", "all of some"])
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_fopru_ranks_what_is_left_by_its_attention(name: str, tower: str) -> None:
    method, depths = METHODS[name]
    model = tiny.model(tower=tower)
    cls = int(tower == "clip")
    given = tiny.inputs(model, *ROWS)
    _, call = features_of(model, given, [method, FoPru(keep=4)])
    for image, pixels in zip(call.images, given["pixel_values"], strict=True):
        seen = of_record(model, image, pixels, depths)
        patches = attention_of(model, seen, READ)[:, cls:, cls:].mean(axis=0)
        sums = [patches.mean(axis=1), patches.mean(axis=0)]
        score = max(sums, key=lambda vector: vector.var(ddof=1))
        best = sorted(seen.index[numpy.argsort(-score)[:4].copy()].tolist())
        assert image.kept.tolist() == best


# ---------------------------------------------------------------------------------------------------------------------
# projectors that are not pointwise


@pytest.mark.usefixtures("gridded")
@pytest.mark.parametrize(("tower", "warm"), [("clip", False), ("clip", True), ("siglip", True)])
@pytest.mark.parametrize("name", ["fixed", "two stages at one depth", "ragged, two stages", "all of some"])
def test_put_back_on_the_grid(name: str, tower: str, warm: bool) -> None:
    """The projector sees all patches, those that left with their last hidden state; the decoder gets the kept ones."""
    method, depths = METHODS[name]
    model = tiny.model(tower=tower)
    given = tiny.inputs(model, *ROWS)
    if warm:  # transformers' collector of hidden states is there before pruning begins
        with torch.no_grad():
            model(**given)
    read: list[Tensor] = []
    projector = model.model.multi_modal_projector
    hook = projector.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0]))
    got, call = features_of(model, given, method)
    hook.remove()
    assert [tuple(one.shape) for one in read] == [(4, 36, 32)]
    for number, (image, pixels) in enumerate(zip(call.images, given["pixel_values"], strict=True)):
        seen = of_record(model, image, pixels, depths)
        close(read[0][number], seen.last)
        close(got[number], reference.project(model, seen.last)[image.kept])
        assert image.after < 36 or name == "all of some"


@pytest.mark.usefixtures("gridded")
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", ["ragged", "all of some"])
def test_fopru_behind_a_grid(name: str, warm: bool) -> None:
    method, depths = METHODS[name]
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    if warm:
        with torch.no_grad():
            model(**given)
    got, call = features_of(model, given, [method, FoPru(keep=3)])
    for number, (image, pixels) in enumerate(zip(call.images, given["pixel_values"], strict=True)):
        seen = of_record(model, image, pixels, depths)
        patches = attention_of(model, seen, READ)[:, 1:, 1:].mean(axis=0)
        score = max([patches.mean(axis=1), patches.mean(axis=0)], key=lambda vector: vector.var(ddof=1))
        assert image.kept.tolist() == sorted(seen.index[numpy.argsort(-score)[:3].copy()].tolist())
        close(got[number], reference.project(model, seen.last)[image.kept])
