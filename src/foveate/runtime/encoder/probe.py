"""Reads a vision encoder's attention and hidden states while it runs: only named blocks, only what a method needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from foveate.choosing.signals import JOINT
from foveate.core import Block, FoveateError, names_of
from foveate.families.family import Family
from foveate.families.towers import Tower
from foveate.runtime.attention import _register
from foveate.runtime.encoder.watch import _SUMS, PackedWatch, Watch

_OF_CLS = names_of(Block, of="cls")


FIELDS = names_of(Block, room="encoder")


LATEST = "latest"
"""Name of the block that has run last where a stage inside the encoder acts."""


OF_COMPANION = names_of(Block, of="companion")
"""What that block shows of a token that runs beside CLS."""


def tower_needs(needs: Iterable[str]) -> dict[str, set[str]]:
    """{"read": {"received"}} from ("tower.read.received", "features"): the fields wanted of each encoder block."""
    wanted: dict[str, set[str]] = {}
    for need in needs:
        room, _, rest = need.partition(".")
        if room == "tower":
            block, _, name = rest.partition(".")
            wanted.setdefault(block, set()).add(name)
    return wanted


def with_joint(needs: Iterable[str]) -> set[str]:
    """Needs, and what CLIP's head maps into the joint space where they speak of that: what the projector reads."""
    given = set(needs)
    return {*given, "tower.read.hidden"} if given.intersection(JOINT) else given


def missing_signals(needs: Iterable[str], tower: Tower) -> list[str]:
    """Which of a method's tower signals this encoder cannot give: CLS fields of an encoder without CLS.

    One that is not described gives none.
    """
    return [
        f"tower.{block}.{name}"
        for block, names in tower_needs(needs).items()
        for name in sorted(names)
        if name not in (FIELDS + OF_COMPANION if block == LATEST else FIELDS)
        or (name in _OF_CLS + OF_COMPANION and tower.summary == 0)
        or not tower.known
    ]


def block_number(name: str, read: int, blocks: int) -> int:
    """0-based encoder block of a name in `needs`: "read", "last", "8", or "8/24", block 8 of 24 in proportion.

    Raises:
        FoveateError: the name is none of these, or names a block that this encoder does not have.
    """
    block, _, of = name.partition("/")
    if name in {"read", "last"}:
        return read if name == "read" else blocks - 1
    if not block.isdigit() or not (of.isdigit() or name == block):
        raise FoveateError(f"encoder block {name!r} is no number; write 8, '8/24', 'read' or 'last'")
    number = int(block) if not of else min(blocks - 1, round(int(block) * blocks / int(of)))
    if not 0 <= number < blocks:
        raise FoveateError(f"encoder block {number} is outside 0..{blocks - 1}")
    return number


class Probe:
    """Observes the encoder blocks that the methods need, from install() to remove()."""

    def __init__(self, model: Any, family: Family, needs: Iterable[str]) -> None:
        tower, row = family.tower_of(model)
        blocks = family.blocks_of(model)
        read = family.read_block(model)
        self._model = model
        self._shared: Any = None  # an Encoding whose probe sees for this one
        self._blocks, self._row = blocks, row
        self._watches: dict[int, Watch] = {}
        self._of_videos: dict[int, Watch] = {}  # the same blocks of an encoder that only videos pass through
        self._video_blocks = None if family.video_tower is None else family.blocks_of(model, "video")
        self._names: dict[str, int] = {}
        self._whole: dict[str, int] = {}  # where attention is read for a name whose own block sees windows only
        whole = row.full_attention(tower.config) if row.full_attention is not None else None
        for name, fields in tower_needs(with_joint(needs)).items():
            if name == LATEST:
                continue  # whoever runs the stages says which block that is
            self._names[name] = number = block_number(name, read, len(blocks))
            sums = fields.intersection(_SUMS)
            if whole is not None and number not in whole and sums:
                self._whole[name] = _nearest(number, whole)
                self.watch(self._whole[name], sums)
                fields = fields - sums
            self.watch(number, fields)

    def watch(self, number: int, fields: Iterable[str]) -> Watch:
        """Observe a block, and more of it than so far where it is observed already; before install()."""
        if number not in self._watches:
            block = self._blocks[number]
            kind = PackedWatch if self._row.packed else Watch
            self._watches[number] = kind(block, getattr(block, self._row.attention), set(), self._row.summary)
        watch = self._watches[number]
        watch.fields.update(fields)
        watch.seen.update({name: [] for name in watch.fields - watch.seen.keys()})
        return watch

    def lead(self, tokens: int) -> None:
        """From now on this many leading tokens are no patches."""
        for watch in self._watches.values():
            watch.summary = tokens

    def install(self) -> None:
        """Start observing."""
        _register()
        self._shared = getattr(self._model, "_foveate_encoding", None)
        if self._shared is not None:
            self._check_shared(self._shared.probe)
            return
        if self._video_blocks is not None:
            for number, watch in self._watches.items():
                block = self._video_blocks[number]
                attention = getattr(block, self._row.attention)
                self._of_videos[number] = Watch(block, attention, set(watch.fields), self._row.summary)
        for watch in self.observers:
            watch.install()

    def _check_shared(self, other: Probe) -> None:
        """Refuse a shared encoding of which less is read than is needed here."""
        for number, watch in self._watches.items():
            read = other._watches[number].fields if number in other._watches else set()
            if not watch.fields <= read:
                lacking = ", ".join(f"tower.{number}.{field}" for field in sorted(watch.fields - read))
                raise FoveateError(
                    f"the encoding that is shared here shows no {lacking}; give share_encoding() the needs of every "
                    "method that will run"
                )

    def remove(self) -> None:
        """Stop observing; the encoder is as it was."""
        for watch in self.observers:
            watch.remove()
        self._of_videos.clear()

    @property
    def observers(self) -> list[Watch]:
        """Whatever holds something of the encoding in progress."""
        return [*self._watches.values(), *self._of_videos.values()]

    def peek(self, depth: int, at: Callable[[Block, int], Block]) -> dict[int | str, Block]:
        """Blocks before block `depth`, by number and by name, as the encoding in progress has shown them.

        Args:
            at: what to make of a block, given its number.
        """
        seen: dict[int | str, Block] = {
            number: at(watch.latest(), number) if number < depth else Block() for number, watch in self._watches.items()
        }
        numbers: dict[int | str, int] = {number: number for number in self._watches}
        numbers.update(self._names)
        return {name: block for name, block in self._named(seen).items() if numbers[name] < depth}

    def _named(self, seen: dict[int | str, Block]) -> dict[int | str, Block]:
        """Blocks by number, and by the names that methods have for them."""
        named: dict[int | str, Block] = {name: seen[number] for name, number in self._names.items()}
        for name, number in self._whole.items():
            sums = {field: getattr(seen[number], field) for field in _SUMS}
            named[name] = dataclasses.replace(named[name], **sums)
            if name.isdigit():  # a method may write the block's number as a number, too
                seen = {**seen, int(name): named[name]}
        return {**seen, **named}

    def runs(self, name: str) -> int:
        """The last block that has to run before everything wanted of a named one is known."""
        return max(self._names[name], self._whole.get(name, 0))

    def take(self, at: Callable[[Block, int], Block] | None = None) -> dict[int | str, Block]:
        """Blocks by number and by name, B = the images encoded since the last call, in order.

        Args:
            at: what to make of a block, given its number.
        """
        if self._shared is not None:
            return self._of(self._shared.take())
        seen: dict[int | str, Block] = {}
        for number in self._watches:
            block = self._taken(number)
            seen[number] = block if at is None else at(block, number)
        return self._named(seen)

    def _taken(self, number: int) -> Block:
        """What was seen of a block, in the encoder of videos where pictures did not come."""
        seen = self._watches[number].take()
        if number not in self._of_videos:
            return seen
        of_videos = self._of_videos[number].take()
        return of_videos if all(value is None for value in vars(seen).values()) else seen

    def _of(self, shared: dict[int | str, Block]) -> dict[int | str, Block]:
        """Of what another probe saw, what this one would have."""
        seen: dict[int | str, Block] = {}
        for number, watch in self._watches.items():
            whole = shared.get(number, Block())
            seen[number] = Block(**{name: getattr(whole, name) for name in watch.fields})
        return self._named(seen)


def _nearest(number: int, whole: Sequence[int]) -> int:
    """The last of the blocks that see everything up to `number`, or the first one behind it."""
    before = [block for block in whole if block <= number]
    return max(before) if before else min(whole)
