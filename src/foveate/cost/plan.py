"""How many visual tokens each decoder layer will see, from the methods alone, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from foveate.core import FoveateError

if TYPE_CHECKING:
    from foveate.core import Grid, Method


def visual_per_layer(
    methods: Method | Iterable[Method] | None,
    original: int,
    layers: int,
    *,
    grid: Grid | None = None,
    tiles: int = 1,
) -> tuple[int, ...]:
    """Visual tokens of one image in each of the decoder's `layers`, in the order in which the methods act on it.

    A method in the tower or between tower and decoder shortens every layer. One inside the decoder with `layer=k`
    leaves the first k blocks as they were. One on the cache changes nothing here: the prefill sees every token.

    Args:
        methods: none, one, or several that compose.
        original: visual tokens of the image before any stage.
        grid: (h, w) of the image's tokens, for methods that keep whole rows or blocks.
        tiles: tiles of the image, for methods that split their budget over them.

    Raises:
        FoveateError: a method decides its own count, asks for more tokens than are left, or acts at a layer outside
            1..layers-1.
    """
    for name, value in (("original", original), ("layers", layers)):
        if value < 1:
            raise FoveateError(f"{name}={value} is below 1; the smallest is 1")
    given = () if methods is None else methods if isinstance(methods, Iterable) else (methods,)
    stages = [
        stage for method in given for part in method.parts() for stage in _stages(part, original, layers, grid, tiles)
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


def _stages(part: Method, original: int, layers: int, grid: Grid | None, tiles: int) -> list[tuple[int, int, int, str]]:
    """Each stage of a part: the first decoder layer it shortens, its order before that layer, its count, its name."""
    name = type(part).__name__
    if part.site == "cache":
        return []
    counts = part.count(original, grid, tiles)
    if counts is None:
        raise FoveateError(
            f"{name} decides its own count from the image, so nothing can be planned with it; "
            "measure it and give the counts that its trace shows"
        )
    if part.site != "layer":
        order = 0 if part.site == "tower" else 1
        return [(0, order, count, name) for count in counts]
    depths = _depths(part, layers)
    if len(depths) != len(counts):
        raise FoveateError(f"{name} acts at {len(depths)} layers {depths} but gives {len(counts)} counts {counts}")
    return [(depth, 0, count, f"{name} at layer {depth}") for depth, count in zip(depths, counts, strict=True)]


def _depths(part: Method, layers: int) -> tuple[int, ...]:
    """The decoder blocks that run in full before each stage of a part."""
    name = type(part).__name__
    stated = part.depths(layers) or getattr(part, "layers", None)
    if stated is None:
        single = getattr(part, "layer", None)
        if single is None:
            raise FoveateError(f"{name} states neither layer nor layers, so nothing can be planned with it")
        stated = (single,)
    depths = tuple(stated)
    for depth in depths:
        if not 1 <= depth < layers:
            nearest = min(max(depth, 1), layers - 1)
            hint = f"the nearest is {nearest}" if layers > 1 else "a decoder of one layer has none"
            raise FoveateError(f"{name} acts at layer {depth}, outside 1..{layers - 1} of {layers} layers; {hint}")
    return depths
