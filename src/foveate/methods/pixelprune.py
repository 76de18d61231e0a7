"""PixelPrune: drop tokens whose pixels their neighbours predict, before the encoder sees any."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.core import FoveateError, Grid, Keep, Method, Selection, Signals, Site, check_choices, check_keep
from foveate.methods._checks import check_share
from foveate.ops.device import Unread
from foveate.ops.prediction import unpredicted
from foveate.ops.repeats import Metric

_GREYS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)  # thresholds that calibration tries
_MARGIN = 0.01  # of [0, 1]: what rounding in half precision can make of a normalised pixel


@dataclass(frozen=True)
class PixelPrune(Method):
    """PixelPrune: drops tokens whose pixels repeat those of a neighbour, before the encoder: margins, screens, tables.

    A token is predicted from the one to its left; or from the one above, where the corner above left is like the one to
    the left and unlike the one above, so that an edge runs down between them. It stays if it differs from its
    prediction by more than the threshold; at the threshold it counts as the same. The first token stays. How many that
    leaves is the picture's affair: a page has many that repeat, a photograph none.

    Each picture is looked at by itself, tiles too, and so is each frame of a video: the authors' code leaves videos
    alone. With frames="before", which is ours, a token whose neighbours to the left and above are like those at their
    places in the frame before is predicted from its own place there, so that what stands still leaves as well. The
    first token of each frame stays. A frame is what the encoder takes for one: two of the video's in Qwen-VL.

    The pixels are those that the encoder is given, so that a picture that the processor has scaled repeats itself less.

    Args:
        threshold: largest distance, of pixels from 0 to 1, at which two tokens are alike; a grey of 8 bits is 1/255.
        metric: of two tokens' pixels the largest difference (max), their mean (mae), or the root of their mean square
            (rmse).
        anchored: a dropped token counts as its prediction in later comparisons, so that small differences do not add
            up over a slope. It matters for thresholds above 0 alone.
        frames: of a video each by itself (apart), or compared with the one before as well (before).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2604.00886"
    site: ClassVar[Site] = "pixels"
    adaptive: ClassVar[bool] = True
    threshold: float = 0.0
    metric: Metric = "max"
    anchored: bool = True
    frames: Literal["apart", "before"] = "apart"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("pixels",) if self.threshold > 0 else ("normalised",)  # what is equal is so in any scale

    def __post_init__(self) -> None:
        check_share("threshold", self.threshold, 0.0)
        object.__setattr__(self, "threshold", self.threshold + 0.0)  # -0.0 is 0.0
        check_choices(self)
        if not isinstance(self.anchored, bool):
            raise FoveateError(f"anchored={self.anchored!r} is neither true nor false; the paper's is anchored=true")

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return None

    def calibrate(self, signals: Signals | Iterable[Signals], target: Keep) -> PixelPrune:
        """The same method with the threshold, a number of greys, whose average count is nearest to `target`.

        Of two that are as near, the lower one.

        Args:
            signals: of the pictures to calibrate on, or of their tiles.
            target: tokens per picture on average, or a share of them.

        Raises:
            FoveateError: no pictures, or a target above their tokens.
        """
        batches = [signals] if isinstance(signals, Signals) else list(signals)
        tokens = [batch.shape[1] for batch in batches for _ in batch.index]
        if not tokens:
            raise FoveateError("calibration needs the signals of at least one picture")
        check_keep(target, "target")
        most = sum(tokens) / len(tokens)
        wanted = target * most if isinstance(target, float) else target
        if wanted > most:
            raise FoveateError(f"target={target} is above the {most:g} tokens that these pictures have on average")

        def distance(greys: int) -> float:
            method = dataclasses.replace(self, threshold=greys / 255)
            left = sum(row.numel() for batch in batches for row in method.select(batch).indices)
            return abs(left / len(tokens) - wanted)

        return dataclasses.replace(self, threshold=min(_GREYS, key=distance) / 255)

    def select(self, signals: Signals) -> Selection:
        grid = signals.raster("PixelPrune", "give it as the first method")
        equal = self.threshold == 0
        pixels = signals.normalised if equal and signals.normalised is not None else signals.pixels
        assert pixels is not None
        found: dict[int, Tensor] = {}
        for rows in self._runs(signals):
            some = pixels[rows.start : rows.stop]
            unlike = unpredicted(some, grid, self.threshold, self.metric, self.anchored, frames=self._in_time(signals))
            found.update(zip(rows, unlike, strict=True))
        stays = torch.stack([found[row] for row in range(len(found))])
        if equal:
            return Selection(Unread(signals.index, stays))
        return Selection(
            Unread(signals.index, stays, [torch.stack(pixels.aminmax()).float().view(torch.int32)], self._look)
        )

    def _look(self, read: Sequence[Tensor]) -> None:
        low, high = read[0].view(torch.float32).tolist()
        self._check_range(low, high)

    def _check_range(self, low: float, high: float) -> None:
        if low < -_MARGIN or high > 1 + _MARGIN:
            raise FoveateError(
                f"{self} compares pixels in [0, 1], and these reach from {low:.3g} to {high:.3g}: they were not "
                "normalised by the mean and deviation that the checkpoint states; pass what its processor made, or "
                "use threshold=0, which compares for equality alone"
            )

    def _in_time(self, signals: Signals) -> bool:
        """Whether frames are compared with each other."""
        return self.frames == "before" and signals.frames is not None

    def _runs(self, signals: Signals) -> list[range]:
        """The images that are looked at together: all, or runs of frames behind each other."""
        batch = signals.shape[0]
        if not self._in_time(signals):
            return [range(batch)]
        assert signals.frames is not None
        follows = [video == before and frame == last + 1 for (before, last), (video, frame) in pairwise(signals.frames)]
        starts = [0, *(row + 1 for row, one in enumerate(follows) if not one), batch]
        return [range(start, stop) for start, stop in pairwise(starts)]
