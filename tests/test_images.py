"""Pictures are refused by file size and header before anything is decoded, and come out upright, opaque RGB."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from foveate.core import FoveateError
from foveate.images import load_image, save_image, visible


def header_of_png(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds no pixel: whatever decodes it fails in another way."""
    fields = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    begin = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + fields + struct.pack(">I", zlib.crc32(fields))
    return begin + struct.pack(">I", 16) + b"IDAT" + b"no zlib stream"


def refusal(path: Path) -> str:
    with pytest.raises(FoveateError) as caught:
        load_image(path)
    return str(caught.value)


def test_a_picture_comes_as_rgb(tmp_path: Path) -> None:
    Image.new("L", (3, 2), 7).save(tmp_path / "grey.png")
    image = load_image(str(tmp_path / "grey.png"))
    assert (image.mode, image.size, image.getpixel((2, 1))) == ("RGB", (3, 2), (7, 7, 7))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((10000, 10000), "announces 10000 x 10000 pixels, 100.00 megapixels; the most is 64 megapixels"),
        ((8000, 8001), "announces 8000 x 8001 pixels, 64.01 megapixels; the most is 64 megapixels"),
        ((20000, 20000), "announces 400.00 megapixels; the most is 64 megapixels"),  # Pillow refuses to open it
    ],
)
def test_the_header_alone_refuses_a_large_picture(tmp_path: Path, size: tuple[int, int], message: str) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(header_of_png(*size))
    assert refusal(path) == f"{path} {message}"


def test_a_picture_at_the_limit_passes_the_header(tmp_path: Path) -> None:
    path = tmp_path / "limit.png"
    path.write_bytes(header_of_png(8000, 8000))
    assert "cannot be decoded" in refusal(path)


def test_a_large_file_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    path.touch()
    os.truncate(path, 20_100_000)
    assert refusal(path) == f"{path} has 20.1 MB; the most is 20 MB"
    os.truncate(path, 20_000_000)
    assert "no picture that can be decoded" in refusal(path)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} is a folder, not a picture"
    assert refusal(tmp_path / "none.png") == f"{tmp_path / 'none.png'} is no file; give the path of a picture"
    text = tmp_path / "text.png"
    text.write_text("no pixels here")
    assert refusal(text) == f"{text} is no picture that can be decoded; PNG, JPEG, WebP, GIF, BMP and TIFF are read"


def test_a_picture_that_ends_too_early_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:500])
    assert refusal(path).startswith(f"{path} cannot be decoded: ")


def test_the_camera_says_which_side_is_up(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 40, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right of the file
    image.save(tmp_path / "turned.png", exif=exif)
    turned = load_image(tmp_path / "turned.png")
    assert turned.size == (20, 40)
    assert turned.getpixel((19, 20)) == (255, 0, 0)
    assert turned.getpixel((0, 20)) == (0, 0, 255)


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    image.save(tmp_path / "alpha.png")
    loaded = load_image(tmp_path / "alpha.png")
    assert (loaded.getpixel((0, 0)), loaded.getpixel((1, 0))) == ((255, 255, 255), (10, 20, 30))


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    Image.frombytes("I;16", (2, 1), struct.pack("<HH", 0x8000, 0xFFFF)).save(tmp_path / "deep.png")
    loaded = load_image(tmp_path / "deep.png")
    assert (loaded.getpixel((0, 0)), loaded.getpixel((1, 0))) == ((128, 128, 128), (255, 255, 255))


def processor(**settings: object) -> SimpleNamespace:
    return SimpleNamespace(**{"do_center_crop": True, "crop_size": {"height": 10, "width": 10}, **settings})


@pytest.mark.parametrize(
    ("size", "settings", "box"),
    [
        ((40, 20), {"size": {"shortest_edge": 10}}, (10, 0, 30, 20)),
        ((20, 60), {"size": {"shortest_edge": 20}}, (5, 25, 15, 35)),
        ((40, 20), {"size": {"height": 20, "width": 20}}, (10, 5, 30, 15)),
        ((40, 20), {"size": {"shortest_edge": 10}, "do_center_crop": False}, (0, 0, 40, 20)),
        ((40, 20), {"size": None}, (0, 0, 40, 20)),
    ],
)
def test_the_visible_part_is_what_the_processor_crops(
    size: tuple[int, int], settings: dict[str, object], box: tuple[int, int, int, int]
) -> None:
    image = Image.linear_gradient("L").resize(size).rotate(30)
    assert visible(image, processor(**settings)).tobytes() == image.crop(box).tobytes()


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "kept.png"
    save_image(Image.new("RGB", (2, 2), "red"), target)
    before = target.read_bytes()
    with pytest.raises(FoveateError, match=f"{target} cannot be written: cannot write mode F as PNG"):
        save_image(Image.new("F", (2, 2)), target)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["kept.png"]
