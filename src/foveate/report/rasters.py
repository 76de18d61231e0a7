"""A picture with what one stage kept of it, and with what it made of its tokens, as inline SVG over the pixels."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence

from foveate.core import FoveateError
from foveate.inference.pictures import picture_of
from foveate.report.markup import Markup, element

HEAT = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
"""Viridis in eighths: it darkens evenly, also for eyes that tell few colours."""


def pixels(png: str, number: int) -> tuple[Markup, tuple[int, int]]:
    """The definition of a picture that others use by `#picture-NUMBER`, and its width and height.

    Args:
        png: base64; it is decoded and encoded anew, so that nothing but a picture gets into the page.

    Raises:
        FoveateError: these are no bytes of a picture.
    """
    name = f"picture {number} of the report"
    try:
        data = base64.b64decode(png, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FoveateError(f"{name} is no picture: its bytes are not written in base64") from error
    image = picture_of(data, name)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    again = base64.b64encode(file.getvalue()).decode()
    width, height = image.size
    made = element("image", id=f"picture-{number}", href=f"data:image/png;base64,{again}", width=width, height=height)
    return element("svg", element("defs", made), class_="hidden", width=0, height=0, aria_hidden="true"), image.size


def whole(number: int, size: tuple[int, int], title: str) -> Markup:
    """A picture as it is."""
    return _over(number, size, title)


def kept(number: int, size: tuple[int, int], grid: tuple[int, int], places: Sequence[int], title: str) -> Markup:
    """A picture whose dropped tokens are veiled.

    Args:
        grid: height and width of the raster.
        places: raster numbers of the tokens that stay.
    """
    stay = set(places)
    dropped = [place for place in range(grid[0] * grid[1]) if place not in stay]
    return _over(number, size, title, _cells(dropped, size, grid, class_="veil"))


def heat(
    number: int, size: tuple[int, int], grid: tuple[int, int], scores: Sequence[float | None], title: str
) -> Markup:
    """A picture under the ranks of its tokens' scores in eighths; tokens without one are veiled."""
    there = sorted((place for place, score in enumerate(scores) if score is not None), key=lambda one: scores[one] or 0)
    layers = []
    for eighth, color in enumerate(HEAT):
        some = sorted(there[len(there) * eighth // len(HEAT) : len(there) * (eighth + 1) // len(HEAT)])
        layers.append(_cells(some, size, grid, fill=color, class_="heat"))
    gone = [place for place, score in enumerate(scores) if score is None]
    return _over(number, size, title, *layers, _cells(gone, size, grid, class_="veil"))


def _over(number: int, size: tuple[int, int], title: str, *layers: Markup | None) -> Markup:
    width, height = size
    picture = element("use", href=f"#picture-{number}")
    return element("svg", picture, *layers, viewBox=f"0 0 {width} {height}", role="img", aria_label=title)


def _cells(places: Sequence[int], size: tuple[int, int], grid: tuple[int, int], **attributes: str) -> Markup | None:
    """Cells of the raster as one path, neighbours in a row as one strip."""
    height, width = grid
    strips: list[list[int]] = []
    for place in places:
        if strips and place == strips[-1][0] + strips[-1][1] and place % width:
            strips[-1][1] += 1
        else:
            strips.append([place, 1])
    path = "".join(f"M{start % width} {start // width}h{count}v1h-{count}z" for start, count in strips)
    scale = f"scale({size[0] / width:.6g} {size[1] / height:.6g})"
    return element("path", d=path, transform=scale, **attributes) if strips else None
