"""Watches decoder blocks: attention from named queries to the visual tokens, keys, hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.runtime.attention import Observed, _register
from foveate.runtime.seams import CACHE


@dataclass(frozen=True, eq=False)
class QueriesAndKeys:
    """Queries and keys of one decoder block's prefill. R rows, H heads, Hkv of keys, L queries, C keys, d width."""

    queries: Tensor  # (R, H, L, d) after rotary embedding
    keys: Tensor  # (R, Hkv, C, d), cached ones first
    mask: Tensor | None  # (R or 1, 1, L, C) bool or additive, (R, C), or None for causal
    scale: float
    past: int  # C - L
    softcap: float | None = None

    def signals(self, needs: set[str], rows: Tensor, visual: Tensor, words: Tensor, last: Tensor) -> dict[str, Tensor]:
        """The signals of B images.

        Args:
            rows: (B,) row of each image.
            visual: (B, N) places of its tokens among the L queries.
            words: (B, T) places of its row's text.
            last: (B,) place of its row's last token.
        """
        found: dict[str, Tensor] = {}
        if "last_query" in needs:
            found["last_query"] = self._attention(rows, last[:, None], visual)[:, :, 0]
        if "text_query" in needs:
            found["text_query"] = self._attention(rows, words, visual)
        for name, places in (("keys", visual), ("text_keys", words)):
            if name in needs:
                keys = self.keys[rows]
                index = (places + self.past)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[-1])
                found[name] = keys.gather(2, index)
        return found

    @torch.no_grad()
    def _attention(self, rows: Tensor, asking: Tensor, visual: Tensor) -> Tensor:
        """(B, H, Q, N) probabilities of Q queries per image on its visual tokens; keys are not repeated for groups."""
        queries, keys = self.queries[rows], self.keys[rows]
        index = asking[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[-1])
        queries = queries.gather(2, index).unflatten(1, (keys.shape[1], -1))  # (B, Hkv, G, Q, d)
        logits = torch.einsum("bkgqd,bkcd->bkgqc", queries * self.scale, keys).flatten(1, 2).float()
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = self._masked(logits, rows, asking)
        columns = (visual + self.past)[:, None, None, :].expand(*logits.shape[:3], -1)
        return logits.softmax(dim=-1).gather(3, columns)

    def _masked(self, logits: Tensor, rows: Tensor, asking: Tensor) -> Tensor:
        columns = torch.arange(logits.shape[-1], device=logits.device)
        if self.mask is not None and self.mask.ndim == 4:
            mask = self.mask.expand(self.keys.shape[0], *self.mask.shape[1:])[rows, 0]  # (B, L, C)
            mask = mask.gather(1, asking[..., None].expand(-1, -1, mask.shape[-1]))[:, None]
            return logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
        future = columns[None, None, :] > (asking + self.past)[..., None]
        logits = logits.masked_fill(future[:, None], -torch.inf)
        if self.mask is not None:
            logits = logits.masked_fill(~self.mask[rows].bool()[:, None, None, :], -torch.inf)
        return logits


class _DecoderWatch(Observed):
    """One decoder block's attention under observation; keeps queries and keys only while it is open.

    A mask may be None (plain causal), (R or 1, 1, L, C) or, for flash attention, (R, C).
    """

    def __init__(self, attention: Any) -> None:
        super().__init__(attention)
        self.open, self.stub = False, False
        self.past = 0  # entries of earlier prompts among the keys
        self.listener: Callable[..., None] | None = None
        self.seen: QueriesAndKeys | None = None

    def remove(self) -> None:
        """Stop; the block is as it was."""
        super().remove()
        self.seen = None

    def attend(self, queries: Tensor, *rest: Any, **options: Any) -> Any:
        """The attention that the model would have run; nothing while only queries and keys are wanted."""
        if self.stub:
            return queries.transpose(1, 2), None
        return super().attend(queries, *rest, **options)

    def read_attention(
        self, queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
    ) -> None:
        """Tell the listener, and keep queries and keys while a stage waits for them."""
        if self.listener is not None and not self.stub:
            self.listener(queries, keys, mask, scale, softcap)
        if self.open:
            length = self.past + queries.shape[2]  # a static cache hands over its empty slots as well
            mask = mask if mask is None else mask[..., :length]
            self.seen = QueriesAndKeys(queries, keys[:, :, :length], mask, scale, self.past, softcap)


class DecoderProbe:
    """Observes single decoder blocks during a prefill, and asks a block ahead for its queries and keys."""

    def __init__(self, layers: Any, stages: Iterable[Any], everywhere: bool = False) -> None:
        self._layers = layers
        self._behind: set[int] = set()
        ahead: set[int] = set()
        for stage in stages:
            needs = {need.partition(".")[2] for need in stage.part.needs if need.startswith("decoder.")}
            if needs & {"last_query", "text_query", "keys", "text_keys"}:
                self._behind.add(stage.depth - 1)
            if "next_query" in needs:
                ahead.add(stage.depth)
        watched = set(range(len(layers))) if everywhere else self._behind | ahead
        self._watches = {number: _DecoderWatch(layers[number].self_attn) for number in sorted(watched)}

    def install(self) -> None:
        """Start observing."""
        if self._watches:
            _register()
        for watch in self._watches.values():
            watch.install()

    def remove(self) -> None:
        """Stop observing; the decoder is as it was."""
        for watch in self._watches.values():
            watch.remove()

    @property
    def observers(self) -> list[_DecoderWatch]:
        """Whatever holds something of the prefill in progress."""
        return list(self._watches.values())

    def open(self, cached: Callable[[int], int]) -> None:
        """A prefill begins: the blocks behind the stages keep what they compute until they are closed.

        Args:
            cached: entries of earlier prompts that a layer holds.
        """
        for number, watch in self._watches.items():
            watch.open, watch.past = number in self._behind, cached(number)

    def close(self, number: int | None = None) -> None:
        """A stage has begun (or the prefill has ended): nothing more is kept of its block."""
        for one, watch in self._watches.items():
            if number is None or one == number:
                watch.open = False
            if number is None:
                watch.seen = None

    def on_attention(self, number: int, listener: Callable[..., None]) -> None:
        """Call `listener(number, queries, keys, mask, scale, softcap)` whenever this block attends."""
        self._watches[number].listener = partial(listener, number)

    def seen(self, number: int) -> QueriesAndKeys | None:
        """Queries and keys of a block, if it is observed."""
        watch = self._watches.get(number)
        return watch.seen if watch is not None else None

    @torch.no_grad()
    def look_ahead(self, number: int, hidden: Tensor, options: dict[str, Any]) -> QueriesAndKeys:
        """Queries and keys that block `number` would compute of (R, L, D) hidden states, by its own norm and weights.

        The block's attention runs without cache and without attending; keys of an earlier prompt come from the cache.
        """
        layer, watch = self._layers[number], self._watches[number]
        cache: Any = options.get(CACHE)
        options = {name: value for name, value in options.items() if name not in {CACHE, "use_cache"}}
        mask, was_open, past = options.pop("attention_mask", None), watch.open, watch.past
        watch.open, watch.stub, watch.past = True, True, 0
        try:
            layer.self_attn(layer.input_layernorm(hidden), attention_mask=None, **options)
        finally:
            watch.open, watch.stub, watch.past = was_open, False, past
        new = watch.seen
        assert new is not None
        watch.seen = None
        keys = torch.cat([cache.layers[number].keys[:, :, :past], new.keys], dim=2) if past else new.keys
        mask = mask if mask is None else mask[..., : keys.shape[2]]
        return QueriesAndKeys(new.queries, keys, mask, new.scale, past, new.softcap)
