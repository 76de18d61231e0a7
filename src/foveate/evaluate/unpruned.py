"""What a prompt costs without pruning, from the model's sizes and the prompt's tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.cost import kv_bytes, prefill_flops, projector_flops, tower_flops
from foveate.families import family_of
from foveate.runtime.placeholders import Placeholders
from foveate.runtime.support import shape_of
from foveate.trace import Budget


def decoder_layers(model: Any) -> int:
    """How many layers the decoder has."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def visual_tokens(model: Any, inputs: Any) -> list[int]:
    """How many ids of each prompt of a batch stand for visual tokens, of pictures or videos."""
    visual = Placeholders(model, family_of(model)).are(inputs["input_ids"])
    return [int(count) for count in visual.sum(dim=1)]


def unpruned_budget(model: Any, inputs: Any, images: int) -> Budget:
    """The budget of one unpruned prompt, counted as a trace counts: convention `roofline`, tower and projector too.

    Args:
        inputs: of one prompt, with `input_ids` (1, L).
        images: pictures in it.

    Raises:
        FoveateError: the sizes of this family of models are not known.
    """
    shape = shape_of(model, family_of(model))
    length = inputs["input_ids"].shape[1]
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    layers = shape.decoder.layers
    given: dict[str, Any] = {"visual": (visual,) * layers, "text": length - visual, "convention": "roofline"}
    if shape.tower.own_size:  # as many patches as the pictures have, which are taken as alike
        patches = shape.patches_of(round(visual / images))
        flops = prefill_flops(shape, **given, tower=False) + projector_flops(shape.projector, tokens=visual)
        flops += images * tower_flops(shape.tower, convention="roofline", patches=patches)
    else:
        flops = prefill_flops(shape, **given, tiles=images, tower=True)
    held = kv_bytes(shape.decoder, (length,) * layers, model.dtype.itemsize)
    return Budget((visual / images,) * layers, float(flops), held)


def unpruned_of_all(model: Any, inputs: Any) -> tuple[list[int], float, int]:
    """Visual tokens of each prompt of a batch with one picture each, and prefill FLOPs and cache bytes of all.

    Padding is not counted.

    Raises:
        FoveateError: as `unpruned_budget`.
    """
    prompts: list[Tensor] = [
        ids[mask.bool()][None] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    budgets = [unpruned_budget(model, {"input_ids": ids}, 1) for ids in prompts]
    tokens = [round(budget.tokens[0]) for budget in budgets]
    return tokens, sum(budget.prefill_flops for budget in budgets), sum(budget.kv_bytes for budget in budgets)
