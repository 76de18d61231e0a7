"""Pictures are refused by file size and header before anything is decoded, and come out upright, opaque RGB."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import EpsImagePlugin, Image

import foveate
from foveate.core import FoveateError
from foveate.inference.pictures import FORMATS, load_image, on_white, save_image, visible


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


def greys_of(image: Image.Image) -> list[int]:
    """Of a picture of one row, each pixel's value, the same in all three bands."""
    values = [image.getpixel((x, 0)) for x in range(image.width)]
    assert image.mode == "RGB" and all(len(set(value)) == 1 for value in values)  # type: ignore[arg-type]
    return [value[0] for value in values]  # type: ignore[index]


def tiff(values: bytes, width: int, bits: int, photometric: int = 1, kind: int = 1, order: str = "<") -> bytes:
    """A grey TIFF of one row; `kind` of its numbers: 1 unsigned, 2 signed, 3 floating-point."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, 1)]
    tags += [(279, len(values)), (339, kind)]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack(order + "HHI", tag, 4, 1) + struct.pack(order + "I", value) for tag, value in tags]
    entries[5] = struct.pack(order + "HHII", 273, 4, 1, start)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8)
    return head + struct.pack(order + "H", len(tags)) + b"".join(entries) + bytes(4) + values


# value * 255 / 65535, to the nearest: 0, 0.5 and more of 257 steps, the middle, the end.
DEEP = (0, 128, 129, 0x7FFF, 0x8000, 0xFFFF)
SHALLOW = [0, 0, 1, 127, 128, 255]


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.frombytes("I;16", (6, 1), struct.pack("<6H", *DEEP)).save(path)
    assert greys_of(load_image(path)) == SHALLOW
    path.write_bytes(tiff(struct.pack("<6H", *DEEP), 6, 16))
    assert greys_of(load_image(path)) == SHALLOW
    path.write_bytes(tiff(struct.pack(">6H", *DEEP), 6, 16, order=">"))
    assert greys_of(load_image(path)) == SHALLOW
    assert greys_of(on_white(Image.frombytes("I;16", (6, 1), struct.pack("<6H", *DEEP)))) == SHALLOW


def test_white_may_be_the_smallest_of_sixteen_bits(tmp_path: Path) -> None:
    path = tmp_path / "film.tif"
    path.write_bytes(tiff(struct.pack("<6H", *DEEP), 6, 16, photometric=0))
    assert greys_of(load_image(path)) == [255, 255, 254, 128, 127, 0]
    path.write_bytes(tiff(bytes([0, 100, 255]), 3, 8, photometric=0))
    assert greys_of(load_image(path)) == [255, 155, 0]


def test_twelve_bits_become_eight(tmp_path: Path) -> None:
    """Two values share three bytes; 4095 is white, 2048 * 255 / 4095 = 127.5."""
    path = tmp_path / "sensor.tif"
    path.write_bytes(tiff(bytes([0xFF, 0xF8, 0x00, 0x00, 0x00, 0x10]), 4, 12))
    assert greys_of(load_image(path)) == [255, 128, 0, 1]


def test_one_of_sixteen_bits_may_be_transparent(tmp_path: Path) -> None:
    image = Image.frombytes("I;16", (3, 1), struct.pack("<3H", 0x0101, 0x0102, 0x4040))
    image.save(tmp_path / "deep.png", transparency=0x0102)
    assert greys_of(load_image(tmp_path / "deep.png")) == [1, 255, 64]


@pytest.mark.parametrize(
    ("values", "bits", "kind", "told"),
    [
        (struct.pack("<2h", -5, 900), 16, 2, "integers of 32 bits or with a sign (mode I)"),
        (struct.pack("<2i", -5, 2**30), 32, 2, "integers of 32 bits or with a sign (mode I)"),
        (struct.pack("<2I", 5, 2**32 - 1), 32, 1, "integers of 32 bits or with a sign (mode I)"),
        (struct.pack("<2f", 0.25, 1.0), 32, 3, "floating-point numbers (mode F)"),
    ],
)
def test_greys_without_a_white_are_refused(tmp_path: Path, values: bytes, bits: int, kind: int, told: str) -> None:
    path = tmp_path / "depth.tif"
    path.write_bytes(tiff(values, 2, bits, kind=kind))
    message = (
        f"the greys of this picture are {told}, of which nothing says which are black and white; save it with 8 or 16 "
        "unsigned bits"
    )
    assert refusal(path) == f"{path}: {message}"
    with Image.open(path) as opened, pytest.raises(FoveateError) as caught:
        on_white(opened)
    assert str(caught.value) == message


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV"])
def test_every_other_kind_of_picture_is_converted_as_a_whole(mode: str) -> None:
    """More rows than are converted at a time, against one conversion of all."""
    red, green = Image.linear_gradient("L").resize((1100, 1000)), Image.radial_gradient("L").resize((1100, 1000))
    image = Image.merge("RGBA", (red, green, red, green)).convert("RGB" if mode in ("P", "PA") else "RGBA")
    image = image.convert(mode) if mode in ("RGBa", "PA", "P", "1", "LA", "L") else image.convert("RGB").convert(mode)
    whole = image.convert("RGBA") if image.mode in ("LA", "PA", "RGBa", "RGBA") else image.convert("RGB")
    if whole.mode == "RGBA":
        whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), whole).convert("RGB")
    assert on_white(image).tobytes() == whole.tobytes()


def test_a_transparent_colour_of_a_palette_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for x in range(3):
        image.putpixel((x, 0), x)
    image.save(tmp_path / "index.gif", transparency=1)
    image.save(tmp_path / "index.png", transparency=1)
    image.save(tmp_path / "alphas.png", transparency=bytes([255, 0, 51]))
    for name, last in (("index.gif", (70, 80, 90)), ("index.png", (70, 80, 90)), ("alphas.png", (218, 220, 222))):
        loaded = load_image(tmp_path / name)
        assert [loaded.getpixel((x, 0)) for x in range(3)] == [(10, 20, 30), (255, 255, 255), last], name


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_a_moving_picture_the_first_frame_is_seen(tmp_path: Path, format: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(tmp_path / "moving", format, save_all=True, append_images=frames[1:], **options)
    assert load_image(tmp_path / "moving").getcolors() == [(48, (255, 0, 0))]


def test_no_other_format_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called: an EPS file would start another program."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("an interpreter was started"))
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))  # one of the formats claims whatever it is called
    image = Image.linear_gradient("L").convert("RGB")
    opened, refused = set(), set()
    Image.init()
    for format in sorted(Image.SAVE):
        path = tmp_path / f"{format}.png"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # some formats are on their way out of Pillow
                image.save(path, format)
        except (OSError, ValueError, KeyError):
            continue  # it takes no such picture, or this build has no encoder
        if format in (*FORMATS, "MPO"):  # several JPEGs in one file, as telephones write them
            assert load_image(path).size == image.size
            opened.add(format)
        else:
            assert "is no picture that can be decoded; PNG, JPEG, WebP, GIF, BMP and TIFF are" in refusal(path), format
            refused.add(format)
    assert {"EPS", "PPM", "TGA"} <= refused
    assert opened >= set(FORMATS)


def test_nothing_else_opens_what_users_name() -> None:
    """Scenes open pictures that ship or that they drew; processors are handed pictures, since they open any path."""
    source = Path(foveate.__file__).parent
    opening = {
        path.relative_to(source).as_posix() for path in source.rglob("*.py") if "Image.open(" in path.read_text()
    }
    assert opening == {"inference/pictures.py", "scenes/generator.py", "scenes/pages.py"}
    with pytest.raises(FoveateError, match=r"str is no PIL picture; open a file with PIL\.Image\.open first"):
        on_white("picture.png")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("format", "mode", "options", "each"),
    [
        ("PNG", "RGBA", {}, 4 + 4),  # what is read, what is made
        ("WEBP", "RGBA", {"lossless": True, "method": 0}, 4 + 14),
        ("JPEG", "RGB", {}, 4 + 4),
        ("JPEG", "RGB", {"progressive": True}, 4 + 6),  # coefficients of 2 bytes
        ("JPEG", "CMYK", {"progressive": True}, 4 + 8),
        ("TIFF", "RGBA", {}, 4 + 4),
    ],
)
def test_what_takes_too_much_to_decode_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, mode: str, options: dict[str, Any], each: int
) -> None:
    path = tmp_path / "costly"
    Image.new(mode, (1000, 500)).save(path, format, **options)
    monkeypatch.setattr("foveate.inference.pictures.MOST_MEMORY", each * 500_000)
    assert load_image(path).size == (1000, 500)
    monkeypatch.setattr("foveate.inference.pictures.MOST_MEMORY", each * 500_000 - 1)
    told = (
        f"{path} announces 1000 x 500 pixels, 0.50 megapixels, which take {each * 500_000 / 1e6:.0f} MB to decode from"
    )
    assert refusal(path).startswith(f"{told} such a {format} file; the most is ")


def large_png(path: Path, width: int, height: int) -> None:
    """An RGBA picture of one colour, written row by row."""
    packer, row = zlib.compressobj(1), b"\0" + bytes((10, 20, 30, 128)) * width
    packed = [packer.compress(row) for _ in range(height)]
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)),
        (b"IDAT", b"".join(packed) + packer.flush()),
        (b"IEND", b""),
    ]
    made = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(made))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the most that a process has held stands in /proc")
def test_the_largest_picture_takes_less_than_600_megabytes(tmp_path: Path) -> None:
    """The picture that is read and the one that is made, 4 bytes a pixel each, and little more."""
    large_png(tmp_path / "large.png", 8000, 8000)
    code = (
        "import sys\n"
        "from foveate.inference.pictures import load_image\n"
        "image = load_image(sys.argv[1])\n"
        "print(*image.getpixel((7999, 7999)))\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "large.png"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *colour, _, kilobytes, _ = run.stdout.split()
    assert colour == ["132", "137", "142"]
    assert 500e6 < int(kilobytes) * 1024 < 600e6


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
