"""The tiles of one encoding on their way through the encoder: which patches are left of each, and for which tokens.

Shapes: n tokens of a tile, K of them left, G patches behind each; P patches of the tile, L of them left, E width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.choosing.choose import TOKEN_AXIS, Image
from foveate.choosing.record import Stopwatch
from foveate.core import Block, FoveateError
from foveate.families.layouts import Layout, Tile, as_pictures
from foveate.trace import StageRecord


class Lane:
    """One tile of an encoding.

    Attributes:
        tile: where its tokens are.
        image: what is left of them; None for a tile without tokens, such as one of padding alone.
        present: (L,) its patches that are left, in the order in which they run.
        last: (P, E) each patch's latest hidden state, where all are put back; else None.
        attended: of each block, the patches that its attention ran on.
        outputs: of each block, the patches in its output, fewer where it merged.
        beside: blocks that ran with a companion.
    """

    def __init__(self, tile: Tile, row: Tensor, blocks: int, put_back: bool) -> None:
        """`row`: (P, E), its patches before any stage."""
        device = row.device
        self.tile, self.beside = tile, 0
        self.patches = tile.patches.to(device)
        self.present = self.whole = torch.arange(tile.length, device=device)
        self.rest = tile.rest.to(device)  # these run along, or of a tile that has none but these, one of them
        self.image: Image | None = None
        if tile.tokens.numel():
            columns = torch.arange(tile.tokens.numel(), device=device)
            self.image = Image(-1, columns, columns[:, None], tile.grid, share=tile.share)
            self.image.group = columns if put_back else None
        self.last = row if put_back else None
        self.attended, self.outputs = ([self.whole] * blocks for _ in range(2))
        self._own_token: int | None = None  # block in which a token that is no patch took a patch's place

    @property
    def where(self) -> Tensor:
        """(K, G) places of the tokens' patches among those that are left."""
        assert self.image is not None
        if self.tile.plain:
            return torch.arange(self.present.numel(), device=self.present.device)[:, None]
        return self._places[self.patches[self.image.index]]

    @property
    def _places(self) -> Tensor:
        places = torch.full((self.tile.length,), -1, device=self.present.device)
        return places.index_copy(0, self.present, torch.arange(self.present.numel(), device=self.present.device))

    def read(self, row: Tensor) -> None:
        """Take up the stream: (L, E), of which each token gets its patches behind each other, (K, G * E)."""
        self.remember(row)
        if self.image is not None:
            self.image.stream = row if self.tile.plain else row[self.where].flatten(1)

    def write(self, row: Tensor, name: str) -> Tensor:
        """What runs on of (L, E), now that a stage has acted on the tokens; the tokens' own part is in the stream.

        Args:
            name: the method's, for errors.

        Raises:
            FoveateError: it gave new tokens where these are no single patches, and did not give all their patches.
        """
        if self.image is None:
            self.present = self.whole[:1]
            return row[:1]
        assert self.image.stream is not None
        width, patches = self.image.stream.shape[1], self.patches.shape[1]
        if width != patches * row.shape[1] or (self.image.merged and self.tile.weights is not None):
            raise FoveateError(
                f"{name} returns tokens {width} wide, where each token stands for {patches} patches of {row.shape[1]}; "
                "here a method drops tokens, or is a Merger, which sees all of a token's patches behind each other"
            )
        if self.tile.plain:
            self.present = self.image.index
            return self.image.stream
        if self.tile.weights is not None:  # a patch may be behind several tokens, none of which is changed
            present = torch.cat([self.rest, self.patches[self.image.index].flatten()]).unique()
            row, self.present = row[self._places[present]], present
            return row
        tokens = self.image.stream.unflatten(1, (self.patches.shape[1], -1)).flatten(0, 1)
        present = torch.cat([self.rest, self.patches[self.image.index].flatten()])
        rows = torch.cat([row[self._places[self.rest]], tokens])
        # As they stood before: windows, and positions that are gathered along, count on it.
        order = present.argsort()
        self.present = present[order]
        return rows[order]

    def note(self, start: int, depth: int, end: int) -> None:
        """A stage has acted at block `depth`: from block `start` on attention runs on what is left, up to `end`."""
        self.attended[start:end] = [self.present] * (end - start)
        self.outputs[depth:end] = [self.present] * (end - depth)
        if self.image is not None and self.image.extra is not None and self._own_token is None:
            self._own_token = depth

    def remember(self, row: Tensor) -> None:
        """Note the hidden states of patches that may be about to leave; one that merged has its group's."""
        if self.last is None:
            return
        last, image = self.last, self.image
        if image is not None and image.size is not None and image.group is not None:
            tokens = row[self.where][image.group.clamp(min=0)]  # (n, G, E)
            there = (image.group >= 0)[:, None, None]
            last = last.index_copy(0, self.patches.flatten(), tokens.where(there, last[self.patches]).flatten(0, 1))
        self.last = last.index_copy(0, self.present, row)

    def sizes(self) -> Tensor | None:
        """(L,) how many patches each stands for; None while each is one."""
        if self.image is None or self.image.size is None:
            return None
        ones = torch.ones(self.present.numel(), device=self.present.device)
        where = self.where
        return ones.index_copy(0, where.flatten(), self.image.size[:, None].expand(where.shape).flatten())

    def full(self, values: Tensor, number: int, axis: int, output: bool) -> Tensor:
        """What block `number` showed of the patches that it had, (..., L, ...) or longer, each at its place among P.

        Zero where one had left, and where the place has since been taken by a token that had none.
        """
        present = (self.outputs if output else self.attended)[number]
        values = values.narrow(axis, 0, present.numel())
        own = self._own_token
        if own is not None and (number < own or (number == own and not output)):
            assert self.image is not None and self.image.extra is not None
            taken = torch.isin(present, self.patches[self.image.index[self.image.extra]])
            values = values.index_fill(axis, taken.nonzero().flatten(), 0)
        if present.numel() == self.tile.length and bool((present[1:] > present[:-1]).all()):
            return values
        shape = list(values.shape)
        shape[axis] = self.tile.length
        return values.new_zeros(shape).index_copy(axis, present, values)


@dataclass(eq=False)
class Lanes:
    """The tiles of one encoding, or of several that belong to one call."""

    lanes: list[Lane]
    packed: bool  # the encoder runs all tiles as one sequence
    put_back: bool  # its output has all patches again
    stopwatches: list[Stopwatch] = field(default_factory=list)

    @property
    def images(self) -> list[Image]:
        """What is left of each tile that has tokens."""
        return [lane.image for lane in self.lanes if lane.image is not None]

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

    def shown(self, block: Block, rows: Sequence[int], whole: Callable[[str], bool]) -> Block:
        """Of what the block at hand shows of the patches, what some tiles, with equally many tokens left, have of it.

        A token has the mean of its patches.

        Args:
            rows: numbers among the tiles that have tokens.
            whole: for these fields it has them behind each other instead, and what is no patch in each one's place.
        """
        numbers = [number for number, lane in enumerate(self.lanes) if lane.image is not None]
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
                    row = _of_tokens(row.narrow(axis - 1, first, lane.present.numel()), lane, axis - 1, whole(name))
                elif whole(name):
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


def _of_tokens(values: Tensor, lane: Lane, axis: int, whole: bool) -> Tensor:
    """(..., L, ...) -> (..., K, ...), or with all its patches behind each other (K, G * E)."""
    if lane.tile.plain:
        return values
    where = lane.where
    found = values.index_select(axis, where.flatten()).unflatten(axis, (-1, where.shape[1]))
    return found.flatten(axis + 1, axis + 2) if whole else found.mean(dim=axis + 1)


def settle(image: Image, lanes: Sequence[Lane], put_back: bool) -> None:
    """Let a picture at its placeholders hold what the stages inside the encoder left of its tiles."""
    visible = [lane for lane in lanes if lane.image is not None]
    inside = [lane.image for lane in visible if lane.image is not None]
    device = image.index.device  # a device map may have the encoder elsewhere
    places = [one.index.to(device) for one in inside]
    index = torch.cat([lane.tile.tokens.to(device)[place] for lane, place in zip(visible, places, strict=True)])
    order = index.argsort() if len(inside) > 1 else torch.arange(index.numel(), device=device)
    image.index = index[order]
    if any(one.extra is not None for one in inside):
        extra = [torch.zeros_like(one.index, dtype=torch.bool) if one.extra is None else one.extra for one in inside]
        image.extra = torch.cat(extra).to(device)[order]
    image.whole, image.adapted = all(one.whole for one in inside), any(one.adapted for one in inside)
    stages = zip(*(one.stages for one in inside), strict=True)
    image.stages = [_of_all(records, visible) for records in stages]
    image.encoded = [
        [there.numel() + (block < lane.beside) for block, there in enumerate(lane.attended)] for lane in lanes
    ]
    image.projected = image.original if put_back else image.index.numel()


def _of_all(records: Sequence[StageRecord], lanes: Sequence[Lane]) -> StageRecord:
    """What one stage did to a picture, of what it did to its tiles."""
    if len(records) == 1:
        return records[0]
    kept = torch.cat([lane.tile.tokens[record.kept] for lane, record in zip(lanes, records, strict=True)])
    kept, order = kept.sort()
    extra = [record.extra.cpu() for record in records if record.extra is not None]
    return dataclasses.replace(
        records[0],
        before=sum(record.before for record in records),
        after=kept.numel(),
        kept=kept,
        extra=torch.cat(extra)[order] if len(extra) == len(records) else None,
    )
