"""Before the encoder: what it is given are the patches of kept tokens, against encoders that see nothing else."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from models import tiny, tiny_calls, tiny_families
from models.untouched import untouched
from references import agreement, family_reference, kept_alone, predicted
from references.tower_agreement import FAMILIES, agree
from torch import Tensor

from foveate import FoPru, FoveateError
from foveate.core import Method, Selection, Signals, Site
from foveate.families import family_of
from foveate.methods.pixelprune import PixelPrune
from foveate.runtime.encoder.observe import signals_of
from foveate.runtime.encoder.pixels import normalised_by
from foveate.runtime.encoder.share import share_encoding

ROWS = ("3i4", "2i1i5", "6")
STEPS = 3
# Those of Video-LLaVA have an encoder of their own, which no method acts in.
VIDEOS = [name for name in tiny_families.with_videos() if name != "video-llava"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
each_family = pytest.mark.parametrize("family", FAMILIES)
each_attention = pytest.mark.parametrize("attn", ["sdpa", "eager"])


@dataclass(frozen=True)
class Looking(Method):
    """Looking: keeps everything, and remembers what it saw."""

    site: ClassVar[Site] = "pixels"
    adaptive: ClassVar[bool] = True
    needs = ("pixels", "normalised")

    seen: ClassVar[list[Signals]] = []

    def count(self, *_: Any) -> None:
        return None

    def select(self, signals: Signals) -> Selection:
        self.seen.append(signals)
        return Selection(list(signals.index))


@dataclass(frozen=True)
class Listed(Looking):
    """Listed: keeps the tokens that it was told."""

    keep: tuple[int, ...] = ()

    def select(self, signals: Signals) -> Selection:
        return Selection([torch.tensor(self.keep)] * signals.shape[0])


def look(model: Any, given: Any) -> list[Signals]:
    Looking.seen.clear()
    with tiny.prune(model, Looking()), torch.no_grad():
        model(**given)
    return list(Looking.seen)


def of_greys(picture: Tensor, mean: Any = MEAN, std: Any = STD) -> Tensor:
    """Greys (..., 3, h, w) as a processor normalises them."""
    return (picture / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def generate(model: Any, given: Any) -> Any:
    return model.generate(**given, max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True)


# ---------------------------------------------------------------------------------------------------------------------
# against encoders by hand


@each_attention
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_llava_equals_an_encoder_that_is_given_nothing_else(tower: str, attn: str) -> None:
    model = tiny.model(tower=tower, attn=attn, blocks=4)
    given = tiny.inputs(model, *ROWS)
    given["pixel_values"][:, :, :, 8:16] = 0.2
    with untouched(model), tiny.prune(model, PixelPrune()) as trace:
        out = generate(model, given)
    assert {image.after for image in trace.images} == {30}  # of two columns of one colour the second repeats the first
    alone = [
        kept_alone.llava(model, picture, image.kept.tolist())
        for picture, image in zip(given["pixel_values"], trace.images, strict=True)
    ]
    rows = agreement.prompts(model, given, trace.latest, merged=[alone])
    assert agreement.worst(model, rows, out, STEPS) < agreement.TOLERANCE
    whole = agreement.prompts(model, given, trace.latest)
    assert agreement.worst(model, whole, out, STEPS) > 0.01, "what is not given is missed"


@each_attention
@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_qwen_equals_an_encoder_that_is_given_nothing_else(
    family: str, attn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(family, attn=attn, blocks=4)
    given = tiny_calls.repeating(tiny.inputs(model, *ROWS))
    with untouched(model), tiny.prune(model, PixelPrune()) as trace:
        out = generate(model, given)
    stock, images = family_reference.pictures, {}
    for row in range(len(ROWS)):
        of_row = [image for image in trace.images if image.row == row]
        images.update({id(one): image for one, image in zip(given.pictures[row], of_row, strict=True)})

    def alone(model: Any, of_row: Any) -> list[family_reference.Seen]:
        found = []
        for seen, picture in zip(stock(model, of_row), of_row.pictures[0], strict=True):
            kept = images[id(picture)].kept
            assert 3 < kept.numel() < seen.visual.numel()
            made = kept_alone.qwen2_5 if family == "qwen2.5-vl" else kept_alone.qwen3
            rows = made(model, picture.pixels, picture.size[1:], kept.tolist())
            rows, deep = rows if isinstance(rows, tuple) else (rows, ())
            whole = [torch.zeros_like(seen.features).index_copy(0, kept, one) for one in (rows, *deep)]
            found.append(family_reference.Seen(whole[0], seen.visual, tuple(whole[1:])))
        return found

    plain = agreement.prompts(model, given, trace.latest)
    assert agreement.worst(model, plain, out, STEPS) > 0.01, "what is not given is missed"
    monkeypatch.setattr(family_reference, "pictures", alone)
    rows = agreement.prompts(model, given, trace.latest)
    assert agreement.worst(model, rows, out, STEPS) < agreement.TOLERANCE


def from_the_start(call: Any) -> Any:
    """The tokens that a call kept, as a stage before the first block of an encoder by hand."""

    def stages(pieces: Any) -> list[Any]:
        return [(0, lambda piece, _: [one for one in piece.there if one in call.images[piece.picture].kept.tolist()])]

    return stages


@each_attention
@each_family
def test_each_family_equals_its_encoder_by_hand(family: str, attn: str) -> None:
    model = tiny.model(family, attn=attn, blocks=4)
    given = tiny_calls.repeating(tiny.inputs(model, *ROWS))
    with tiny.prune(model, PixelPrune()) as trace, torch.no_grad():
        model(**given)
    agree(model, given, PixelPrune(), drops=from_the_start(trace.latest))


@pytest.mark.parametrize("family", VIDEOS)
def test_frames_lose_what_repeats_within_them(family: str) -> None:
    model = tiny.model(family, blocks=4)
    given = tiny_calls.repeating(tiny.inputs(model, "3v4", "2v1v5", "6"))
    with tiny.prune(model, PixelPrune()) as trace, torch.no_grad():
        model(**given)
    agree(model, given, PixelPrune(), drops=from_the_start(trace.latest))


def still(given: Any) -> Any:
    """The same call with videos of which frames repeat those before, but for a patch that moves."""

    def held(picture: Any) -> Any:
        if not picture.video:
            return picture
        pixels = picture.pixels.clone()
        frames = pixels.view(picture.size[0], -1, pixels.shape[-1]) if pixels.ndim == 2 else pixels
        for number in range(1, len(frames)):
            before = frames[number - 1].clone()
            if pixels.ndim == 2:
                before[5 * number] = frames[number, 5 * number]
            else:
                before[..., -4:, : 4 * number] = frames[number][..., -4:, : 4 * number]
            frames[number] = before
        return dataclasses.replace(picture, pixels=pixels)

    pictures = [[held(picture) for picture in row] for row in given.pictures]
    return tiny_calls.call(given.model, given["input_ids"], given.get("attention_mask"), pictures)


@pytest.mark.parametrize("family", VIDEOS)
def test_what_stands_still_in_a_video_leaves(family: str) -> None:
    """Against the rule followed token by token, and the encoder by hand on what that leaves."""
    model = tiny.model(family, blocks=4)
    given = still(tiny.inputs(model, "3v4", "2v1v5", "6"))
    method = PixelPrune(frames="before")
    seen = look(model, given)
    with tiny.prune(model, method) as trace, torch.no_grad():
        model(**given)
    kept: dict[tuple[int, int], list[bool]] = {}
    for one in seen:
        assert one.frames is not None and one.pixels is not None and one.grid is not None and one.tile is not None
        assert [frame for _, frame in one.frames] == one.tile[:, 0].tolist()
        for video in {video for video, _ in one.frames}:
            mine = [row for row, (of, _) in enumerate(one.frames) if of == video]
            rows = predicted.of_video(one.pixels[mine], one.grid, 0.0, "max", True)
            kept.update({one.frames[row]: stays for row, stays in zip(mine, rows, strict=True)})
    for video, image in enumerate(trace.images):
        frames = [kept[place] for place in sorted(kept) if place[0] == video]
        flat = [stays for frame in frames for stays in frame]
        assert image.kept.tolist() == [number for number, stays in enumerate(flat) if stays]
        assert image.after < image.original, "random pixels repeat nowhere else"
    agree(model, given, method, drops=from_the_start(trace.latest))


# ---------------------------------------------------------------------------------------------------------------------
# what a method sees


def test_the_pixels_of_a_picture_are_its_greys() -> None:
    """By hand: four patches of four by four pixels are side by side in their rows and columns."""
    model = tiny.model(tower="clip")
    greys = torch.randint(0, 256, (1, 3, 24, 24), generator=torch.Generator().manual_seed(1)).float()
    given = {**tiny.inputs(model, "2i3"), "pixel_values": of_greys(greys)}
    (seen,) = look(model, given)
    assert seen.pixels is not None and seen.pixels.shape == (1, 36, 48) and seen.grid == (6, 6)
    patch = seen.pixels[0, 8].view(3, 4, 4)  # second row, third column
    torch.testing.assert_close(patch, greys[0, :, 4:8, 8:12] / 255, atol=2e-5, rtol=0)
    assert torch.equal((seen.pixels * 65536 / 257).round(), seen.pixels * 65536 / 257), "whole greys, exactly"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_greys_come_back_from_half_precision(dtype: torch.dtype) -> None:
    """Bfloat16 holds the brightest greys of a channel together, and the others apart."""
    model = tiny.model(tower="clip").to(dtype)
    greys = torch.arange(256.0)[:192].view(1, 1, 8, 24).expand(1, 3, 8, 24).repeat(1, 1, 3, 1)
    given = {**tiny.inputs(model, "2i3"), "pixel_values": of_greys(greys).to(dtype)}
    (seen,) = look(model, given)
    assert seen.pixels is not None
    patch = seen.pixels[0, 8].view(3, 4, 4)
    torch.testing.assert_close(patch, greys[0, :, 4:8, 8:12] * 257 / 65536, atol=0, rtol=0)


@pytest.mark.parametrize("greys", [1, 4, 16])
def test_a_threshold_in_greys_is_met_exactly(greys: int) -> None:
    """Whatever the greys and channels: so many apart are the same, one more are not."""
    model = tiny.model(tower="clip")
    for step, same in ((greys, True), (greys + 1, False)):
        picture = torch.zeros(1, 3, 24, 24)
        low = torch.arange(18).repeat_interleave(2).view(6, 6) * 13.0
        picture += low.repeat_interleave(4, 0).repeat_interleave(4, 1)
        picture[..., 4:8] = picture[..., :4] + step  # the second column of patches
        picture[..., 12:16] = picture[..., 8:12] - step
        given = {**tiny.inputs(model, "2i3"), "pixel_values": of_greys(picture.clamp(0, 255))}
        with tiny.prune(model, PixelPrune(threshold=greys / 255, anchored=False)) as trace, torch.no_grad():
            model(**given)
        second = {row * 6 + 1 for row in range(1, 6)} & set(trace.images[0].kept.tolist())
        assert (len(second) == 0) is same


def test_the_second_frame_of_a_still_picture_is_not_seen() -> None:
    model = tiny.model("qwen2.5-vl")
    given = tiny.inputs(model, "2i3")
    (seen,) = look(model, given)
    assert seen.pixels is not None and seen.pixels.shape == (1, 24, 4 * 48) and seen.grid == (4, 6)
    rows = given["pixel_values"][4 * 7 : 4 * 8].view(4, 3, 2, 16)[:, :, 0]
    mean, std = (torch.tensor(one)[:, None] for one in (MEAN, STD))
    torch.testing.assert_close(seen.pixels[0, 7].view(4, 3, 16), rows * std + mean, atol=1e-5, rtol=0)


def test_pixels_that_are_no_whole_greys_are_told_apart() -> None:
    """A picture scaled in floating point: what differs by a hundredth of a grey is not the same."""
    model = tiny.model(tower="clip")
    greys = torch.full((1, 3, 24, 24), 100.3)
    greys[..., 4:8] += 0.01
    given = {**tiny.inputs(model, "2i3"), "pixel_values": of_greys(greys)}
    with tiny.prune(model, PixelPrune()) as trace, torch.no_grad():
        model(**given)
    assert trace.images[0].kept.tolist() == [0, 1, 2]  # below, the tokens above tell where the edges are


def test_both_frames_of_a_video_are_seen() -> None:
    seen = look(tiny.model("qwen2.5-vl"), tiny.inputs(tiny.model("qwen2.5-vl"), "2v3"))
    assert [one.pixels.shape for one in seen if one.pixels is not None] == [(2, 16, 4 * 96)]  # two frames, each a tile


def test_pixels_are_the_processors_own_until_somebody_asks_for_others() -> None:
    """Those of an encoder that takes patches as rows stand side by side already."""
    model = tiny.model("qwen2.5-vl")
    given = tiny.inputs(model, "2i3")
    (seen,) = look(model, given)
    assert seen.normalised is not None and seen.normalised.data_ptr() == given["pixel_values"].data_ptr()
    assert torch.equal(seen.normalised[0], given["pixel_values"].view(24, -1))


def test_what_the_encoder_is_given_has_the_shape_of_its_patches() -> None:
    """By hand: four by four values of three channels, as the processor normalised them."""
    model = tiny.model(tower="clip")
    given = tiny.inputs(model, "2i3")
    (seen,) = look(model, given)
    assert seen.normalised is not None
    assert torch.equal(seen.normalised[0, 8].view(3, 4, 4), given["pixel_values"][0, :, 4:8, 8:12])


def test_each_tile_has_a_raster_of_its_own() -> None:
    """LLaVA-NeXT's second picture, 31 x 14 pixels: 16 tokens of the base, 16 and 12 of tiles with padding."""
    model = tiny.model("llava-next")
    given = tiny.inputs(model, *ROWS)
    seen = look(model, given)
    numbers = sorted(int(row[0]) for one in seen if one.tile is not None for row in one.tile)
    assert numbers == sorted(tile for row in given.pictures for one in row for tile in range(one.pixels.shape[0]))
    assert all(one.tile is not None and bool((one.tile == one.tile[:, :1]).all()) and one.tiles == 1 for one in seen)
    grids = sorted(one.grid for one in seen for _ in range(one.shape[0]) if one.grid is not None)
    assert sum(height * width for height, width in grids) == 32 + 48 + 64
    assert len(grids) == sum(one.shape[0] for one in seen)


@pytest.mark.parametrize("family", ["llava-1.5", "llava-next", "qwen2.5-vl", "internvl"])
def test_calibration_sees_what_a_call_sees(family: str) -> None:
    """A call asks about its pictures tile by tile, too."""
    model = tiny.model(family)
    given = tiny.inputs(model, "2i3")
    called = {tuple(row.flatten().tolist()) for one in look(model, given) for row in one.pixels}  # type: ignore[union-attr]
    alone = {name: value for name, value in given.items() if "ids" not in name and "mask" not in name}
    seen = signals_of(model, PixelPrune(), alone)
    assert {tuple(row.flatten().tolist()) for one in seen for row in one.pixels} == called  # type: ignore[union-attr]
    assert all(one.grid is not None for one in seen)


# ---------------------------------------------------------------------------------------------------------------------
# with other stages, in batches and turns


@each_family
def test_a_stage_behind_counts_the_original_tokens(family: str) -> None:
    model = tiny.model(family, blocks=4)
    given = tiny_calls.repeating(tiny.inputs(model, *ROWS))
    attention = FoPru(keep=0.25)
    with tiny.prune(model, [PixelPrune(), attention]) as trace:
        generate(model, given)
    for image in trace.images:
        first, second = image.stages
        assert (first.site, first.before, second.before) == ("pixels", image.original, first.after)
        assert second.after == min(first.after, max(1, round(image.original / 4)))
        assert set(second.kept.tolist()) <= set(first.kept.tolist())


@each_family
def test_a_picture_in_a_batch_is_what_it_is_alone(family: str) -> None:
    model = tiny.model(family, blocks=4)
    given = tiny_calls.repeating(tiny.inputs(model, *ROWS))
    with tiny.prune(model, PixelPrune()) as trace:
        together = generate(model, given)
        images = trace.images
        for row in range(2):
            alone = generate(model, given.alone(row))
            assert torch.equal(together.sequences[row, -STEPS:], alone.sequences[0, -STEPS:])
            kept = [image.kept.tolist() for image in images if image.row == row]
            assert kept == [image.kept.tolist() for image in trace.images]


def test_where_nothing_repeats_nothing_changes() -> None:
    for family in ("llava-1.5", "qwen2.5-vl"):
        model = tiny.model(family)
        given = tiny.inputs(model, *ROWS)
        with torch.no_grad():
            plain = model(**given).logits
            with tiny.prune(model, PixelPrune()) as trace:
                assert torch.equal(model(**given).logits, plain)
        assert all(image.after == image.original for image in trace.images)


def test_the_trace_says_what_the_encoder_ran_on() -> None:
    model = tiny.model("qwen2.5-vl")
    given = tiny_calls.repeating(tiny.inputs(model, "2i3"))
    with tiny.prune(model, [PixelPrune(), FoPru(keep=4)]) as trace:
        generate(model, given)
    (image,) = trace.images
    assert image.encoded == image.stages[0].after == 10 < image.original
    assert "encoder tokens 24 -> 10" in str(trace)
    assert trace.latest.to_dict()["images"][0]["encoder_tokens"] == 10


# ---------------------------------------------------------------------------------------------------------------------
# how pixels were normalised, and refusals


def test_the_checkpoint_says_how_its_pixels_are_normalised(tmp_path: Path) -> None:
    model = tiny.model(tower="siglip")
    row = family_of(model).tower_of(model)[1]
    assert normalised_by(model, row) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    model.config._name_or_path = str(tmp_path)
    assert normalised_by(model, row) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    stated = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": stated}))
    assert normalised_by(model, row) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**stated, "do_normalize": False}))
    assert normalised_by(model, row) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_a_threshold_needs_pixels_that_the_checkpoint_speaks_of() -> None:
    model = tiny.model(tower="clip")
    with (
        tiny.prune(model, PixelPrune(threshold=0.1)),
        pytest.raises(FoveateError, match=r"these reach from -\d.* pass what its processor made, or use threshold=0"),
    ):
        model(**tiny.inputs(model, "2i3"))


def test_an_encoder_that_cannot_run_on_some_patches_is_refused() -> None:
    with pytest.raises(
        FoveateError, match=r"acts before the encoder, which gemma4 does not allow.* methods that work: "
    ):
        tiny.prune(tiny.model("gemma4"), PixelPrune())


def test_an_encoding_that_others_look_at_is_not_shortened() -> None:
    model = tiny.model()
    with share_encoding(model, ()), pytest.raises(FoveateError, match="changes the encoding"):
        tiny.prune(model, PixelPrune()).start()


def test_two_methods_before_the_encoder() -> None:
    """The second sees the pixels of what the first has left."""
    model = tiny.model(tower="clip")
    given = tiny.inputs(model, "2i3")
    Looking.seen.clear()
    with tiny.prune(model, [Listed(keep=(3, 8, 20)), Looking()]), torch.no_grad():
        model(**given)
    left = Looking.seen[-1]
    whole = look(model, given)[0].pixels
    assert whole is not None and left.pixels is not None
    assert left.grid is None and torch.equal(left.pixels[0], whole[0, [3, 8, 20]])
