"""How many tokens each block of encoder and decoder will see, from the methods alone, before anything runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foveate.core import FoveateError, check_keep, tokens_to_keep
from foveate.families.shapes import ModelShape
from foveate.forms import Merger

if TYPE_CHECKING:
    from foveate.core import Grid, Keep, Method


@dataclass(frozen=True)
class Plan:
    """What is left where, of one image.

    Attributes:
        visual: (layers,) visual tokens that each decoder layer sees.
        tower: (blocks,) tokens of one tile that each encoder block's attention runs on, CLS and companions included.
        tiles: pictures that the encoder runs on.
        patches: of one tile, before any stage.
        projected: tokens that the projector runs on.
        parts: the methods' single-site parts.
    """

    visual: tuple[int, ...]
    tower: tuple[int, ...]
    tiles: int
    patches: int
    projected: int
    parts: tuple[Method, ...]


def token_plan(
    shape: ModelShape,
    methods: Method | Iterable[Method] | None,
    visual: int,
    *,
    grid: Grid | None = None,
    tiles: int | None = None,
    kept: Keep | None = None,
) -> Plan:
    """Where an image of `visual` tokens loses how many.

    A method before the encoder shortens all of its blocks, one inside it the later ones; where it counts tokens that
    are made of several patches, the same share of the patches stays. Where the projector maps every patch by itself it
    runs on what is left.

    Args:
        grid: (h, w) of one tile's tokens; None is the square that they fill, if they fill one.
        tiles: pictures that the encoder runs on; None is as few as hold the tokens.
        kept: what a method that decides its own count leaves, tokens or a share of `visual`, as its trace shows.

    Raises:
        FoveateError: as `visual_per_layer`; a method acts after encoder blocks that are not there; or it scales the
            picture down for an encoder that all pictures are brought to one size for, or before other methods.
    """
    if visual < 1:
        raise FoveateError(f"visual={visual} is below 1; the smallest is 1")
    tiles = shape.tiles_of(visual) if tiles is None else tiles
    if tiles < 1:
        raise FoveateError(f"tiles={tiles} is below 1; the smallest is 1")
    if grid is None:
        side = math.isqrt(visual // tiles)
        grid = (side, side) if side * side * tiles == visual else None
    given = () if methods is None else methods if isinstance(methods, Iterable) else (methods,)
    parts = tuple(part for method in given for part in method.parts())
    if any(part.site == "picture" for part in parts):
        return _of_small(shape, parts, visual)
    blocks = shape.tower.reads or shape.tower.layers
    seen = visual_per_layer(parts, visual, shape.decoder.layers, grid=grid, tiles=tiles, blocks=blocks, kept=kept)
    patches = shape.patches_of(visual)
    ahead = [part for part in parts if part.site in ("pixels", "tower")]
    tower, left = _tower(shape, ahead, visual, patches, tiles, grid, kept)
    whole = visual if shape.tower.own_size else tiles * shape.projector.tokens
    projected = left * tiles if not shape.tower.put_back and left < patches else whole
    return Plan(seen, tower, tiles, patches, projected, parts)


def _of_small(shape: ModelShape, parts: tuple[Method, ...], visual: int) -> Plan:
    """That of a picture with no more tokens than the budget, which nothing leaves."""
    name = type(parts[0]).__name__
    if len(parts) > 1:
        raise FoveateError(f"{name} scales the picture and stands alone, and {len(parts)} methods were given")
    if not shape.tower.own_size:
        raise FoveateError(
            f"{name} scales the picture down, and {shape.name} brings all pictures to one size, so that nothing is "
            "saved; the nearest that leaves tokens out evenly is Uniform"
        )
    plan = token_plan(shape, None, _counts(parts[0], visual, None, 1)[0])
    return dataclasses.replace(plan, parts=parts)


def _tower(
    shape: ModelShape,
    parts: Sequence[Method],
    visual: int,
    patches: int,
    tiles: int,
    grid: Grid | None,
    kept: Keep | None,
) -> tuple[tuple[int, ...], int]:
    """Tokens that each encoder block's attention runs on, of one tile, and the patches left at the end."""
    blocks, reads = shape.tower.layers, shape.tower.reads or shape.tower.layers
    left, beside = [patches] * (blocks + 1), [0] * (blocks + 1)  # before each block, and at the end
    for part in parts:
        if isinstance(part, Merger):
            merged = _merged(shape, part, visual, patches, reads)
            for block in range(blocks + 1):
                left[block] -= sum(merged[:block])
            if any(merged) and part.beside:
                beside[:reads] = [part.beside] * reads
                left[reads:] = [count + part.beside for count in left[reads:]]  # a token like the others by then
            continue
        counts = _counts(part, visual, grid, tiles, kept=kept)
        before = part.site == "pixels"  # the first block
        for depth, count in zip((0,) if before else part.depths(blocks), counts, strict=True):
            if not before and not 1 <= depth <= reads - 1:
                raise FoveateError(
                    f"{type(part).__name__} acts after {depth} encoder blocks, outside 1..{reads - 1}: tokens leave "
                    f"before the block that the projector reads; the nearest is {min(max(depth, 1), reads - 1)}"
                )
            left[depth:] = [min(_of_tile(shape, count, visual, patches), there) for there in left[depth:]]
    if shape.tower.put_back:
        left[reads:] = [patches] * (blocks + 1 - reads)  # tokens are back at their places when they are merged
    return tuple(left[block] + beside[block] + shape.tower.cls for block in range(blocks)), left[blocks]


def _of_tile(shape: ModelShape, count: int, visual: int, patches: int) -> int:
    """Of one tile's `patches`, those behind its even part of `count` among `visual` tokens."""
    merge = shape.projector.merge
    return merge * -(-count * (patches // merge) // visual)


def _merged(shape: ModelShape, part: Merger, visual: int, patches: int, blocks: int) -> tuple[int, ...]:
    """How many of one tile's patches each block merges away; those of a token go together."""
    merge = shape.projector.merge
    tokens = patches // merge
    if part.keep is not None:
        (count,) = part.count(visual) or (visual,)
        part = dataclasses.replace(part, keep=min(tokens, _of_tile(shape, count, visual, patches) // merge))
    return tuple(merge * number for number in part.schedule(tokens, blocks))


def visual_per_layer(
    methods: Method | Iterable[Method] | None,
    original: int,
    layers: int,
    *,
    grid: Grid | None = None,
    tiles: int = 1,
    blocks: int | None = None,
    kept: Keep | None = None,
) -> tuple[int, ...]:
    """Visual tokens of one image in each of the decoder's `layers`, in the order in which the methods act on it.

    A method in the tower or between tower and decoder shortens every layer. One inside the decoder with `layer=k`
    leaves the first k blocks as they were. One on the cache changes nothing here: the prefill sees every token.

    Args:
        methods: none, one, or several that compose.
        original: visual tokens of the image before any stage.
        grid: (h, w) of the image's tokens, for methods that keep whole rows or blocks.
        tiles: tiles of the image, for methods that split their budget over them.
        blocks: encoder blocks up to the one that the projector reads, for methods that merge in each of them.
        kept: what a method that decides its own count leaves, tokens or a share of `original`, as its trace shows.

    Raises:
        FoveateError: a method decides its own count and `kept` does not say it, asks for more tokens than are left, or
            acts at a layer outside 1..layers-1.
    """
    for name, value in (("original", original), ("layers", layers)):
        if value < 1:
            raise FoveateError(f"{name}={value} is below 1; the smallest is 1")
    given = () if methods is None else methods if isinstance(methods, Iterable) else (methods,)
    stages = [
        stage
        for method in given
        for part in method.parts()
        for stage in _stages(part, original, layers, grid, tiles, blocks, kept)
    ]
    visual = [original] * layers
    for first, _, count, name in sorted(stages, key=lambda stage: stage[:2]):  # stable: as listed where they tie
        if count > visual[first]:
            raise FoveateError(
                f"{name} asks for {count} tokens but {visual[first]} of the image's {original} are left; "
                f"the most is {visual[first]}"
            )
        visual[first:] = [count] * (layers - first)
    return tuple(visual)


def _stages(
    part: Method,
    original: int,
    layers: int,
    grid: Grid | None,
    tiles: int,
    blocks: int | None,
    kept: Keep | None,
) -> list[tuple[int, int, int, str]]:
    """Each stage of a part: the first decoder layer it shortens, its order before that layer, its count, its name."""
    name = type(part).__name__
    if part.site == "cache":
        return []
    counts = _counts(part, original, grid, tiles, blocks, kept)
    if part.site != "layer":
        order = {"picture": 0, "pixels": 1, "tower": 2}.get(part.site, 3)
        return [(0, order, count, name) for count in counts]
    depths = part.depths(layers)
    for depth in depths:
        if not 1 <= depth < layers:
            nearest = min(max(depth, 1), layers - 1)
            hint = f"the nearest is {nearest}" if layers > 1 else "a decoder of one layer has none"
            raise FoveateError(f"{name} acts at layer {depth}, outside 1..{layers - 1} of {layers} layers; {hint}")
    if len(depths) != len(counts):
        raise FoveateError(f"{name} acts at {len(depths)} layers {depths} but gives {len(counts)} counts {counts}")
    return [(depth, 0, count, f"{name} at layer {depth}") for depth, count in zip(depths, counts, strict=True)]


def _counts(
    part: Method,
    original: int,
    grid: Grid | None,
    tiles: int,
    blocks: int | None = None,
    kept: Keep | None = None,
) -> tuple[int, ...]:
    """Tokens left after each stage of a part.

    Raises:
        FoveateError: the part decides its own count from the image, and `kept` does not say it.
    """
    counts = part.count(original, grid, tiles)
    if counts is None and isinstance(part, Merger) and blocks is not None:  # known once the blocks are
        each, over = divmod(original, tiles)
        left = [(size, size - sum(part.schedule(size, blocks))) for size in [each + 1] * over + [each] * (tiles - over)]
        counts = (sum(count + part.beside if count < size else count for size, count in left),)
    if counts is None and kept is not None:
        check_keep(kept, "kept")
        counts = (tokens_to_keep(kept, original, name="kept"),)
    if counts is None:
        budget = "give it keep=, or " if hasattr(part, "keep") else ""
        raise FoveateError(
            f"{type(part).__name__} decides its own count from the image, so nothing can be planned with it; "
            f"{budget}measure it and say with kept= what its trace shows"
        )
    return counts
