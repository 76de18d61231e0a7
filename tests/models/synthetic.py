"""Random signals of any kind that a method may ask for, and a walk through all stages of a method on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from foveate.core import Block, CacheSelection, Grid, Method, Selection, Signals, described
from foveate.forms import Merger

HEADS, WIDTH, WORDS = 3, 8, 5
BLOCKS = 6  # in which a merger acts

# Axes behind B of each signal, by name, and of the sizes that a merger sees.
_SHAPES = {name: what.axes[1:] for kind in (Signals, Block) for name, what in described(kind).items()} | {"size": "N"}
_SIZES = {"D": WIDTH, "H": HEADS, "T": WORDS}
_ATTENTION = {name for name, what in described(Block).items() if what.attention}


def signals(method: Method, batch: int, grid: Grid, seed: int = 0) -> Signals:
    """What `method` needs of B images whose h x w tokens are all there."""
    tokens = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, Any] = {}
    tower: dict[int | str, dict[str, Tensor]] = {}
    decoder: dict[str, Tensor] = {}
    for need in method.needs:
        room, _, rest = need.partition(".")
        name = rest.rpartition(".")[2] or room
        if name in described(Signals) and not described(Signals)[name].words:  # a mask
            fields[name] = torch.ones(batch, WORDS, dtype=torch.bool)
            continue
        shape = [tokens if axis == "N" else _SIZES[axis] for axis in _SHAPES[name]]
        value = torch.randn(batch, *shape, generator=generator)
        value = value.softmax(dim=-1) if name in _ATTENTION else value
        if room == "tower":
            block = rest.rpartition(".")[0]
            tower.setdefault(int(block) if block.isdigit() else block, {})[name] = value
        elif room == "decoder":
            decoder[name] = value
        else:
            fields[name] = value
    if isinstance(method, Merger):
        fields["size"] = torch.ones(batch, tokens)
    return Signals(
        original=tokens,
        index=torch.arange(tokens).expand(batch, tokens),
        grid=grid,
        tower={block: Block(**values) for block, values in tower.items()},
        decoder=Block(**decoder) if decoder else None,
        **fields,
    )


def narrowed(before: Signals, selection: Selection, stage: int) -> Signals:
    """The same images one stage later: everything that counts visual tokens is taken at those that stayed."""
    index = torch.stack(selection.indices)
    place = (before.index[:, None, :] == index[:, :, None]).int().argmax(dim=-1)

    def take(name: str, value: Any) -> Any:
        axis = _SHAPES.get(name, "").find("N") + 1
        if not isinstance(value, Tensor) or not axis:
            return value
        return torch.stack([row.index_select(axis - 1, kept) for row, kept in zip(value, place, strict=True)])

    def block(whole: Block) -> Block:
        return Block(**{name: take(name, value) for name, value in vars(whole).items()})

    features = before.features if before.features is None else take("features", before.features)
    return dataclasses.replace(
        before,
        index=index,
        stage=stage,
        grid=before.grid if index.shape[1] == before.original else None,
        features=features if selection.features is None else torch.stack(selection.features),
        image_clip=take("image_clip", before.image_clip),
        size=take("size", before.size),
        tower={name: block(whole) for name, whole in before.tower.items()},
        decoder=None if before.decoder is None else block(before.decoder),
    )


def merged(part: Merger, seen: Signals) -> Selection:
    """The last answer of a merger to images that it met first as `seen`; all blocks show the same of a token."""
    answer = part.select(seen)
    for stage in range(1, seen.stages):
        seen = narrowed(seen, answer, stage)
        answer = part.select(seen)
    return answer


def walk(part: Method, seen: Signals) -> Iterator[tuple[Signals, Selection]]:
    """Every stage of a single-site method before the cache: what it saw and what it answered.

    The merges of all blocks count as one stage.
    """
    if isinstance(part, Merger):
        seen = dataclasses.replace(seen, stages=BLOCKS)
        yield seen, merged(part, dataclasses.replace(seen, memory={}))
        return
    counts = part.count(seen.original, seen.grid)
    for stage in range(1 if counts is None else len(counts)):
        answer = part.select(seen)
        assert not isinstance(answer, CacheSelection)
        yield seen, answer
        if counts is not None and stage + 1 < len(counts):
            seen = narrowed(seen, answer, stage + 1)
