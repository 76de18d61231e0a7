"""What leaves before the encoder: chosen by its pixels in the processor, which must count, and dropped on the way in.

Processor and model choose by the same numbers, on the host, so that the one knows what the other will leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from foveate.serve.vllm.outline import Outline
from foveate.serve.vllm.rooms import (
    Brought,
    Depth,
    Family,
    FoveateError,
    Lane,
    Lanes,
    Layout,
    Method,
    Pixels,
    Probe,
    Prompt,
    TowerStages,
    choose_inside,
    format_spec,
    tiles_of,
)


def before_encoder(parts: Sequence[Method]) -> tuple[Method, ...]:
    """The methods that choose before the encoder runs."""
    return tuple(part for part in parts if part.site == "pixels")


def behind_encoder(parts: Sequence[Method]) -> tuple[Method, ...]:
    """The others."""
    return tuple(part for part in parts if part.site != "pixels")


class HostPixels(Pixels):
    """The pixels of an encoder's calls, on the host."""

    def note(self, pixels: Tensor, sizes: Any) -> None:
        """The encoder will be given these."""
        self.forget()
        self._given = pixels.detach().cpu(), sizes

    def _before(self, tower: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        super()._before(tower, arguments, options)
        if self._given is not None:
            self.note(*self._given)


def left_of(
    outline: Outline, parts: Sequence[Method], kind: str, given: Mapping[str, Any], layouts: Sequence[Layout]
) -> list[Tensor]:
    """Which of the N visual tokens of each picture go into the encoder, (K,) each.

    Args:
        parts: that choose before the encoder.
        given: what the processor made of the pictures.

    Raises:
        FoveateError: these are videos.
    """
    if kind != "image":
        raise FoveateError(f"{format_spec(parts[0])} acts before the encoder, which videos do not allow in vLLM")
    pixels = HostPixels(outline.model, outline.encoder, outline.tower)
    pixels.note(given["pixel_values"], given.get("image_sizes"))
    lanes = [Lane(tile, torch.zeros(tile.length, 1), 1, True) for tile in tiles_of(layouts)]
    left, rows = Lanes(lanes, outline.tower.packed, True), [torch.zeros(lane.tile.length, 1) for lane in lanes]
    nothing = torch.zeros(0, dtype=torch.bool)

    def shown(numbers: Sequence[int], name: str) -> list[Tensor]:
        return pixels.left(left, kind, name, numbers)

    for part in parts:
        at = Depth(0, None, {}, _no_block, pixels=shown)
        made = choose_inside(part, left.tokens, torch.zeros(0), {}, Prompt(lambda: nothing, nothing), at)
        outcomes = dict(zip(left.visible, made, strict=True))
        name = format_spec(part)
        rows = [lane.write(row, outcomes.get(lane), name) for lane, row in zip(lanes, rows, strict=True)]
    return [
        torch.cat([lane.tile.tokens[lane.left.index] for lane in mine if lane.left is not None]).sort().values
        for mine in left.pictures()
    ]


def _no_block(numbers: Sequence[int], wanted: set[str]) -> Any:
    raise RuntimeError("no block has run before the encoder")


@contextmanager
def dropping(view: Any, family: Family, parts: Sequence[Method], probe: Probe, told: Brought) -> Iterator[TowerStages]:
    """While this is open the encoder runs on what `parts` leave of the pictures that it is told of.

    All patches are in its output again, so that whoever splits it finds the pictures whole.
    """
    stages = TowerStages(view, family, parts, probe, lambda: True)
    stages.put_back = True
    stages.pixels = HostPixels(view, stages.tower, stages.row)
    stages.install()
    stages.expect(told)
    try:
        yield stages
    finally:
        stages.remove()
