"""H2O: evict from the KV cache what has been looked at least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from foveate.core import CacheSelection, Grid, Keep, Method, Signals, Site, check_keep
from foveate.ops.subsets import heavy_and_recent


@dataclass(frozen=True)
class H2O(Method):
    """H2O: keeps the cache entries that received most attention so far, and the most recent ones.

    Every layer and KV head decides for itself, on text and visual entries alike. An entry's score is the sum of the
    attention that it received from every query since it entered the cache, averaged over the query heads of its KV
    head. Whenever a layer holds more than heavy + recent entries, the newest `recent` stay, and of the older ones the
    `heavy` highest. Attention is computed before the eviction, so that the prompt's own output is exact.

    Args:
        heavy: entries chosen by score, or a share of the prompt's entries, rounded down, at least 1.
        recent: newest entries, likewise. Two shares that add up to 1 hold the whole prompt: `heavy` gets the rest.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2306.14048"
    site: ClassVar[Site] = "cache"
    needs = ("cache.scores", "cache.age")
    when: ClassVar[Literal["prefill", "decode"]] = "decode"
    """"prefill": asked once, after the prompt has run; "decode": asked then and after every generated token."""

    heavy: Keep = 0.1
    recent: Keep = 0.1

    def __post_init__(self) -> None:
        check_keep(self.heavy, "heavy")
        check_keep(self.recent, "recent")

    def budget(self, prompt_length: int) -> tuple[int, int]:
        """Entries chosen by score and newest entries of one row, whose prompt left `prompt_length` of them."""
        recent = self.recent if isinstance(self.recent, int) else max(1, int(prompt_length * self.recent))
        if isinstance(self.heavy, int):
            return self.heavy, recent
        if isinstance(self.recent, float) and abs(self.heavy + self.recent - 1.0) < 1e-9:
            return max(1, prompt_length - recent), recent
        return max(1, int(prompt_length * self.heavy)), recent

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        """Empty: no token leaves before the cache, whose budget is `budget`."""
        return ()

    def select(self, signals: Signals) -> CacheSelection:
        """What stays of one layer's cache. Entries stand in order of age, none of them is padding."""
        cache = signals.cache
        assert cache is not None and cache.scores is not None and cache.age is not None
        assert cache.prompt_length is not None
        heavy, recent = self.budget(cache.prompt_length)
        held = cache.age.shape[-1]
        if held <= heavy + recent:
            return CacheSelection(cache.age)
        slots = heavy_and_recent(cache.scores[..., : held - recent], held, heavy)
        return CacheSelection(cache.age.gather(-1, slots), slots)
