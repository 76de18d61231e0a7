"""How an encoder's hidden states hold its tiles, and what its blocks must be given to run on what is left of them.

Shapes: T tiles, P patches of all of them, L of one that are left, E encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.choosing.lanes import Lane
from foveate.core import FoveateError
from foveate.ops.device import on_device


@dataclass(eq=False)
class Batched:
    """A row for each tile: (T, lead + L, E), padded to the longest.

    Attributes:
        mask: keeps attention off padding and weighs tokens; None where every row is full and nothing is weighed.
    """

    mask: Tensor | None = None
    _stated: Tensor | None = None  # the caller's mask, once it is known to hide nothing

    def split(self, hidden: Tensor, lanes: Sequence[Lane], lead: int) -> list[Tensor]:
        """(L, E) of each tile."""
        return [row[lead : lead + lane.present.numel()] for row, lane in zip(hidden, lanes, strict=True)]

    def join(self, hidden: Tensor, rows: Sequence[Tensor], lead: int) -> Tensor:
        """The hidden states with these rows in place of those that they had."""
        longest = max(row.shape[0] for row in rows)
        left = hidden.new_zeros(len(rows), longest, hidden.shape[-1])
        for place, row in enumerate(rows):
            left[place, : row.shape[0]] = row
        return torch.cat([hidden[:, :lead], left], dim=1)

    def settle(self, lanes: Sequence[Lane], lead: int, kind: str, weighed: bool, like: Tensor) -> None:
        """Make the mask that attention of this `kind` takes.

        Args:
            weighed: a token counts by its patches.
            like: of the stream's device and dtype.
        """
        counts = [lane.present.numel() for lane in lanes]
        longest, device, dtype = max(counts), like.device, like.dtype
        sizes = [lane.sizes() for lane in lanes] if weighed else []
        weighed = any(size is not None for size in sizes)
        self.mask = None
        if min(counts) == longest and not weighed:
            return
        places = torch.arange(longest + lead, device=device)
        open_ = places < on_device(torch.tensor(counts), device)[:, None] + lead
        if "flash" in kind:
            self.mask = open_
            return
        if kind == "sdpa" and not weighed:
            self.mask = open_[:, None, None, :]
            return
        bias = torch.zeros(open_.shape, device=device)
        for row, size in enumerate(sizes):
            if size is not None:
                bias[row, lead : lead + size.numel()] = size.log()
        self.mask = bias.to(dtype).masked_fill(~open_, torch.finfo(dtype).min)[:, None, None, :]

    def options(self, given: dict[str, Any], lanes: Sequence[Lane]) -> dict[str, Any]:
        """What a block is given beside the hidden states.

        Raises:
            FoveateError: the caller's mask hides patches.
        """
        stated = given.get("attention_mask")
        if stated is None or stated is self._stated:
            return {**given, "attention_mask": self.mask}
        if bool((~stated if stated.dtype == torch.bool else stated < 0).any()):
            raise FoveateError(
                "a mask hides patches of the pictures from the encoder, so that none can leave inside it; pass whole "
                "pictures, or use a method that acts behind the encoder"
            )
        self._stated = stated  # every block is given the same, and looking at it waits for the device
        return {**given, "attention_mask": self.mask}


@dataclass(eq=False)
class Packed:
    """All tiles behind each other, each attending to itself: (P, E) or (1, P, E), and no token but patches.

    Attributes:
        bias: (P,) what is added to the logits of each key; None where nothing is weighed.
    """

    bias: Tensor | None = None
    _left: Tensor | None = None  # numbers of the patches that are left
    _patches: int = 0  # P
    _made: dict[tuple[str, int], tuple[Any, Any]] = field(default_factory=dict)  # blocks take turns with some

    def split(self, hidden: Tensor, lanes: Sequence[Lane], lead: int) -> list[Tensor]:
        """(L, E) of each tile."""
        return list(hidden.flatten(0, -2).split([lane.present.numel() for lane in lanes]))

    def join(self, hidden: Tensor, rows: Sequence[Tensor], lead: int) -> Tensor:
        """The hidden states with these rows in place of those that they had."""
        joined = torch.cat(list(rows))
        return joined if hidden.ndim == 2 else joined[None]

    def settle(self, lanes: Sequence[Lane], lead: int, kind: str, weighed: bool, like: Tensor) -> None:
        """Note which patches are left, and what weighs them."""
        firsts = [0]
        for lane in lanes:
            firsts.append(firsts[-1] + lane.tile.length)
        self._patches = firsts[-1]
        present = [on_device(lane.present, like.device) for lane in lanes]
        self._left = torch.cat([mine + first for mine, first in zip(present, firsts, strict=False)])
        self._made.clear()
        sizes = [lane.sizes() for lane in lanes] if weighed else []
        self.bias = None
        if any(size is not None for size in sizes):
            ones = [torch.ones(lane.present.numel(), device=like.device) for lane in lanes]
            each = [one if size is None else size for one, size in zip(ones, sizes, strict=True)]
            self.bias = torch.cat(each).log().to(like.dtype)

    def options(self, given: dict[str, Any], lanes: Sequence[Lane]) -> dict[str, Any]:
        """What a block is given beside the hidden states: positions, bounds and masks of the patches that are left."""
        if self._left is None:
            return given
        return {name: self._of_left(name, value, lanes) for name, value in given.items()}

    def _of_left(self, name: str, value: Any, lanes: Sequence[Lane]) -> Any:
        """An argument for the patches that are left; made once for the blocks that share it."""
        key = name, id(value)
        if key not in self._made:
            self._made[key] = (value, self._made_for(name, value, lanes))  # held, so that nothing else takes its number
        return self._made[key][1]

    def _made_for(self, name: str, value: Any, lanes: Sequence[Lane]) -> Any:
        left = self._left
        assert left is not None
        if name == "position_embeddings":
            return tuple(one[left.to(one.device)] for one in value)
        if name in {"cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k"}:
            if value.numel() == len(lanes) + 1:  # a run is a tile, since no run has parts of two
                counts = torch.tensor([0, *(lane.present.numel() for lane in lanes)], dtype=value.dtype)
                return on_device(counts.cumsum(0, dtype=value.dtype), value.device)
            return _bounds(value, left, self._patches)
        if name == "attention_mask" and value is not None:
            return value[:, :, left][:, :, :, left]
        return value


def _bounds(bounds: Tensor, left: Tensor, patches: int) -> Tensor:
    """Where each run of `patches` begins and ends among those that are left; runs of which none is left are gone."""
    there = torch.zeros(patches + 1, dtype=torch.int64, device=left.device)
    before = there.index_fill(0, left + 1, 1).cumsum(0)
    return before[bounds.long()].unique_consecutive().to(bounds.dtype)
