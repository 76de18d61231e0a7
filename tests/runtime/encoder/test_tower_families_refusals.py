"""Budgets of tiles, and what the encoders of families refuse."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from models import tiny
from models.untouched import untouched
from references import tower_by_hand
from references.tower_agreement import ROWS, Cut, by_hand, features_of, made

from foveate import FoPru, FoveateError, ImageTextInteraction
from foveate.core import Method, Selection, Signals
from foveate.methods.crossget import CrossGET
from foveate.methods.dynamicvit import DynamicViT
from foveate.methods.tome import ToMe


def test_a_budget_is_shared_in_proportion() -> None:
    """LLaVA-NeXT's picture of 31 x 14 pixels: 16 tokens of the base tile, and 16 and 12 of tiles with padding."""
    model = made("llava-next")
    given = tiny.inputs(model, *ROWS)
    pieces = by_hand(model, given).pieces
    _, _, call = features_of(model, given, Cut(layers=(2,), keep=(11,)))
    for number, image in enumerate(call.images):
        tiles = [piece for piece in pieces if piece.picture == number]
        left = [len(set(piece.tokens) & set(image.kept.tolist())) for piece in tiles]
        assert left == tower_by_hand.divided(11, [len(piece.tokens) for piece in tiles])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            DynamicViT(keep=(3, 2, 1), path="random"),
            r"asks for 2 tokens of a picture whose 3 tiles keep 1 each inside .* keep=3",
        ),
        (CrossGET(keep=5), r"crossget:keep=5 asks for 5 tokens of a picture whose 3 tiles keep 2 each .* keep=6"),
        (ToMe(keep=4000), "keep=4000 asks for 4000 tokens but the image has"),
        (ImageTextInteraction(keep=1), r"keep=1.* asks for 1 tokens of a picture whose \d tiles"),
    ],
    ids=str,
)
def test_a_budget_that_tiles_cannot_keep(method: Method, message: str) -> None:
    model = made("llava-next")
    with tiny.prune(model, method), pytest.raises(FoveateError, match=message):
        model(**tiny.inputs(model, *ROWS))


def test_interpolated_tokens_do_not_merge() -> None:
    model = made("llava-onevision")
    with (
        untouched(model),
        tiny.prune(model, ToMe(keep=0.5)),
        pytest.raises(FoveateError, match="merges tokens, and those of this picture are interpolated between patches"),
    ):
        model(**tiny.inputs(model, *ROWS))


def test_attention_in_windows_is_read_where_whole_pictures_are_seen() -> None:
    """In the tiny model blocks 2 and 5 see whole pictures."""
    model = made("qwen2.5-vl")
    with pytest.raises(
        FoveateError,
        match="reads attention in block 1, which sees windows; the nearest that sees whole pictures is block 2",
    ):
        tiny.prune(model, ImageTextInteraction(where=2, attention="received"))
    given = tiny.inputs(model, *ROWS)
    for where in (3, 4):
        call = features_of(model, given, ImageTextInteraction(where=where, attention="received", visual_only=True))[2]
        assert any(image.after < image.original for image in call.images)


def test_patches_that_a_mask_hides() -> None:
    model = made("idefics3")
    given = tiny.inputs(model, "3i4")
    given["pixel_attention_mask"][:, :, 20:] = 0
    with tiny.prune(model, Cut()), pytest.raises(FoveateError, match="a mask hides patches of the pictures"):
        model(**given)


def test_merging_in_a_packed_encoder_reads_keys_alone() -> None:
    @dataclass(frozen=True)
    class Reader(ToMe):
        needs = ("tower.latest.hidden", "tower.latest.keys", "tower.latest.received")

    model = made("qwen2-vl")
    with tiny.prune(model, Reader(r=1)), pytest.raises(FoveateError, match="reads received of the block in which it"):
        model(**tiny.inputs(model, "3i4"))


@pytest.mark.parametrize("method", [ToMe(r=1), FoPru(keep=3)], ids=["inside", "behind"])
@pytest.mark.parametrize("given_tiles", [2, 4])
def test_pictures_that_the_prompt_does_not_speak_of(given_tiles: int, method: Method) -> None:
    """InternVL's prompt says how many tiles a picture has: three."""
    model = made("internvl")
    given = {**tiny.inputs(model, "3i4")}
    given["pixel_values"] = given["pixel_values"][[0, 1, 2, 0]][:given_tiles]
    with untouched(model), tiny.prune(model, method), pytest.raises(FoveateError) as error:
        model(**given)
    assert "pass what the processor made" in str(error.value)
    assert "27" in str(error.value) or "144 patches" in str(error.value)


@dataclass(frozen=True)
class Averaging(Cut):
    """Averaging: hands on the mean of what it keeps and drops, as wide as one patch."""

    layers: tuple[int, ...] = (2,)
    keep: tuple[float, ...] = (0.5,)

    def select(self, signals: Signals) -> Selection:
        chosen = super().select(signals)
        hidden = signals.tower["latest"].hidden
        assert hidden is not None
        rows = [hidden[row, : kept.numel()] for row, kept in enumerate(chosen.indices)]
        return Selection(chosen.indices, features=rows)


@pytest.mark.parametrize("family", ["internvl", "qwen2-vl", "llava-onevision"])
def test_new_tokens_as_wide_as_a_patch_do_not_stand_for_several(family: str) -> None:
    model = made(family)
    with (
        untouched(model),
        tiny.prune(model, Averaging()),
        pytest.raises(FoveateError, match="returns tokens 32 wide, where each token stands for 4 patches of 32"),
    ):
        model(**tiny.inputs(model, *ROWS))
