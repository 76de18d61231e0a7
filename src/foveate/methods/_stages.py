"""What methods of several stages share: which layers and budgets fit together."""

from __future__ import annotations

from itertools import pairwise

from foveate.core import FoveateError, Keep, check_keep, tokens_to_keep
from foveate.depths import check_depths, scaled_layers


def check_layers(method: str, layers: tuple[int, ...]) -> None:
    """Refuse depths that are no whole numbers from 1, or that do not rise."""
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise FoveateError(f"{method}: layer={layer!r} is no whole number of decoder blocks")
        if layer < 1:
            raise FoveateError(f"{method}: layer={layer} is below 1; layer=1 lets the first block run in full")
    if any(later <= earlier for earlier, later in pairwise(layers)):
        raise FoveateError(f"{method}: layers {layers} do not rise strictly; nearest: {tuple(sorted(set(layers)))}")


def check_stages(method: str, keep: tuple[Keep, ...], layers: tuple[int, ...] | None, default: tuple[int, ...]) -> None:
    """Refuse budgets that rise from stage to stage, or that are not as many as the layers.

    A count beside a share can only be judged on an image.
    """
    if layers is not None:
        check_layers(method, layers)
    stages = default if layers is None else layers
    if len(keep) != len(stages):
        hint = "" if layers is not None else f"; the paper's layers are {stages}, give layers= for others"
        raise FoveateError(f"{method}: {len(keep)} budgets {keep} for {len(stages)} layers{hint}")
    for number, budget in enumerate(keep):
        check_keep(budget, f"{method}: keep of stage {number}")
    for earlier, later in pairwise(keep):
        if type(earlier) is type(later) and later > earlier:
            raise FoveateError(f"{method}: keep={keep} rises from {earlier} to {later}; the most is {earlier}")


def rounded_down(budgets: tuple[Keep, ...], original: int) -> tuple[int, ...]:
    """Tokens after each stage where shares of the ORIGINAL tokens are rounded down, at least 1.

    Raises:
        FoveateError: a stage asks for more tokens than the one before it left.
    """
    counts: list[int] = []
    for keep in budgets:
        tokens = keep if isinstance(keep, int) else max(1, int(original * keep))
        counts.append(tokens_to_keep(tokens, original, counts[-1] if counts else original))
    return tuple(counts)


def stage_depths(
    method: str, layers: tuple[int, ...] | None, default: tuple[int, ...], of: int, blocks: int
) -> tuple[int, ...]:
    """Depths in a decoder of `blocks` blocks: `layers`, or the paper's `default` of `of` blocks, scaled."""
    if layers is None:
        return scaled_layers(default, of, blocks)
    check_depths(layers, blocks, method)
    return layers
