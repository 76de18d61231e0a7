"""PixelPrune: drop tokens whose pixels their neighbours predict, before the encoder sees any."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from foveate.core import FoveateError, Grid, Keep, Method, Selection, Signals, Site, check_choices, check_keep
from foveate.methods._checks import check_share
from foveate.ops.prediction import Metric, unpredicted

_GREYS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)  # thresholds that calibration tries
_MARGIN = 0.01  # of [0, 1]: what rounding in half precision can make of a normalised pixel


@dataclass(frozen=True)
class PixelPrune(Method):
    """PixelPrune: drops tokens whose pixels repeat those of a neighbour, before the encoder: margins, screens, tables.

    A token is predicted from the one to its left; or from the one above, where the corner above left is like the one to
    the left and unlike the one above, so that an edge runs down between them. It stays if it differs from its
    prediction by more than the threshold; at the threshold it counts as the same. The first token stays. How many that
    leaves is the picture's affair: a page has many that repeat, a photograph none.

    Each picture is looked at by itself, tiles and frames too: frames are not compared with each other. The pixels are
    those that the encoder is given, so that a picture that the processor has scaled repeats itself less.

    Args:
        threshold: largest distance, of pixels from 0 to 1, at which two tokens are alike; a grey of 8 bits is 1/255.
        metric: of two tokens' pixels the largest difference (max), their mean (mae), or the root of their mean square
            (rmse).
        anchored: a dropped token counts as its prediction in later comparisons, so that small differences do not add
            up over a slope. It matters for thresholds above 0 alone.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2604.00886"
    site: ClassVar[Site] = "pixels"
    adaptive: ClassVar[bool] = True
    needs = ("pixels",)

    threshold: float = 0.0
    metric: Metric = "max"
    anchored: bool = True

    def __post_init__(self) -> None:
        check_share("threshold", self.threshold, 0.0)
        object.__setattr__(self, "threshold", float(self.threshold))
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
        pixels = signals.pixels
        assert pixels is not None
        grid = signals.raster("PixelPrune", "give it as the first method")
        if self.threshold > 0:
            low, high = pixels.min().item(), pixels.max().item()
            if low < -_MARGIN or high > 1 + _MARGIN:
                raise FoveateError(
                    f"{self} compares pixels in [0, 1], and these reach from {low:.3g} to {high:.3g}: they were not "
                    "normalised by the mean and deviation that the checkpoint states; pass what its processor made, or "
                    "use threshold=0, which compares for equality alone"
                )
        stays = unpredicted(pixels, grid, self.threshold, self.metric, self.anchored)
        return Selection([index[row] for index, row in zip(signals.index, stays, strict=True)])
