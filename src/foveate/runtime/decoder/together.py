"""Evicts what a token drops from all layers at once, and in place.

While an answer grows, each head of each layer loses one entry a token. The new entry takes the slot of the one that
left, so that slots are no longer in order of age; `Held.order` says which slot each entry is in. Shapes: n layers, R
rows, Hkv KV heads, G query heads of each, L entries that a layer held before the token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from foveate.choosing.timeline import Held
from foveate.core import CacheBlock

Ask = Callable[[CacheBlock], tuple[Tensor, Tensor]]
"""A method's answer about a block of B rows whose entries are in order of age: (B, Hkv, K) entries that stay,
ascending, and their ages."""


@dataclass(eq=False)
class Waiting:
    """One layer that has attended to a new token, which what it holds does not count yet."""

    number: int
    layer: Any
    held: Held
    logits: Tensor  # (R, Hkv, G, L + 1) by slot, of the query heads that share a KV head
    scale: float  # of the logits


@dataclass(eq=False)
class Stack:
    """What all layers hold, each a view of it."""

    ages: Tensor  # (n, R, Hkv, L)
    scores: Tensor  # (n, R, Hkv, L)
    order: Tensor | None  # (n, R, Hkv, L)

    def spread(self, held: Sequence[Held]) -> None:
        """Give each layer its own."""
        orders = [None] * len(held) if self.order is None else self.order.unbind()
        for one, ages, scores, order in zip(held, self.ages.unbind(), self.scores.unbind(), orders, strict=True):
            one.ages, one.scores, one.order, one.stack = ages, scores, order, self

    @classmethod
    def of(cls, held: Sequence[Held]) -> Stack:
        """The one that layers have shared since the last token, or a new one."""
        found = held[0].stack
        if found is not None and all(one.stack is found for one in held):
            assert isinstance(found, cls)
            return found
        order = None
        if any(one.order is not None for one in held):
            plain = torch.arange(held[0].ages.shape[-1], device=held[0].ages.device).expand_as(held[0].ages)
            order = torch.stack([plain if one.order is None else one.order for one in held])
        scores = torch.stack([one.scores for one in held if one.scores is not None])
        return cls(torch.stack([one.ages for one in held]), scores, order)


def fits(layer: Any, held: Held) -> bool:
    """Whether a layer's slots can be told apart by `Held.order` alone."""
    return type(layer) is DynamicLayer and held.unpadded and held.scores is not None


def alike(waiting: Sequence[Waiting], layers: int) -> bool:
    """Whether all layers hold as much, each row as much as the others."""
    first = waiting[0]
    counts, prompts = first.held.counts, first.held.prompts
    return (
        len(waiting) == layers
        and len(set(counts)) == 1
        and len(set(prompts)) == 1
        and all(
            one.held.counts == counts
            and one.held.prompts == prompts
            and one.scale == first.scale
            and one.logits.shape == first.logits.shape
            for one in waiting
        )
    )


def received(logits: Tensor, scale: float) -> Tensor:
    """(..., G, L) products of a query of each head -> (..., L) attention, mean over heads that share a KV head."""
    weights = logits.float().mul(scale).softmax(dim=-1)
    return weights.mean(dim=-2) if weights.shape[-2] > 1 else weights.squeeze(-2)


def evict(waiting: Sequence[Waiting], age: int, ask: Ask) -> bool:
    """Count the new token in, and let one entry leave each head, or none where the budget has room.

    Args:
        age: of the token.

    Returns:
        Whether this was done; nothing was where more than one is to leave.
    """
    held = [one.held for one in waiting]
    before = Stack.of(held)
    entries = before.ages.shape[-1]
    ages = torch.nn.functional.pad(before.ages, (0, 1), value=age)
    scores = received(torch.stack([one.logits for one in waiting]), waiting[0].scale)
    order = None if before.order is None else torch.nn.functional.pad(before.order, (0, 1), value=entries)
    if order is not None:
        scores = scores.gather(-1, order)
    scores[..., :entries].add_(before.scores)
    block = CacheBlock(scores=scores.flatten(0, 1), age=ages.flatten(0, 1), prompt_length=held[0].prompts[0])
    stay, their_ages = ask(block)
    stay = stay.unflatten(0, ages.shape[:2])
    if stay.shape[-1] < entries:
        return False
    if stay.shape[-1] > entries:
        Stack(ages, scores, order).spread(held)
        valid = held[0].valid.new_ones(1, 1).expand(ages.shape[1], entries + 1)
        for one in held:
            one.valid, one.counts = valid, [entries + 1] * ages.shape[1]
        return True
    leaves = entries * (entries + 1) // 2 - stay.sum(dim=-1, keepdim=True)
    if order is None:
        order = torch.arange(entries + 1, device=ages.device).expand_as(ages)
    free = order.gather(-1, leaves)  # the slot, which the last one's entry is to take
    order = order.gather(-1, stay)
    order = torch.where(order == entries, free, order)
    Stack(their_ages.unflatten(0, ages.shape[:2]), scores.gather(-1, stay), order).spread(held)
    for layer, rows in zip(waiting, _rows(free, entries).unbind(), strict=True):
        _fill(layer.layer, layer.held, rows, entries)
    return True


def _rows(free: Tensor, entries: int) -> Tensor:
    """(n, R, Hkv, 1) slots -> (n, R * Hkv) rows of a layer's keys, of which each head has L + 1."""
    heads = free.shape[1] * free.shape[2]
    first = torch.arange(0, heads * (entries + 1), entries + 1, device=free.device)
    return free.flatten(1) + first


def _fill(layer: Any, held: Held, rows: Tensor, entries: int) -> None:
    """Move each head's last entry to `rows` (R * Hkv), where one has left; its own slot is room for the next."""
    room = []
    for name in ("keys", "values"):
        whole = getattr(layer, name)
        if not whole.is_contiguous():
            whole = whole.contiguous()
        whole.flatten(0, 2).index_copy_(0, rows, whole[:, :, entries].flatten(0, 1).clone())
        setattr(layer, name, whole[:, :, :entries])
        room.append((whole, getattr(layer, name)))
    held.room = room


def append(layer: Any, held: Held, keys: Tensor, values: Tensor) -> bool:
    """Put a token's keys and values (R, Hkv, 1, d) where there is room for them; whether there is."""
    if held.room is None:
        return False
    new = {"keys": keys, "values": values}
    for (name, value), (whole, seen) in zip(new.items(), held.room, strict=True):
        # Not where somebody has put other tensors in place, or where autograd may look.
        if getattr(layer, name) is not seen or value.shape[2] != 1 or value.requires_grad or value.dtype != whole.dtype:
            return False
        if whole.is_inference() and not torch.is_inference_mode_enabled():
            return False
    for (name, value), (whole, _) in zip(new.items(), held.room, strict=True):
        whole[:, :, -1:] = value
        setattr(layer, name, whole)
    return True


def in_order(layer: Any, held: Held, received: Tensor | None = None) -> Tensor | None:
    """Bring a layer's slots into order of age again, and `received` (R, Hkv, L + M), what M newer ones stand behind."""
    order, held.order, held.room, held.stack = held.order, None, None, None
    if order is None:
        return received
    entries, slots = order.shape[-1], layer.keys.shape[2]
    if slots > entries:
        newer = torch.arange(entries, slots, device=order.device)
        order = torch.cat([order, newer.expand(*order.shape[:2], -1)], dim=-1)
    index = order[..., None]
    layer.keys = layer.keys.gather(2, index.expand(-1, -1, -1, layer.keys.shape[-1]))
    layer.values = layer.values.gather(2, index.expand(-1, -1, -1, layer.values.shape[-1]))
    return received if received is None else received.gather(2, order)
