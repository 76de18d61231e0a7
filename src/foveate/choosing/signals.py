"""What a method is shown of some pictures that are alike: Signals, from what encoder, prompt and decoder have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from foveate.choosing.images import Image, TileTokens, Tokens
from foveate.choosing.later import Later
from foveate.core import Block, Method, Signals, described, names_of
from foveate.ops.device import beside, on_device

JOINT = names_of(Signals, room="joint")
"""Signals that need question and picture in CLIP's joint space."""

PICTURE = frozenset(names_of(Signals, room="picture"))
"""Signals that show what the encoder is given."""

TOKEN_AXIS = {name: what.axes.index("N") for name, what in described(Block).items() if "N" in what.axes}
"""The axis of each Block field that counts visual tokens; the others hold one value per image."""


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
class Sources:
    """Where the signals of a stage come from."""

    blocks: Mapping[int | str, Block]
    prompt: Prompt
    at: Depth | None
    device: torch.device  # that has the tokens
    later: Later | None = None


def signals_of(
    part: Method, group: Sequence[Tokens], numbers: Sequence[int], keep: int | None, sources: Sources
) -> Signals:
    """What a method reads of pictures that are alike.

    Args:
        numbers: of these pictures among all of the call.
        keep: tokens to leave of each; None where the method decides.
    """
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
    part: Method, group: Sequence[Tokens], numbers: Sequence[int], blocks: dict[int | str, Block], sources: Sources
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
        sizes = [on_device(size_of(tokens), sources.device) for tokens in group if isinstance(tokens, TileTokens)]
        found["size"] = torch.stack(sizes)
    return found


def _tile(tokens: Tokens) -> Tensor:
    """(K,) tile of each token that is left."""
    assert tokens.tile is not None
    return beside(tokens.tile, tokens.index)[tokens.index]


def _tile_counts(tiles: Tensor) -> tuple[tuple[int, ...], ...]:
    """Of each image the tokens of each tile, of (B, N) tile numbers on the host."""
    return tuple(tuple(row.bincount().tolist()) for row in tiles)


def size_of(tokens: TileTokens) -> Tensor:
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
