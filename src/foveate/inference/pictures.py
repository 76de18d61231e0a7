"""Pictures from files: refused by their header when too large, turned upright, on white where transparent."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
from PIL import ExifTags, Image, ImageOps

from foveate.core import FoveateError
from foveate.paths import checked
from foveate.runs import whole_file

MOST_BYTES = 20_000_000
MOST_PIXELS = 64_000_000
MOST_MEMORY = 600_000_000
"""Bytes that decoding a picture may take beside the program's own."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Pillow knows many more, some of which start other programs."""

_KNOWN = "PNG, JPEG, WebP, GIF, BMP and TIFF are read"
_WHITE_IS_ZERO, _BITS, _PHOTOMETRIC = 0, 258, 262  # of TIFF
_AT_ONCE = 1_000_000  # pixels that are converted at a time: whole copies of a large picture are what costs memory


def load_image(path: str | Path) -> Image.Image:
    """The picture of a file as RGB: the first frame, turned as its EXIF orientation says, on white where transparent.

    Greys of up to 16 bits are scaled to 8.

    Raises:
        FoveateError: no such file, more than 20 MB, a header that announces more than 64 megapixels or what would take
            more than 600 MB to decode (nothing is decoded then), greys whose black and white no header states, or bytes
            that are none of PNG, JPEG, WebP, GIF, BMP and TIFF or cannot be decoded.
    """
    path = checked(path)
    _check_file(path)
    with _opened(path, path) as image:
        return _decoded(image, path)


def picture_of(data: bytes, name: str) -> Image.Image:
    """The picture that some bytes are, as `load_image` reads that of a file.

    Args:
        name: what messages call it.

    Raises:
        FoveateError: as `load_image`.
    """
    if len(data) > MOST_BYTES:
        raise FoveateError(f"{name} has {len(data) / 1e6:.1f} MB; the most is {MOST_BYTES / 1e6:.0f} MB")
    with _opened(io.BytesIO(data), name) as image:
        return _decoded(image, name)


def check_image(path: str | Path) -> None:
    """Refuse, by its size and header, a file that `load_image` would refuse; nothing is decoded.

    Raises:
        FoveateError: as `load_image`, but for what only decoding brings to light.
    """
    path = checked(path)
    _check_file(path)
    with _opened(path, path):
        pass


def upright_size(path: str | Path) -> tuple[int, int]:
    """Width and height of the picture that `load_image` gives, from the header.

    Raises:
        FoveateError: as `check_image`.
    """
    path = checked(path)
    _check_file(path)
    with _opened(path, path) as image:
        width, height = image.size
        on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
        return (height, width) if on_its_side else (width, height)


@contextmanager
def _opened(source: Path | io.BytesIO, name: Path | str) -> Iterator[Image.Image]:
    """A picture whose header has been looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
        try:
            image = Image.open(source, formats=FORMATS)
        except Image.DecompressionBombError as error:
            pixels = re.search(r"\d+", str(error))
            raise _too_large(name, f"{int(pixels[0]) / 1e6:.2f} megapixels" if pixels else str(error)) from error
        # Damaged files raise whatever their decoder runs into: SyntaxError, struct.error, IndexError and others.
        except Exception as error:
            raise _undecodable(name, error) from error
        with image:
            _check_header(name, image)
            yield image


def _decoded(image: Image.Image, name: Path | str) -> Image.Image:
    try:
        ImageOps.exif_transpose(image, in_place=True)
        return on_white(image)
    except FoveateError as error:
        raise FoveateError(f"{name}: {error}") from error
    except Exception as error:
        raise _undecodable(name, error) from error


def on_white(image: Image.Image) -> Image.Image:
    """A picture as RGB, on white where it is transparent; greys of 9 to 16 bits are scaled to 8.

    Raises:
        FoveateError: it is no PIL picture, or its greys are signed, 32-bit or floating-point numbers, of which nothing
            says what is white.
    """
    if not isinstance(image, Image.Image):
        raise FoveateError(f"{type(image).__name__} is no PIL picture; open a file with PIL.Image.open first")
    if image.mode in ("I", "F"):
        kind = "integers of 32 bits or with a sign" if image.mode == "I" else "floating-point numbers"
        raise FoveateError(
            f"the greys of this picture are {kind} (mode {image.mode}), of which nothing says which are black and "
            "white; save it with 8 or 16 unsigned bits"
        )
    tags = getattr(image, "tag_v2", {})
    bits, inverted = tags.get(_BITS, (16,))[0], tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    whole, rows = Image.new("RGB", image.size), max(1, _AT_ONCE // max(1, image.width))
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        deep = part.mode.startswith("I;16")
        whole.paste(_eight_bits(part, bits, inverted) if deep else _flat(part), (0, top))
    return whole


def visible(image: Image.Image, image_processor: Any) -> Image.Image:
    """The part of a picture that a model sees: its middle, where the image processor crops, else all of it.

    Args:
        image_processor: the processor's `image_processor`; `do_center_crop`, `size` and `crop_size` are read.
    """
    size, crop = getattr(image_processor, "size", None), getattr(image_processor, "crop_size", None)
    if not getattr(image_processor, "do_center_crop", False) or not size or not crop:
        return image
    height, width = crop["height"], crop["width"]
    if "shortest_edge" in dict(size):
        scale = min(image.size) / size["shortest_edge"]
        height, width = height * scale, width * scale
    else:
        height, width = height * image.height / size["height"], width * image.width / size["width"]
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (max(0, left), max(0, top), min(image.width, left + width), min(image.height, top + height))
    return image.crop(tuple(round(edge) for edge in box))


def _check_file(path: Path) -> None:
    if not path.is_file():
        kind = "is a folder, not a picture" if path.is_dir() else "is no file; give the path of a picture"
        raise FoveateError(f"{path} {kind}")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise FoveateError(f"{path} has {size / 1e6:.1f} MB; the most is {MOST_BYTES / 1e6:.0f} MB")


def _check_header(path: Path | str, image: Image.Image) -> None:
    pixels = image.width * image.height
    size = f"{image.width} x {image.height} pixels, {pixels / 1e6:.2f} megapixels"
    if pixels > MOST_PIXELS:
        raise _too_large(path, size)
    memory = pixels * _bytes_per_pixel(image)
    if memory > MOST_MEMORY:
        most = MOST_MEMORY / _bytes_per_pixel(image) / 1e6
        raise FoveateError(
            f"{path} announces {size}, which take {memory / 1e6:.0f} MB to decode from such a {image.format} file; the "
            f"most is {MOST_MEMORY / 1e6:.0f} MB, {most:.1f} megapixels"
        )


def _bytes_per_pixel(image: Image.Image) -> int:
    """What decoding takes at most: Pillow's own pixels, beside them what the decoder holds or what they become."""
    beside = 4
    if image.format == "WEBP":
        beside = 14  # two canvases, what the decoder keeps, and a copy to read from
    elif image.info.get("progressive"):  # all coefficients wait for the last scan
        beside = max(beside, 2 * len(image.getbands()))
    elif image.format == "TIFF":  # a strip may be the whole picture
        beside = max(beside, sum(getattr(image, "tag_v2", {}).get(_BITS, (8,))) // 8)
    return 4 + beside


def _too_large(path: Path | str, size: str) -> FoveateError:
    return FoveateError(f"{path} announces {size}; the most is {MOST_PIXELS / 1e6:.0f} megapixels")


def _undecodable(path: Path | str, error: Exception) -> FoveateError:
    reason = str(error) or type(error).__name__
    if isinstance(error, Image.UnidentifiedImageError):
        return FoveateError(f"{path} is no picture that can be decoded; {_KNOWN}")
    return FoveateError(f"{path} cannot be decoded: {reason}; {_KNOWN}")


def _flat(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _eight_bits(image: Image.Image, bits: int, inverted: bool) -> Image.Image:
    """Deep greys, the largest of `bits` bits to 255; a plain conversion cuts them off there."""
    most = 2**bits - 1
    deep = numpy.asarray(image).astype(numpy.uint32)
    grey = (deep * 255 + most // 2) // most
    if inverted:
        grey = 255 - grey
    if "transparency" in image.info:  # the one grey that stands for nothing
        grey[deep == image.info["transparency"]] = 255
    return Image.fromarray(grey.clip(0, 255).astype(numpy.uint8)).convert("RGB")


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a picture in the format of its suffix, all of it or nothing.

    Raises:
        FoveateError: it cannot be written, such as on a full disk.
    """
    with whole_file(path) as temporary:
        image.save(temporary)
