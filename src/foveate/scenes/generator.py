"""Draws batches of pictures, pictograms on coloured discs with a digit tag each, and knows where every object is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from foveate.core import FoveateError, did_you_mean
from foveate.scenes.vocabulary import COLORS, DIGITS, NAMES

Split = Literal["train", "test"]

SIZE = 336  # pixels of a picture's side
MOST = 7  # objects in one picture
CELLS = 4  # a picture is 4 x 4 cells, and an object stays inside its own
CELL = SIZE // CELLS
RADIUS = (25, 34)  # smallest and largest disc, in pixels
TAG = 30  # pixels of the digit tag's side
SPRITE_SHARE = 0.75  # half the side of a pictogram's cell, as a share of the disc's radius
CROP = (80, 200)  # smallest and largest side of the background's crop, in pixels of its 256-pixel tile

_SPRITE, _SPRITE_COLUMNS = 72, 8  # as tools/render_assets.py lays out the sheets
_GLYPH = 28
_PHOTO, _PHOTO_COLUMNS = 256, 4
_COARSE = SIZE // 2  # backgrounds are soft: they are drawn at half the resolution
_SPLITS: tuple[str, ...] = ("train", "test")
_SEEDS = 2**31  # torch's CPU generator looks at 32 bits of its seed, and one of them is the split
_DEMO_SEED = 215


@dataclass(frozen=True)
class Scenes:
    """One batch of B pictures with at most 7 objects each; unused places hold -1.

    Objects are listed row by row: by `floor(y / 84)` of the centre of their box (four rows of 84 pixels), and within a
    row from left to right. No two objects of a picture share a name, and their boxes do not overlap.

    Attributes:
        pixels: (B, 3, 336, 336) uint8, RGB.
        count: (B,) int64, 1 to 7.
        names: (B, 7) int64, index into `NAMES`.
        colors: (B, 7) int64, index into `COLORS`, the disc's colour.
        digits: (B, 7) int64, 0 to 9.
        boxes: (B, 7, 4) int64 pixels x0, y0, x1, y1 around disc and tag; x1 and y1 are exclusive.
    """

    pixels: Tensor
    count: Tensor
    names: Tensor
    colors: Tensor
    digits: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def image(self, row: int) -> Image.Image:
        """Picture `row` as a PIL image."""
        pixels = self.pixels[row].permute(1, 2, 0).contiguous().cpu()
        return Image.frombytes("RGB", (SIZE, SIZE), pixels.numpy().tobytes())

    def patches(self, patch: int = 14) -> Tensor:
        """Which square patches of `patch` pixels each object's box touches, in raster order.

        Returns:
            (B, 7, N) bool with N = (336 / patch) ** 2; all False where there is no object.

        Raises:
            FoveateError: 336 is no multiple of `patch`.
        """
        if isinstance(patch, bool) or not isinstance(patch, int) or patch < 1 or SIZE % patch:
            sides = [side for side in range(1, SIZE + 1) if SIZE % side == 0]
            known = isinstance(patch, int | float) and math.isfinite(patch)
            nearest = min(sides, key=lambda side: abs(side - patch)) if known else 14
            raise FoveateError(f"patch={patch!r} does not divide {SIZE} pixels; the nearest that does is {nearest}")
        edges = torch.arange(0, SIZE, patch, device=self.boxes.device)
        x0, y0, x1, y1 = self.boxes[..., None].unbind(2)  # each (B, 7, 1)
        columns = (edges < x1) & (edges + patch > x0)  # (B, 7, 336 / patch)
        rows = (edges < y1) & (edges + patch > y0)
        return (rows[..., :, None] & columns[..., None, :]).flatten(2)


def held_out(name: Tensor | int, color: Tensor | int, digit: Tensor | int) -> Tensor:
    """Whether a combination belongs to the split "test" alone: one digit in ten for each name and colour.

    Takes integers or integer tensors that broadcast; -1 (no object) gives no meaningful answer.
    """
    return torch.as_tensor(digit) == _held_out_digit(torch.as_tensor(name), torch.as_tensor(color))


def _held_out_digit(name: Tensor, color: Tensor) -> Tensor:
    # 3 and 7 are coprime to 10, so that names, colours and digits all stay evenly spread in both splits.
    return -(7 * name + 3 * color) % len(DIGITS)


def generate(
    batch: int,
    *,
    seed: int,
    split: Split = "train",
    device: str | torch.device = "cpu",
    paper: Callable[[int], Tensor] | None = None,
) -> Scenes:
    """Draw `batch` pictures.

    The same batch, seed and split give the same pictures; random numbers come from the CPU, so that every device shows
    the same scenes (shades may differ by rounding). The splits share neither random streams nor combinations of name,
    colour and digit: every object of "test" is `held_out`, no object of "train" is.

    Args:
        batch: pictures, at least 1.
        seed: 0 to 2**31 - 1.
        split: "train" or "test".
        device: where the pictures are drawn and stay.
        paper: gives the background of each picture by its number, (3, 336, 336) uint8; None for crops of photos.

    Raises:
        FoveateError: an argument outside these ranges, or a CUDA device where there is none.
    """
    _check(batch, seed, split, device)
    generator = torch.Generator().manual_seed(_stream(seed, split))
    table = _draw_table(batch, split, generator)
    look = _draw_look(batch, generator)
    boxes, discs, tags = _place(table, look)
    place = torch.device(device)
    if paper is None:
        pixels = _background(look["photo"].to(place))
    else:
        pixels = torch.stack([paper(number) for number in range(batch)]).to(place)
    present = (table["names"] >= 0).nonzero().to(place)  # (M, 2): picture and place of each of the batch's M objects
    objects = {key: value.to(place)[present[:, 0], present[:, 1]] for key, value in {**table, **discs, **tags}.items()}
    _paint(pixels, present[:, 0], objects)
    names, colors, digits = (table[key].to(place) for key in ("names", "colors", "digits"))
    return Scenes(pixels, (names >= 0).sum(dim=1), names, colors, digits, boxes.to(place))


def demo() -> Scenes:
    """The one picture that the examples and `make demo` show: from the split "test", a dog among its objects."""
    return generate(1, seed=_DEMO_SEED, split="test")


# ---------------------------------------------------------------------------------------------------------------------
# what a picture holds


def _check(batch: int, seed: int, split: str, device: str | torch.device) -> None:
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise FoveateError(f"batch={batch!r} is no number of pictures; the smallest is batch=1")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _SEEDS:
        nearest = _SEEDS - 1 if isinstance(seed, int) and seed >= _SEEDS else 0
        raise FoveateError(f"seed={seed!r} is no whole number from 0 to {_SEEDS - 1}; the nearest is seed={nearest}")
    if split not in _SPLITS:
        raise FoveateError(f"unknown split {split!r}; {did_you_mean(str(split), _SPLITS)}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise FoveateError(f"device={str(device)!r}, but torch sees no CUDA device; use device='cpu'")


def _stream(seed: int, split: str) -> int:
    # An odd factor is a bijection of 32-bit numbers: no two (seed, split) meet, and neighbours start far apart.
    return (2 * seed + _SPLITS.index(split)) * 0x9E3779B1 % 2**32


def _draw_table(batch: int, split: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Names, colours, digits and cells, each (B, 7), objects in the order of `Scenes`."""
    count = torch.randint(1, MOST + 1, (batch,), generator=generator)
    absent = torch.arange(MOST) >= count[:, None]  # (B, 7)
    names = torch.rand(batch, len(NAMES), generator=generator).argsort(dim=1)[:, :MOST]
    cells = torch.rand(batch, CELLS**2, generator=generator).argsort(dim=1)[:, :MOST]
    cells = cells.masked_fill(absent, CELLS**2).sort(dim=1).values  # raster order of the cells is the order of objects
    colors = torch.randint(len(COLORS), (batch, MOST), generator=generator)
    digits = _held_out_digit(names, colors)
    others = torch.randint(1, len(DIGITS), (batch, MOST), generator=generator)
    if split == "train":
        digits = (digits + others) % len(DIGITS)
    table = {"names": names, "colors": colors, "digits": digits, "cells": cells}
    return {key: value.masked_fill(absent, -1) for key, value in table.items()}


def _draw_look(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Everything that no question asks about: sizes, places inside the cells, typefaces, backgrounds."""
    radius = torch.randint(RADIUS[0], RADIUS[1] + 1, (batch, MOST), generator=generator)
    jitter = torch.rand(batch, MOST, 2, generator=generator)
    fonts = torch.randint(3, (batch, MOST), generator=generator)
    photo = torch.rand(batch, 11, generator=generator)
    return {"radius": radius, "jitter": jitter, "fonts": fonts, "photo": photo}


def _place(table: dict[str, Tensor], look: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Boxes (B, 7, 4), discs and tags: the whole object lies inside its cell, so that no two can touch."""
    radius = look["radius"]
    tag = (7 * radius + 5) // 10 - TAG // 2  # the tag's middle sits on the disc's rim, at the lower right
    side = radius + torch.maximum(radius, tag + TAG)
    corner = (look["jitter"] * (CELL - side + 1)[..., None]).long()  # (B, 7, 2): x, y inside the cell
    cell = torch.stack((table["cells"] % CELLS, table["cells"] // CELLS), dim=-1)
    origin = cell * CELL + corner
    boxes = torch.cat((origin, origin + side[..., None]), dim=-1)
    boxes = boxes.masked_fill(table["names"][..., None] < 0, -1)
    centre = corner + radius[..., None]
    return boxes, {"centre": centre, "radius": radius}, {"tag": centre + tag[..., None], "fonts": look["fonts"]}


# ---------------------------------------------------------------------------------------------------------------------
# how it is drawn


@functools.cache
def _assets(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """From 0 to 1: pictograms (48, 4, 72, 72), alpha premultiplied, digits (3, 10, 28, 28), photo sheet (3, H, W)."""
    sprites = _sheet("sprites.png", "RGBA").unfold(1, _SPRITE, _SPRITE).unfold(2, _SPRITE, _SPRITE)
    sprites = sprites.permute(1, 2, 0, 3, 4).flatten(0, 1)
    sprites = torch.cat((sprites[:, :3] * sprites[:, 3:], sprites[:, 3:]), dim=1)
    glyphs = _sheet("digits.png", "L")[0].unfold(0, _GLYPH, _GLYPH).unfold(1, _GLYPH, _GLYPH)
    photos = _sheet("photos.jpg", "RGB")
    return sprites.contiguous().to(device), glyphs.contiguous().to(device), photos.contiguous().to(device)


def _sheet(file: str, mode: str) -> Tensor:
    """An image of the package as (channels, height, width) float32 from 0 to 1."""
    with (resources.files("foveate.scenes") / "assets" / file).open("rb") as stream, Image.open(stream) as file_image:
        image = file_image.convert(mode)
        data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return data.view(image.height, image.width, len(mode)).permute(2, 0, 1).float() / 255


def _background(draw: Tensor) -> Tensor:
    """Soft crops of photos in shifted shades: (B, 11) random numbers to (B, 3, 336, 336) uint8."""
    photos = _assets(draw.device)[2]
    height, width = photos.shape[1:]
    tiles = (height // _PHOTO) * (width // _PHOTO)
    tile = (draw[:, 0] * tiles).long().clamp(max=tiles - 1)
    side = CROP[0] + draw[:, 1] * (CROP[1] - CROP[0])
    left = tile % _PHOTO_COLUMNS * _PHOTO + draw[:, 2] * (_PHOTO - side)
    top = tile // _PHOTO_COLUMNS * _PHOTO + draw[:, 3] * (_PHOTO - side)
    steps = (torch.arange(_COARSE, device=draw.device) + 0.5) / _COARSE
    across = torch.where(draw[:, 4, None] < 0.5, steps, 1 - steps)  # half of the pictures are mirrored
    x = (left[:, None] + across * side[:, None]) / width * 2 - 1  # (B, 168)
    y = (top[:, None] + steps * side[:, None]) / height * 2 - 1
    grid = torch.stack((x[:, None, :].expand(-1, _COARSE, -1), y[:, :, None].expand(-1, -1, _COARSE)), dim=-1)
    coarse = functional.grid_sample(photos[None], grid.flatten(0, 1)[None], align_corners=False)  # (1, 3, B * 168, 168)
    coarse = coarse.view(3, -1, _COARSE, _COARSE).transpose(0, 1)
    gain, shift = 0.6 + 0.7 * draw[:, 5:8], 0.3 * draw[:, 8:11] - 0.1
    coarse = (coarse * gain[..., None, None] + shift[..., None, None]).clamp(0, 1)
    return _bytes(functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear"))


def _bytes(shades: Tensor) -> Tensor:
    """Shades from 0 to 1, which are overwritten, as uint8."""
    return shades.mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _paint(pixels: Tensor, picture: Tensor, objects: dict[str, Tensor]) -> None:
    """Paint M objects into their cells of `pixels` (B, 3, 336, 336), in place."""
    cells = pixels.view(-1, 3, CELLS, CELL, CELLS, CELL).permute(0, 2, 4, 1, 3, 5)  # (B, row, column, 3, 84, 84)
    place = (picture, objects["cells"] // CELLS, objects["cells"] % CELLS)
    canvas = cells[place].float() / 255  # (M, 3, 84, 84)
    steps = torch.arange(CELL, device=pixels.device) + 0.5
    offsets = steps - objects["centre"][..., None]  # (M, 2, 84): x and y from the disc's centre
    palette = torch.tensor(list(COLORS.values()), device=pixels.device) / 255
    distance = (offsets[:, 0, None, :] ** 2 + offsets[:, 1, :, None] ** 2).sqrt()
    disc = (objects["radius"][:, None, None] + 0.5 - distance).clamp(0, 1)[:, None]
    canvas = torch.lerp(canvas, palette[objects["colors"]][..., None, None], disc)
    sprite = _sprites(objects["names"], offsets / (SPRITE_SHARE * objects["radius"][:, None, None]))
    canvas.mul_(1 - sprite[:, 3:]).add_(sprite[:, :3])
    inside, white = _tags(objects)
    cells[place] = _bytes(torch.where(inside[:, None], white[:, None], canvas))


def _sprites(names: Tensor, offsets: Tensor) -> Tensor:
    """Pictograms with premultiplied alpha (M, 4, 84, 84), where `offsets` (M, 2, 84) run from -1 to 1 across each."""
    x, y = offsets[:, 0, None, :].expand(-1, CELL, -1), offsets[:, 1, :, None].expand(-1, -1, CELL)
    sprites = _assets(names.device)[0][names]
    return functional.grid_sample(sprites, torch.stack((x, y), dim=-1), align_corners=False)


def _tags(objects: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Which pixels of the cells (M, 84, 84) are tag, and how white each is: black digits on white squares."""
    glyphs = _assets(objects["digits"].device)[1]
    steps = torch.arange(CELL, device=glyphs.device)
    offset = steps - objects["tag"][..., None]  # (M, 2, 84): pixels from the tag's corner
    inside = (offset >= 0) & (offset < TAG)
    margin = (TAG - _GLYPH) // 2
    glyph = (offset - margin).clamp(0, _GLYPH - 1)
    ink = glyphs[objects["fonts"], objects["digits"]]  # (M, 28, 28)
    rows = torch.arange(len(ink), device=glyphs.device)[:, None, None]
    ink = ink[rows, glyph[:, 1, :, None], glyph[:, 0, None, :]]
    return inside[:, 1, :, None] & inside[:, 0, None, :], 1 - ink
