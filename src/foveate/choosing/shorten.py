"""Shortens a prompt before the decoder: which columns of it stay, and every aligned tensor gathered with one index.

Shapes: B rows, S columns of the caller's prompt, S' of the shortened one, N tokens of an image before and K after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from foveate.choosing.images import Apart, Image
from foveate.choosing.widen import speakers
from foveate.core import FoveateError, Grid
from foveate.families.layouts import Layout
from foveate.ops.device import on_device

Side = Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class Plan:
    """Which column of the caller's prompt each shortened column is; made on the host, and carried to a device."""

    index: Tensor  # (B, S') columns; 0 in re-padding
    filled: Tensor  # (B, S') bool, False in re-padding
    valid: Tensor  # (B, S') bool, False in re-padding and in the caller's own padding
    columns: int  # S
    untouched: bool = False  # nothing has left or changed places
    made: Plan | None = None  # the same on the host; None where this is that one

    @property
    def host(self) -> Plan:
        """The same on the host."""
        return self if self.made is None else self.made

    def on(self, device: torch.device) -> Plan:
        """The same on a device."""
        index, filled, valid = (on_device(part, device) for part in (self.index, self.filled, self.valid))
        return Plan(index, filled, valid, self.columns, self.untouched, self.host)

    def gather(self, values: Tensor, fill: int) -> Tensor:
        """(..., B, S) -> (..., B, S'); `fill` where there is no column."""
        index = self.index.expand(*values.shape[:-1], -1)
        return values.gather(-1, index).masked_fill(~self.filled, fill)

    def repeat(self, times: int) -> Plan:
        """Each row several times in a row, as beams and samples want it."""
        if times == 1:
            return self
        index, filled, valid = (part.repeat_interleave(times, dim=0) for part in (self.index, self.filled, self.valid))
        made = None if self.made is None else self.made.repeat(times)
        return Plan(index, filled, valid, self.columns, self.untouched, made)

    @property
    def speaking(self) -> Tensor | None:
        """(B, S) who speaks in each of the caller's columns; None where each speaks for itself."""
        return None if self.untouched else speakers(self.index, self.filled, self.columns)

    @property
    def unheard(self) -> Tensor:
        """(B, S) bool, columns that nobody predicts: those of tokens that left, and the first one behind padding."""
        if self.untouched:
            return torch.zeros_like(self.valid)
        gone = self.valid.new_ones(self.index.shape[0], self.columns + 1)
        gone = gone.scatter(1, self.index.where(self.filled, self.columns), False)[:, :-1]
        silent = speakers(self.index, self.filled, self.columns) < 0
        return gone | nn.functional.pad(silent, (1, -1), value=False)

    @property
    def original(self) -> Tensor:
        """(B, S') columns, -1 in padding."""
        return self.index.masked_fill(~self.valid, -1)


def find_images(
    ids: Tensor, token: int, features: Sequence[Tensor], grid: Grid | None, counts: Sequence[int] | None = None
) -> list[Image]:
    """Match encoded images, in order, with their placeholders in a (B, S) batch of prompts.

    Args:
        ids: on the host, so that nothing waits for a device.
        features: one (N, D) tensor per image, in the order of the prompts.
        counts: N of each image where tokens have left inside the encoder; None where each has as many as features.
        grid: raster shape of an image's tokens; dropped for images that have another number of tokens.

    Raises:
        FoveateError: placeholders and features differ in number, or an image spans two rows.
    """
    counts = [one.shape[0] for one in features] if counts is None else counts
    images = []
    for one, (row, columns) in zip(features, _columns(ids, token, counts), strict=True):
        fits = grid is not None and grid[0] * grid[1] == columns.numel()
        images.append(Image.placed(row, columns, one, grid if fits else None))
    return images


def place_images(ids: Tensor, token: int, features: Tensor, layouts: Sequence[Layout]) -> list[Image]:
    """Pictures of any layout at their placeholders.

    Args:
        ids: on the host, so that nothing waits for a device.
        features: (M of all pictures, D), in the order of the prompts.

    Raises:
        FoveateError: as `find_images`.
    """
    counts = [layout.placeholders for layout in layouts]
    if features.shape[0] != sum(counts):
        raise FoveateError(
            f"the prompt has {sum(counts)} visual placeholders but its pictures give {features.shape[0]} tokens; pass "
            "what the processor made"
        )
    images: list[Image] = []
    start = 0
    for layout, (row, columns) in zip(layouts, _columns(ids, token, counts), strict=True):
        rows = features[start : start + layout.placeholders]
        start += layout.placeholders
        apart = None
        if layout.visual.numel() < layout.placeholders:
            visual = layout.visual.cpu()
            other = torch.ones_like(columns, dtype=torch.bool).index_fill(0, visual, False).nonzero().squeeze(-1)
            apart = Apart(columns[other], rows[on_device(other, rows.device)])
            columns, rows = columns[visual], rows[on_device(visual, rows.device)]
        image = Image.placed(row, columns, rows, layout.grid, tile=layout.tile, patches=layout.lengths, apart=apart)
        images.append(image)
    return images


def _columns(ids: Tensor, token: int, counts: Sequence[int]) -> list[tuple[int, Tensor]]:
    """Row and columns (M,) of each image's placeholders."""
    places = (ids == token).cpu().nonzero()  # (placeholders, 2), row by row
    tokens = sum(counts)
    if places.shape[0] != tokens:
        raise FoveateError(
            f"the prompt has {places.shape[0]} visual placeholders but its {len(counts)} images give {tokens} "
            "tokens; pass each image once and let the processor write the placeholders"
        )
    found, start = [], 0
    for number, count in enumerate(counts):
        mine = places[start : start + count]
        start += count
        if count == 0:
            raise FoveateError(f"image {number} has no tokens; every image needs at least 1")
        row = int(mine[0, 0])
        if int(mine[-1, 0]) != row:
            raise FoveateError(f"image {number} begins in row {row} and ends in row {int(mine[-1, 0])} of the prompts")
        found.append((row, mine[:, 1]))
    return found


def plan(mask: Tensor, images: Sequence[Image], side: Side) -> Plan:
    """Which columns stay: all text, and of each image what its stages left, in their order.

    Rows that end up shorter than the longest are padded anew on `side`; where no image lost or re-ordered a token the
    prompt stays as it is, padding included.

    Args:
        mask: (B, S) bool, False in padding; on the host.
    """
    batch, length = mask.shape
    columns = torch.arange(length)
    if all(_untouched(image) for image in images):
        return Plan(columns.expand(batch, -1), torch.ones_like(mask), mask, length, untouched=True)
    rows = [_row(columns, mask[number], [i for i in images if i.row == number]) for number in range(batch)]
    longest = max(row.numel() for row in rows)
    index = torch.zeros(batch, longest, dtype=torch.int64)
    filled = torch.zeros(batch, longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        where = slice(longest - row.numel(), None) if side == "left" else slice(0, row.numel())
        index[number, where] = row
        filled[number, where] = True
    return Plan(index, filled, filled, length)


def _untouched(image: Image) -> bool:
    index = image.index
    return index.numel() == image.original and bool((index[1:] > index[:-1]).all())


def _row(columns: Tensor, valid: Tensor, images: Sequence[Image]) -> Tensor:
    stays = valid.clone()
    for image in images:
        stays[image.columns] = False
        stays[image.columns[image.index]] = True
    row = columns[stays]
    for image in images:
        wanted = image.columns[image.index]
        if bool((wanted[1:] < wanted[:-1]).any()):  # a method that wants another order than the picture's
            row[torch.searchsorted(row, wanted.sort().values)] = wanted
    return row


def padding_side(mask: Tensor) -> Side:
    """The side on which a caller who makes no other promise has padded: right where a row ends in padding."""
    return "right" if bool((~mask[:, -1]).any()) else "left"
