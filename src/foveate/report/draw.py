"""Pictures of what was kept: dropped patches turn grey and dim, kept ones stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from PIL import Image

from foveate.core import FoveateError
from foveate.inference.pictures import load_image, on_white

if TYPE_CHECKING:
    from foveate.trace import ImageRecord, Trace

Picture: TypeAlias = Image.Image | str | Path

_GREY = 60  # what dropped patches fade to ...
_FADED = 0.6  # ... and how far; black objects that are kept stay darker than all of them
_LATER = 0.6  # colour that a patch still has when it is dropped just before the answer, after many stages


def draw(images: Picture | Sequence[Picture | Sequence[Picture]], trace: Trace, image: int = 0) -> Image.Image:
    """The picture with the patches of dropped tokens grey and dim, those of kept tokens in full colour.

    A merged token shows at its representative's patch; tokens marked `extra` are not drawn. With several stages a patch
    is the greyer the earlier it was dropped. The raster is stretched over the given picture, which fits models that
    resize pictures to a square; for one that crops them, give the crop (`foveate.inference.pictures.visible`).

    Args:
        images: the picture (PIL or path), or all pictures of the call in the order of `trace.images`, nested per prompt
            if need be.
        trace: of the call to draw.
        image: which of the call's pictures to draw.

    Raises:
        FoveateError: the call had no such image, a list of another length than the call's, tokens that form no raster,
            a picture of a shape that cannot have made the raster (where a model keeps a picture's proportions), or a
            file that is no picture (see `load_image`).
    """
    records = trace.images
    if not records:
        raise FoveateError("the call had no picture, so there is none to draw")
    if not 0 <= image < len(records):
        raise FoveateError(f"image={image}, but the call had {len(records)} images; the last is {len(records) - 1}")
    picture = _pick(images, image, len(records))
    _check_shape(picture, records[image], image)
    colour = _colour(records[image], image).resize(picture.size, Image.Resampling.NEAREST)
    grey = Image.new("RGB", picture.size, (_GREY, _GREY, _GREY))
    return Image.composite(picture, Image.blend(picture.convert("L").convert("RGB"), grey, _FADED), colour)


def _pick(images: Picture | Sequence[Picture | Sequence[Picture]], image: int, count: int) -> Image.Image:
    if isinstance(images, Image.Image | str | Path):
        picture = images
    else:
        flat = [one for entry in images for one in ([entry] if isinstance(entry, Image.Image | str | Path) else entry)]
        if len(flat) != count:
            raise FoveateError(f"{len(flat)} pictures for a call that had {count} images; give one, or all {count}")
        picture = flat[image]
    return on_white(picture) if isinstance(picture, Image.Image) else load_image(picture)


def _check_shape(picture: Image.Image, record: ImageRecord, image: int) -> None:
    """Refuse a picture that cannot be the traced one: each side was rounded to whole patches, by less than one."""
    if record.grid is None or not record.proportional:
        return
    height, width = record.grid
    least = max((height - 1) / picture.height, (width - 1) / picture.width)
    most = min((height + 1) / picture.height, (width + 1) / picture.width)
    if least >= most:
        raise FoveateError(
            f"a picture of {picture.width} x {picture.height} pixels is not image {image} of this call, whose "
            f"tokens lie {width} x {height}; give the picture that was asked about, upright as the model saw it"
        )


def _colour(record: ImageRecord, image: int) -> Image.Image:
    """How much colour each patch keeps: an 8-bit picture with one pixel for each of the raster's patches."""
    if record.grid is None:
        raise FoveateError(
            f"the {record.original} tokens of image {image} form no single raster (several tiles, perhaps), "
            "so there is no place in the picture to draw them at; draw one-tile images, or read trace.images[i].kept"
        )
    height, width = record.grid
    colour = [255] * (height * width)
    for number, stage in enumerate(record.stages):
        drawn = stage.kept if stage.extra is None else stage.kept[~stage.extra]
        kept = set(drawn.tolist())
        left = round(255 * _LATER * number / len(record.stages))
        colour = [min(value, left) if patch not in kept else value for patch, value in enumerate(colour)]
    return Image.frombytes("L", (width, height), bytes(colour))
