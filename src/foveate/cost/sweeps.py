"""One method at a series of budgets, for curves of cost over what is kept."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from foveate.core import FoveateError
from foveate.cost.estimates import Cost, estimate
from foveate.cost.shapes import shape

if TYPE_CHECKING:
    from foveate.core import Method

STEP = 0.05
"""Of the curve in LVPruning's Figure 6."""


def sweep(model: Any, method: Method, visual: int = 576, **options: Any) -> list[tuple[float, Method, Cost]]:
    """The cost at budgets of 5, 10, ... 100 %: of each the share, the method at it, and the cost.

    A method of several stages keeps the share in its first. LVPruning's later stages keep as much less as they do by
    default (rho, rho - 0.2, rho - 0.4 as in the paper), those of other methods keep their proportions; shares at which
    a stage would keep nothing are left out.

    Args:
        visual: tokens of the image; `options` are the other arguments of `estimate`.

    Raises:
        FoveateError: the method has no budget to change, or none of the shares can be planned.
    """
    if not any(field.name == "keep" for field in dataclasses.fields(method)):
        raise FoveateError(
            f"{type(method).__name__} has no keep to sweep; choose a method that keeps a share of tokens"
        )
    sizes, found, why = shape(model), [], ""
    for step in range(1, round(1 / STEP) + 1):
        share = round(step * STEP, 10)
        try:
            made = at_share(method, share, visual)
            found.append((share, made, estimate(sizes, visual, methods=made, **options)))
        except FoveateError as error:  # below what the method can reach
            why = str(error)
    if not found:
        raise FoveateError(f"no budget of {type(method).__name__} can be planned: {why}")
    return found


def at_share(method: Method, share: float, visual: int) -> Method:
    """`method` with `keep` at a share of the image's tokens, in all of its stages."""
    keep = getattr(method, "keep", None)
    if not isinstance(keep, tuple):
        return dataclasses.replace(method, keep=share)  # type: ignore[call-arg]
    shares = [one / visual if isinstance(one, int) else one for one in keep]
    if type(method).__name__ == "LVPruning":
        shares = [round(share - (shares[0] - one), 10) for one in shares]
    else:
        shares = [round(share * one / shares[0], 10) for one in shares]
    return dataclasses.replace(method, keep=tuple(shares))  # type: ignore[call-arg]
