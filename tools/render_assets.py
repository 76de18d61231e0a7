"""Renders the pictures that `foveate.scenes` draws with: pictograms, digits and backgrounds.

Needs: Pillow, matplotlib (ships the DejaVu fonts and their licence), scikit-image (ships the photos) and the font
Noto Color Emoji (Debian and Ubuntu: `apt-get install fonts-noto-color-emoji`). The results are part of the package, so
only someone who wants other pictures has to run this:

    python tools/render_assets.py --output src/foveate/scenes/assets
"""

from __future__ import annotations

import argparse
import io
from importlib import resources
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from foveate.runs import write_bytes

SPRITE = 72  # pixels of one pictogram's square cell
COLUMNS = 8  # pictograms in one row of their sheet
GLYPH = 28  # pixels of one digit's square cell
PHOTO = 256  # pixels of one background's square cell
BLUR = 1.5  # pixels of blur, so that no background is as sharp as the objects before it

# One pictogram per name, in the order of foveate.scenes.vocabulary.NAMES.
EMOJI = {
    "dog": "🐶",
    "cat": "🐱",
    "horse": "🐴",
    "cow": "🐮",
    "pig": "🐷",
    "frog": "🐸",
    "bear": "🐻",
    "panda": "🐼",
    "lion": "🦁",
    "monkey": "🐵",
    "rabbit": "🐰",
    "fox": "🦊",
    "chicken": "🐔",
    "penguin": "🐧",
    "fish": "🐟",
    "whale": "🐳",
    "turtle": "🐢",
    "snake": "🐍",
    "bee": "🐝",
    "butterfly": "🦋",
    "apple": "🍎",
    "banana": "🍌",
    "grapes": "🍇",
    "lemon": "🍋",
    "cherry": "🍒",
    "pizza": "🍕",
    "burger": "🍔",
    "cake": "🎂",
    "bread": "🍞",
    "car": "🚗",
    "bus": "🚌",
    "train": "🚂",
    "airplane": "✈",
    "rocket": "🚀",
    "bicycle": "🚲",
    "ship": "🚢",
    "house": "🏠",
    "tree": "🌳",
    "flower": "🌻",
    "moon": "🌙",
    "star": "⭐",
    "clock": "⏰",
    "key": "🔑",
    "book": "📕",
    "phone": "📱",
    "guitar": "🎸",
    "ball": "⚽",
    "umbrella": "☂",
}

FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf")

# Squares of scikit-image's photos (file, left, top, side): those that their photographers or owners have released under
# CC0 or into the public domain, cut so that none shows a thing that is among the names.
PHOTOS = (
    ("coffee.png", 0, 0, 400),
    ("coffee.png", 200, 0, 400),
    ("coffee.png", 0, 200, 200),
    ("rocket.jpg", 70, 0, 230),
    ("rocket.jpg", 350, 0, 230),
    ("rocket.jpg", 350, 140, 230),
    ("retina.jpg", 250, 250, 900),
    ("retina.jpg", 300, 700, 450),
    ("brick.png", 0, 0, 512),
    ("brick.png", 200, 256, 256),
    ("grass.png", 0, 0, 512),
    ("grass.png", 200, 200, 256),
    ("gravel.png", 0, 0, 512),
    ("gravel.png", 200, 200, 256),
    ("camera.png", 250, 240, 256),
    ("cell.png", 0, 110, 340),
)


def sprites(font: ImageFont.FreeTypeFont) -> Image.Image:
    """All pictograms in one RGBA sheet, row by row."""
    rows = -(-len(EMOJI) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * SPRITE, rows * SPRITE))
    for index, character in enumerate(EMOJI.values()):
        cell = Image.new("RGBA", (136, 136))  # the font's bitmaps are 136 x 128
        ImageDraw.Draw(cell).text((0, 4), character, font=font, embedded_color=True)
        cell = cell.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)
        sheet.paste(cell, (index % COLUMNS * SPRITE, index // COLUMNS * SPRITE))
    return sheet


def digits(folder: Path) -> Image.Image:
    """Masks of the ten digits (columns) in each font (rows); 255 is ink."""
    sheet = Image.new("L", (10 * GLYPH, len(FONTS) * GLYPH))
    for row, file in enumerate(FONTS):
        font = ImageFont.truetype(folder / file, 26)
        for digit in range(10):
            cell = Image.new("L", (GLYPH, GLYPH))
            ImageDraw.Draw(cell).text((GLYPH // 2, GLYPH // 2), str(digit), fill=255, font=font, anchor="mm")
            sheet.paste(cell, (digit * GLYPH, row * GLYPH))
    return sheet


def photos(folder: Path) -> Image.Image:
    """All backgrounds in one sheet, four to a row."""
    sheet = Image.new("RGB", (4 * PHOTO, -(-len(PHOTOS) // 4) * PHOTO))
    for index, (file, left, top, side) in enumerate(PHOTOS):
        square = Image.open(folder / file).convert("RGB").crop((left, top, left + side, top + side))
        square = square.resize((PHOTO, PHOTO), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(BLUR))
        sheet.paste(square, (index % 4 * PHOTO, index // 4 * PHOTO))
    return sheet


def encoded(image: Image.Image, **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def main() -> None:
    """Render everything into `--output`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("src/foveate/scenes/assets"))
    parser.add_argument("--emoji", type=Path, default=Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    fonts = Path(str(resources.files("matplotlib") / "mpl-data" / "fonts" / "ttf"))
    sheet = sprites(ImageFont.truetype(options.emoji, 109))
    write_bytes(options.output / "sprites.png", encoded(sheet, format="PNG", optimize=True))
    write_bytes(options.output / "digits.png", encoded(digits(fonts), format="PNG", optimize=True))
    backgrounds = photos(Path(str(resources.files("skimage") / "data")))
    write_bytes(options.output / "photos.jpg", encoded(backgrounds, format="JPEG", quality=88, optimize=True))
    write_bytes(options.output / "DEJAVU-LICENSE.txt", (fonts / "LICENSE_DEJAVU").read_bytes())


if __name__ == "__main__":
    main()
