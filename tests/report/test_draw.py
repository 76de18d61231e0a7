"""Drawings keep the colour of kept patches and take it from dropped ones, stretched over the picture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from foveate.core import FoveateError
from foveate.report.draw import draw
from foveate.trace import ImageRecord, StageRecord, Trace

GREEN = (0, 200, 0)  # of luminance 117, so that it fades to 0.4 * 117 + 0.6 * 60 = 82.8, whose fraction is cut off
FADED = (82, 82, 82)


def stage(kept: list[int], extra: list[bool] | None = None) -> StageRecord:
    mask = None if extra is None else torch.tensor(extra)
    return StageRecord("test", "input", None, before=6, after=len(kept), kept=torch.tensor(kept), extra=mask)


def trace_of(*stages: StageRecord, grid: tuple[int, int] | None = (2, 3), images: int = 1) -> Any:
    return SimpleNamespace(images=tuple(ImageRecord(0, 6, grid, stages) for _ in range(images)))


def patches(image: Image.Image) -> list[Any]:
    """The colour in the middle of each patch of a 2 x 3 raster."""
    width, height = image.size
    return [
        image.getpixel((int((column + 0.5) * width / 3), int((row + 0.5) * height / 2)))
        for row in range(2)
        for column in range(3)
    ]


@pytest.mark.parametrize("size", [(30, 20), (31, 47), (3, 2), (300, 17)])
def test_dropped_patches_turn_grey(size: tuple[int, int]) -> None:
    drawn = draw(Image.new("RGB", size, GREEN), trace_of(stage([0, 5])))
    assert drawn.size == size
    assert patches(drawn) == [GREEN, FADED, FADED, FADED, FADED, GREEN]


def test_the_border_between_patches_is_where_the_raster_puts_it() -> None:
    drawn = draw(Image.new("RGB", (30, 20), GREEN), trace_of(stage([4])))
    kept = {(x, y) for x in range(30) for y in range(20) if drawn.getpixel((x, y)) == GREEN}
    assert kept == {(x, y) for x in range(10, 20) for y in range(10, 20)}


def test_kept_patches_are_the_picture_itself() -> None:
    image = Image.effect_noise((30, 20), 80).convert("RGB")
    assert draw(image, trace_of(stage([0, 1, 2, 3, 4, 5]))).tobytes() == image.tobytes()
    assert draw(image, trace_of()).tobytes() == image.tobytes()


def test_extra_tokens_are_not_drawn() -> None:
    drawn = draw(Image.new("RGB", (30, 20), GREEN), trace_of(stage([1, 5], [False, True])))
    assert patches(drawn) == [FADED, GREEN, FADED, FADED, FADED, FADED]


def test_a_patch_dropped_later_keeps_more_colour() -> None:
    drawn = patches(draw(Image.new("RGB", (30, 20), GREEN), trace_of(stage([0, 1, 2]), stage([0, 1]), stage([0]))))
    saturation = [green - red for red, green, _ in drawn]
    assert drawn[0] == GREEN
    assert drawn[3:] == [FADED] * 3
    assert saturation[0] > saturation[1] > saturation[2] > saturation[3] == 0


def test_several_pictures_are_given_as_a_list_or_one_by_one(tmp_path: Path) -> None:
    trace = trace_of(stage([0]), images=3)
    red, blue = Image.new("RGB", (6, 4), "red"), Image.new("RGB", (6, 4), "blue")
    Image.new("RGB", (6, 4), GREEN).save(tmp_path / "green.png")
    pictures: list[Any] = [[red], [tmp_path / "green.png", blue]]
    assert [draw(pictures, trace, number).getpixel((0, 0)) for number in range(3)] == [(255, 0, 0), GREEN, (0, 0, 255)]
    assert draw(blue, trace, image=1).getpixel((0, 0)) == (0, 0, 255)
    assert draw(str(tmp_path / "green.png"), trace, image=2).getpixel((0, 0)) == GREEN


def test_a_picture_in_memory_looks_as_it_does_in_a_file(tmp_path: Path) -> None:
    for mode in ("RGBA", "LA", "I;16"):
        picture = Image.new(mode, (6, 4), 0x8000 if mode == "I;16" else None)
        picture.save(tmp_path / "one.png")
        kept = trace_of(stage([0, 1, 2, 3, 4, 5]))
        assert draw(picture, kept).tobytes() == draw(tmp_path / "one.png", kept).tobytes()
        assert draw(picture, kept).getpixel((0, 0)) == ((128,) * 3 if mode == "I;16" else (255,) * 3)


@pytest.mark.parametrize(
    ("images", "trace", "image", "message"),
    [
        (None, trace_of(stage([0])), 1, "image=1, but the call had 1 images; the last is 0"),
        (None, trace_of(stage([0])), -1, "image=-1, but the call had 1 images; the last is 0"),
        (None, trace_of(stage([0]), grid=None), 0, "the 6 tokens of image 0 form no single raster"),
        (2, trace_of(stage([0]), images=3), 0, "2 pictures for a call that had 3 images; give one, or all 3"),
        (None, Trace(), 0, "nothing has been pruned yet"),
    ],
)
def test_what_cannot_be_drawn_is_refused(images: int | None, trace: Any, image: int, message: str) -> None:
    one = Image.new("RGB", (6, 4))
    with pytest.raises(FoveateError, match=message):
        draw(one if images is None else [one] * images, trace, image)


@pytest.mark.parametrize(
    ("size", "fits"), [((30, 20), True), ((33, 20), True), ((300, 290), True), ((20, 30), False), ((100, 20), False)]
)
def test_a_picture_of_another_shape_is_refused_where_proportions_are_kept(size: tuple[int, int], fits: bool) -> None:
    """Three patches beside each other may have been 2.1 to 3.9, two above each other 1.1 to 2.9."""
    trace = SimpleNamespace(images=(ImageRecord(0, 6, (2, 3), (stage([0]),), proportional=True),))
    picture = Image.new("RGB", size, GREEN)
    if fits:
        assert draw(picture, trace).size == size  # type: ignore[arg-type]
        return
    with pytest.raises(FoveateError) as error:
        draw(picture, trace)  # type: ignore[arg-type]
    assert str(error.value) == (
        f"a picture of {size[0]} x {size[1]} pixels is not image 0 of this call, whose tokens lie 3 x 2; give the "
        "picture that was asked about, upright as the model saw it"
    )


def test_words_alone_cannot_be_drawn() -> None:
    with pytest.raises(FoveateError, match="the call had no picture, so there is none to draw"):
        draw(Image.new("RGB", (30, 20), GREEN), SimpleNamespace(images=()))  # type: ignore[arg-type]
