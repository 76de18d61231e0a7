"""Lets training reach between decoder layers: it is shown what enters a layer and may answer with a softer mask.

Shapes: B rows, L sequence, N visual tokens of a picture, D width, A axes of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.choosing.shorten import place_images
from foveate.core import FoveateError, Grid
from foveate.families import family_of
from foveate.families.family import Family
from foveate.families.layouts import Encoded, runs_of
from foveate.runtime.arguments import TOKEN_TYPES, renamed
from foveate.runtime.encoder.encode import encode

Between = Callable[[int, Tensor, Tensor], "Tensor | None"]
"""(layer, hidden states (R, L, D), mask (R or 1, 1, L, L)) -> the mask that the layer is to use, or None for its own.

Masks are float32 and additive: 0 where a query may look, the lowest number of the model's dtype where it may not.
"""

IMPLEMENTATIONS = ("sdpa", "eager")


@dataclass(frozen=True, eq=False)
class Seen:
    """What a model sees of a batch of prompts and answers, whose pictures its frozen encoder has encoded."""

    visual: Tensor  # (B, L) bool; the newlines and separators among the placeholders are not visual
    holders: Tensor  # (B, L) bool, every placeholder
    positions: Tensor  # (B, L) or (A, B, L)
    encoded: Any = None  # transformers' output for the pictures
    types: dict[str, Tensor] = field(default_factory=dict)  # (B, L) each
    grids: tuple[Grid | None, ...] = ()  # of each row's picture before any token left; None without one raster

    def options(self) -> dict[str, Any]:
        """Arguments of a call beside ids and mask."""
        outputs = {} if self.encoded is None else {"image": self.encoded}
        return {"position_ids": self.positions, "mm_encoder_outputs": outputs, **self.types}

    def gathered(self, columns: Tensor) -> Seen:
        """The same of fewer tokens, at their positions.

        Args:
            columns: (B, L') which stay, ascending.
        """
        stays = torch.zeros_like(self.holders).scatter_(1, columns, True)[self.holders]
        return Seen(
            self.visual.gather(1, columns),
            self.holders.gather(1, columns),
            self.positions.gather(-1, columns.expand(*self.positions.shape[:-1], -1)),
            None if self.encoded is None else _cut(self.encoded, stays),
            {name: types.gather(1, columns) for name, types in self.types.items()},
            self.grids,
        )


def look(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    given: Mapping[str, Tensor],
    *,
    answered: Tensor | None = None,
    features: Tensor | None = None,
) -> Seen:
    """Encode the pictures of a batch without gradients, and find which of its tokens are visual, as inference does.

    Args:
        ids, mask: (B, L); 0 in padding.
        given: what else the processor made: pixels, sizes, token types.
        answered: (B, L) bool, tokens that the model is to predict.
        features: (pictures, N, D), what the encoder makes of the pictures, where that is known.

    Raises:
        FoveateError: videos, pictures and placeholders that do not belong together, or token types are missing that
            positions are made of.
    """
    family, given = family_of(model), renamed(given)
    if given.get("pixel_values_videos") is not None:
        raise FoveateError("videos cannot be trained on; give rows with pictures alone")
    holders = ids == family.image_token_id(model.config)
    encoded = _encoded(model, given, features)
    if encoded is None and bool(holders.any()):
        raise FoveateError(f"the rows have {int(holders.sum())} visual placeholders but no pixel_values were given")
    visual = torch.zeros_like(holders)
    grids: list[list[Grid | None]] = [[] for _ in ids]
    if encoded is not None:
        tower, token = family.tower_of(model)[0], family.image_token_id(model.config)
        rows = list(encoded.pooler_output)
        lengths = [one.shape[0] for one in rows]
        layouts = family.layouts(Encoded(model, tower, given, lengths, lambda: runs_of(ids, token)))
        for image in place_images(ids, token, torch.cat(rows), layouts):
            visual[image.row, image.columns] = True
            grids[image.row].append(image.grid)
    types = {name: given[name] for name in TOKEN_TYPES if name in given}
    if family.answers_typed and answered is not None:
        types["token_type_ids"] = answered.cumsum(dim=1).clamp(max=1)
    of_rows = tuple(of_row[0] if len(of_row) == 1 else None for of_row in grids)
    return Seen(visual, holders, _positions(model, family, ids, mask, given), encoded, types, of_rows)


def _encoded(model: Any, given: Mapping[str, Tensor], features: Tensor | None) -> Any:
    if features is not None:
        return BaseModelOutputWithPooling(pooler_output=list(features.to(model.dtype)))
    if given.get("pixel_values") is None:
        return None
    with torch.no_grad():
        return encode(model, {**given, "pixel_values": given["pixel_values"].to(model.dtype)})


def _positions(model: Any, family: Family, ids: Tensor, mask: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """(B, L) positions that count what is no padding, or (A, B, L), as generate() makes them."""
    if family.positions is not None:
        return family.positions(model, ids, mask.bool(), dict(given), ids.new_zeros(ids.shape[0]))
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0) + family.first_position


def _cut(encoded: Any, stays: Tensor) -> Any:
    """An encoder's output for fewer tokens, in the containers that models take.

    Args:
        stays: (placeholders,) bool.
    """

    def rows_of(features: Sequence[Tensor]) -> Any:
        flat = torch.cat(list(features))[stays]
        return flat[None] if isinstance(features, Tensor) else [flat]

    made = {"pooler_output": rows_of(encoded.pooler_output)}
    deep = getattr(encoded, "deepstack_features", None)
    if deep is not None:
        made["deepstack_features"] = [rows_of(of_block) for of_block in deep]
    return type(encoded)(**made)


def check_softens(model: Any) -> None:
    """Refuse a model whose decoder takes no soft masks.

    Raises:
        FoveateError: another attention implementation than SDPA and eager, float16, or a model that is being pruned.
    """
    if getattr(model, "_foveate_handle", None) is not None:
        raise FoveateError("this model is being pruned, so it cannot be trained with; stop() the handle first")
    family = family_of(model)
    if family.closed_decoder is not None:
        raise FoveateError(
            f"training acts inside the decoder, which {family.name} does not allow: {family.closed_decoder}"
        )
    kind = model.get_decoder().config._attn_implementation
    if kind not in IMPLEMENTATIONS:
        raise FoveateError(
            f"attn_implementation={kind!r} takes no mask with gradients; load the model with "
            f"{' or '.join(IMPLEMENTATIONS)}"
        )
    check_softens_in(model.dtype)


def check_softens_in(dtype: torch.dtype | None) -> None:
    """Refuse numbers that soft masks have no gradients in.

    Raises:
        FoveateError: float16.
    """
    if dtype == torch.float16:
        raise FoveateError(
            "dtype=float16 cannot hold the gradients of masked tokens; load the model with dtype=bfloat16, or "
            "dtype=float32"
        )


@contextmanager
def soften(model: Any, between: Between) -> Iterator[None]:
    """Ask `between` before every decoder layer of `model`, until the context is left; gradients pass through.

    Calls of the model in here run without cache. Masks with gradients are taken by SDPA and eager attention alone, and
    float16 cannot hold the gradient of a token that is masked to one part in a billion.

    Raises:
        FoveateError: another attention implementation, float16, or a model that is being pruned.
    """
    check_softens(model)
    decoder = model.get_decoder()
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
