"""Draws pages, as documents and screens are: lines of text, tables, boxes and windows, in the typeface Pillow ships."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from foveate.core import FoveateError, did_you_mean
from foveate.scenes.generator import SIZE, Scenes, Split, generate

Kind = Literal["letter", "text", "table", "boxes", "screen"]

KINDS: tuple[Kind, ...] = ("letter", "text", "table", "boxes", "screen")

_WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so said what up its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man"
).split()
_INK, _RULE, _SHADE, _BAR = (20, 20, 20), (120, 120, 120), (232, 236, 244), (58, 78, 122)


def page(width: int, height: int, *, seed: int, kind: Kind = "letter") -> Image.Image:
    """One page of `width` x `height` pixels, white where nothing is drawn; the same seed draws the same page.

    Args:
        kind: "letter" has an address, a few paragraphs and a name below, "text" paragraphs to its end, "table" a ruled
            table below some lines, "boxes" framed and shaded notes, "screen" a window with a bar, a list and fields.

    Raises:
        FoveateError: another kind, or sides below 64 pixels.
    """
    if kind not in KINDS:
        raise FoveateError(f"unknown kind of page {kind!r}; {did_you_mean(str(kind), KINDS)}")
    if min(width, height) < 64:
        raise FoveateError(f"a page of {width} x {height} pixels has no room for a line; the least is 64 x 64")
    sheet = Image.new("RGB", (width, height), "white")
    _Pen(sheet, random.Random(f"{seed} {kind}")).draw(kind)
    return sheet


def stamped(batch: int, *, seed: int, split: Split = "test", jpeg: int | None = None) -> Scenes:
    """Pages of 336 x 336 pixels with the objects of scenes as stamps on them, so that questions can be asked of them.

    The kinds take turns. Objects are those of `generate` with the same seed and split.

    Args:
        jpeg: the quality at which the pictures have been through JPEG, 1 to 95; None for lossless ones.

    Raises:
        FoveateError: as `generate`, or a quality that is none.
    """
    check_quality(jpeg)
    scenes = generate(batch, seed=seed, split=split, paper=_papers(seed))
    if jpeg is not None:
        pictures = [_pixels(through_jpeg(scenes.image(row), jpeg)) for row in range(batch)]
        scenes.pixels.copy_(torch.stack(pictures))
    return scenes


def check_quality(jpeg: int | None) -> None:
    """Refuse what is no quality of JPEG.

    Raises:
        FoveateError: it is no whole number from 1 to 95.
    """
    if jpeg is not None and (isinstance(jpeg, bool) or not isinstance(jpeg, int) or not 1 <= jpeg <= 95):
        nearest = 95 if isinstance(jpeg, int | float) and jpeg > 95 else 1
        raise FoveateError(f"jpeg={jpeg!r} is no quality from 1 to 95; the nearest is jpeg={nearest}")


def through_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    """The picture as a JPEG file of this quality gives it back."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def _papers(seed: int) -> Callable[[int], Tensor]:
    return lambda number: _pixels(page(SIZE, SIZE, seed=seed * 100_003 + number, kind=KINDS[number % len(KINDS)]))


def _pixels(picture: Image.Image) -> Tensor:
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.view(picture.height, picture.width, 3).permute(2, 0, 1)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


class _Pen:
    """Draws on one sheet; sizes follow from its width."""

    def __init__(self, sheet: Image.Image, drawn: random.Random) -> None:
        self.sheet, self.random, self.on = sheet, drawn, ImageDraw.Draw(sheet)
        self.margin = sheet.width // 9
        self.size = max(9, sheet.width // 56)
        self.line = self.size * 3 // 2

    def draw(self, kind: Kind) -> None:
        left, right, bottom = self.margin, self.sheet.width - self.margin, self.sheet.height - self.margin
        if kind == "screen":
            self.screen()
        elif kind == "table":
            self.table(left, self.paragraphs(left, right, self.margin, self.sheet.height // 3), right, bottom)
        elif kind == "boxes":
            self.boxes(left, right, bottom)
        elif kind == "letter":
            self.letter(left, right)
        else:
            self.title(left, self.margin)
            self.paragraphs(left, right, self.margin + 3 * self.line, bottom)

    def words(
        self, left: int, top: int, right: int, size: int | None = None, fill: str | tuple[int, int, int] = _INK
    ) -> None:
        """One line of words that ends before `right`."""
        font, text = _font(size or self.size), ""
        while True:
            longer = f"{text} {self.random.choice(_WORDS)}".strip()
            if left + font.getlength(longer) > right:
                break
            text = longer
        self.on.text((left, top), text, font=font, fill=fill)

    def title(self, left: int, top: int) -> None:
        self.words(left, top, left + self.sheet.width // 2, 2 * self.size)

    def paragraphs(self, left: int, right: int, top: int, bottom: int) -> int:
        """Lines with gaps between paragraphs, the last one of each shorter; where they end."""
        while top + 2 * self.line < bottom:
            lines = self.random.randint(2, 6)
            for number in range(lines):
                if top + self.line > bottom:
                    break
                last = number == lines - 1
                self.words(left, top, left + (right - left) // 2 if last else right)
                top += self.line
            top += self.line
        return top

    def letter(self, left: int, right: int) -> None:
        """An address, a date, a greeting, paragraphs to two thirds of the sheet, and a name."""
        middle, top = (left + right) // 2, self.margin
        for number in range(4):
            self.words(left, top + number * self.line, middle - self.size * number)
        self.words(middle + self.size * 4, top + 6 * self.line, right)
        end = self.paragraphs(left, right, top + 9 * self.line, self.sheet.height * 2 // 3)
        self.words(left, end + self.line, middle - 4 * self.size)

    def table(self, left: int, top: int, right: int, bottom: int) -> None:
        columns, height = self.random.randint(3, 5), 2 * self.line
        edges = [left + (right - left) * number // columns for number in range(columns + 1)]
        self.on.rectangle((left, top, right, top + height), fill=_SHADE)
        while top + height < bottom:
            self.on.line((left, top, right, top), fill=_RULE)
            for start, end in pairwise(edges):
                self.on.line((start, top, start, top + height), fill=_RULE)
                if self.random.random() < 0.8:
                    self.words(start + self.size // 2, top + self.size // 2, (start + end) // 2 + self.size)
            self.on.line((right, top, right, top + height), fill=_RULE)
            top += height
        self.on.line((left, top, right, top), fill=_RULE)

    def boxes(self, left: int, right: int, bottom: int) -> None:
        top = self.margin
        while top + 5 * self.line < bottom:
            height = self.random.randint(4, 7) * self.line
            middle = self.random.randint(left + (right - left) // 3, right - (right - left) // 3)
            for start, end in ((left, middle - self.size), (middle, right)):
                shaded = self.random.random() < 0.5
                frame = (start, top, end, min(bottom, top + height))
                self.on.rectangle(frame, fill=_SHADE if shaded else None, outline=None if shaded else _RULE)
                self.words(start + self.size, top + self.size, end - self.size)
                self.words(start + self.size, top + self.size + self.line, end - self.size)
            top += height + self.line

    def screen(self) -> None:
        width, height, bar = self.sheet.width, self.sheet.height, 2 * self.line
        self.on.rectangle((0, 0, width, bar), fill=_BAR)
        self.words(self.size, self.size // 2, width // 3, fill="white")
        side = width // 4
        self.on.rectangle((0, bar, side, height), fill=_SHADE)
        top = bar + self.line
        while top + self.line < height - self.line:
            self.words(self.size, top, side - self.size)
            top += 2 * self.line
        left, top = side + self.line, bar + self.line
        while top + 4 * self.line < height:
            self.words(left, top, left + width // 4)
            self.on.rectangle((left, top + self.line + 4, width - self.line, top + 3 * self.line), outline=_RULE)
            if self.random.random() < 0.5:
                self.words(left + self.size // 2, top + self.line + self.size, width // 2 + self.margin)
            top += 4 * self.line
