"""Evicts what a token drops from all layers at once, and in place.

While an answer grows, each head of each layer loses one entry a token. The new entry takes the slot of the one that
left, so that slots are no longer in order of age; `Held.order` says which slot each entry is in. Shapes: n layers, R
rows, Hkv KV heads, G query heads of each, L entries that a layer held before the token, d width.
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
from foveate.ops.scores import grouped_logits

Ask = Callable[[CacheBlock], tuple[Tensor, Tensor]]
"""A method's answer about a block of B rows whose entries are in order of age: (B, Hkv, K) entries that stay,
ascending, and their ages."""


@dataclass(eq=False)
class Asked:
    """The queries of one token, and the keys that they were answered by."""

    queries: Tensor  # (R, Hkv * G, 1, d)
    keys: Tensor  # (R, Hkv, L + 1, d) by slot
    scale: float  # of their products

    def received(self) -> Tensor:
        """(R, Hkv, L + 1) attention, mean over heads that share a KV head."""
        return _received(grouped_logits(self.queries, self.keys).squeeze(3), self.scale)


@dataclass(eq=False)
class Waiting:
    """One layer that has attended to a new token, which what it holds does not count yet."""

    number: int
    layer: Any
    held: Held
    asked: Asked


@dataclass(eq=False)
class Room:
    """Keys and values of all layers, (n, R, Hkv, L + 1, d) each: the last slot is room for a token.

    Each layer's are views of them, which are made once.
    """

    both: tuple[Tensor, Tensor]

    def __post_init__(self) -> None:
        entries = self.both[0].shape[3] - 1
        self.whole = [values.unbind() for values in self.both]
        self.seen = [values[..., :entries, :].unbind() for values in self.both]
        self._free = [values[..., entries:, :].unbind() for values in self.both]
        self._rows = [values.flatten(0, 3) for values in self.both]
        self._newest = [values[..., entries, :].flatten(0, 2) for values in self.both]
        heads = self._newest[0].shape[0]
        self._first = torch.arange(0, heads * (entries + 1), entries + 1, device=self.both[0].device)

    @classmethod
    def made_of(cls, waiting: Sequence[Waiting]) -> Room:
        """A new one, of what layers hold."""
        keys, values = ([getattr(one.layer, name) for one in waiting] for name in ("keys", "values"))
        return cls((torch.stack(keys), torch.stack(values)))

    @classmethod
    def shared_by(cls, waiting: Sequence[Waiting]) -> Room | None:
        """The one into which all layers have just put a token."""
        found: Room | None = waiting[0].held.room
        if found is None or any(one.held.room is not found for one in waiting):
            return None
        whole = found.whole[0]
        return found if all(one.layer.keys is one.asked.keys is whole[one.number] for one in waiting) else None

    def put(self, number: int, both: tuple[Tensor, Tensor]) -> None:
        """A token's keys and values (R, Hkv, 1, d) in one layer."""
        for free, new in zip(self._free, both, strict=True):
            free[number].copy_(new)

    def keep(self, slots: Tensor) -> None:
        """Move each head's last entry to one of its slots (n, R, Hkv, 1), from which one has left."""
        rows = slots.flatten().add_(self._first)
        for values, newest in zip(self._rows, self._newest, strict=True):
            values.index_copy_(0, rows, newest.clone())


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


def fits(layer: Any, number: int, held: Held) -> bool:
    """Whether layer `number` has been given one entry more, and its slots can be told apart by `Held.order` alone."""
    if held.room is not None and layer.keys is held.room.whole[0][number]:
        return True
    return (
        type(layer) is DynamicLayer
        and held.unpadded
        and held.scores is not None
        and layer.keys.shape[2] == held.ages.shape[2] + 1
    )


def alike(waiting: Sequence[Waiting], layers: int) -> bool:
    """Whether all layers hold as much, in tensors that fit together, each row as much as the others."""
    first = waiting[0]
    counts, prompts, kind = first.held.counts, first.held.prompts, _kind(first)
    return (
        len(waiting) == layers
        and len(set(counts)) == 1
        and len(set(prompts)) == 1
        and all(one.held.counts == counts and one.held.prompts == prompts and _kind(one) == kind for one in waiting)
    )


def _kind(one: Waiting) -> tuple[Any, ...]:
    """What has to be the same for tensors of layers to be stacked."""
    asked, keys, values = one.asked, one.layer.keys, one.layer.values
    shapes = (asked.queries.shape, asked.keys.shape, keys.shape, values.shape)
    return *shapes, keys.dtype, values.dtype, keys.device, asked.scale


def _received(logits: Tensor, scale: float) -> Tensor:
    """(..., G, L) products of a query of each head -> (..., L) attention, mean over heads that share a KV head."""
    weights = logits.float().mul_(scale).softmax(dim=-1)
    return weights.mean(dim=-2) if weights.shape[-2] > 1 else weights.squeeze(-2)


def _all_received(waiting: Sequence[Waiting], room: Room | None) -> Tensor:
    """(n, R, Hkv, L + 1) attention of every layer."""
    if room is None:
        return torch.stack([one.asked.received() for one in waiting])
    queries, keys = torch.stack([one.asked.queries for one in waiting]), room.both[0]
    return _received(
        torch.matmul(queries.unflatten(2, (keys.shape[2], -1)).squeeze(4), keys.mT), waiting[0].asked.scale
    )


@torch.no_grad()
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
    room = Room.shared_by(waiting)
    scores = _all_received(waiting, room)
    order = None if before.order is None else torch.nn.functional.pad(before.order, (0, 1), value=entries)
    scores = scores if order is None else scores.gather(-1, order)
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
        order = torch.arange(entries + 1, device=ages.device).expand_as(ages).clone()
    free = order.gather(-1, leaves)
    order[..., entries:] = free  # which the last one's entry is to take
    Stack(their_ages.unflatten(0, ages.shape[:2]), scores.gather(-1, stay), order.gather(-1, stay)).spread(held)
    room = Room.made_of(waiting) if room is None else room
    room.keep(free)
    for one, keys, values in zip(waiting, *room.seen, strict=True):
        one.layer.keys, one.layer.values, one.held.room = keys, values, room
    return True


def append(layer: Any, number: int, held: Held, keys: Tensor, values: Tensor) -> bool:
    """Put a token's keys and values (R, Hkv, 1, d) where layer `number` has room for them; whether it has."""
    room = held.room
    if room is None:
        return False
    for seen, held_now, new in zip(room.seen, (layer.keys, layer.values), (keys, values), strict=True):
        # Not where somebody has put other tensors in place, or where autograd may look.
        if held_now is not seen[number] or new.shape[2] != 1 or new.requires_grad or new.dtype != held_now.dtype:
            return False
    if room.both[0].is_inference() and not torch.is_inference_mode_enabled():
        return False
    room.put(number, (keys, values))
    layer.keys, layer.values = room.whole[0][number], room.whole[1][number]
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
