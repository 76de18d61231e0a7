"""Pages: what repeats on them, and scenes stamped on them."""

from __future__ import annotations

import pytest
import torch

from foveate import FoveateError
from foveate.scenes import generator, pages


def tokens_of(kind: pages.Kind, seed: int = 0) -> torch.Tensor:
    """(N, values) of a page in squares of 28 pixels."""
    sheet = pages.page(336, 448, seed=seed, kind=kind)
    greys = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    return greys.view(16, 28, 12, 84).transpose(1, 2).reshape(192, -1)


@pytest.mark.parametrize("kind", pages.KINDS)
def test_a_page_repeats_itself_and_has_ink(kind: pages.Kind) -> None:
    tokens = tokens_of(kind)
    assert 20 < tokens.unique(dim=0).shape[0] < 160
    assert torch.equal(tokens, tokens_of(kind)) and not torch.equal(tokens, tokens_of(kind, seed=1))
    assert int(tokens.min()) < 100 and int(tokens.max()) == 255


def test_stamps_are_the_objects_of_scenes() -> None:
    """Same seed and split, same table; where there is no object there is paper."""
    plain, page = generator.generate(5, seed=7, split="test"), pages.stamped(5, seed=7)
    for name in ("count", "names", "colors", "digits", "boxes"):
        assert torch.equal(getattr(plain, name), getattr(page, name))
    beside = torch.ones(5, 336, 336, dtype=torch.bool)
    for picture, boxes in enumerate(page.boxes.tolist()):
        for left, top, right, bottom in boxes:
            beside[picture, max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = False
    shares = [float((page.pixels[row].amin(dim=0)[beside[row]] == 255).float().mean()) for row in range(4)]
    assert min(shares) > 0.5, "paper is white where it is not written on"


def test_jpeg_changes_pixels_and_no_objects() -> None:
    page, packed = pages.stamped(2, seed=7), pages.stamped(2, seed=7, jpeg=75)
    assert torch.equal(page.boxes, packed.boxes)
    difference = (page.pixels.int() - packed.pixels.int()).abs()
    assert int(difference.max()) > 8 and float(difference.float().mean()) < 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pages.page(100, 100, seed=0, kind="map"), "unknown kind of page 'map'; Choices: boxes, letter"),  # type: ignore[arg-type]
        (lambda: pages.page(100, 20, seed=0), "a page of 100 x 20 pixels has no room for a line; the least is 64 x 64"),
        (lambda: pages.stamped(1, seed=0, jpeg=100), "jpeg=100 is no quality from 1 to 95; the nearest is jpeg=95"),
        (lambda: pages.stamped(0, seed=0), "batch=0 is no number of pictures"),
    ],
)
def test_pages_that_cannot_be(call: object, message: str) -> None:
    with pytest.raises(FoveateError) as error:
        call()  # type: ignore[operator]
    assert message in str(error.value)
