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

from foveate.core import Block, FoveateError, Method
from foveate.families import Family
from foveate.runtime.choose import TOKEN_AXIS, Depth, Image, Prompt, choose
from foveate.runtime.probe import Probe, block_number, tower_needs
from foveate.runtime.record import Stopwatch
from foveate.spec import format as format_spec


@dataclass(eq=False)
class Encoded:
    """What the stages inside the encoder left of the pictures of one encoding."""

    images: list[Image]
    index: list[list[Tensor]]  # of each image, the patches (K,) that each block ran on, in their order
    stopwatches: list[Stopwatch]
    put_back: bool  # the encoder's output has all N patches again

    def lengths(self, number: int) -> list[int]:
        """Of one picture, how many patches each block ran on."""
        return [index.numel() for index in self.index[number]]

    def features(self, number: int, rows: Tensor) -> Tensor:
        """Of the projected rows of one picture, those that are its own and were kept. (N or longest, D) -> (K, D)."""
        image = self.images[number]
        return rows[image.index] if self.put_back else rows[: image.index.numel()]

    def full(self, block: Block, number: int) -> Block:
        """What a probe saw of block `number`, with its tokens at their places among all N; zero where one had left."""
        places = [index[number] for index in self.index]
        original = self.images[0].original
        fields = {}
        for name, value in vars(block).items():
            axis = TOKEN_AXIS.get(name)
            if value is not None and axis is not None:
                pairs = zip(value, places, strict=True)
                value = torch.stack([_spread(row, index, original, axis - 1) for row, index in pairs])
            fields[name] = value
        return Block(**fields)


def _spread(values: Tensor, index: Tensor, original: int, axis: int) -> Tensor:
    """Padding off, and each of the K values of `index` to its place among `original` ones."""
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

    def __post_init__(self) -> None:
        self.tower, self.row = self.family.tower_of(self.model)
        self.blocks = self.row.blocks_of(self.tower)
        self.stages = sorted(
            (
                (depth, number, part)
                for part in self.parts
                for number, depth in enumerate(part.depths(len(self.blocks)))
            ),
            key=lambda stage: stage[0],
        )
        self.read = self.family.read_block(self.model)
        layer = getattr(self.model.config, "vision_feature_layer", 0)
        if self.stages and not isinstance(layer, int):
            raise FoveateError(
                f"{format_spec(self.parts[0])}: a projector that reads several blocks cannot be shortened"
            )
        for part in self.parts:
            self._check(part, [depth for depth, _, one in self.stages if one is part])

    def _check(self, part: Method, depths: list[int]) -> None:
        for depth in depths:
            if not 1 <= depth <= self.read:
                raise FoveateError(
                    f"{format_spec(part)} acts after {depth} encoder blocks; tokens must leave after 1 to {self.read} "
                    f"of them, before the block that the projector reads"
                )
        for block in tower_needs(part.needs):
            if block_number(block, self.read, len(self.blocks)) >= max(depths):
                raise FoveateError(
                    f"{format_spec(part)} acts after {max(depths)} encoder blocks and reads block {block}, which has "
                    f"not run by then; it can read blocks 0 to {max(depths) - 1}"
                )

    def install(self) -> None:
        """Start shortening."""
        if not self.stages:
            return
        for number, block in enumerate(self.blocks):
            hook = partial(self._before_block, number)
            self._hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        if not self.family.pointwise:
            # Whoever else listens to this block, transformers' own collector of hidden states above all, hears it full.
            self._hooks.append(self.blocks[self.read].register_forward_hook(self._put_back, prepend=True))

    def remove(self) -> None:
        """Stop; the encoder is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.forget()

    def forget(self) -> None:
        """A call is over, well or not."""
        self._done = []
        self._images = self._mask = self._last = None

    def take(self) -> Encoded | None:
        """What the stages left of the pictures encoded since the last call; None without stages."""
        done = self._done
        self.forget()
        if not done:
            return None
        return Encoded(
            images=[image for one in done for image in one.images],
            index=[index for one in done for index in one.index],
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
        for depth, stage, part in self.stages:
            if depth == number:
                hidden = self._run(depth, stage, part, hidden)
        if self._images is None:
            return None
        options = {name: value for name, value in options.items() if name not in {"hidden_states", "attention_mask"}}
        return (hidden, self._mask, *arguments[2:]), options

    def _choose(self, depth: int, stage: int, part: Method, images: list[Image]) -> None:
        left, numbers = self._done[-1], self.probe.numbers()
        seen: Mapping[int | str, Block] = self.probe.peek()
        blocks = {name: left.full(block, numbers[name]) for name, block in seen.items() if numbers[name] < depth}
        nothing = torch.zeros(0, dtype=torch.bool)
        at = Depth(stage, None, self._memories.setdefault(id(part), {}), lambda *_: Block())
        left.stopwatches.append(Stopwatch(images[0].index.device))
        with left.stopwatches[-1]:
            choose([part], images, blocks, Prompt(lambda: nothing, nothing), None, at)

    def _run(self, depth: int, stage: int, part: Method, hidden: Tensor) -> Tensor:
        """Let one stage act on (B, CLS + N, E) and return what is left of it."""
        summary = self.row.summary
        cls, patches = hidden[:, :summary], hidden[:, summary:]
        if self._images is None:
            columns = torch.arange(patches.shape[1], device=hidden.device)
            grid = self.family.grid(self.model.config)
            fits = grid[0] * grid[1] == columns.numel()
            self._images = [Image(-1, columns, rows, grid if fits else None, stream=rows) for rows in patches]
            index = [[columns] * len(self.blocks) for _ in self._images]
            self._done.append(Encoded(self._images, index, [], not self.family.pointwise))
            self._memories, self._last = {}, patches
        else:
            for image, rows in zip(self._images, patches, strict=True):
                image.stream = rows[: image.index.numel()]
            self._remember(patches)
        self._choose(depth, stage, part, self._images)
        longest = max(image.index.numel() for image in self._images)
        left = hidden.new_zeros(len(self._images), longest, hidden.shape[-1])
        for place, image in enumerate(self._images):
            assert image.stream is not None
            assert image.stream is not None
            left[place, : image.index.numel()] = image.stream
        self._mask = self._key_mask(longest, hidden.dtype)
        end = len(self.blocks) if self.family.pointwise else self.read + 1  # blocks behind it run on all patches again
        for image, seen in zip(self._images, self._done[-1].index, strict=True):
            seen[depth:end] = [image.index] * (end - depth)
        return torch.cat([cls, left], dim=1)

    def _key_mask(self, longest: int, dtype: torch.dtype) -> Tensor | None:
        """Keeps attention off the padding of ragged pictures, in the form that the encoder's attention takes."""
        assert self._images is not None
        counts = torch.tensor([image.index.numel() for image in self._images], device=self._images[0].index.device)
        if bool((counts == longest).all()):
            return None
        places = torch.arange(longest + self.row.summary, device=counts.device)
        open_ = places < (counts + self.row.summary)[:, None]
        kind = str(getattr(self.tower.config, "_attn_implementation", "eager"))
        if "flash" in kind:
            return open_
        open_ = open_[:, None, None, :]
        if kind == "sdpa":
            return open_
        return torch.zeros_like(open_, dtype=dtype).masked_fill(~open_, torch.finfo(dtype).min)

    def _remember(self, patches: Tensor) -> None:
        """Note the hidden states of patches that may be about to leave."""
        if self.family.pointwise or self._images is None or self._last is None:
            return
        rows = []
        for image, last, new in zip(self._images, self._last, patches, strict=True):
            rows.append(last.index_copy(0, image.index, new[: image.index.numel()]))
        self._last = torch.stack(rows)

    def _put_back(self, block: Any, arguments: Any, output: Any) -> Any:
        """The projector needs the whole grid: a patch that left stands there with its last hidden state."""
        if self._images is None or self._last is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        self._remember(hidden[:, self.row.summary :])
        full = torch.cat([hidden[:, : self.row.summary], self._last], dim=1)
        self._images = self._mask = None
        return (full, *output[1:]) if isinstance(output, tuple) else full
