"""Lets training reach between encoder blocks: it is shown what enters a block and may answer with a softer mask.

Shapes: B pictures, N patches, L leading tokens and patches, E encoder width, D decoder width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.core import FoveateError
from foveate.families import family_of

Between = Callable[[int, Tensor], "Tensor | None"]
"""(block, hidden states (B, L, E)) -> an additive mask (B, 1, L, L) for the block, or None for its own."""

IMPLEMENTATIONS = ("sdpa", "eager")


def check_softens_encoder(model: Any) -> None:
    """Refuse a model whose encoder takes no soft masks, or whose patches are not the decoder's tokens.

    Raises:
        FoveateError: another attention implementation than SDPA and eager, several tiles or sizes of pictures, patches
            that are joined, blocks without a mask, or a model that is being pruned.
    """
    if getattr(model, "_foveate_handle", None) is not None:
        raise FoveateError("this model is being pruned, so it cannot be trained with; stop() the handle first")
    family = family_of(model)
    tower: Any
    tower, row = family.tower_of(model)
    if not (family.fixed and family.pointwise) or family.gathered or row.packed or not row.masked:
        raise FoveateError(
            f"{family.name} with {row.type} cannot be trained inside its encoder, which needs pictures of one tile "
            "whose patches the decoder reads one by one, and blocks that take a mask, as LLaVA-1.5 has"
        )
    if family.closed_encoder is not None:
        raise FoveateError(
            f"training acts inside the encoder, which {family.name} does not allow: {family.closed_encoder}"
        )
    kind = tower.config._attn_implementation
    if kind not in IMPLEMENTATIONS:
        raise FoveateError(
            f"attn_implementation={kind!r} takes no mask with gradients; load the model with "
            f"{' or '.join(IMPLEMENTATIONS)}"
        )


def encode_softly(model: Any, given: Mapping[str, Tensor], between: Between | None = None) -> Tensor:
    """(B, N, D) visual tokens of pictures, `between` being asked before each encoder block; gradients pass through.

    Args:
        given: what the processor made of them: pixels (B, C, height, width) and what else the encoder takes.
        between: None encodes them as the model does.
    """
    encode = model.base_model.get_image_features
    names = [name for name in inspect.signature(encode).parameters if name in given]
    arguments = {**{name: given[name] for name in names}, "pixel_values": given["pixel_values"].to(model.dtype)}
    hooks = []
    if between is not None:
        for number, block in enumerate(family_of(model).blocks_of(model)):
            hooks.append(block.register_forward_pre_hook(partial(_before, number, between), with_kwargs=True))
    try:
        return torch.stack(list(encode(**arguments, return_dict=True).pooler_output))
    finally:
        for hook in hooks:
            hook.remove()


def _before(number: int, between: Between, block: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    hidden = arguments[0] if arguments else options["hidden_states"]
    mask = between(number, hidden)
    if mask is None:
        return None
    given = {name: value for name, value in options.items() if name != "hidden_states"}
    return (hidden,), {**given, "attention_mask": mask.to(hidden.dtype)}
