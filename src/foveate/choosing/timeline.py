"""The Timeline of a pruned prompt: which place of it each cache entry is. Coordinates: see `Timeline`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from foveate.core import FoveateError
from foveate.ops.device import on_device


class Owner(Protocol):
    """Whoever pruned the cache; only while it is active may the cache be used."""

    active: bool


@dataclass(eq=False)
class Group:
    """What the decoder layers from `first` on hold, in entries of layer 0. R rows, n entries of the prompt.

    Layer-0 entries from `reach` on are in every layer.
    """

    first: int
    kept: Tensor  # (R, n) layer-0 entry of each of this group's entries
    valid: Tensor  # (R, n) bool, False in padding and re-padding
    reach: int
    unpadded: bool | None = None  # no padding among them; found out where it is not said, which waits for the device
    static: Tensor | None = None  # (R, width) layer-0 entry behind each slot of a static cache
    blocked: Tensor | None = None  # (R, width) bool, slots that hold padding

    def __post_init__(self) -> None:
        if self.unpadded is None:
            self.unpadded = bool(self.valid.all())

    def columns(self, length: int) -> Tensor:
        """(R, ...) layer-0 entry of each entry when layer 0 holds `length`."""
        if length == self.reach:
            return self.kept
        grown = torch.arange(self.reach, length, device=self.kept.device)
        return torch.cat([self.kept, grown.expand(self.kept.shape[0], -1)], dim=1)

    def valid_columns(self, length: int) -> Tensor:
        """(R, ...) bool: entries that are no padding when layer 0 holds `length`."""
        return torch.cat([self.valid, self.valid.new_ones(self.valid.shape[0], length - self.reach)], dim=1)

    def fill(self, width: int, longest: int) -> None:
        """Note what each of the `width` slots of a static cache stands for, where layer 0 has `longest` of them."""
        if self.static is None:
            length = self.reach + width - self.kept.shape[1]
            columns = self.columns(length)
            # After a second prompt that lost tokens a deep layer has slots to spare, which never come to use.
            self.static = columns.clamp(max=longest - 1)
            self.blocked = ~self.valid_columns(length) | (columns >= longest)

    def select_rows(self, rows: Tensor) -> None:
        """Follow a re-ordering, repetition or selection of the cache's rows."""
        self.kept, self.valid = self.kept[rows], self.valid[rows]
        self.static = None if self.static is None else self.static[rows]
        self.blocked = None if self.blocked is None else self.blocked[rows]

    def check_crop(self, length: int) -> None:
        """Refuse a cut of layer 0 to `length` entries that this group cannot follow."""
        removed = self.reach - length
        entries = self.kept.shape[1] - removed
        if removed > 0 and (entries < 1 or bool((self.kept[:, -1] - self.kept[:, entries - 1] != removed).any())):
            raise FoveateError(
                f"crop removes {removed} prompt entries and cuts through visual tokens that layer {self.first} has "
                "dropped; crop only text that follows the image, or reset() the cache"
            )

    def crop(self, length: int) -> None:
        """Follow a cut of layer 0 to its first `length` entries."""
        removed = self.reach - length
        if removed > 0:
            entries = self.kept.shape[1] - removed
            self.kept, self.valid, self.reach = self.kept[:, :entries], self.valid[:, :entries], length


@dataclass(eq=False)
class Held:
    """What one layer holds once entries are evicted from it, each KV head its own. R rows, L slots.

    Tokens that only come are counted, and become tensors once somebody asks for these.
    """

    _ages: Tensor
    _valid: Tensor
    scores: Tensor | None  # (R, Hkv, L) attention received so far
    counts: list[int]  # of each row, entries that are no padding
    prompts: list[int]  # of each row, those of them that the prompt left
    order: Tensor | None = None  # (R, Hkv, L) slot of the cache that each entry is in; None: its place here
    room: Any = None  # where all layers' keys and values stand, with a slot to spare, if they do
    stack: Any = None  # of which these are views, where all layers share one
    _come: range = range(0)  # layer-0 entries of tokens that came one by one, in each head

    @property
    def ages(self) -> Tensor:
        """(R, Hkv, L) layer-0 entry of each slot, ascending."""
        self._settle()
        return self._ages

    @ages.setter
    def ages(self, ages: Tensor) -> None:
        self._settle()
        self._ages = ages

    @property
    def valid(self) -> Tensor:
        """(R, L) bool, False in padding and re-padding."""
        self._settle()
        return self._valid

    @valid.setter
    def valid(self, valid: Tensor) -> None:
        self._settle()
        self._valid = valid

    @property
    def entries(self) -> int:
        """Slots."""
        return self._ages.shape[2] + len(self._come)

    @property
    def unpadded(self) -> bool:
        """No slot is padding."""
        return min(self.counts) == self.entries

    def come(self, age: int) -> None:
        """Hold one token more, the same in all rows and heads, that is no padding and has no score."""
        if age != self._come.stop:
            self._settle()
            self._come = range(age, age)
        self._come = range(self._come.start, age + 1)
        self.counts = [count + 1 for count in self.counts]

    def _settle(self) -> None:
        if self._come:
            come, self._come = self._come, range(0)
            new = torch.arange(come.start, come.stop, device=self._ages.device)
            self._ages = torch.cat([self._ages, new.expand(*self._ages.shape[:2], -1)], dim=2)
            self._valid = torch.cat([self._valid, self._valid.new_ones(self._valid.shape[0], len(come))], dim=1)

    def cut(self, slots: int) -> None:
        """Only the last `slots` are left."""
        if slots < self.entries:
            unpadded, self.stack = self.unpadded, None
            self.ages, self.valid = self.ages[:, :, -slots:], self.valid[:, -slots:]
            self.scores = None if self.scores is None else self.scores[:, :, -slots:]
            self.counts = [slots] * len(self.counts) if unpadded else self.valid.sum(dim=1).tolist()

    def take(self, slots: Tensor, filled: Tensor | None, counts: list[int]) -> None:
        """Keep (R, Hkv, K) slots, of which (R, K), so many of each row, are no re-padding; all of them where None."""
        self.stack = None
        if filled is None:  # and no slot was
            filled = self.valid[:, : slots.shape[2]]
        self.ages, self.valid, self.counts = self.ages.gather(2, slots), filled, counts
        self.scores = None if self.scores is None else self.scores.gather(2, slots)

    def select_rows(self, rows: Tensor, numbers: Sequence[int] | None) -> None:
        """Follow a re-ordering, repetition or selection of the cache's rows.

        Args:
            numbers: the same on the host; None where all rows have as many entries.
        """
        self.ages, self.valid = self.ages[rows], self.valid[rows]
        self.counts = [self.counts[row] for row in numbers or [0] * rows.numel()]
        self.prompts = [self.prompts[row] for row in numbers or [0] * rows.numel()]
        self.scores = None if self.scores is None else self.scores[rows]
        self.order = None if self.order is None else self.order[rows]
        self.room = self.stack = None


@dataclass(eq=False)
class Timeline:
    """Where the entries of a pruned cache stand in the caller's sequence. B rows, n entries of the prompt.

    Entries that follow the prompt (generated tokens) are not listed: they are consecutive in both coordinates.
    """

    kept: Tensor  # (B, n) place of each prompt entry
    valid: Tensor  # (B, n) bool, False for re-padding and for the caller's own padding
    length: int  # places that the prompt takes on the timeline
    next_position: Tensor  # (B,) position id of the token after the prompt
    lag: Tensor | None  # (..., B) by axis, what generate() adds to its positions where a prompt ends in dropped tokens
    owner: Owner
    pictured: list[bool]  # of each row, whether it has had a picture; the others are left as they are
    padded: bool = True  # there may be padding among the entries of the latest prompt
    groups: list[Group] = field(default_factory=list)  # of deep layers, by their first layer
    evicting: bool = False  # entries leave the cache, so that its tensors no longer say how long it is
    held: dict[int, Held] = field(default_factory=dict)  # by layer, once entries may have left it
    before: int = 0  # while evicting: entries that layer 0 had been given before the latest call
    seen: int = 0  # ... and after it

    def __deepcopy__(self, memo: dict[int, Any]) -> Timeline:
        """A copy of a cache belongs to the same handle."""
        memo[id(self.owner)] = self.owner
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return copied

    @property
    def entries(self) -> int:
        """Prompt entries in the cache, re-padding included."""
        return self.kept.shape[1]

    def group(self, number: int) -> Group | None:
        """What layer `number` holds; None while it holds everything."""
        return group_of(self.groups, number)

    def holds(self, number: int, length: int) -> int:
        """Entries that layer `number` holds, of `length` that layer 0 was given; windows may have forgotten some."""
        if number in self.held:
            return self.held[number].entries
        group = self.group(number)
        return length if group is None else group.kept.shape[1] + length - group.reach

    def places(self, entries: int) -> Tensor:
        """(B, entries) place of every cache entry, generated ones included."""
        grown = torch.arange(entries - self.entries, device=self.kept.device) + self.length
        return torch.cat([self.kept, grown.expand(self.kept.shape[0], -1)], dim=1)

    def valid_places(self, entries: int) -> Tensor:
        """(B, entries) bool: entries that may be attended to."""
        more = self.valid.new_ones(self.valid.shape[0], entries - self.entries)
        return torch.cat([self.valid, more], dim=1)

    def reached(self, entries: int) -> int:
        """Length of the timeline when the cache holds so many entries."""
        return self.length + entries - self.entries

    def positions(self, entries: int, new: int) -> Tensor:
        """(B, new) position ids of the tokens that follow `entries` cached ones."""
        first = self.next_position + (entries - self.entries)
        return first[:, None] + torch.arange(new, device=first.device)

    def select_rows(self, rows: Tensor) -> None:
        """Follow a re-ordering, repetition or selection of the cache's rows."""
        lists: list[Sequence[int]] = [
            self.pictured,
            *(of_row for held in self.held.values() for of_row in (held.counts, held.prompts)),
        ]
        # Where all rows are alike it does not matter which is which, and nothing waits for the device.
        numbers = rows.tolist() if any(len(set(of_row)) > 1 for of_row in lists) else None
        self.pictured = [self.pictured[row] for row in numbers or [0] * rows.numel()]
        rows = on_device(rows, self.kept.device)
        self.kept, self.valid = self.kept[rows], self.valid[rows]
        self.next_position = self.next_position[rows]
        self.lag = None if self.lag is None else self.lag[..., rows]
        for group in self.groups:
            group.select_rows(rows)
        for held in self.held.values():
            held.select_rows(rows, numbers)

    def crop(self, entries: int) -> None:
        """Follow a cut of the cache to its first `entries` entries, all layers alike.

        Raises:
            FoveateError: the cut goes through pruned tokens, where rows would end at different places.
        """
        removed = self.entries - entries
        for group in self.groups:  # nothing is cut before all can be
            group.check_crop(entries)
        if removed > 0:
            places = torch.arange(self.length - removed, self.length, device=self.kept.device)
            if entries < 1 or bool((self.kept[:, entries:] != places).any()):
                raise FoveateError(
                    f"crop removes {removed} of the {self.entries} prompt entries and cuts through pruned visual "
                    "tokens; crop only text that follows the image, or reset() the cache"
                )
        for group in self.groups:
            group.crop(entries)
        if removed <= 0:
            return
        self.kept, self.valid = self.kept[:, :entries], self.valid[:, :entries]
        self.length -= removed
        self.next_position = self.next_position - removed


def group_of(groups: Sequence[Group], number: int) -> Group | None:
    """The group that layer `number` belongs to, of groups ordered by their first layer."""
    found = None
    for group in groups:
        if group.first <= number:
            found = group
    return found
