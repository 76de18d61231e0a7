"""Runs stages on the tokens of one call: collects their Signals, asks the method, checks its answer, applies it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from foveate.choosing.images import Image, TileTokens, Tokens
from foveate.choosing.later import Later
from foveate.core import Block, FoveateError, Method, Selection, Signals, described, names_of
from foveate.ops.device import Complaints, beside, noting, on_device, read_together
from foveate.ops.subsets import split_by_size
from foveate.spec import format as format_spec
from foveate.trace import StageRecord

JOINT = names_of(Signals, room="joint")
"""Signals that need question and picture in CLIP's joint space."""

PICTURE = frozenset(names_of(Signals, room="picture"))
"""Signals that show what the encoder is given."""

TOKEN_AXIS = {name: what.axes.index("N") for name, what in described(Block).items() if "N" in what.axes}
"""The axis of each Block field that counts visual tokens; the others hold one value per image."""

T = TypeVar("T", bound=Tokens)


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
    is_text: Tensor  # (B, S) neither visual nor padding, and no answer that is taught; on the host
    joint_space: JointSpace | None = None  # where a method compares question and picture
    ids: Tensor | None = None  # (B, S) on the host
    taught: Tensor | None = None  # (B,) bool on the host: whether an answer follows what may be read; None without one


@dataclass(frozen=True, eq=False)
class Depth:
    """A stage inside the decoder or the encoder."""

    stage: int
    layer: int | None  # decoder blocks that run in full before it; None inside the encoder
    memory: dict[tuple[int, ...], dict[str, Any]]  # by the images that are asked about together
    block: Callable[[Sequence[int], set[str]], Block]  # images and wanted fields -> what the block at hand shows
    stages: int = 1
    # Before the encoder: images and "pixels" or "normalised" -> (K, P) of each.
    pixels: Callable[[Sequence[int], str], Sequence[Tensor]] | None = None


@dataclass(frozen=True, eq=False)
class Outcome(Generic[T]):
    """What a stage inside encoder or decoder left of some tokens."""

    tokens: T
    features: Tensor | None  # (K, E) their hidden states, where they merged; else each has its own


def choose(
    parts: Sequence[Method],
    images: Sequence[Image],
    blocks: Mapping[int | str, Block],
    prompt: Prompt,
    project: Callable[[Tensor], Tensor] | None,
) -> list[Image]:
    """Let every part that acts between encoder and decoder act on every image in turn; what is left of each.

    Args:
        blocks: what the probe saw, B = the images in order, N = their original tokens.
        project: maps encoded tokens (K, E) to decoder tokens (K, D); None where the projector is not pointwise.
    """
    left = list(images)
    for part in parts if images else ():
        sources = _Sources(blocks, prompt, None, left[0].features.device)
        answers = _ask(part, left, sources)
        left = [_shortened(part, answer, image, project) for answer, image in zip(answers, left, strict=True)]
    return left


def choose_inside(
    part: Method,
    images: Sequence[T],
    like: Tensor,
    blocks: Mapping[int | str, Block],
    prompt: Prompt,
    at: Depth,
    later: Later | None = None,
) -> list[Outcome[T]]:
    """Let one stage inside the decoder or the encoder act on every image.

    Args:
        later: where a method merges, notes what it answers, to be read and refused behind its last block.
        like: has device and dtype of the hidden states.
        blocks: as `choose` has them.
    """
    answers = _ask(part, images, _Sources(blocks, prompt, at, like.device, later))
    return [
        _shortened_inside(part, answer, image, like.dtype, prompt, at, later)
        for answer, image in zip(answers, images, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Sources:
    """Where the signals of a stage come from."""

    blocks: Mapping[int | str, Block]
    prompt: Prompt
    at: Depth | None
    device: torch.device  # that has the tokens
    later: Later | None = None


@dataclass(frozen=True, eq=False)
class _Answer:
    """What a method decided for one image; see Selection."""

    kept: Tensor  # on the host, as masks and groups are, unless they are read later
    features: Tensor | None
    extra: Tensor | None
    groups: Tensor | None
    encoded: bool  # the features are still to be projected
    ordered: bool
    scores: Tensor | None  # for those who look on; where the method left them


def _groups(images: Sequence[Tokens], keeps: Sequence[int | None]) -> list[list[int]]:
    """Numbers of the images that share original count, grid, tiles, budget and what each stage left: one Signals each.

    Images that parted at one stage stay apart, even where a later one leaves as many of both: they have other memories.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, (image, keep) in enumerate(zip(images, keeps, strict=True)):
        history = tuple(stage.after for stage in image.stages)
        tiles = image.tile is None, image.tiling
        key = (image.original, image.index.numel(), history, image.grid, tiles, image.untouched, keep)
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def budget_of(part: Method, image: Tokens, stage: int = 0) -> int | None:
    """The tokens that a stage is to leave of this image; None where the method decides.

    After an adaptive stage a budget is a ceiling: it is lowered to what that stage happened to leave. A tile of a
    picture has its part of the picture's.

    Raises:
        FoveateError: a picture's budget is too small for its tiles.
    """
    if part.adaptive or getattr(part, "keep", None) is None:
        return None
    if isinstance(image, TileTokens) and image.share is not None:
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
    least = 1 + part.beside
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


# ---------------------------------------------------------------------------------------------------------------------
# asking


def _ask(part: Method, images: Sequence[Tokens], sources: _Sources) -> list[_Answer]:
    """What a method decides for each image, those that are alike asked about together."""
    stage = 0 if sources.at is None or part.merging else sources.at.stage
    keeps = [budget_of(part, image, stage) for image in images]
    name, later = format_spec(part), sources.later
    complaints = Complaints() if later is None else later.complaints
    groups, given = _groups(images, keeps), []
    for numbers in groups:
        group = [images[number] for number in numbers]
        given.append(_select(part, name, _signals(part, group, numbers, keeps[numbers[0]], sources), complaints))
    answers: dict[int, _Answer] = {}
    originals = [images[numbers[0]].original for numbers in groups]
    if later is None:
        # Images of all sizes together: each size would wait for the device.
        counts, *read = read_together([complaints.counts(), *(selection.unread() for selection in given)])
        complaints.refuse(counts)
        checked = [
            one.checked(values, original, name) for one, values, original in zip(given, read, originals, strict=True)
        ]
    else:
        checked = [later.add(one, original, name) for one, original in zip(given, originals, strict=True)]
    for numbers, selection in zip(groups, checked, strict=True):
        for place, number in enumerate(numbers):
            features, extra, groups_ = (
                None if rows is None else rows[place]
                for rows in (selection.features, selection.extra, selection.groups)
            )
            encoded = selection.features is not None and selection.space == "encoded"
            scores = None if selection.scores is None else selection.scores[place].detach()
            kept, ordered = selection.indices[place], selection.ordered
            answers[number] = _Answer(kept, features, extra, groups_, encoded, ordered, scores)
    return [answers[number] for number in range(len(images))]


def _select(part: Method, name: str, signals: Signals, complaints: Complaints) -> Selection:
    """What a method answers, in so far as that can be checked without waiting for the device."""
    # Between the stages of a part inside the encoder, what a later one reads has not run yet.
    lacking = [] if part.site == "tower" else signals.lacking(part.needs)
    if lacking:
        raise FoveateError(f"{name} reads {', '.join(lacking)}, which this call does not show; use another method")
    # A caller's autocast is for the model: scores and greedy loops need the float32 that they ask for.
    with torch.autocast(signals.index.device.type, enabled=False), noting(complaints):
        selection = part.select(signals)
    if not isinstance(selection, Selection):
        raise FoveateError(f"{name} answered with {type(selection).__name__} where a Selection is needed")
    selection.check_form(signals.shape[0], name)
    return selection


def _signals(
    part: Method, group: Sequence[Tokens], numbers: Sequence[int], keep: int | None, sources: _Sources
) -> Signals:
    index = torch.stack([tokens.index for tokens in group])
    images = [tokens for tokens in group if isinstance(tokens, Image)]
    first, rows, device = group[0], torch.tensor(numbers), sources.device
    tiles = None if first.tile is None else torch.stack([_tile(tokens) for tokens in group])
    more: dict[str, Any] = {}
    if any(need in {"text", "text_mask", "after_image"} for need in part.needs):
        more = _text(sources.prompt, images)
    blocks = {name: narrow(block, rows, index) for name, block in sources.blocks.items()}
    if any(need in JOINT for need in part.needs):
        more.update(_joint(sources.prompt, images, blocks["read"]))
    if sources.at is not None:
        more.update(_signals_inside(part, group, numbers, blocks, sources))
    return Signals(
        original=first.original,
        index=on_device(index, device),
        keep=keep,
        grid=first.grid if first.untouched else None,
        tile=None if tiles is None else on_device(tiles, device),
        # Where tokens merge, only the device knows which are left.
        tile_counts=None if tiles is None or part.merging else _tile_counts(tiles),
        features=torch.stack([image.features for image in images]) if "features" in part.needs else None,
        tower=blocks,
        **more,
    )


def _signals_inside(
    part: Method, group: Sequence[Tokens], numbers: Sequence[int], blocks: dict[int | str, Block], sources: _Sources
) -> dict[str, Any]:
    """What a stage inside decoder or encoder sees besides; the block in which tokens merge joins `blocks`."""
    at = sources.at
    assert at is not None
    wanted = {need.partition(".")[2] for need in part.needs if need.startswith("decoder.")}
    decoder = at.block(numbers, wanted) if wanted else None
    memory = at.memory.setdefault(tuple(numbers), {})
    found: dict[str, Any] = {"decoder": decoder, "stage": at.stage, "stages": at.stages, "memory": memory}
    for name in PICTURE.intersection(part.needs):
        if at.pixels is None:
            continue
        seen = at.pixels(numbers, name)
        found[name] = seen[0][None] if len(seen) == 1 else torch.stack(list(seen))
    frames = [tokens.frame for tokens in group if isinstance(tokens, TileTokens) and tokens.frame is not None]
    found["frames"] = tuple(frames) or None
    if part.merging:
        wanted = {need.rpartition(".")[2] for need in part.needs if need.startswith("tower.latest.")}
        blocks["latest"] = at.block(numbers, wanted)
        sizes = [on_device(_size(tokens), sources.device) for tokens in group if isinstance(tokens, TileTokens)]
        found["size"] = torch.stack(sizes)
    return found


def _tile(tokens: Tokens) -> Tensor:
    """(K,) tile of each token that is left."""
    assert tokens.tile is not None
    return beside(tokens.tile, tokens.index)[tokens.index]


def _tile_counts(tiles: Tensor) -> tuple[tuple[int, ...], ...]:
    """Of each image the tokens of each tile, of (B, N) tile numbers on the host."""
    return tuple(tuple(row.bincount().tolist()) for row in tiles)


def _size(tokens: TileTokens) -> Tensor:
    """(K,) patches in each token."""
    return torch.ones(tokens.index.shape) if tokens.size is None else tokens.size


def narrow(block: Block, rows: Tensor, index: Tensor) -> Block:
    """The block's values for some images, and of those the tokens that are still there.

    Args:
        rows: (B,) of the images; on the host.
        index: (B, K) original indices of their tokens; on the host.
    """
    fields = {}
    moved = not bool((index[:, 1:] > index[:, :-1]).all())
    for name, value in vars(block).items():
        if value is None:
            continue
        rows, index = on_device(rows, value.device), on_device(index, value.device)
        value = value[rows]
        axis = TOKEN_AXIS.get(name)
        if axis is not None and index.shape[1] != value.shape[axis]:
            shape = [1] * value.ndim
            shape[0], shape[axis] = index.shape
            expanded = index.view(shape).expand(*value.shape[:axis], index.shape[1], *value.shape[axis + 1 :])
            value = value.gather(axis, expanded)
        elif axis is not None and moved:
            value = torch.stack([row.index_select(axis - 1, order) for row, order in zip(value, index, strict=True)])
        fields[name] = value
    return Block(**fields)


def _text(prompt: Prompt, group: Sequence[Image]) -> dict[str, Tensor]:
    """Embeddings of each image's row without visual tokens and padding, right-padded to (B, T)."""
    embeddings = prompt.embeddings()
    found = [prompt.is_text[image.row].nonzero().squeeze(-1) for image in group]
    columns = torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)
    mask, rows = columns >= 0, torch.tensor([image.row for image in group])
    after = columns > torch.stack([image.columns[-1] for image in group])[:, None]
    device = embeddings.device
    text = embeddings[on_device(rows, device)[:, None], on_device(columns.clamp(min=0), device)]
    there = on_device(mask, device)
    text = text.masked_fill(~there[..., None], 0.0)
    return {"text": text, "text_mask": there, "after_image": on_device(after, device)}


def _joint(prompt: Prompt, group: Sequence[Image], read: Block) -> dict[str, Tensor]:
    """Both modalities in CLIP's joint space."""
    assert prompt.joint_space is not None and prompt.ids is not None and read.hidden is not None
    written = prompt.joint_space.text(prompt.ids, prompt.is_text, group)
    image = prompt.joint_space.image(read.hidden)
    words = {"text_clip": written.text, "word_clip": written.words, "word_mask": written.mask}
    return {"image_clip": image, **{name: value.to(image.device) for name, value in words.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# what is left


def _shortened(part: Method, answer: _Answer, image: Image, project: Callable[[Tensor], Tensor] | None) -> Image:
    """What of an image goes into the decoder."""
    name, kept = format_spec(part), answer.kept
    if answer.features is None:
        features = image.features[on_device(_positions(name, kept, image), image.features.device)]
    else:
        features = answer.features
        if answer.encoded:
            if project is None:
                raise FoveateError(
                    f"{name} returns encoded tokens, but this family's projector merges neighbours and cannot map "
                    "single ones; methods that return projected tokens, or none, work"
                )
            features = project(features)
        features = features.to(image.features.dtype)
    return replace(image, features=features, **_noted(part, name, answer, kept, image))


def _shortened_inside(
    part: Method,
    answer: _Answer,
    tokens: T,
    dtype: torch.dtype,
    prompt: Prompt,
    at: Depth,
    later: Later | None,
) -> Outcome[T]:
    """Inside encoder or decoder: every kept token is one of the block's, with its own hidden state or a new one."""
    name, kept = format_spec(part), answer.kept
    if answer.encoded:
        raise FoveateError(f"{name} returns tokens for the projector where only the block's own stream fits")
    extra = None if answer.groups is None else answer.extra
    positions = _positions(name, kept, tokens, extra, later)
    changed: dict[str, Any] = {}
    flops = 0
    if isinstance(tokens, Image):
        changed["features"] = tokens.features[on_device(positions, tokens.features.device)]
        flops = part.flops(tokens.index.numel(), int(prompt.is_text[tokens.row].sum()))
    if isinstance(tokens, TileTokens):
        changed.update(_regrouped(name, answer.groups, positions, tokens), unread=later is not None)
    changed.update(_noted(part, name, answer, kept, tokens, at, flops))
    return Outcome(replace(tokens, **changed), None if answer.features is None else answer.features.to(dtype))


def _noted(
    part: Method,
    name: str,
    answer: _Answer,
    kept: Tensor,
    tokens: Tokens,
    at: Depth | None = None,
    flops: int = 0,
) -> dict[str, Any]:
    """What a stage changes of any tokens, its own record included."""
    before, stages = tokens.index.numel(), tokens.stages
    if part.merging and at is not None and at.stage and stages and stages[-1].method == name:
        before, stages = stages[-1].before, stages[:-1]  # the merges of all blocks count as one stage
    layer = None if at is None else at.layer
    scores = None if part.merging else answer.scores  # those of one block say little of all
    stage = StageRecord(name, part.site, layer, before, kept.numel(), kept, answer.extra, flops, scores)
    return {
        "index": kept,
        "extra": answer.extra,
        "untouched": tokens.untouched and kept.numel() == tokens.original and _rising(answer, part),
        "adapted": tokens.adapted or part.adaptive,
        "stages": (*stages, stage),
    }


def _rising(answer: _Answer, part: Method) -> bool:
    """Whether what was kept of all tokens is in their order; of blocks in which tokens merge, whether none did."""
    return answer.groups is None if part.merging else bool((answer.kept[1:] > answer.kept[:-1]).all())


def _positions(
    name: str, kept: Tensor, tokens: Tokens, extra: Tensor | None = None, later: Later | None = None
) -> Tensor:
    """Where the kept original indices stand among the tokens that are left; 0 for `extra` ones, which stand nowhere."""
    place = kept.new_full((tokens.original,), -1)
    order = torch.arange(tokens.index.numel())
    positions = place.index_copy(0, beside(tokens.index, kept), beside(order, kept))[kept]
    if extra is not None:
        positions = positions.masked_fill(extra, 0)
    if later is not None:
        words = f"{name} keeps {{}} tokens which an earlier stage has dropped"
        later.complaints.add((positions < 0).sum(), words)
        return positions.clamp(min=0)
    if bool((positions < 0).any()):
        gone = kept[positions < 0][0].item()
        raise FoveateError(f"{name} keeps token {gone}, which an earlier stage has dropped")
    return positions


def _regrouped(name: str, groups: Tensor | None, positions: Tensor, tokens: TileTokens) -> dict[str, Any]:
    """How many patches each output token stands for, and which one a patch is in."""
    if groups is None and tokens.size is None and tokens.group is None:
        return {}
    present, left, size = tokens.index.numel(), positions.numel(), tokens.size
    if groups is None:
        size = None if size is None else beside(size, positions)[positions]
        went = positions.new_full((present,), -1).index_copy(0, positions, beside(torch.arange(left), positions))
    else:
        went = groups
        if went.numel() != present:
            raise FoveateError(f"{name} says where {went.numel()} tokens went, but {present} were there")
        if left < present or size is not None:
            each = beside(_size(tokens), positions)
            sizes = each.new_zeros(left + 1).index_add(0, went.where(went >= 0, left), each)
            size = sizes[:left].clamp(min=1.0)
    group = None if tokens.group is None else beside(tokens.group, positions)
    return {"size": size, "group": None if group is None else went[group.clamp(min=0)].where(group >= 0, -1)}
