"""PixelPrune: what repeats its neighbours leaves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from foveate import FoveateError, spec
from foveate.core import Signals
from foveate.methods.pixelprune import PixelPrune


def signals(*rows: str, **more: Any) -> Signals:
    """A picture of one value a token, a digit each in tenths."""
    values = torch.tensor([[int(digit) / 10 for row in rows for digit in row]])[..., None]
    tokens = values.shape[1]
    given = {"grid": (len(rows), len(rows[0])), "pixels": values, **more}
    return Signals(original=tokens, index=torch.arange(tokens)[None], **given)


def kept(seen: Signals, **fields: Any) -> list[int]:
    (found,) = PixelPrune(**fields).select(seen).indices
    return found.tolist()


def test_a_box_on_a_page_by_hand() -> None:
    """White before the box, the box's first token, white behind it; and white below its corner."""
    page = signals("9999", "9119", "9119", "9999")
    assert kept(page) == [0, 5, 7, 13]


def test_thresholds_and_anchors() -> None:
    slope = signals("12345")
    assert kept(slope) == [0, 1, 2, 3, 4]
    assert kept(slope, threshold=0.11) == [0, 2, 4]
    assert kept(slope, threshold=0.11, anchored=False) == [0]


def test_at_threshold_0_pixels_are_compared_as_they_are() -> None:
    """What is equal is so in any scale, so that nothing has to be brought back to [0, 1]."""
    assert PixelPrune().needs == ("normalised",) and PixelPrune(threshold=0.1).needs == ("pixels",)
    page = signals("9919")
    other = Signals(
        original=4, index=page.index, grid=page.grid, normalised=torch.tensor([[[1.0], [2.0], [2.0], [2.0]]])
    )
    assert kept(other) == [0, 1]
    both = dataclasses.replace(other, pixels=page.pixels)
    assert (kept(both), kept(both, threshold=0.1)) == ([0, 1], [0, 2, 3])


def test_frames_are_compared_with_the_one_before_where_they_follow_it() -> None:
    """By hand: frames of two videos, and one of which the frame before was not shown."""
    frames = ["12", "12", "32", "12", "12"]
    pixels = torch.cat([signals(one).pixels for one in frames])  # type: ignore[misc]
    index = torch.arange(2).expand(5, 2)
    seen = Signals(original=2, index=index, grid=(1, 2), pixels=pixels)
    video = dataclasses.replace(seen, frames=((0, 0), (0, 1), (0, 2), (1, 0), (1, 2)))
    rows = [row.tolist() for row in PixelPrune(frames="before").select(video).indices]
    # Of the third the first token differs, and the second is foretold by it, in vain.
    assert rows == [[0, 1], [0], [0, 1], [0, 1], [0, 1]]
    for one, method in ((video, PixelPrune()), (seen, PixelPrune(frames="before"))):
        assert all(row.tolist() == [0, 1] for row in method.select(one).indices)


def test_indices_are_original_ones() -> None:
    page = signals("9919")
    moved = Signals(original=8, index=page.index + 4, grid=page.grid, pixels=page.pixels)
    assert kept(moved) == [4, 6, 7]


def test_specs() -> None:
    assert spec.parse("pixelprune") == PixelPrune()
    assert spec.parse("pixelprune:threshold=0.0157,metric=mae,anchored=false") == PixelPrune(0.0157, "mae", False)
    assert spec.parse("pixelprune:frames=before") == PixelPrune(frames="before")
    assert spec.format(PixelPrune(threshold=0)) == "pixelprune"
    assert PixelPrune().count(100, (10, 10)) is None and PixelPrune().adaptive


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": -0.1}, r"threshold=-0.1 is no share in \[0, 1\]; the paper's is threshold=0.0"),
        ({"threshold": 4}, r"threshold=4 is no share in \[0, 1\]"),
        ({"metric": "l2"}, r"metric='l2' is not among its choices; Choices: mae, max, rmse"),
        ({"anchored": 1}, "anchored=1 is neither true nor false"),
        ({"frames": "both"}, "frames='both' is not among its choices; .*Choices: apart, before"),
    ],
)
def test_fields_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        PixelPrune(**fields)


def test_calibration_finds_the_nearest_number_of_greys() -> None:
    """Steps of a tenth are 25 or 26 greys: below that all five stay, above 51 two of them."""
    slope = signals("12345")
    assert PixelPrune().calibrate(slope, 5) == PixelPrune()
    assert PixelPrune().calibrate([slope], 0.6) == PixelPrune(threshold=32 / 255)
    assert PixelPrune().calibrate(slope, 2).threshold == 64 / 255
    with pytest.raises(FoveateError, match=r"target=6 is above the 5 tokens that these pictures have on average"):
        PixelPrune().calibrate(slope, 6)
    with pytest.raises(FoveateError, match="calibration needs the signals of at least one picture"):
        PixelPrune().calibrate([], 0.5)


def test_it_needs_the_whole_raster() -> None:
    page = signals("9999")
    with pytest.raises(FoveateError, match=r"PixelPrune needs the whole grid .* give it as the first method"):
        PixelPrune().select(Signals(original=9, index=page.index, pixels=page.pixels))


def test_a_threshold_needs_pixels_from_0_to_1() -> None:
    page = signals("19")
    wide = Signals(original=2, index=page.index, grid=(1, 2), pixels=page.pixels * 3 - 1)  # type: ignore[operator]
    assert kept(wide) == [0, 1]
    with pytest.raises(FoveateError, match=r"compares pixels in \[0, 1\], and these reach from -0.7 to 1.7"):
        kept(wide, threshold=0.1)
