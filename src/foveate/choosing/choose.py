"""Runs stages on the images of one call: collects their Signals, asks the method, checks its answer, applies it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from foveate.core import Block, FoveateError, Grid, Method, Selection, Signals, described, names_of
from foveate.forms import Merger
from foveate.ops.subsets import split_by_size
from foveate.spec import format as format_spec
from foveate.trace import StageRecord

JOINT = names_of(Signals, room="joint")
"""Signals that need question and picture in CLIP's joint space."""

TOKEN_AXIS = {name: what.axes.index("N") for name, what in described(Block).items() if "N" in what.axes}
"""The axis of each Block field that counts visual tokens; the others hold one value per image."""


@dataclass(eq=False)
class Image:
    """One image on its way to the decoder. N tokens before any stage, K of them left."""

    row: int  # of the prompt batch
    columns: Tensor  # (N,) columns of its placeholders in that row
    features: Tensor  # (K, D), rows of `index`
    grid: Grid | None
    index: Tensor = field(init=False)  # (K,) original indices
    stream: Tensor | None = None  # (K, E) inside encoder or decoder: the block's own hidden states, rows of `index`
    extra: Tensor | None = None  # (K,) bool
    whole: bool = True  # no stage has acted yet
    merged: bool = False  # its features, or inside a model its stream, are no longer those it came with
    adapted: bool = False  # an adaptive stage has acted
    stages: list[StageRecord] = field(default_factory=list)
    # Of each tile, the patches that each encoder block ran on; None where that is all of them.
    encoded: list[list[int]] | None = None
    projected: int | None = None  # tokens that the projector mapped; None where that is all of them
    size: Tensor | None = None  # (K,) patches in each token, inside the encoder; None while it is one
    group: Tensor | None = None  # (N,) place of the token that a patch is in, -1 once dropped; None where nobody asks
    tile: Tensor | None = None  # (N,) tile of each original token, 0 = base; None without tiles
    patches: tuple[int, ...] | None = (
        None  # that the encoder saw of it, tile by tile; None where all images have as many
    )
    # Inside the encoder, where a picture's tiles are images of their own: its place among those that have tokens, and
    # how many each has; None for a picture that is one tile.
    share: tuple[int, tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        self.index = torch.arange(self.original, device=self.features.device)

    @property
    def original(self) -> int:
        """N, the tokens before any stage."""
        return self.columns.numel()

    @property
    def tiling(self) -> tuple[int, ...]:
        """Original tokens of each tile; empty without tiles."""
        return () if self.tile is None else tuple(self.tile.bincount().tolist())


class Written(Protocol):
    """What a question is in CLIP's joint space: `text` (B, Q, C), `words` (B, W, C), `mask` (B, W)."""

    @property
    def text(self) -> Tensor: ...

    @property
    def words(self) -> Tensor: ...

    @property
    def mask(self) -> Tensor: ...


class JointSpace(Protocol):
    """Where a method compares question and picture."""

    def text(self, ids: Tensor, is_text: Tensor, images: Sequence[Image]) -> Written:
        """The question about each image of a prompt (R, S)."""

    def image(self, hidden: Tensor) -> Tensor:
        """The patches of B pictures, (B, N, E) -> (B, N, C)."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the methods may read of the text. B rows of S columns."""

    embeddings: Callable[[], Tensor]  # (B, S, D)
    is_text: Tensor  # (B, S) neither visual nor padding
    joint_space: JointSpace | None = None  # where a method compares question and picture
    ids: Tensor | None = None  # (B, S)


@dataclass(frozen=True, eq=False)
class Depth:
    """A stage inside the decoder or the encoder."""

    stage: int
    layer: int | None  # decoder blocks that run in full before it; None inside the encoder
    memory: dict[tuple[int, ...], dict[str, Any]]  # by the images that are asked about together
    block: Callable[[Sequence[int], set[str]], Block]  # images and wanted fields -> what the block at hand shows
    stages: int = 1


def choose(
    parts: Sequence[Method],
    images: Sequence[Image],
    blocks: Mapping[int | str, Block],
    prompt: Prompt,
    project: Callable[[Tensor], Tensor] | None,
    at: Depth | None = None,
) -> None:
    """Let every part act on every image in turn; afterwards each image holds what is left of it.

    Args:
        blocks: what the probe saw, B = the images in order, N = their original tokens.
        project: maps encoded tokens (K, E) to decoder tokens (K, D); None where the projector is not pointwise.
        at: the stage inside the decoder or the encoder; None between them.
    """
    for part in parts:
        stage = 0 if at is None or isinstance(part, Merger) else at.stage
        numbers = [budget_of(part, image, stage) for image in images]
        for group in _groups(images, numbers):
            _ask(part, images, group, numbers[group[0]], _Sources(blocks, prompt, project, at))
        for image in images:
            image.adapted = image.adapted or part.adaptive


def _groups(images: Sequence[Image], keeps: Sequence[int | None]) -> list[list[int]]:
    """Numbers of the images that share original count, grid, tiles, budget and what each stage left: one Signals each.

    Images that parted at one stage stay apart, even where a later one leaves as many of both: they have other memories.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, (image, keep) in enumerate(zip(images, keeps, strict=True)):
        history = tuple(stage.after for stage in image.stages)
        key = (image.original, image.index.numel(), history, image.grid, image.tiling, image.whole, keep)
        groups.setdefault(key, []).append(place)
    return list(groups.values())


@dataclass(frozen=True, eq=False)
class _Sources:
    """Where the signals of a stage come from."""

    blocks: Mapping[int | str, Block]
    prompt: Prompt
    project: Callable[[Tensor], Tensor] | None
    at: Depth | None


def budget_of(part: Method, image: Image, stage: int = 0) -> int | None:
    """The tokens that a stage is to leave of this image; None where the method decides.

    After an adaptive stage a budget is a ceiling: it is lowered to what that stage happened to leave. A tile of a
    picture has its part of the picture's.

    Raises:
        FoveateError: a picture's budget is too small for its tiles.
    """
    if part.adaptive or getattr(part, "keep", None) is None:
        return None
    if image.share is not None:
        count = _of_tile(part, image.share, stage)
    else:
        asked = part.asked(image.original, image.grid, max(1, len(image.tiling)))
        count = None if asked is None else asked[stage]
    return count if count is None or not image.adapted else min(count, image.index.numel())


def _of_tile(part: Method, share: tuple[int, tuple[int, ...]], stage: int) -> int | None:
    """The part of a picture's budget that falls to one of its tiles, in proportion to their tokens."""
    place, sizes = share
    asked = part.asked(sum(sizes), None, len(sizes))
    if asked is None:
        return None
    least = 1 + (part.beside if isinstance(part, Merger) else 0)
    for count in asked:  # of all stages, before the first has acted
        if count < least * len(sizes):
            raise FoveateError(
                f"{format_spec(part)} asks for {count} tokens of a picture whose {len(sizes)} tiles keep {least} each "
                f"inside the encoder; the least is keep={least * len(sizes)}"
            )
    return _shares(asked[stage], sizes, least)[place]


@lru_cache(maxsize=1024)
def _shares(total: int, sizes: tuple[int, ...], least: int) -> tuple[int, ...]:
    """`split_by_size`, which every tile asks for, and a method that merges once for each block."""
    return tuple(split_by_size(total, sizes, least))


def _ask(part: Method, images: Sequence[Image], places: Sequence[int], keep: int | None, sources: _Sources) -> None:
    """Let a method choose `keep` tokens of each of these images, or as many as it decides."""
    group, name = [images[place] for place in places], format_spec(part)
    signals = _signals(part, group, places, keep, sources)
    # Between the stages of a part inside the encoder, what a later one reads has not run yet.
    lacking = [] if part.site == "tower" else signals.lacking(part.needs)
    if lacking:
        raise FoveateError(f"{name} reads {', '.join(lacking)}, which this call does not show; use another method")
    # A caller's autocast is for the model: scores and greedy loops need the float32 that they ask for.
    with torch.autocast(signals.index.device.type, enabled=False):
        selection = part.select(signals)
    if not isinstance(selection, Selection):
        raise FoveateError(f"{name} answered with {type(selection).__name__} where a Selection is needed")
    selection.check(signals.original, len(group), name)
    for place, image in enumerate(group):
        _apply(name, part, selection, place, image, sources)


def _signals(
    part: Method, group: Sequence[Image], numbers: Sequence[int], keep: int | None, sources: _Sources
) -> Signals:
    index = torch.stack([image.index for image in group])
    first = group[0]
    rows = torch.tensor(numbers, device=index.device)
    more: dict[str, Any] = {}
    if any(need in {"text", "text_mask", "after_image"} for need in part.needs):
        more = _text(sources.prompt, group)
    blocks = {name: narrow(block, rows, index) for name, block in sources.blocks.items()}
    if any(need in JOINT for need in part.needs):
        more.update(_joint(sources.prompt, group, blocks["read"]))
    if sources.at is not None:
        wanted = {need.partition(".")[2] for need in part.needs if need.startswith("decoder.")}
        memory = sources.at.memory.setdefault(tuple(numbers), {})
        decoder = sources.at.block(numbers, wanted) if wanted else None
        more.update(decoder=decoder, stage=sources.at.stage, stages=sources.at.stages, memory=memory)
        if isinstance(part, Merger):
            wanted = {need.rpartition(".")[2] for need in part.needs if need.startswith("tower.latest.")}
            blocks["latest"] = sources.at.block(numbers, wanted)
            more["size"] = torch.stack([_size(image) for image in group])
    return Signals(
        original=first.original,
        index=index,
        keep=keep,
        grid=first.grid if first.whole else None,
        tile=None if first.tile is None else torch.stack([_tile(image) for image in group]),
        features=torch.stack([image.features for image in group]) if "features" in part.needs else None,
        tower=blocks,
        **more,
    )


def _tile(image: Image) -> Tensor:
    """(K,) tile of each token that is left."""
    assert image.tile is not None
    return image.tile.to(image.index.device)[image.index]


def _size(image: Image) -> Tensor:
    """(K,) patches in each token."""
    return torch.ones(image.index.shape, device=image.index.device) if image.size is None else image.size


def narrow(block: Block, rows: Tensor, index: Tensor) -> Block:
    """The block's values for some images, and of those the tokens that are still there."""
    fields = {}
    for name, value in vars(block).items():
        if value is None:
            continue
        rows, index = rows.to(value.device), index.to(value.device)
        value = value[rows]
        axis = TOKEN_AXIS.get(name)
        if axis is not None and index.shape[1] != value.shape[axis]:
            shape = [1] * value.ndim
            shape[0], shape[axis] = index.shape
            expanded = index.view(shape).expand(*value.shape[:axis], index.shape[1], *value.shape[axis + 1 :])
            value = value.gather(axis, expanded)
        elif axis is not None and not bool((index[:, 1:] > index[:, :-1]).all()):
            value = torch.stack([row.index_select(axis - 1, order) for row, order in zip(value, index, strict=True)])
        fields[name] = value
    return Block(**fields)


def _text(prompt: Prompt, group: Sequence[Image]) -> dict[str, Tensor]:
    """Embeddings of each image's row without visual tokens and padding, right-padded to (B, T)."""
    embeddings = prompt.embeddings()
    columns = [prompt.is_text[image.row].nonzero().squeeze(-1) for image in group]
    longest = max(one.numel() for one in columns)
    text = embeddings.new_zeros(len(group), longest, embeddings.shape[-1])
    mask = torch.zeros(len(group), longest, dtype=torch.bool, device=text.device)
    after = torch.zeros_like(mask)
    for place, (image, places) in enumerate(zip(group, columns, strict=True)):
        count = places.numel()
        text[place, :count] = embeddings[image.row, places]
        mask[place, :count] = True
        after[place, :count] = places > image.columns[-1]
    return {"text": text, "text_mask": mask, "after_image": after}


def _joint(prompt: Prompt, group: Sequence[Image], read: Block) -> dict[str, Tensor]:
    """Both modalities in CLIP's joint space."""
    assert prompt.joint_space is not None and prompt.ids is not None and read.hidden is not None
    written = prompt.joint_space.text(prompt.ids, prompt.is_text, group)
    image = prompt.joint_space.image(read.hidden)
    return {"image_clip": image, "text_clip": written.text, "word_clip": written.words, "word_mask": written.mask}


def _apply(
    name: str,
    part: Method,
    selection: Selection,
    place: int,
    image: Image,
    sources: _Sources,
) -> None:
    kept = selection.indices[place].to(image.index.device)
    before = image.index.numel()
    if sources.at is not None:
        _apply_stream(name, selection, place, kept, image)
    elif selection.features is None:
        image.features = image.features[_positions(name, kept, image)]
    else:
        features = selection.features[place]
        if selection.space == "encoded":
            if sources.project is None:
                raise FoveateError(
                    f"{name} returns encoded tokens, but this family's projector merges neighbours and cannot map "
                    "single ones; methods that return projected tokens, or none, work"
                )
            features = sources.project(features)
        image.features = features.to(image.features.dtype)
        image.merged = True
    image.extra = None if selection.extra is None else selection.extra[place]
    image.index = kept
    image.whole = image.whole and kept.numel() == image.original and selection.ordered
    layer = None if sources.at is None else sources.at.layer
    last = image.stages[-1] if image.stages else None
    if isinstance(part, Merger) and sources.at and sources.at.stage and last is not None and last.method == name:
        before = image.stages.pop().before  # the merges of all blocks count as one stage
    # Between encoder and decoder no method has modules, and pictures may come without a prompt.
    flops = 0 if layer is None else part.flops(before, int(sources.prompt.is_text[image.row].sum()))
    kept_cpu = kept.detach().cpu()
    image.stages.append(StageRecord(name, part.site, layer, before, kept.numel(), kept_cpu, image.extra, flops))


def _apply_stream(name: str, selection: Selection, place: int, kept: Tensor, image: Image) -> None:
    """Inside encoder or decoder: every kept token is one of the block's, with its own hidden state or a new one."""
    assert image.stream is not None
    if selection.features is not None and selection.space == "encoded":
        raise FoveateError(f"{name} returns tokens for the projector where only the block's own stream fits")
    extra = None if selection.groups is None or selection.extra is None else selection.extra[place].to(kept.device)
    positions = _positions(name, kept, image, extra)
    image.features = image.features[positions]
    _regroup(name, selection, place, positions, image)
    if selection.features is None:
        image.stream = image.stream[positions]
    else:
        image.stream, image.merged = selection.features[place].to(image.stream.dtype), True


def _positions(name: str, kept: Tensor, image: Image, extra: Tensor | None = None) -> Tensor:
    """Where the kept original indices stand among the tokens that are left; 0 for `extra` ones, which stand nowhere."""
    place = torch.full((image.original,), -1, device=kept.device)
    place[image.index] = torch.arange(image.index.numel(), device=kept.device)
    positions = place[kept]
    if extra is not None:
        positions = positions.masked_fill(extra, 0)
    if bool((positions < 0).any()):
        gone = kept[positions < 0][0].item()
        raise FoveateError(f"{name} keeps token {gone}, which an earlier stage has dropped")
    return positions


def _regroup(name: str, selection: Selection, place: int, positions: Tensor, image: Image) -> None:
    """Note how many patches each output token stands for, and which one a patch is in."""
    if selection.groups is None and image.size is None and image.group is None:
        return
    present, left = image.index.numel(), positions.numel()
    if selection.groups is None:
        image.size = None if image.size is None else image.size[positions]
        went = torch.full((present,), -1, device=positions.device)
        went[positions] = torch.arange(left, device=positions.device)
    else:
        went = selection.groups[place].to(positions.device)
        if went.numel() != present:
            raise FoveateError(f"{name} says where {went.numel()} tokens went, but {present} were there")
        if left < present or image.size is not None:
            sizes = _size(image).new_zeros(left + 1).index_add(0, went.where(went >= 0, left), _size(image))
            image.size = sizes[:left].clamp(min=1.0)
    if image.group is not None:
        image.group = went[image.group.clamp(min=0)].where(image.group >= 0, -1)
