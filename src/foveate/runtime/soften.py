"""Lets training reach between decoder layers: it is shown what enters a layer and may answer with a softer mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core import FoveateError

Between = Callable[[int, Tensor, Tensor], "Tensor | None"]
"""(layer, hidden states (R, L, D), mask (R or 1, 1, L, L)) -> the mask that the layer is to use, or None for its own.

Masks are float32 and additive: 0 where a query may look, the lowest number of the model's dtype where it may not.
"""

IMPLEMENTATIONS = ("sdpa", "eager")


@contextmanager
def soften(model: Any, between: Between) -> Iterator[None]:
    """Ask `between` before every decoder layer of `model`, until the context is left; gradients pass through.

    Calls of the model in here run without cache. Masks with gradients are taken by SDPA and eager attention alone, and
    float16 cannot hold the gradient of a token that is masked to one part in a billion.

    Raises:
        FoveateError: another attention implementation, float16, or a model that is being pruned.
    """
    if getattr(model, "_foveate_handle", None) is not None:
        raise FoveateError("this model is being pruned, so it cannot be trained with; stop() the handle first")
    decoder = model.get_decoder()
    kind = decoder.config._attn_implementation
    if kind not in IMPLEMENTATIONS:
        raise FoveateError(
            f"attn_implementation={kind!r} takes no mask with gradients; load the model with "
            f"{' or '.join(IMPLEMENTATIONS)}"
        )
    if model.dtype == torch.float16:
        raise FoveateError("dtype=float16 cannot hold the gradients of masked tokens; use bfloat16 or float32")
    masks = _Masks()
    hooks = [
        layer.register_forward_pre_hook(partial(_before, number, between, masks), with_kwargs=True)
        for number, layer in enumerate(decoder.layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Masks:
    """The additive form of what the model hands its layers; most share one mask."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Tensor]] = {}

    def additive(self, mask: Tensor | None, hidden: Tensor) -> Tensor:
        """(R or 1, 1, L, L) float32 of a boolean mask, an additive one, or None for plain causal attention."""
        key = id(mask)
        if key not in self._made or self._made[key][1].shape[-1] != hidden.shape[1]:
            self._made = {} if len(self._made) > 4 else self._made
            self._made[key] = (mask, _additive(mask, hidden))  # the mask is held so that its id stays its own
        return self._made[key][1]


def _additive(mask: Tensor | None, hidden: Tensor) -> Tensor:
    closed = torch.finfo(hidden.dtype).min
    length = hidden.shape[1]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()[None, None]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=hidden.device).masked_fill_(~mask, closed)
    return mask.float().clamp(min=closed)


def _before(
    number: int, between: Between, masks: _Masks, layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    hidden = arguments[0] if arguments else options["hidden_states"]
    answer = between(number, hidden, masks.additive(options.get("attention_mask"), hidden))
    if answer is None:
        return None
    return arguments, {**options, "attention_mask": answer.to(hidden.dtype)}
