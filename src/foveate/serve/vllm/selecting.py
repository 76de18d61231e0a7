"""From what the encoder made of some items to what stays of them: asks the methods, and puts the rows in order.

Shapes: M placeholders of a unit, N of them visual, K kept; R tokens of an item in the unpruned prompt; D width of the
decoder, W >= D of what the encoder hands over, where features for deeper blocks stand behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.serve.vllm.asked import Asked
from foveate.serve.vllm.before import behind_encoder
from foveate.serve.vllm.rooms import (
    Block,
    Image,
    JointSpace,
    Lanes,
    Layout,
    Prompt,
    Questions,
    choose,
    settled,
    to_tokens,
)
from foveate.serve.vllm.slots import Unit, fitted, units_of


@dataclass(frozen=True, eq=False)
class Item:
    """A picture or video of a request, as the processor sent it.

    Attributes:
        asked: what is asked of it.
        tokens: (R,) ids that stand for it in the unpruned prompt, -1 at the placeholders.
        sources: (P,) which of them each token of the pruned prompt is, -1 in slots.
    """

    asked: Asked
    tokens: Tensor
    sources: Tensor


@dataclass(frozen=True, eq=False)
class Decoder:
    """What choosing needs of the model behind the encoder.

    Attributes:
        width: D.
        embed: ids (T,) to embeddings (T, D).
        project: encoded tokens (K, E) to (K, D); None where the projector takes no single ones.
        joint_space: CLIP's two heads; None without.
    """

    width: int
    embed: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor] | None
    joint_space: JointSpace | None


def choose_rows(
    items: Sequence[Item],
    layouts: Sequence[Sequence[Layout]],
    features: Sequence[Tensor],
    seen: Mapping[int | str, Block],
    packed: bool,
    decoder: Decoder,
    lanes: Lanes | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """What stands in the slots of each item: embeddings (slots, W), and which of its R tokens each is.

    Args:
        layouts: of each item.
        features: (M of all its units, W) of each item.
        seen: what was read of the encoder, all items together.
        packed: the encoder ran the patches of all pictures as one row.
        lanes: what went into it; None for all.
    """
    units = [
        units_of(item.tokens, own, behind_encoder(item.asked.parts)) for item, own in zip(items, layouts, strict=True)
    ]
    owners = [item for item, own in zip(items, units, strict=True) for _ in own]
    flat = [unit for own in units for unit in own]
    rows = [row for own, whole in zip(units, features, strict=True) for row in _split(own, whole)]
    device = features[0].device
    images = [_image(unit, row, decoder.width) for unit, row in zip(flat, rows, strict=True)]
    if lanes is not None:
        images = [settled(image, own, True) for image, own in zip(images, lanes.pictures(), strict=True)]
        images = [replace(image, features=image.features[image.index.to(device)]) for image in images]
    if any(item.asked.parts for item in items):
        blocks = to_tokens(seen, [unit.layout for unit in flat], packed)
        images = _choose(owners, images, blocks, decoder)
    made = [
        _rows(item, unit, image, row, decoder)
        for item, unit, image, row in zip(owners, flat, images, rows, strict=True)
    ]
    joined, start = [], 0
    for item, own in zip(items, units, strict=True):
        mine = made[start : start + len(own)]
        start += len(own)
        found = torch.cat([row for row, _ in mine]), torch.cat([place for _, place in mine]).to(device)
        slots = int((item.sources < 0).sum())
        if found[0].shape[0] != slots:
            raise RuntimeError(f"{item.asked.spec} left {found[0].shape[0]} tokens where the prompt has {slots} slots")
        joined.append(found)
    return joined


def _split(units: Sequence[Unit], features: Tensor) -> list[Tensor]:
    return list(features.split([unit.layout.placeholders for unit in units]))


def _image(unit: Unit, rows: Tensor, width: int) -> Image:
    """A unit on its own: its N visual tokens are all of its row."""
    layout = unit.layout
    visual = layout.visual.to(rows.device)
    columns = torch.arange(visual.numel())
    return Image.placed(0, columns, rows[visual, :width], layout.grid, tile=layout.tile, patches=layout.lengths)


def _choose(
    items: Sequence[Item], images: Sequence[Image], blocks: Mapping[int | str, Block], decoder: Decoder
) -> list[Image]:
    """Ask the methods of each spec about all pictures that they are asked about, those of one size together."""
    left = list(images)
    groups: dict[tuple[str, int], list[int]] = {}
    for number, (item, image) in enumerate(zip(items, images, strict=True)):
        groups.setdefault((item.asked.spec, image.original), []).append(number)
    for (_, tokens), numbers in groups.items():
        parts = fitted(behind_encoder(items[numbers[0]].asked.parts), tokens)
        mine = [replace(images[number], row=row) for row, number in enumerate(numbers)]
        prompt = _prompt([items[number].asked for number in numbers], mine, decoder)
        seen = {name: _of(block, numbers) for name, block in blocks.items()}
        for number, image in zip(numbers, choose(parts, mine, seen, prompt, decoder.project), strict=True):
            left[number] = image
    return left


def _of(block: Block, numbers: Sequence[int]) -> Block:
    """What a block shows of some pictures."""
    fields: dict[str, Any] = {}
    for name, value in vars(block).items():
        if value is not None:
            fields[name] = value[torch.tensor(numbers, device=value.device)]
    return Block(**fields)


def _prompt(asked: Sequence[Asked], images: Sequence[Image], decoder: Decoder) -> Prompt:
    """One row for each picture: its tokens, then the words of the question about it."""
    device = images[0].features.device
    tokens, longest = images[0].original, max(len(one.words) for one in asked)
    ids = torch.zeros(len(asked), tokens + longest, dtype=torch.int64)
    is_text = torch.zeros_like(ids, dtype=torch.bool)
    for row, one in enumerate(asked):
        end = tokens + len(one.words)
        ids[row, tokens:end] = torch.tensor(one.words, dtype=torch.int64)
        is_text[row, tokens:end] = True
    if decoder.joint_space is not None:
        decoder.joint_space.questions = Questions(None, [one.question or "" for one in asked])
    embed = lambda: decoder.embed(ids.flatten().to(device)).unflatten(0, ids.shape)  # noqa: E731 - rarely asked
    return Prompt(embed, is_text, decoder.joint_space, ids)


def _rows(item: Item, unit: Unit, image: Image, rows: Tensor, decoder: Decoder) -> tuple[Tensor, Tensor]:
    """(slots, W) embeddings of a unit and (slots,) its tokens' numbers, in the order of the prompt.

    Where a method wants another order than the picture's, its tokens come in that order, each at its own position.
    """
    layout, device = unit.layout, rows.device
    index = image.index
    kept = unit.places[layout.visual][index]
    apart = torch.ones(layout.placeholders, dtype=torch.bool).index_fill(0, layout.visual, False)
    beside = unit.places[apart]
    deep = rows[layout.visual.to(device), decoder.width :][image.index.to(device)]
    if image.extra is not None:
        deep = deep.masked_fill(image.extra[:, None].to(device), 0.0)  # it stands for no patch
    parts = [torch.cat([image.features, deep], dim=1), rows[apart.to(device)]]
    if unit.between.numel():
        words = decoder.embed(item.tokens[unit.between].to(device))
        parts.append(torch.nn.functional.pad(words, (0, rows.shape[1] - decoder.width)))
    order = torch.cat([kept.sort().values, beside, unit.between]).argsort()
    places = torch.cat([kept, beside, unit.between])[order]
    return torch.cat([part.to(rows.dtype) for part in parts])[order.to(device)], places
