"""Pictures from files: refused by their header when too large, turned upright, on white where transparent."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from foveate.core import FoveateError
from foveate.paths import checked
from foveate.runs import whole_file

MOST_BYTES = 20_000_000
MOST_PIXELS = 64_000_000


def load_image(path: str | Path) -> Image.Image:
    """The picture of a file as RGB: the first frame, turned as its EXIF orientation says, on white where transparent.

    Raises:
        FoveateError: no such file, more than 20 MB, a header that announces more than 64 megapixels (nothing is decoded
            then), or bytes that cannot be decoded.
    """
    path = checked(path)
    _check_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
        try:
            image = Image.open(path)
        except Image.DecompressionBombError as error:
            pixels = re.search(r"\d+", str(error))
            raise _too_large(path, f"{int(pixels[0]) / 1e6:.2f} megapixels" if pixels else str(error)) from error
        # Damaged files raise whatever their decoder runs into: SyntaxError, struct.error, IndexError and others.
        except Exception as error:
            raise _undecodable(path, error) from error
        with image:
            if image.width * image.height > MOST_PIXELS:
                size = f"{image.width} x {image.height} pixels, {image.width * image.height / 1e6:.2f} megapixels"
                raise _too_large(path, size)
            try:
                return _on_white(ImageOps.exif_transpose(image))
            except Exception as error:
                raise _undecodable(path, error) from error


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


def _too_large(path: Path, size: str) -> FoveateError:
    return FoveateError(f"{path} announces {size}; the most is {MOST_PIXELS / 1e6:.0f} megapixels")


def _undecodable(path: Path, error: Exception) -> FoveateError:
    reason = str(error) or type(error).__name__
    known = "PNG, JPEG, WebP, GIF, BMP and TIFF are read"
    if isinstance(error, Image.UnidentifiedImageError):
        return FoveateError(f"{path} is no picture that can be decoded; {known}")
    return FoveateError(f"{path} cannot be decoded: {reason}; {known}")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # 16-bit greys are divided; a plain conversion cuts them off at 255.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a picture in the format of its suffix, all of it or nothing.

    Raises:
        FoveateError: it cannot be written, such as on a full disk.
    """
    with whole_file(path) as temporary:
        image.save(temporary)
