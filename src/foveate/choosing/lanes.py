"""The tiles of one encoding on their way through the encoder: which patches are left of each, and for which tokens.

Shapes: n tokens of a tile, K of them left, G patches behind each; P patches of the tile, L of them left, E width.
Numbers of patches and tokens are on the host, hidden states on a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.choosing.choose import Outcome
from foveate.choosing.images import Image, TileTokens
from foveate.choosing.record import Stopwatch
from foveate.choosing.signals import TOKEN_AXIS
from foveate.core import Block, FoveateError
from foveate.families.layouts import Layout, Tile, as_pictures
from foveate.ops.device import beside, on_device
from foveate.trace import StageRecord


class Lane:
    """One tile of an encoding.

    Attributes:
        tile: where its tokens are.
        left: what is left of them; None for a tile without tokens, such as one of padding alone.
        present: (L,) its patches that are left, in the order in which they run.
        last: (P, E) each patch's latest hidden state, where all are put back; else None.
        attended: of each block, the patches that its attention ran on.
        outputs: of each block, the patches in its output, fewer where it merged.
        beside: blocks that ran with a companion.
    """

    def __init__(self, tile: Tile, row: Tensor, blocks: int, put_back: bool, video: bool = False) -> None:
        """`row`: (P, E), its patches before any stage."""
        self.tile, self.beside, self.device = tile, 0, row.device
        self.patches = tile.patches
        self.present = self.every = torch.arange(tile.length)
        self.rest = tile.rest  # these run along, or of a tile that has none but these, one of them
        self.left: TileTokens | None = None
        if tile.tokens.numel():
            every = torch.arange(tile.tokens.numel())
            group = every if put_back else None
            self.left = TileTokens(
                original=every.numel(),
                grid=tile.grid,
                index=every,
                tile=None if tile.number is None else torch.full_like(every, tile.number),
                share=tile.share,
                group=group,
                frame=(tile.picture, tile.number or 0) if video else None,
            )
        self.last = row if put_back else None
        self.attended, self.outputs = ([self.every] * blocks for _ in range(2))
        self._unread: list[Tensor] = []  # numbers of patches where the hidden states are
        self._own_token: int | None = None  # block in which a token that is no patch took a patch's place

    @property
    def where(self) -> Tensor:
        """(K, G) places of the tokens' patches among those that are left."""
        assert self.left is not None
        if self.tile.plain:
            return beside(torch.arange(self.present.numel()), self.present)[:, None]
        patches = beside(self.patches, self.left.index)[self.left.index]
        return self._places(patches)[patches]

    def _places(self, other: Tensor) -> Tensor:
        """(P,) where each patch stands among those that are left, -1 for the others; beside another tensor."""
        places = other.new_full((self.tile.length,), -1)
        return places.index_copy(0, beside(self.present, other), beside(torch.arange(self.present.numel()), other))

    def _on(self, numbers: Tensor) -> Tensor:
        """Numbers of patches where the hidden states are."""
        return on_device(numbers, self.device)

    @property
    def whole(self) -> bool:
        """All its patches are there, in their order."""
        return self.present.numel() == self.every.numel() and torch.equal(self.present, self.every)

    def write(self, row: Tensor, outcome: Outcome[TileTokens] | None, name: str) -> Tensor:
        """What runs on of (L, E), now that a stage has acted on the tokens.

        Args:
            outcome: of the stage; None for a tile without tokens.
            name: the method's, for errors.

        Raises:
            FoveateError: it gave new tokens where these are no single patches, and did not give all their patches.
        """
        if outcome is None:
            self.present = self.every[:1]
            return row[:1]
        self.left, tokens = outcome.tokens, outcome.features
        present, unread = self._behind(self.left, tokens is None), self.left.unread
        if tokens is None:
            stays = not unread and torch.equal(present, self.present)
            row = row if stays else row[self._on(self._places(present)[present])]
            self._leave(present, unread)
            return row
        width, patches = tokens.shape[1], self.patches.shape[1]
        if width != patches * row.shape[1] or self.tile.weights is not None:
            raise FoveateError(
                f"{name} returns tokens {width} wide, where each token stands for {patches} patches of {row.shape[1]}; "
                "here a method drops tokens, or is a Merger, which sees all of a token's patches behind each other"
            )
        if self.tile.plain:
            self._leave(present, unread)
            return tokens
        tokens = tokens.unflatten(1, (self.patches.shape[1], -1)).flatten(0, 1)
        rows = torch.cat([row[self._on(self._places(present)[beside(self.rest, present)])], tokens])
        # As they stood before: windows, and positions that are gathered along, count on it.
        order = present.argsort()
        self._leave(present[order], unread)
        return rows[self._on(order)]

    def _leave(self, present: Tensor, unread: bool) -> None:
        self.present = present
        if unread:
            self._unread.append(present)

    def _behind(self, left: TileTokens, drops: bool) -> Tensor:
        """(L,) patches of these tokens and those that run along, in order where others have only been dropped."""
        if self.tile.plain:
            return left.index
        patches = beside(self.patches, left.index)[left.index]
        present = torch.cat([beside(self.rest, patches), patches.flatten()])
        if not drops:
            return present
        # A patch may be behind several tokens, but not where tokens merge.
        return present.sort().values if left.unread else present.unique()

    def unread(self) -> list[Tensor]:
        """Numbers that the host has to know, to be handed to `land`."""
        if self.left is None or not self.left.unread:
            return []
        mine = (self.left.index, self.left.size, self.left.group, self.left.extra)
        return [*self._unread, *(one for one in mine if one is not None)]

    def land(self, read: Sequence[Tensor]) -> None:
        """Have on the host what was read."""
        left = self.left
        if left is None or not left.unread:
            return
        there = {id(one): on_host for one, on_host in zip(self.unread(), read, strict=True)}
        index = there[id(left.index)]
        size, group, extra = (None if one is None else there[id(one)] for one in (left.size, left.group, left.extra))
        stages = (*left.stages[:-1], dataclasses.replace(left.stages[-1], kept=index, extra=extra))
        self.left = dataclasses.replace(
            left, index=index, size=size, group=group, extra=extra, stages=stages, unread=False
        )
        self.present = there.get(id(self.present), self.present)
        self.attended, self.outputs = (
            [there.get(id(one), one) for one in held] for held in (self.attended, self.outputs)
        )
        self._unread = []

    def note(self, start: int, depth: int, end: int) -> None:
        """A stage has acted at block `depth`: from block `start` on attention runs on what is left, up to `end`."""
        self.attended[start:end] = [self.present] * (end - start)
        self.outputs[depth:end] = [self.present] * (end - depth)
        if self.left is not None and self.left.extra is not None and self._own_token is None:
            self._own_token = depth

    def remember(self, row: Tensor) -> None:
        """Note the hidden states of patches that may be about to leave; one that merged has its group's."""
        if self.last is None:
            return
        last, left = self.last, self.left
        if left is not None and left.size is not None and left.group is not None:
            tokens = row[self._on(self.where[left.group.clamp(min=0)])]  # (n, G, E)
            there, patches = self._on(left.group >= 0)[:, None, None], self._on(self.patches)
            last = last.index_copy(0, patches.flatten(), tokens.where(there, last[patches]).flatten(0, 1))
        self.last = row if self.whole else last.index_copy(0, self._on(self.present), row)

    def sizes(self) -> Tensor | None:
        """(L,) how many patches each stands for, where the hidden states are; None while each is one."""
        if self.left is None or self.left.size is None:
            return None
        where = self.where
        ones = self.left.size.new_ones(self.present.numel())
        sizes = ones.index_copy(0, where.flatten(), self.left.size[:, None].expand(where.shape).flatten())
        return self._on(sizes)

    def full(self, values: Tensor, number: int, axis: int, output: bool) -> Tensor:
        """What block `number` showed of the patches that it had, (..., L, ...) or longer, each at its place among P.

        Zero where one had left, and where the place has since been taken by a token that had none.
        """
        present = (self.outputs if output else self.attended)[number]
        values = values.narrow(axis, 0, present.numel())
        own = self._own_token
        if own is not None and (number < own or (number == own and not output)):
            assert self.left is not None and self.left.extra is not None
            taken = torch.isin(present, self.patches[self.left.index[self.left.extra]])
            values = values.index_fill(axis, self._on(taken.nonzero().flatten()), 0)
        if present.numel() == self.tile.length and bool((present[1:] > present[:-1]).all()):
            return values
        shape = list(values.shape)
        shape[axis] = self.tile.length
        return values.new_zeros(shape).index_copy(axis, self._on(present), values)


@dataclass(eq=False)
class Lanes:
    """The tiles of one encoding, or of several that belong to one call."""

    lanes: list[Lane]
    packed: bool  # the encoder runs all tiles as one sequence
    put_back: bool  # its output has all patches again
    described: Sequence[Layout] = ()  # how the pictures lie
    stopwatches: list[Stopwatch] = field(default_factory=list)

    @property
    def visible(self) -> list[Lane]:
        """The tiles that have tokens."""
        return [lane for lane in self.lanes if lane.left is not None]

    @property
    def tokens(self) -> list[TileTokens]:
        """What is left of each of these."""
        return [lane.left for lane in self.lanes if lane.left is not None]

    def layouts(self) -> list[Layout]:
        """Each tile that has tokens as a picture of its own."""
        return as_pictures([lane.tile for lane in self.lanes])

    def full(self, block: Block, number: int) -> Block:
        """What a probe saw of block `number`, with the patches at their places, as if none had left."""
        fields = {}
        for name, value in vars(block).items():
            axis = TOKEN_AXIS.get(name)
            if value is not None and axis is not None:
                output = name == "hidden"
                parts = self._parts(value, number, axis, output)
                whole = [lane.full(part, number, axis - 1, output) for lane, part in parts]
                value = torch.cat(whole, dim=axis - 1)[None] if self.packed else torch.stack(whole)
            fields[name] = value
        return Block(**fields)

    def _parts(self, value: Tensor, number: int, axis: int, output: bool) -> list[tuple[Lane, Tensor]]:
        """Each tile's own part of what a block showed, without the axis of rows."""
        if not self.packed:
            return list(zip(self.lanes, value, strict=True))
        counts = [(lane.outputs if output else lane.attended)[number].numel() for lane in self.lanes]
        return list(zip(self.lanes, value[0].split(counts, dim=axis - 1), strict=True))

    def shown(self, block: Block, rows: Sequence[int], joined: Callable[[str], bool]) -> Block:
        """Of what the block at hand shows of the patches, what some tiles, with equally many tokens left, have of it.

        A token has the mean of its patches.

        Args:
            rows: numbers among the tiles that have tokens.
            joined: for these fields it has them behind each other instead, and what is no patch in each one's place.
        """
        numbers = [number for number, lane in enumerate(self.lanes) if lane.left is not None]
        mine = [(numbers[row], self.lanes[numbers[row]]) for row in rows]
        starts = [0]
        for lane in self.lanes:
            starts.append(starts[-1] + lane.present.numel())
        fields = {}
        for name, value in vars(block).items():
            axis = TOKEN_AXIS.get(name)
            if value is None:
                continue
            found = []
            for number, lane in mine:
                row = value[0 if self.packed and axis is not None else number]
                if axis is not None:
                    first = starts[number] if self.packed else 0
                    row = _of_tokens(row.narrow(axis - 1, first, lane.present.numel()), lane, axis - 1, joined(name))
                elif joined(name):
                    row = row.repeat(lane.patches.shape[1])
                found.append(row)
            fields[name] = torch.stack(found)
        return Block(**fields)

    def pictures(self) -> list[list[Lane]]:
        """The tiles of each picture."""
        found: dict[int, list[Lane]] = {}
        for lane in self.lanes:
            found.setdefault(lane.tile.picture, []).append(lane)
        return list(found.values())


def _of_tokens(values: Tensor, lane: Lane, axis: int, joined: bool) -> Tensor:
    """(..., L, ...) -> (..., K, ...), or with all its patches behind each other (K, G * E)."""
    if lane.tile.plain:
        return values
    where = lane.where
    found = values.index_select(axis, on_device(where.flatten(), values.device)).unflatten(axis, (-1, where.shape[1]))
    return found.flatten(axis + 1, axis + 2) if joined else found.mean(dim=axis + 1)


def settled(image: Image, lanes: Sequence[Lane], put_back: bool) -> Image:
    """A picture at its placeholders with what the stages inside the encoder left of its tiles; features as they were.

    Args:
        put_back: all patches are in the encoder's output again.
    """
    visible = [(lane, lane.left) for lane in lanes if lane.left is not None]
    inside = [left for _, left in visible]
    index = torch.cat([lane.tile.tokens[left.index] for lane, left in visible])
    order = index.argsort() if len(inside) > 1 else torch.arange(index.numel())
    index, extra = index[order], image.extra
    if any(left.extra is not None for left in inside):
        each = [torch.zeros_like(left.index, dtype=torch.bool) if left.extra is None else left.extra for left in inside]
        extra = torch.cat(each)[order]
    stages = zip(*(left.stages for left in inside), strict=True)
    return dataclasses.replace(
        image,
        index=index,
        extra=extra,
        untouched=all(left.untouched for left in inside),
        adapted=any(left.adapted for left in inside),
        stages=tuple(_of_all(records, [lane for lane, _ in visible]) for records in stages),
        encoded=tuple(
            tuple(there.numel() + (block < lane.beside) for block, there in enumerate(lane.attended)) for lane in lanes
        ),
        projected=image.original if put_back else index.numel(),
    )


def _of_all(records: Sequence[StageRecord], lanes: Sequence[Lane]) -> StageRecord:
    """What one stage did to a picture, of what it did to its tiles."""
    if len(records) == 1:
        return records[0]
    kept = torch.cat([lane.tile.tokens[record.kept] for lane, record in zip(lanes, records, strict=True)])
    kept, order = kept.sort()
    extra = [record.extra for record in records if record.extra is not None]
    return dataclasses.replace(
        records[0],
        before=sum(record.before for record in records),
        after=kept.numel(),
        kept=kept,
        extra=torch.cat(extra)[order] if len(extra) == len(records) else None,
        scores=None,  # those of tiles were never compared
    )
