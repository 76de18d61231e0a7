"""The new tokens of one call: ids, mask and positions, counted behind what a pruned cache knows of earlier ones.

Shapes: B rows, S columns of the caller's new tokens, E entries that a cache already holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.choosing.timeline import Timeline
from foveate.core import FoveateError
from foveate.families.family import Family
from foveate.ops.device import on_host
from foveate.runtime.decoder.cache import timeline_of
from foveate.runtime.placeholders import Placeholders


@dataclass(frozen=True, eq=False)
class Told:
    """What of a call's arguments has been read already: each read waits for the device.

    Attributes:
        sizes: of the pictures, as the call states them, on the host.
    """

    sizes: dict[str, Tensor] = field(default_factory=dict)
    _read: tuple[tuple[Tensor, Tensor], ...] = ()  # arguments, and the same on the host

    def on_host(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Tensors on the host, those that are none of these arguments read together."""
        known = [next((host for given, host in self._read if given is value), None) for value in values]
        read = iter(on_host([value for value, host in zip(values, known, strict=True) if host is None]))
        return [next(read) if host is None else host for host in known]


@dataclass(frozen=True, eq=False)
class Incoming:
    """The caller's new tokens and what the cache knows of earlier ones."""

    ids: Tensor  # (B, S)
    mask: Tensor  # (B, S) bool
    host_ids: Tensor  # the same on the host, where the prompt is planned
    host_mask: Tensor
    past: list[int]  # of each row, the tokens in the cache that are no padding
    positions: Tensor  # (..., B, S)
    past_mask: Tensor | None  # (B, E) bool: the caller's mask on what the cache holds
    timeline: Timeline | None
    entries: int  # E

    @property
    def reached(self) -> int:
        """Places of the timeline that the cache covers."""
        return self.timeline.reached(self.entries) if self.timeline is not None else 0

    @property
    def next_position(self) -> Tensor:
        """(B,) position of the token after the prompt: one past the largest on any axis."""
        largest = self.positions.masked_fill(~self.mask, -1).amax(dim=-1)
        return largest.reshape(-1, self.ids.shape[0]).amax(dim=0) + 1

    @property
    def following(self) -> Tensor:
        """(..., B) where generate() goes on: behind the prompt's last token, on each axis by itself."""
        last = torch.arange(self.ids.shape[1], device=self.ids.device).where(self.mask, 0).amax(dim=1)
        behind: Tensor = self.positions.gather(-1, last[:, None].expand(*self.positions.shape[:-1], 1))
        return behind.squeeze(-1) + 1


class Reader:
    """Reads the new tokens of one model's calls."""

    def __init__(self, model: Any, family: Family, placeholders: Placeholders) -> None:
        self._model, self._family, self._placeholders = model, family, placeholders

    def __call__(
        self, ids: Tensor, options: dict[str, Any], cache: Any, contains_past: bool, given: dict[str, Any], told: Told
    ) -> Incoming:
        """What a call brings, and what the cache that it follows knows of earlier tokens.

        Args:
            ids: (B, S), or (B, reached + S) when `contains_past`.
            options: mask and positions, where they are stated.
            given: what the caller gave, sizes of the pictures among it.
            told: what of it has been read.

        Raises:
            FoveateError: nothing new comes, or mask or cache have another shape than the prompt.
        """
        timeline = timeline_of(cache)
        entries = int(cache.get_seq_length()) if timeline is not None else 0
        reached = timeline.reached(entries) if timeline is not None else 0
        new = ids[:, reached:] if contains_past else ids
        if new.shape[1] == 0:
            raise FoveateError(f"the cache holds {reached} tokens already and the prompt brings no new one")
        whole = reached + new.shape[1]
        stated_mask = options.get("attention_mask")
        mask = ids.new_ones(ids.shape[0], whole) if stated_mask is None else stated_mask
        if mask.ndim != 2 or mask.shape[1] != whole:
            raise FoveateError(
                f"attention_mask has shape {tuple(mask.shape)}; a mask of (rows, {whole}) is needed: one column for "
                "each token of the unpruned sequence"
            )
        mask = mask.to(ids.device).bool()
        past_mask = None
        if timeline is not None:
            if timeline.kept.shape[0] != ids.shape[0]:
                raise FoveateError(f"the cache holds {timeline.kept.shape[0]} rows, the prompt has {ids.shape[0]}")
            past_mask = mask.gather(1, timeline.places(entries)) & timeline.valid_places(entries)
        mask = mask[:, reached:]
        counts = [] if past_mask is None else [past_mask.sum(dim=1)]
        host_ids, *read = told.on_host([ids, *counts, *(() if stated_mask is None else (stated_mask,))])
        host_ids = host_ids[:, -new.shape[1] :]
        host_mask = torch.ones_like(host_ids) if stated_mask is None else read[-1][:, reached:]
        past = read[0].tolist() if counts else [0] * ids.shape[0]
        stated, pictures = options.get("position_ids"), bool(self._placeholders.are(host_ids).any())
        axes = self._axes(stated, new, mask, timeline, entries, given, pictures)
        positions = self._positions(stated, new, timeline, entries) if axes is None else axes
        return Incoming(new, mask, host_ids, host_mask.bool(), past, positions, past_mask, timeline, entries)

    def _axes(
        self,
        stated: Tensor | None,
        new: Tensor,
        mask: Tensor,
        timeline: Timeline | None,
        entries: int,
        given: dict[str, Any],
        pictures: bool,
    ) -> Tensor | None:
        """(3, B, S) positions of a family that counts on several axes; None for others.

        A row in front of them that counts text, as generate() writes it, is left out: only masks were made of it, and
        its gaps would be read as packed sequences.
        """
        if self._family.positions is None:
            return None
        batch, length = new.shape
        if timeline is None and stated is not None and stated.ndim == 3:
            return stated[-3:, :, -length:].expand(3, batch, -1).to(new.device)
        start = new.new_zeros(batch) if timeline is None else timeline.positions(entries, 1)[:, 0]
        if pictures:
            return self._family.positions(self._model, new, mask, given, start)
        along = mask.long().cumsum(dim=1) - 1 if timeline is None else torch.arange(length, device=new.device)
        return (start[:, None] + along).clamp(min=0).expand(3, batch, -1)

    def _positions(self, given: Tensor | None, new: Tensor, timeline: Timeline | None, entries: int) -> Tensor:
        batch, length = new.shape
        reached = timeline.reached(entries) if timeline is not None else 0
        # With a cache but no mask generate() counts from 0 again, though its caller means a continuation.
        if given is not None and given.shape[-1] == reached + length:
            return given[..., -length:].expand(*given.shape[:-2], batch, -1).to(new.device)
        if timeline is not None:
            return timeline.positions(entries, length)
        return torch.arange(length, device=new.device).expand(batch, -1)
