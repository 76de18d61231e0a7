"""Inside the encoders of every family, against the encoders run by hand on the whole grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers
from models import tiny, tiny_families
from models.untouched import untouched
from packaging.version import Version
from references import family_reference, merging_by_hand, tower_by_hand
from references.tower_by_hand import ByHand, Piece
from torch import Tensor

from foveate import FoPru, FoveateError, ImageTextInteraction
from foveate.core import Grid, Method, Selection, Signals, Site
from foveate.cost.flops import decoder_flops, projector_flops, tower_flops
from foveate.families import family_of
from foveate.families.rows import FAMILIES as ROWS_OF_FAMILIES
from foveate.families.shapes import ModelShape
from foveate.methods.crossget import CrossGET
from foveate.methods.dynamicvit import DynamicViT
from foveate.methods.tome import ToMe
from foveate.runtime.seams import CACHE
from foveate.trace import Call

OPEN = {family.name for family in ROWS_OF_FAMILIES if family.inside is None}
FAMILIES = tuple(name for name in tiny_families.KINDS if name.partition("/")[0] in OPEN)
# Those of Video-LLaVA have an encoder of their own, which no method acts in.
VIDEOS = tuple(name for name, kind in tiny_families.KINDS.items() if kind.video is not None and name != "video-llava")
ATTENTION = ("sdpa", "eager")
ROWS = ("3i4", "2i1i5", "6")
# Of LLaVA-OneVision's pictures the first is scaled down, so that its tokens share patches.
UNSCALED = ("2i1i5", "6", "1i4")
each_family = pytest.mark.parametrize("family", FAMILIES)
each_attention = pytest.mark.parametrize("attn", ATTENTION)


def longest(hidden: Tensor, count: int) -> Tensor:
    """(K, E): the places of the longest rows, ascending."""
    return hidden.double().norm(dim=-1).topk(count).indices.sort().values


def above(hidden: Tensor) -> Tensor:
    """(K,) which rows are longer than the mean."""
    length = hidden.double().norm(dim=-1)
    stay = length > length.mean()
    stay[length.argmax()] = True
    return stay


@dataclass(frozen=True)
class Cut(Method):
    """Cut: keeps the tokens with the longest hidden states behind the block before each stage."""

    site: ClassVar[Site] = "tower"
    needs = ("tower.latest.hidden",)

    layers: tuple[int, ...] = (1, 3)
    keep: tuple[float, ...] = (0.7, 0.4)

    def depths(self, layers: int) -> tuple[int, ...]:
        return self.layers

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return tuple(max(1, round(share * original)) if share < 1 else int(share) for share in self.keep)

    def select(self, signals: Signals) -> Selection:
        hidden, count = signals.tower["latest"].hidden, self.wanted(signals)
        assert hidden is not None
        return Selection([index[longest(rows, count)] for rows, index in zip(hidden, signals.index, strict=True)])


@dataclass(frozen=True)
class RaggedCut(Cut):
    """RaggedCut: keeps those above the average."""

    adaptive: ClassVar[bool] = True
    layers: tuple[int, ...] = (2,)

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return None

    def select(self, signals: Signals) -> Selection:
        hidden = signals.tower["latest"].hidden
        assert hidden is not None
        return Selection([index[above(rows)] for rows, index in zip(hidden, signals.index, strict=True)])


# ---------------------------------------------------------------------------------------------------------------------
# both sides


def made(family: str, attn: str = "sdpa") -> Any:
    return tiny.model(family, attn=attn, blocks=6)


def stock(model: Any, given: Any) -> list[family_reference.Seen]:
    """The pictures of all rows."""
    return [one for row in range(len(given.pictures)) for one in family_reference.pictures(model, given.alone(row))]


def features_of(model: Any, given: Any, method: Any) -> tuple[list[Tensor], list[tuple[Tensor, ...]], Call]:
    """Rows of each picture as the decoder gets them, what is not visual among them; deep features; the call."""
    got: list[Any] = []

    def note(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        got.extend(options["mm_encoder_outputs"].values())

    hook = model.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with untouched(model), tiny.prune(model, method) as trace, torch.no_grad():
            model(**given)
    finally:
        hook.remove()
    others = [one.features.shape[0] - one.visual.numel() for one in stock(model, given)]
    lengths = [image.after + other for image, other in zip(trace.images, others, strict=True)]
    rows = torch.cat(list(got[0].pooler_output)).split(lengths)
    deep = [torch.cat(list(one)).split(lengths) for one in getattr(got[0], "deepstack_features", None) or ()]
    return list(rows), [tuple(block[number] for block in deep) for number in range(len(lengths))], trace.latest


def by_hand(model: Any, given: Any, **stages: Any) -> ByHand:
    seen = stock(model, given)
    return tower_by_hand.encoded(
        model, given, [one.visual for one in seen], [one.features.shape[0] for one in seen], **stages
    )


def agree(model: Any, given: Any, method: Method, **stages: Any) -> Call:
    """The same tokens stay by both ways, and the decoder gets the same of them."""
    got, deep, call = features_of(model, given, method)
    hand = by_hand(model, given, **stages)
    for number, (image, seen) in enumerate(zip(call.images, stock(model, given), strict=True)):
        assert image.kept.tolist() == hand.kept(number)
        assert image.after < image.original
        left = stays(seen, image.kept)
        for mine, theirs in zip((got[number], *deep[number]), (hand.rows[number], *hand.deep[number]), strict=True):
            torch.testing.assert_close(mine, theirs[left], atol=2e-4, rtol=2e-4)
        plain = seen.features[left]
        assert (got[number] - plain).abs().max() > 1e-3, "what left is missed"
    return call


def stays(seen: family_reference.Seen, kept: Tensor) -> Tensor:
    """(M,) bool: the rows of a picture that its kept tokens and what is not visual leave."""
    left = torch.ones(seen.features.shape[0], dtype=torch.bool)
    left[seen.visual] = False
    left[seen.visual[kept]] = True
    return left


def dropping(method: Cut) -> Callable[[list[Piece]], Sequence[tuple[int, Any]]]:
    """The same choice by hand: of each tile its part of the picture's budget."""

    def stages(pieces: list[Piece]) -> list[tuple[int, Any]]:
        def stay(number: int, piece: Piece, means: Tensor) -> list[int]:
            if isinstance(method, RaggedCut):
                return [token for token, yes in zip(piece.there, above(means).tolist(), strict=True) if yes]
            counts = method.count(sum(piece.together))
            assert counts is not None
            share = tower_by_hand.divided(counts[number], piece.together)[piece.place]
            return [piece.there[place] for place in longest(means, share).tolist()]

        return [
            (depth, lambda piece, means, number=number: stay(number, piece, means))
            for number, depth in enumerate(method.layers)
        ]

    return stages


def one_per_block(model: Any) -> Callable[[Piece, int], int]:
    read = family_of(model).read_block(model)
    return lambda piece, block: min(1, len(piece.there) // 2) if block <= read else 0


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
    shape, read = ModelShape.from_config(model.config), family_of(model).read_block(model)
    outright = family in {"paligemma", "video-llava", "deepseek-vl"}
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
@pytest.mark.parametrize("method", [Cut(), ToMe(r=2)], ids=["drop", "merge"])
@pytest.mark.parametrize("where", ["block", "projector"])
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


# ---------------------------------------------------------------------------------------------------------------------
# budgets and refusals


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
