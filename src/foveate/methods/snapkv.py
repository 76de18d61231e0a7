"""SnapKV: compress the prompt's KV cache to what its last tokens look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from foveate.core import CacheSelection, FoveateError, Grid, Keep, Method, Signals, Site, check_keep
from foveate.ops.scores import window_attention
from foveate.ops.subsets import heavy_and_recent


@dataclass(frozen=True)
class SnapKV(Method):
    """SnapKV: keeps the prompt's cache entries that its last tokens look at, with their neighbours, and those tokens.

    Every layer and KV head decides for itself, once, after the prompt has run on all its entries. The attention of
    the last `window` tokens to each earlier entry is summed over them, averaged over the query heads of the KV head
    (the authors' code repeats the keys and decides per query head, which shrinks no shared cache) and over `kernel`
    neighbouring entries; the highest stay together with the window.

    Args:
        capacity: entries that stay of the prompt, window included, or a share of the prompt's, rounded down, at least
            1. A shorter prompt is left alone. The authors' code keeps 2048.
        window: last prompt tokens, which look and stay. A share of a short prompt that does not hold the window
            gives it half.
        kernel: odd number of neighbouring entries whose scores are averaged; 1 for none.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2404.14469"
    site: ClassVar[Site] = "cache"
    needs = ("cache.keys", "cache.window_queries", "cache.age")
    when: ClassVar[Literal["prefill", "decode"]] = "prefill"
    """"prefill": asked once, after the prompt has run; "decode": asked then and after every generated token."""

    capacity: Keep = 0.25
    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        check_keep(self.capacity, "capacity")
        for name in ("window", "kernel"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise FoveateError(f"{name}={value!r} is no whole number from 1")
        if self.kernel % 2 == 0:
            raise FoveateError(
                f"kernel={self.kernel} is even; the nearest odd ones are {self.kernel - 1} and {self.kernel + 1}"
            )
        if isinstance(self.capacity, int) and self.capacity <= self.window:
            raise FoveateError(
                f"capacity={self.capacity} does not hold window={self.window} and anything else; the least is "
                f"capacity={self.window + 1}"
            )

    def budget(self, prompt_length: int) -> tuple[int, int]:
        """Entries chosen by score and newest entries of one row, whose prompt left `prompt_length` of them."""
        if isinstance(self.capacity, int):
            return self.capacity - self.window, self.window
        capacity = max(1, int(prompt_length * self.capacity))
        window = self.window if self.window < capacity else max(1, capacity // 2)
        return capacity - window, window

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        """Empty: no token leaves before the cache, whose budget is `budget`."""
        return ()

    def select(self, signals: Signals) -> CacheSelection:
        """What stays of one layer's cache. Entries stand in order of age, none of them is padding."""
        cache = signals.cache
        assert cache is not None and cache.keys is not None and cache.window_queries is not None
        assert cache.age is not None and cache.prompt_length is not None
        chosen, window = self.budget(cache.prompt_length)
        if cache.age.shape[-1] <= chosen + window:
            return CacheSelection(cache.age)
        scores = window_attention(cache.window_queries[:, :, -window:], cache.keys, self.kernel)
        slots = heavy_and_recent(scores, cache.age.shape[-1], chosen)
        return CacheSelection(cache.age.gather(-1, slots), slots)
