"""Shortens the sequence inside the vision encoder: later blocks run on fewer patches.

Shapes: B images, N patches before any stage, K of them left (padded to the longest of the batch), E encoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.core import Block, FoveateError, Merger, Method
from foveate.families import Family
from foveate.runtime.choose import TOKEN_AXIS, Depth, Image, Prompt, choose
from foveate.runtime.merge import MergingBlocks
from foveate.runtime.probe import LATEST, Probe, block_number, tower_needs
from foveate.runtime.record import Stopwatch
from foveate.spec import format as format_spec


@dataclass(eq=False)
class Encoded:
    """What the stages inside the encoder left of the pictures of one encoding."""

    images: list[Image]
    index: list[list[Tensor]]  # of each image, the patches (K,) that each block's attention ran on, in their order
    outputs: list[list[Tensor]]  # ... and those in its output, fewer where it merged
    beside: list[int]  # of each image, the blocks that ran with a companion
    stopwatches: list[Stopwatch]
    put_back: bool  # the encoder's output has all N patches again

    def lengths(self, number: int) -> list[int]:
        """Of one picture, how many patches each block's attention ran on, a companion among them."""
        beside = self.beside[number]
        return [index.numel() + (block < beside) for block, index in enumerate(self.index[number])]

    def features(self, number: int, rows: Tensor) -> Tensor:
        """Of the projected rows of one picture, those that are its own and were kept. (N or longest, D) -> (K, D)."""
        image = self.images[number]
        return rows[image.index] if self.put_back else rows[: image.index.numel()]

    def full(self, block: Block, number: int) -> Block:
        """What a probe saw of block `number`, with its tokens at their places among all N.

        Zero where one had left, and where the place has since been taken by a token that had none.
        """
        before, after = ([index[number] for index in blocks] for blocks in (self.index, self.outputs))
        original = self.images[0].original
        fields = {}
        for name, value in vars(block).items():
            axis = TOKEN_AXIS.get(name)
            if value is not None and axis is not None:
                pairs = zip(value, after if name == "hidden" else before, self.images, strict=True)
                value = torch.stack([_spread(row, index, original, axis - 1, image) for row, index, image in pairs])
            fields[name] = value
        return Block(**fields)


def _spread(values: Tensor, index: Tensor, original: int, axis: int, image: Image) -> Tensor:
    """Padding off, and each of the K values of `index` to its place among `original` ones."""
    if image.extra is not None and index is not image.index:
        taken = torch.isin(index, image.index[image.extra])
        values = values.narrow(axis, 0, index.numel()).index_fill(axis, taken.nonzero().flatten(), 0)
    if index.numel() == original == values.shape[axis] and bool((index[1:] > index[:-1]).all()):
        return values
    shape = list(values.shape)
    shape[axis] = original
    return values.new_zeros(shape).index_copy(axis, index, values.narrow(axis, 0, index.numel()))


@dataclass(eq=False)
class TowerStages:
    """The stages inside one encoder, from install() to remove()."""

    model: Any
    family: Family
    parts: Sequence[Method]
    probe: Probe
    is_active: Callable[[], bool]
    _done: list[Encoded] = field(default_factory=list)
    _images: list[Image] | None = None
    _hooks: list[Any] = field(default_factory=list)
    _mask: Tensor | None = None
    _memories: dict[int, dict[tuple[int, ...], dict[str, Any]]] = field(default_factory=dict)
    _last: Tensor | None = None  # (B, N, E) each patch's latest hidden state, where all are put back
    _lead: int = 0  # leading tokens that are no patches: CLS, and a companion

    def __post_init__(self) -> None:
        self.tower, self.row = self.family.tower_of(self.model)
        self.blocks = self.row.blocks_of(self.tower)
        self.read = self.family.read_block(self.model)
        depths = {
            id(part): part.depths(self.read + 1 if isinstance(part, Merger) else len(self.blocks))
            for part in self.parts
        }
        self.stages = sorted(
            ((depth, number, part) for part in self.parts for number, depth in enumerate(depths[id(part)])),
            key=lambda stage: stage[0],
        )
        layer = getattr(self.model.config, "vision_feature_layer", 0)
        if self.stages and not isinstance(layer, int):
            raise FoveateError(
                f"{format_spec(self.parts[0])}: a projector that reads several blocks cannot be shortened"
            )
        for part in self.parts:
            self._check(part, list(depths[id(part)]))
        self.merging = self._merging()

    def _merging(self) -> MergingBlocks | None:
        """The blocks in which tokens merge, where a method does that."""
        mergers = [part for part in self.parts if isinstance(part, Merger)]
        if not mergers:
            return None
        if len(mergers) > 1:
            names = " and ".join(map(format_spec, mergers))
            raise FoveateError(f"{names} would merge in the same encoder blocks; give one of them")
        working = lambda: self._images is not None and self.is_active()  # noqa: E731 - a question of the blocks
        blocks = list(self.blocks)[: self.read + 1]
        merging = MergingBlocks(mergers[0], blocks, self.row, self.probe, working, self._merge)
        merging.check(self._kind())
        height, width = self.family.grid(self.model.config)
        # No other stage comes before the first block, so this is what it starts from.
        merging.any = any(mergers[0].schedule(height * width, len(blocks)))
        merging.watch()
        return merging

    def _check(self, part: Method, depths: list[int]) -> None:
        if isinstance(part, Merger):
            behind = [block for block in tower_needs(part.needs) if block != LATEST]
            if behind:
                raise FoveateError(
                    f"{format_spec(part)} merges from the first block on and reads block {behind[0]}; it can read the "
                    f"block in which it acts, {LATEST!r}"
                )
            return
        for depth in depths:
            if not 1 <= depth <= self.read:
                raise FoveateError(
                    f"{format_spec(part)} acts after {depth} encoder blocks; tokens must leave after 1 to {self.read} "
                    f"of them, before the block that the projector reads"
                )
        for block, fields in tower_needs(part.needs).items():
            if block == LATEST:
                for depth in depths:
                    self.probe.watch(depth - 1, fields)
            elif block_number(block, self.read, len(self.blocks)) >= max(depths):
                raise FoveateError(
                    f"{format_spec(part)} acts after {max(depths)} encoder blocks and reads block {block}, which has "
                    f"not run by then; it can read blocks 0 to {max(depths) - 1}"
                )

    def install(self) -> None:
        """Start shortening."""
        if not self.stages:
            return
        if hasattr(self.model, "_foveate_encoding"):
            raise FoveateError(f"{format_spec(self.parts[0])} changes the encoding, so it cannot share it with others")
        for number, block in enumerate(self.blocks):
            hook = partial(self._before_block, number)
            self._hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        if self.merging is not None:
            self.merging.install()
        if not self.family.pointwise:
            # Whoever else listens to this block, transformers' own collector of hidden states above all, hears it full.
            self._hooks.append(self.blocks[self.read].register_forward_hook(self._put_back, prepend=True))

    def remove(self) -> None:
        """Stop; the encoder is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self.merging is not None:
            self.merging.remove()
        self.forget()

    def forget(self) -> None:
        """A call is over, well or not."""
        self._done = []
        self._images = self._mask = self._last = None
        if self.merging is not None:
            self.merging.attended = None
        self._lead_with(self.row.summary)

    def take(self) -> Encoded | None:
        """What the stages left of the pictures encoded since the last call; None without stages."""
        done = self._done
        self.forget()
        if not done:
            return None
        return Encoded(
            images=[image for one in done for image in one.images],
            index=[index for one in done for index in one.index],
            outputs=[index for one in done for index in one.outputs],
            beside=[blocks for one in done for blocks in one.beside],
            stopwatches=[stopwatch for one in done for stopwatch in one.stopwatches],
            put_back=done[0].put_back,
        )

    # -- hooks ----------------------------------------------------------------------------------------------------

    def _before_block(self, number: int, block: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if not self.is_active():
            return None
        hidden = arguments[0] if arguments else options["hidden_states"]
        if number == 0:
            self._images, self._mask = None, None
            self._lead_with(self.row.summary)
        for depth, stage, part in self.stages:
            if depth == number and not isinstance(part, Merger):
                self._start(hidden)
                hidden = self._act(depth, stage, part, hidden)
        if self.merging is not None and number < len(self.merging.blocks):
            self._start(hidden)
            hidden = self._accompanied(number, hidden)
        if self._images is None:
            return None
        options = {name: value for name, value in options.items() if name not in {"hidden_states", "attention_mask"}}
        return (hidden, self._mask, *arguments[2:]), options

    def _start(self, hidden: Tensor) -> None:
        """The first stage of an encoding: note what there is, (B, CLS + N, E)."""
        if self._images is not None:
            return
        patches = hidden[:, self._lead :]
        columns = torch.arange(patches.shape[1], device=hidden.device)
        grid = self.family.grid(self.model.config)
        fits = grid[0] * grid[1] == columns.numel()
        self._images = [Image(-1, columns, rows, grid if fits else None, stream=rows) for rows in patches]
        if not self.family.pointwise:
            for image in self._images:
                image.group = columns
        index, outputs = ([[columns] * len(self.blocks) for _ in self._images] for _ in range(2))
        beside = [0] * len(self._images)
        self._done.append(Encoded(self._images, index, outputs, beside, [], not self.family.pointwise))
        self._memories, self._last = {}, patches

    def _accompanied(self, number: int, hidden: Tensor) -> Tensor:
        """The stream with the companion that the merging method wants in this block."""
        assert self.merging is not None
        summary, lead = self.row.summary, self._lead
        if summary == 0 or not self.merging.any:
            return hidden
        before = hidden[:, summary] if lead > summary else None
        companion = self.merging.part.companion(number, hidden[:, 0], before)
        rows = [hidden[:, :summary], hidden[:, lead:]]
        if companion is not None:
            rows.insert(1, companion[:, None].to(hidden.dtype))
            self._done[-1].beside = [number + 1] * hidden.shape[0]
        if len(rows) - 2 != lead - summary:
            self._lead_with(summary + len(rows) - 2)
            self._set_mask(rows[-1].shape[1], hidden.dtype)
        return torch.cat(rows, dim=1)

    def _lead_with(self, tokens: int) -> None:
        self._lead = tokens
        self.probe.lead(tokens)

    def _merge(self, number: int, hidden: Tensor) -> Tensor:
        """Let the merging method act inside block `number`, between attention and MLP."""
        assert self.merging is not None
        return self._act(number, number, self.merging.part, hidden)

    def _act(self, depth: int, stage: int, part: Method, hidden: Tensor) -> Tensor:
        """Let one stage act on (B, lead + N, E) and return what is left of it."""
        assert self._images is not None
        for image, rows in zip(self._images, hidden[:, self._lead :], strict=True):
            image.stream = rows[: image.index.numel()]
        self._remember(hidden[:, self._lead :])
        self._choose(depth, stage, part, hidden)
        merged = isinstance(part, Merger)
        if merged and stage == self.read:  # a companion that the method keeps is one of the tokens by now
            hidden = torch.cat([hidden[:, : self.row.summary], hidden[:, self._lead :]], dim=1)
            self._lead_with(self.row.summary)
        longest = max(image.index.numel() for image in self._images)
        left = hidden.new_zeros(len(self._images), longest, hidden.shape[-1])
        for place, image in enumerate(self._images):
            assert image.stream is not None
            left[place, : image.index.numel()] = image.stream
        self._set_mask(longest, hidden.dtype)
        end = len(self.blocks) if self.family.pointwise else self.read + 1  # blocks behind it run on all patches again
        done = self._done[-1]
        for number, image in enumerate(self._images):
            start = depth + merged
            done.index[number][start:end] = [image.index] * (end - start)
            done.outputs[number][depth:end] = [image.index] * (end - depth)
        return torch.cat([hidden[:, : self._lead], left], dim=1)

    def _choose(self, depth: int, stage: int, part: Method, hidden: Tensor) -> None:
        assert self._images is not None
        images, left = self._images, self._done[-1]
        blocks = {} if isinstance(part, Merger) else self._blocks_before(depth)
        shown: list[Block] = []

        def show(rows: Sequence[int], wanted: set[str]) -> Block:
            """Of the block at work, in which tokens merge."""
            assert self.merging is not None and self.merging.attended is not None
            if not shown:
                shown.append(self.merging.attended.block(hidden, self._lead, self.row.summary, wanted))
            return _some(shown[0], images, rows)

        stages = sum(one is part for _, _, one in self.stages)
        at = Depth(stage, None, self._memories.setdefault(id(part), {}), show, stages)
        nothing = torch.zeros(0, dtype=torch.bool)
        left.stopwatches.append(Stopwatch(images[0].index.device))
        with left.stopwatches[-1]:
            choose([part], images, blocks, Prompt(lambda: nothing, nothing), None, at)

    def _blocks_before(self, depth: int) -> dict[int | str, Block]:
        """What the probe has seen, with the block right before as the latest; tokens at their places among all N."""
        left, numbers = self._done[-1], self.probe.numbers()
        seen: Mapping[int | str, Block] = self.probe.peek()
        blocks = {name: left.full(block, numbers[name]) for name, block in seen.items() if numbers[name] < depth}
        if depth - 1 in blocks:
            blocks[LATEST] = blocks[depth - 1]
        return blocks

    def _set_mask(self, longest: int, dtype: torch.dtype) -> None:
        """Keeps attention off the padding of ragged pictures and weighs tokens by size where a method wants that.

        In the form that the encoder's attention takes.
        """
        assert self._images is not None
        device, counts = self._images[0].index.device, [image.index.numel() for image in self._images]
        proportional = self.merging is not None and self.merging.part.proportional
        sizes = [image.size for image in self._images] if proportional else []
        weighed = any(size is not None for size in sizes)
        self._mask = None
        if min(counts) == longest and not weighed:
            return
        places = torch.arange(longest + self._lead, device=device)
        open_ = places < torch.tensor(counts, device=device)[:, None] + self._lead
        kind = self._kind()
        if weighed and self.merging is not None:
            self.merging.check(kind)
        if "flash" in kind:
            self._mask = open_
            return
        if kind == "sdpa" and not weighed:
            self._mask = open_[:, None, None, :]
            return
        bias = torch.zeros(open_.shape, device=device)
        for row, size in enumerate(sizes):
            if size is not None:
                bias[row, self._lead : self._lead + size.numel()] = size.log()
        self._mask = bias.to(dtype).masked_fill(~open_, torch.finfo(dtype).min)[:, None, None, :]

    def _kind(self) -> str:
        return str(getattr(self.tower.config, "_attn_implementation", "eager"))

    def _remember(self, patches: Tensor) -> None:
        """Note the hidden states of patches that may be about to leave; one that merged has its group's."""
        if self.family.pointwise or self._images is None or self._last is None:
            return
        rows = []
        for image, last, new in zip(self._images, self._last, patches, strict=True):
            new = new[: image.index.numel()]
            if image.size is not None and image.group is not None:
                last = new[image.group.clamp(min=0)].where(image.group[:, None] >= 0, last)
            rows.append(last.index_copy(0, image.index, new))
        self._last = torch.stack(rows)

    def _put_back(self, block: Any, arguments: Any, output: Any) -> Any:
        """The projector needs the whole grid: a patch that left stands there with its last hidden state."""
        if self._images is None or self._last is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        self._remember(hidden[:, self._lead :])
        full = torch.cat([hidden[:, : self._lead], self._last], dim=1)
        self._images = self._mask = None
        return (full, *output[1:]) if isinstance(output, tuple) else full


def _some(block: Block, images: Sequence[Image], rows: Sequence[int]) -> Block:
    """Of what the block at hand shows, the values of images that have as many tokens left: padding off."""
    count = images[rows[0]].index.numel()
    fields = {}
    for name, value in vars(block).items():
        if value is not None:
            chosen = value[torch.tensor(list(rows), device=value.device)]
            axis = TOKEN_AXIS.get(name)
            fields[name] = chosen if axis is None else chosen.narrow(axis, 0, count)
    return Block(**fields)
