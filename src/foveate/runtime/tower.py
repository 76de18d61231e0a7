"""Shortens the sequence inside the vision encoder: later blocks run on fewer patches.

Shapes: B images, N patches before any stage, K of them left (padded to the longest of the batch), E encoder width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.core import Block, FoveateError, Method
from foveate.families import Family
from foveate.runtime.choose import TOKEN_AXIS, Depth, Image, Prompt, choose
from foveate.runtime.probe import Probe
from foveate.runtime.record import Stopwatch
from foveate.spec import format as format_spec


@dataclass(eq=False)
class Encoded:
    """What the stages inside the encoder left of the pictures of one encoding."""

    images: list[Image]
    lengths: list[list[int]]  # of each image, the patches that each block ran on
    stopwatch: Stopwatch
    put_back: bool  # the encoder's output has all N patches again

    def features(self, number: int, rows: Tensor) -> Tensor:
        """Of the projected rows of one picture, those that are its own and were kept. (N or longest, D) -> (K, D)."""
        image = self.images[number]
        return rows[image.index] if self.put_back else rows[: image.index.numel()]

    def full(self, block: Block, first: int, number: int) -> Block:
        """What a probe saw of a block behind the first stage, with its tokens at their places among all N.

        Args:
            first: blocks that ran before the stage; `number` is the block's own.
        """
        if number < first:
            return block
        fields = {}
        for name, value in vars(block).items():
            axis = TOKEN_AXIS.get(name)
            if value is not None and axis is not None and value.shape[axis] != self.images[0].original:
                rows = [self._spread(row, image, axis - 1) for row, image in zip(value, self.images, strict=True)]
                value = torch.stack(rows)
            fields[name] = value
        return Block(**fields)

    @staticmethod
    def _spread(values: Tensor, image: Image, axis: int) -> Tensor:
        shape = list(values.shape)
        shape[axis] = image.original
        own = values.narrow(axis, 0, image.index.numel())
        return values.new_zeros(shape).index_copy(axis, image.index, own)


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
        for depth, _, part in self.stages:
            if not 1 <= depth <= self.read:
                raise FoveateError(
                    f"{format_spec(part)} acts after {depth} encoder blocks; tokens must leave after 1 to {self.read} "
                    f"of them, before the block that the projector reads"
                )
        layer = getattr(self.model.config, "vision_feature_layer", 0)
        if self.stages and not isinstance(layer, int):
            raise FoveateError(
                f"{format_spec(self.parts[0])}: a projector that reads several blocks cannot be shortened"
            )

    def install(self) -> None:
        """Start shortening."""
        if not self.stages:
            return
        for number, block in enumerate(self.blocks):
            hook = partial(self._before_block, number)
            self._hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        if not self.family.pointwise:
            self._hooks.append(self.blocks[self.read].register_forward_hook(self._put_back))

    def remove(self) -> None:
        """Stop; the encoder is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.forget()

    def forget(self) -> None:
        """A call is over, well or not."""
        self._done.clear()
        self._images = self._mask = self._last = None

    def take(self, first: int = 0) -> Encoded | None:
        """What the stages left of the pictures encoded since the last call; None without stages."""
        done, self._done = self._done, []
        self._images = self._mask = self._last = None
        if len(done) > 1:
            images = [image for one in done for image in one.images]
            lengths = [length for one in done for length in one.lengths]
            return dataclasses.replace(done[0], images=images, lengths=lengths)
        return done[0] if done else None

    @property
    def first_depth(self) -> int:
        """Blocks that run before the first stage."""
        return self.stages[0][0]

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

    @torch.no_grad()
    def _choose(self, depth: int, stage: int, part: Method, images: list[Image]) -> None:
        blocks: Mapping[int | str, Block] = self.probe.peek()
        if self._done and self._done[-1].images is images and depth > self.first_depth:
            blocks = {
                name: self._done[-1].full(block, self.first_depth, int(name))
                for name, block in blocks.items()
                if isinstance(name, int)
            }
        nothing = torch.zeros(0, dtype=torch.bool)
        at = Depth(stage, None, {}, lambda *_: Block())
        choose([part], images, blocks, Prompt(lambda: nothing, nothing), None, at)

    def _run(self, depth: int, stage: int, part: Method, hidden: Tensor) -> Tensor:
        """Let one stage act on (B, CLS + N, E) and return what is left of it."""
        summary = self.row.summary
        cls, patches = hidden[:, :summary], hidden[:, summary:]
        if self._images is None:
            columns = torch.arange(patches.shape[1], device=hidden.device)
            grid = self.family.grid(self.model.config)
            fits = grid[0] * grid[1] == columns.numel()
            self._images = [Image(-1, columns, rows, grid if fits else None) for rows in patches]
            lengths = [[columns.numel()] * len(self.blocks) for _ in self._images]
            self._done.append(Encoded(self._images, lengths, Stopwatch(hidden.device), not self.family.pointwise))
            self._last = patches
        else:
            for image, rows in zip(self._images, patches, strict=True):
                image.features = rows[: image.index.numel()]
            self._remember(patches)
        with self._done[-1].stopwatch:
            self._choose(depth, stage, part, self._images)
        longest = max(image.index.numel() for image in self._images)
        left = hidden.new_zeros(len(self._images), longest, hidden.shape[-1])
        for place, image in enumerate(self._images):
            left[place, : image.index.numel()] = image.features
        self._mask = self._key_mask(longest, hidden.dtype)
        for image, seen in zip(self._images, self._done[-1].lengths, strict=True):
            seen[depth:] = [image.index.numel()] * (len(seen) - depth)
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
