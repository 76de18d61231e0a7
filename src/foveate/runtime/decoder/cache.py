"""The Timeline that a pruned cache carries, and the caches that carry it.

Coordinates: the timeline counts the caller's prompt, padding included, and then every generated token. A pruned cache
holds fewer entries; `kept` says which place of the timeline each of them is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from foveate.choosing.timeline import Owner, Timeline
from foveate.core import FoveateError
from foveate.runtime.decoder import together


class _Timelined(Cache):
    """What both pruned caches share: they follow their timeline and refuse to work without their handle."""

    timeline: Timeline | None = None

    def _check_owner(self) -> None:
        if self.timeline is not None and not self.timeline.owner.active:
            raise FoveateError(
                "this cache was pruned by a handle that has been stopped: its entries no longer match the prompt. "
                "Use it inside `with foveate.prune(...)`, call handle.start() again, or reset() it"
            )

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **options: Any) -> Any:
        self._check_owner()
        if self.timeline is not None and self.timeline.evicting:
            layer: Any = self.layers[layer_idx] if layer_idx < len(self.layers) else None
            held = self.timeline.held.get(layer_idx)
            if held is not None and together.append(layer, layer_idx, held, key_states, value_states):
                return layer.keys, layer.values
        return super().update(key_states, value_states, layer_idx, *rest, **options)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        self._check_owner()
        if self.timeline is not None and self.timeline.evicting:
            return self.timeline.seen
        return super().get_seq_length(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        # Masks are made in layer-0 coordinates, whichever layer of a kind comes first.
        return super().get_query_offset(0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        self._check_owner()
        if self.timeline is not None and self.timeline.evicting:
            return self.timeline.seen + query_length, 0
        groups = self.timeline.groups if self.timeline is not None else []
        if not groups or layer_idx < groups[0].first or layer_idx >= len(self.layers):
            return super().get_mask_sizes(query_length, layer_idx)
        past = super().get_seq_length(0)
        layer: Any = self.layers[layer_idx]
        if getattr(layer, "is_compileable", False):
            return int(self.layers[0].get_mask_sizes(query_length)[0]), 0
        if not layer.is_sliding:
            return past + query_length, 0
        offset = max(past - layer.sliding_window + 1, 0)
        return past - offset + query_length, offset

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.timeline is not None:
            self.timeline.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.timeline is not None:
            self.timeline.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.timeline is not None:
            rows = torch.arange(self.timeline.kept.shape[0], device=self.timeline.kept.device)
            self.timeline.select_rows(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if self.timeline is not None and self.timeline.evicting and tokens_to_remove:
            raise FoveateError("entries have been evicted from this cache, so it cannot be cropped; reset() it instead")
        if self.timeline is not None and tokens_to_remove < 0:
            self._check_windows()
            self.timeline.crop(int(self.get_seq_length()) + tokens_to_remove)
        super().crop(tokens_to_remove)

    def _check_windows(self) -> None:
        for number, layer in enumerate(self.layers):
            window = getattr(layer, "sliding_window", None)
            if window and layer.get_seq_length() >= window and not getattr(layer, "record_past", False):
                raise FoveateError(
                    f"layer {number} slides and has forgotten all but {window - 1} entries, so that nothing stands "
                    "where a crop would end; reset() the cache instead"
                )

    def reset(self) -> None:
        super().reset()
        self.timeline = None


class TimelineCache(_Timelined, DynamicCache):
    """A dynamic cache whose prompt was pruned."""


class StaticTimelineCache(_Timelined, StaticCache):
    """A static cache whose prompt was pruned."""


_UPGRADES: dict[type[Cache], type[_Timelined]] = {DynamicCache: TimelineCache, StaticCache: StaticTimelineCache}


def timeline_of(cache: object) -> Timeline | None:
    """The timeline that a cache carries; None for one that was never pruned."""
    return getattr(cache, "timeline", None)


def check_usable(cache: object, owner: Owner) -> None:
    """Refuse a cache that pruning cannot work with, before any work is done.

    Raises:
        FoveateError: a filled cache of another prompt, one pruned by another handle, or a kind that cannot carry a
            timeline (quantized, offloaded, encoder-decoder).
    """
    if cache is None:
        return
    if isinstance(cache, _Timelined):
        cache._check_owner()
        if cache.timeline is not None:
            if cache.timeline.owner is not owner:
                raise FoveateError("this cache was pruned by another handle; give each handle a cache of its own")
            return
    name = type(cache).__name__
    if not isinstance(cache, _Timelined) and type(cache) not in _UPGRADES:
        raise FoveateError(f"{name} cannot hold a pruned prompt; use an empty DynamicCache or StaticCache, or none")
    if getattr(cache, "offloading", False):
        raise FoveateError(f"an offloaded {name} cannot hold a pruned prompt; use one without offloading, or none")
    assert isinstance(cache, Cache)
    if cache.get_seq_length() > 0:
        raise FoveateError(
            f"this {name} holds {cache.get_seq_length()} tokens of a prompt that was not pruned; "
            "start with an empty cache, or continue it outside the handle"
        )


def miscounted(cache: Any, length: int) -> str | None:
    """What a cache holds otherwise than its timeline says, in words; None where all is well.

    Args:
        length: entries that layer 0 was given so far.
    """
    timeline: Timeline = cache.timeline
    # Layers that attend to what another one holds keep none.
    numbers = [number for number, layer in enumerate(cache.layers) if hasattr(layer, "get_seq_length")]
    found = [_entries(cache.layers[number], evicted=number in timeline.held) for number in numbers]
    if any(isinstance(one, Tensor) for one in found):  # of a static cache: all with one wait for the device
        found = torch.stack([torch.as_tensor(one, device=timeline.kept.device) for one in found]).tolist()
    for number, counted in zip(numbers, found, strict=True):
        planned = timeline.holds(number, length)
        if counted != planned:
            return f"layer {number} of the cache holds {counted} entries where {planned} were planned"
        if timeline.evicting and number not in timeline.held:
            return f"layer {number} of the cache holds {counted} entries, and none of them was seen by the method"
    return None


def _entries(layer: Any, evicted: bool) -> Any:
    """Entries that a layer was given, or of those that are left where some were evicted."""
    return layer.keys.shape[2] if evicted else layer.get_seq_length()


def attach(cache: Cache, timeline: Timeline) -> None:
    """Make an empty stock cache carry `timeline`, in place, so that the caller's own variable is the pruned cache."""
    if not isinstance(cache, _Timelined):
        if timeline.evicting and isinstance(cache, StaticCache) and not any(timeline.pictured):
            timeline.evicting = False  # nothing leaves before a picture comes
        if timeline.evicting and isinstance(cache, StaticCache):
            raise FoveateError("a static cache cannot shrink, so nothing can be evicted from it; use a dynamic cache")
        cache.__class__ = _UPGRADES[type(cache)]  # same layout: the subclass adds behaviour, no storage
    assert isinstance(cache, _Timelined)
    cache.timeline = timeline
