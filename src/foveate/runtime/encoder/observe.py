"""Reads an encoder's signals once, outside any pruning: what its blocks show of some pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.choosing.packing import to_tokens
from foveate.choosing.signals import narrow
from foveate.core import Block, FoveateError, Method, Signals
from foveate.families import family_of
from foveate.families.layouts import Layout, Tile, as_pictures, tiles_of
from foveate.ops.device import on_device
from foveate.runtime.encoder.encode import encode
from foveate.runtime.encoder.pixels import Pixels
from foveate.runtime.encoder.probe import Probe, missing_signals
from foveate.runtime.encoder.tower import Brought, layouts_of


def observe(model: Any, pictures: Tensor | Mapping[str, Any], needs: Iterable[str]) -> dict[int | str, Block]:
    """Encode pictures and return what the named encoder blocks showed of their patches; the model is as it was.

    Args:
        model: a loaded vision-language model.
        pictures: pixel values (B, C, height, width), or what a processor made: pixel values and sizes. Moved to the
            model's device, pixels to its dtype.
        needs: signals, such as "tower.0.received" or "tower.read.hidden"; those of other rooms are left out.

    Returns:
        Blocks by 0-based number, and by name where one was asked for ("read", "last").

    Raises:
        FoveateError: the model is of no known family, is being pruned, or its encoder lacks a block or a signal.
    """
    needs = tuple(needs)
    family = family_of(model)
    tower = family.tower_of(model)[1]
    missing = missing_signals(needs, tower)
    if missing:
        raise FoveateError(f"{', '.join(missing)} cannot be read: {family.name} with {tower.type} does not have it")
    if getattr(model, "_foveate_handle", None) is not None:
        raise FoveateError("this model is being pruned, so its encoder cannot be observed; stop() the handle first")
    probe = Probe(model, family, needs)
    probe.install()
    try:
        with torch.no_grad():
            encode(model, {name: _moved(value, model) for name, value in _named(pictures).items()})
        return probe.take()
    finally:
        probe.remove()


def signals_of(model: Any, part: Method, pictures: Tensor | Mapping[str, Any]) -> list[Signals]:
    """What a method would see of some pictures: before and inside the encoder, of each of their tiles.

    Returns:
        One Signals for all that have equally many tokens.

    Raises:
        FoveateError: as `observe`, or a size of the pictures is missing.
    """
    family, given = family_of(model), _named(pictures)
    tower, row = family.tower_of(model)
    height, width = family.grid(model.config)
    if part.site == "pixels":
        return _signals_of_pixels(model, given)
    seen = observe(model, given, part.needs)
    values = (value for block in seen.values() for value in vars(block).values() if value is not None)
    entries = next((value.shape[0] for value in values), 0)
    # Without a prompt, tiles of one size stand for themselves.
    brought = Brought(given, lambda: [height * width] * entries)
    layouts = layouts_of(family, model, tower, brought, height * width, entries)
    if part.site == "tower":
        layouts = as_pictures(tiles_of(layouts))
    blocks = to_tokens(seen, layouts, row.packed)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, layout in enumerate(layouts):
        tiling = None if layout.tile is None else tuple(layout.tile.tolist())
        groups.setdefault((layout.visual.numel(), layout.grid, tiling), []).append(number)
    return [_signals(blocks, layouts[numbers[0]], numbers, model.device) for numbers in groups.values()]


def _signals_of_pixels(model: Any, given: Mapping[str, Any]) -> list[Signals]:
    """What a method before the encoder would see."""
    family = family_of(model)
    tower, row = family.tower_of(model)
    height, width = family.grid(model.config)
    pixels = Pixels(model, tower, row)
    pixels.install()
    try:
        with torch.no_grad():
            encode(model, {name: _moved(value, model) for name, value in given.items()})
        entries = 1 if row.packed else pixels.entries
        told = Brought(given, lambda: [height * width] * entries)
        tiles = tiles_of(layouts_of(family, model, tower, told, height * width, entries))
        seen, given_ones = (pixels.of(tiles, told.kind, name) for name in ("pixels", "normalised"))
    finally:
        pixels.remove()
    visible = [tile for tile in tiles if tile.tokens.numel()]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, tile in enumerate(visible):
        groups.setdefault((seen[number].shape[0], tile.grid, tile.number is None), []).append(number)
    return [
        Signals(
            original=tokens,
            index=torch.arange(tokens, device=model.device).expand(len(mine), -1),
            grid=grid,
            tile=None if alone else _numbered([visible[number] for number in mine], model.device),
            pixels=torch.stack([seen[number] for number in mine]),
            normalised=torch.stack([given_ones[number] for number in mine]),
        )
        for (tokens, grid, alone), mine in groups.items()
    ]


def _numbered(tiles: Sequence[Tile], device: torch.device) -> Tensor:
    """(B, N) the number of each tile, as its tokens have it."""
    numbers = torch.tensor([[tile.number] for tile in tiles])
    return on_device(numbers, device).expand(-1, tiles[0].tokens.numel())


def _signals(blocks: Mapping[int | str, Block], layout: Layout, numbers: list[int], device: torch.device) -> Signals:
    """Of pictures that lie alike, padding off."""
    tokens = layout.visual.numel()
    index = torch.arange(tokens).expand(len(numbers), -1)
    rows = torch.tensor(numbers)
    return Signals(
        original=tokens,
        index=on_device(index, device),
        grid=layout.grid,
        tile=None if layout.tile is None else on_device(layout.tile, device).expand(len(numbers), -1),
        tower={name: narrow(block, rows, index) for name, block in blocks.items()},
    )


def _named(pictures: Tensor | Mapping[str, Any]) -> Mapping[str, Any]:
    return {"pixel_values": pictures} if isinstance(pictures, Tensor) else pictures


def _moved(value: Any, model: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
