"""Inside the encoders of every family, against the encoders run by hand on the whole grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from models import tiny, tiny_families
from models.untouched import untouched
from packaging.version import Version
from references import merging_by_hand, tower_by_hand
from references.tower_agreement import (
    ROWS,
    UNSCALED,
    Cut,
    RaggedCut,
    agree,
    by_hand,
    dropping,
    each_attention,
    each_family,
    features_of,
    made,
    one_per_block,
)

from foveate import FoPru
from foveate.core import Method, Selection, Signals
from foveate.cost.flops import decoder_flops, projector_flops, tower_flops
from foveate.families import family_of
from foveate.families.shapes import ModelShape
from foveate.methods.crossget import CrossGET
from foveate.methods.dynamicvit import DynamicViT
from foveate.methods.tome import ToMe
from foveate.runtime.seams import CACHE

# Those of Video-LLaVA have an encoder of their own, which no method acts in.
VIDEOS = tuple(name for name, kind in tiny_families.KINDS.items() if kind.video is not None and name != "video-llava")


# ---------------------------------------------------------------------------------------------------------------------
# pictures


@each_attention
@each_family
@pytest.mark.parametrize("method", [Cut(), RaggedCut()], ids=["two stages", "ragged"])
def test_tokens_that_leave(method: Cut, family: str, attn: str) -> None:
    model = made(family, attn)
    call = agree(model, tiny.inputs(model, *ROWS), method, drops=dropping(method))
    for image in call.images:
        counts = method.count(image.original)
        if counts is not None:
            assert [stage.after for stage in image.stages] == list(counts), "the count is exact"


@each_attention
@each_family
def test_tokens_that_merge(family: str, attn: str) -> None:
    model = made(family, attn)
    rows = UNSCALED if family == "llava-onevision" else ROWS
    call = agree(model, tiny.inputs(model, *rows), ToMe(r=1), merges=one_per_block(model))
    assert all([stage.method for stage in image.stages] == ["tome:r=1"] for image in call.images)


@each_attention
@pytest.mark.parametrize("family", VIDEOS)
@pytest.mark.parametrize("method", [Cut(), RaggedCut()], ids=["two stages", "ragged"])
def test_tokens_of_videos_that_leave(method: Cut, family: str, attn: str) -> None:
    model = made(family, attn)
    agree(model, tiny.inputs(model, "3v4", "2v1v5", "6"), method, drops=dropping(method))


@pytest.mark.parametrize("family", [name for name in VIDEOS if name != "llava-onevision"])
def test_tokens_of_videos_that_merge(family: str) -> None:
    model = made(family)
    agree(model, tiny.inputs(model, "3v4", "2v1v5", "6"), ToMe(r=1), merges=one_per_block(model))


@each_family
@pytest.mark.parametrize(
    "method", [Cut(layers=(2,), keep=(1.0,)), ToMe(keep=1.0), DynamicViT(keep=(1.0, 1.0, 1.0), path="random")], ids=str
)
def test_keeping_everything_changes_no_bit(method: Any, family: str) -> None:
    if isinstance(method, Cut):

        class All(Cut):
            def select(self, signals: Signals) -> Selection:
                return Selection(list(signals.index))

        method = All(layers=(2,))
    model = made(family)
    given = tiny.inputs(model, *(UNSCALED if family == "llava-onevision" else ROWS))
    with torch.no_grad():
        plain = model(**given).logits
        with tiny.prune(model, method):
            assert torch.equal(model(**given).logits, plain)


@pytest.mark.parametrize("family", ["llava-next", "llava-next-video", "internvl"])
def test_cross_tokens_of_tiles(family: str) -> None:
    """Each tile has its own, which stands for a token of it and counts in the picture's budget."""
    model = made(family)
    given = tiny.inputs(model, *ROWS)
    got, _, call = features_of(model, given, CrossGET(keep=0.5))
    pieces = by_hand(model, given).pieces
    for number, (features, image) in enumerate(zip(got, call.images, strict=True)):
        assert image.after == round(image.original / 2)
        assert features.isfinite().all()
        extra = image.stages[0].extra
        assert extra is not None
        assert int(extra.sum()) == sum(piece.picture == number for piece in pieces)


@torch.no_grad()
def test_a_tile_with_its_cross_token_equals_a_picture_of_llava_1_5() -> None:
    """The base tile of LLaVA-NeXT has no padding, and each tile is encoded by itself."""
    model = made("llava-next")
    given = tiny.inputs(model, *ROWS)
    got, _, call = features_of(model, given, CrossGET(r=2))
    blocks = family_of(model).read_block(model) + 1
    pictures = [picture for row in given.pictures for picture in row]
    for features, image, picture in zip(got, call.images, pictures, strict=True):
        run = merging_by_hand.crossget(model, picture.pixels[:1], (2,) * blocks, patches=16)
        assert image.kept[image.kept < 16].tolist() == [token.index for token in run.tokens]
        rows = model.model.multi_modal_projector(torch.stack([token.row for token in run.tokens]))
        torch.testing.assert_close(features[: rows.shape[0]], rows, atol=2e-5, rtol=2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# with other stages, and in answers


@each_family
@pytest.mark.parametrize("method", [Cut(), ToMe(keep=0.7)], ids=["drop", "merge"])
def test_a_stage_behind_the_encoder_sees_what_is_left(method: Method, family: str) -> None:
    """It ranks by the attention among those; a row in a batch is what it is alone."""
    model = made(family)
    given = tiny.inputs(model, *(UNSCALED if family == "llava-onevision" else ROWS))
    _, _, first = features_of(model, given, method)
    got, _, call = features_of(model, given, [method, FoPru(keep=3)])
    for features, image, alone in zip(got, call.images, first.images, strict=True):
        assert torch.equal(image.stages[-2].kept, alone.kept)
        assert image.after == 3
        assert set(image.kept.tolist()) <= set(alone.kept.tolist())
        assert features.isfinite().all()
    for row in (0, 1, 2):
        if not given.pictures[row]:
            continue
        single, _, by_itself = features_of(model, given.alone(row), [method, FoPru(keep=3)])
        mine = [number for number, image in enumerate(call.images) if image.row == row]
        for number, rows, image in zip(mine, single, by_itself.images, strict=True):
            assert torch.equal(image.kept, call.images[number].kept)
            torch.testing.assert_close(rows, got[number], atol=1e-4, rtol=1e-4)


@each_family
def test_a_later_turn_brings_another_picture(family: str) -> None:
    """The second call repeats the first prompt, and only its new pictures are encoded."""
    model = made(family)
    turns = (
        (("2i2",), ("1i3",))
        if getattr(model.get_decoder().config, "sliding_window", None)
        else (("3i4", "2i2"), ("5", "1i3"))
    )
    first, second = tiny.inputs(model, *turns[0]), tiny.inputs(model, *turns[1], seed=1)
    method = Cut()
    with tiny.prune(model, method) as trace:
        out = model.generate(**first, max_new_tokens=3, return_dict_in_generate=True)
        given, whole = first.continued(out.sequences, second)
        needed = family_of(model).later_turns
        if needed is not None and Version(transformers.__version__) < Version(needed):
            pytest.skip(f"pictures in later turns of {family} need transformers {needed}")
        again = model.generate(**given, **{CACHE: getattr(out, CACHE)}, max_new_tokens=3)
    assert len(trace.history) == 2
    hand = by_hand(model, second, drops=dropping(method))
    for number, image in enumerate(trace.latest.images):
        assert image.kept.tolist() == hand.kept(number)
    assert again.shape[1] == whole["input_ids"].shape[1] + 3


@each_family
def test_the_trace_counts_what_was_computed(family: str) -> None:
    """Of each tile, the patches of the tokens that were left; the projector maps all that it was given."""
    model = made(family)
    given = tiny.inputs(model, *(UNSCALED if family == "llava-onevision" else ROWS))
    method = Cut(layers=(2,), keep=(0.5,))
    call = features_of(model, given, method)[2]
    hand = by_hand(model, given, drops=dropping(method))
    mine, shape = family_of(model), ModelShape.from_config(model.config)
    read, outright = mine.read_block(model), not mine.puts_back(mine.tower_of(model)[1])
    expected = 0
    for patches, left in zip(hand.lengths, hand.left, strict=True):
        end = 6 if outright else read + 1
        lengths = [patches] * 2 + [max(1, left)] * (end - 2) + [patches] * (6 - end)
        lengths = [length + shape.tower.cls for length in lengths[: shape.tower.layers]]
        expected += tower_flops(shape.tower, convention="roofline", lengths=lengths, patches=patches)
    mapped = sum(image.after for image in call.images) if outright else sum(hand.lengths) // shape.projector.merge
    expected += projector_flops(shape.projector, tokens=mapped)
    for row, valid in enumerate(given["attention_mask"].sum(dim=1).tolist()):
        gone = sum(image.original - image.after for image in call.images if image.row == row)
        lengths = [valid - gone] * shape.decoder.layers
        expected += decoder_flops(shape.decoder, lengths=lengths, convention="roofline")
    assert call.budget.prefill_flops == expected


# ---------------------------------------------------------------------------------------------------------------------
# around it


@each_family
@pytest.mark.parametrize(("where", "method"), [("projector", Cut()), ("block", ToMe(r=2))], ids=["drop", "merge"])
def test_an_exception_inside_leaves_nothing_behind(where: str, method: Method, family: str) -> None:
    model = made(family)
    given = tiny.inputs(model, *(UNSCALED if family == "llava-onevision" else ROWS))
    clean, _, _ = features_of(model, given, method)
    row = family_of(model)
    module = tower_by_hand.parts_of(model)[1][4]
    if where == "projector":
        module = model.model.get_submodule(row.projector)

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    with untouched(model):
        hook = module.register_forward_hook(fail)
        with tiny.prune(model, method), torch.no_grad():
            for call in (lambda: model(**given), lambda: model.generate(**given, max_new_tokens=1)):
                with pytest.raises(RuntimeError, match="on purpose"):
                    call()
        hook.remove()
    again, _, _ = features_of(model, given, method)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, clean, strict=True))


def test_pictures_encoded_outside_a_call_are_whole() -> None:
    model = made("qwen2.5-vl")
    given = tiny.inputs(model, "3i4")
    pixels = {"pixel_values": given["pixel_values"], "image_grid_thw": given["image_grid_thw"]}
    with torch.no_grad(), tiny.prune(model, ToMe(keep=0.5)):
        model(**given)
        assert model.model.get_image_features(**pixels, return_dict=True).pooler_output[0].shape == (24, 32)
