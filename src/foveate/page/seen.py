"""What was done to a picture, to look at: each stage's picture with dropped patches greyed, and one patch's fate."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from foveate.core import FoveateError
from foveate.inference.pictures import visible
from foveate.report.draw import draw
from foveate.trace import Call, StageRecord

WHOLE = "the picture"
LEAST, MOST = 512, 1024
"""Pixels of the longer side that a picture is shown with."""

_MARK = (255, 0, 102)


@dataclass(frozen=True)
class Seen:
    """A picture and the call that pruned it.

    Attributes:
        picture: what the model saw of it.
        text: tokens of the prompt that are not visual.
        spec: what it was pruned by.
    """

    picture: Image.Image
    call: Call
    text: int
    spec: str

    @property
    def stages(self) -> tuple[StageRecord, ...]:
        """What each stage did."""
        return self.call.images[0].stages

    def names(self) -> list[str]:
        """The picture and its stages, to choose from."""
        told = [f"{number}. {one.method}: {one.after} of {one.before}" for number, one in enumerate(self.stages, 1)]
        return [WHOLE, *told]

    def drawn(self, name: str, patch: tuple[int, int] | None = None) -> Image.Image:
        """The picture after a stage, dropped patches grey, and one patch framed.

        Args:
            name: one of `names`.
            patch: its row and column from 1.

        Raises:
            FoveateError: the tokens form no single raster.
        """
        number = self.names().index(name)
        picture = self.picture.copy()
        if number:
            record = dataclasses.replace(self.call.images[0], stages=self.stages[:number])
            call: Any = dataclasses.replace(self.call, images=(record,))
            picture = draw(picture, call)
        if patch is not None:
            self._check(*patch)
            height, width = self.grid
            row, column = patch
            box = (
                (column - 1) * picture.width // width,
                (row - 1) * picture.height // height,
                column * picture.width // width,
                row * picture.height // height,
            )
            ImageDraw.Draw(picture).rectangle(box, outline=_MARK, width=max(2, picture.width // 200))
        return picture

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches.

        Raises:
            FoveateError: the tokens form no single raster.
        """
        grid = self.call.images[0].grid
        if grid is None:
            raise FoveateError("the tokens of this picture form no single raster, so that no patch can be pointed at")
        return grid

    def _check(self, row: int, column: int) -> None:
        height, width = self.grid
        if not (1 <= row <= height and 1 <= column <= width):
            raise FoveateError(f"there is no patch {row}, {column}; this picture has {height} rows of {width}")

    def patch_at(self, x: float, y: float) -> tuple[int, int]:
        """Row and column, from 1, of the patch under a pixel of what is shown."""
        height, width = self.grid
        row, column = int(y * height // self.picture.height), int(x * width // self.picture.width)
        return min(max(row, 0), height - 1) + 1, min(max(column, 0), width - 1) + 1

    def fate(self, row: int, column: int) -> list[str]:
        """What became of a patch at each stage, a sentence each, with its score and rank where the method has any.

        Raises:
            FoveateError: there is no such patch.
        """
        self._check(row, column)
        token = (row - 1) * self.grid[1] + column - 1
        there, told = list(range(self.call.images[0].original)), []
        for stage in self.stages:
            kept = stage.kept.tolist()
            place = there.index(token)
            became = "kept" if token in kept else "dropped"
            told.append(f"{stage.method}: {became}, {_ranked(stage, place)}")
            if became == "dropped":
                break
            there = kept
        return told


def _ranked(stage: StageRecord, place: int) -> str:
    if stage.scores is None:
        return "by no score of its own that the method tells"
    score = stage.scores[place]
    above = (stage.scores > score).sum() + (stage.scores[:place] == score).sum()
    return f"score {score.item():.4g}, rank {int(above) + 1} of {stage.before}"


def seen(picture: Image.Image, call: Call, text: int, spec: str, processor: Any) -> Seen:
    """What can be looked at of a picture that was asked about."""
    shown = visible(picture, getattr(processor, "image_processor", None)).copy()
    shown.thumbnail((MOST, MOST))
    times = -(-LEAST // max(shown.size))
    if times > 1:
        shown = shown.resize((shown.width * times, shown.height * times), Image.Resampling.LANCZOS)
    return Seen(shown, call, text, spec)
