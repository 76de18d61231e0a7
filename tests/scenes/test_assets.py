"""The shipped pictures fit the generator, and each is named with its source and licence."""

from pathlib import Path

import pytest
from outside import loaded
from PIL import Image

from foveate.scenes import generator
from foveate.scenes.vocabulary import NAMES

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "src" / "foveate" / "scenes" / "assets"


@pytest.fixture(scope="module")
def renderer():
    return loaded("tools/render_assets.py")


def test_one_pictogram_per_name_in_order(renderer):
    assert tuple(renderer.EMOJI) == NAMES
    assert len(set(renderer.EMOJI.values())) == len(NAMES)


def test_sheets_are_laid_out_as_the_generator_reads_them(renderer):
    assert (renderer.SPRITE, renderer.COLUMNS) == (generator._SPRITE, generator._SPRITE_COLUMNS)
    assert (renderer.GLYPH, renderer.PHOTO) == (generator._GLYPH, generator._PHOTO)
    with Image.open(ASSETS / "sprites.png") as sprites:
        assert (sprites.mode, sprites.size) == ("RGBA", (8 * 72, 6 * 72))
    with Image.open(ASSETS / "digits.png") as digits:
        assert (digits.mode, digits.size) == ("L", (10 * 28, 3 * 28))
    with Image.open(ASSETS / "photos.jpg") as photos:
        assert photos.size == (generator._PHOTO_COLUMNS * 256, len(renderer.PHOTOS) // generator._PHOTO_COLUMNS * 256)


def test_every_pictogram_and_digit_is_drawn():
    with Image.open(ASSETS / "sprites.png") as sheet:
        for index in range(48):
            x, y = index % 8 * 72, index // 8 * 72
            alpha = sheet.crop((x, y, x + 72, y + 72)).getchannel("A")
            assert sum(alpha.histogram()[128:]) > 500, NAMES[index]
    with Image.open(ASSETS / "digits.png") as sheet:
        cells = [sheet.crop((x, y, x + 28, y + 28)).tobytes() for y in range(0, 84, 28) for x in range(0, 280, 28)]
    assert len(set(cells)) == 30
    assert all(max(cell) == 255 for cell in cells)


def test_no_digit_is_cut_off():
    with Image.open(ASSETS / "digits.png") as sheet:
        for y in range(0, 84, 28):
            for x in range(0, 280, 28):
                left, top, right, bottom = sheet.crop((x, y, x + 28, y + 28)).getbbox()
                assert left > 0 and top > 0 and right < 28 and bottom < 28, (x, y)


def test_notice_names_each_source(renderer):
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for file, *_ in renderer.PHOTOS:
        assert f"\n  {file.split('.')[0]} " in notice, file
    for word in ("Noto Color Emoji", "SIL Open Font License 1.1", "DejaVu Sans Bold", "DejaVu Serif Bold", "Mono Bold"):
        assert word in notice
    assert "SIL OPEN FONT LICENSE" in (ASSETS / "OFL.txt").read_text(encoding="utf-8")
    assert "Bitstream Vera" in (ASSETS / "DEJAVU-LICENSE.txt").read_text(encoding="utf-8")


def test_assets_are_small():
    assert sum(file.stat().st_size for file in ASSETS.iterdir()) < 3_000_000
