"""The row of a model whose type has none: made of the standard parts that are found, refused where one is missing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from foveate.core import FoveateError
from foveate.families.family import Family
from foveate.families.layouts import Encoded, Layout, entries, plain
from foveate.families.rows import three_axes
from foveate.families.towers import TOWERS, Tower

HIDDEN = Tower("a vision encoder that is not described", summary=0, blocks="", known=False)
"""Stands for an encoder of which no method can see anything."""

_TOWERS = ("vision_tower", "vision_model", "visual", "vision_encoder")
_IMAGE_TOKENS = ("image_token_id", "image_token_index")


@dataclass(frozen=True)
class GenericFamily(Family):
    """A family of one model, by what was found of it.

    Attributes:
        row: the description of its encoder; None where its blocks cannot be observed.
        assumed: what pruning takes for granted, in words.
    """

    row: Tower | None = None
    assumed: tuple[str, ...] = ()

    def tower_of(self, model: Any) -> tuple[nn.Module, Tower]:
        """The vision encoder and its description, or the model and one that shows nothing."""
        return (model.base_model, HIDDEN) if self.row is None else super().tower_of(model)

    def read_block(self, model: Any) -> int:
        """0-based number of the encoder block that the projector reads; -1 where the encoder shows nothing."""
        return -1 if self.row is None else super().read_block(model)

    @property
    def warning(self) -> str:
        """What a user should know before relying on it."""
        return (
            f"{self.name!r} is no family that Foveate knows. What was found of it has the standard parts, and this is "
            f"assumed: {'; '.join(self.assumed)}. Run `foveate check` on it first"
        )


def generic_family(model: Any) -> GenericFamily:
    """A row for a vision-language model of unknown type.

    Raises:
        FoveateError: a standard part is missing; the message names it.
    """
    config = model.config
    _check_mixers(model)
    image_token = next((name for name in _IMAGE_TOKENS if isinstance(getattr(config, name, None), int)), None)
    missing = missing_parts(model, image_token)
    if missing:
        raise FoveateError(
            f"{type(model).__name__} ({config.model_type}) has no row among the families, and a row cannot be made for "
            f"it without {', '.join(missing)}; `foveate models` lists the families"
        )
    assert image_token is not None
    path = next((name for name in _TOWERS if isinstance(getattr(model.base_model, name, None), nn.Module)), None)
    row = None if path is None else _described(model, path)
    assumed = [
        "each entry of pooler_output is one picture, whose tokens stand in the prompt in their order",
        "token types, where the model takes any, mark pictures alone",
        "the decoder's blocks are dense and gated, and what encoder and projector compute is not counted",
    ]
    tokens = getattr(config, "image_seq_length", None)
    if row is None:
        assumed.append("nothing can be read from the encoder")
    else:
        assumed.append(f"its {tokens} tokens are the patches of the block that vision_feature_layer names, or the last")
    base, decoder = model.base_model, model.get_decoder()
    return GenericFamily(
        name=str(config.model_type),
        types=(str(config.model_type),),
        hub_ids=(),
        towers=() if row is None else (row.type,),
        read=_read(config),
        grid=lambda config: (1, 1) if row is None else _raster(config),
        image_token=image_token,
        tower=path or "",
        pointwise=False,
        fixed=False,
        layouts=entries if row is None else _patches,
        closed_encoder="its type has no row, so what its projector needs of the encoder is not known",
        closed_decoder="its layers take inputs of their own for each token, or keys and values of others"
        if _hang(model)
        else None,
        positions=three_axes if hasattr(base, "get_rope_index") else None,
        deepstack="_deepstack_process" if hasattr(decoder, "_deepstack_process") else None,
        typed_past=_ahead(model),
        two_way=_two_way(model),
        row=row,
        assumed=tuple(assumed),
    )


def _check_mixers(model: Any) -> None:
    """Refuse decoders of which only some layers have attention.

    Raises:
        FoveateError: the others carry a state from token to token: pruning counts and caches what a layer holds of each
            token, and rows of different length are filled up between their turns, which such a state does not forget.
    """
    layers = list(getattr(_decoder(model), "layers", None) or ())
    without = [number for number, layer in enumerate(layers) if not hasattr(layer, "self_attn")]
    if 0 < len(without) < len(layers):
        raise FoveateError(
            f"{type(model).__name__} ({model.config.model_type}) cannot be pruned: {len(without)} of its {len(layers)} "
            f"decoder layers, layer {without[0]} among them, have no self_attn. They carry a state from token to token "
            "in place of keys and values of each, which is neither counted nor cached by tokens; `foveate models` "
            "lists the families"
        )


def missing_parts(model: Any, image_token: str | None) -> list[str]:
    """The standard parts that a model lacks, in words."""
    base, decoder = getattr(model, "base_model", model), _decoder(model)
    layers: Any = getattr(decoder, "layers", None)
    forward = inspect.signature(type(model).forward).parameters
    below = inspect.signature(type(base).forward).parameters
    rope = getattr(base, "get_rope_index", None)
    axes = rope is None or "mm_token_type_ids" in inspect.signature(rope).parameters
    listed = isinstance(layers, nn.ModuleList) and len(layers) > 0
    first = next(iter(layers)) if listed else None
    attention = hasattr(first, "self_attn") and hasattr(first, "input_layernorm")
    found = {
        "generate()": hasattr(model, "generate"),
        "image_token_id in its configuration": image_token is not None,
        "get_image_features()": callable(getattr(base, "get_image_features", None)),
        "get_decoder().layers": listed,
        "get_decoder().norm": isinstance(getattr(decoder, "norm", None), nn.Module),
        "self_attn and input_layernorm in the decoder's layers": attention or not listed,
        "mm_encoder_outputs among the arguments of forward()": "mm_encoder_outputs" in {*forward, *below},
        "mm_token_type_ids among the arguments of get_rope_index()": axes,
    }
    return [name for name, there in found.items() if not there]


def _decoder(model: Any) -> Any:
    return model.get_decoder() if hasattr(model, "get_decoder") else None


def _described(model: Any, path: str) -> Tower | None:
    """The description of the encoder, where its blocks are there and the decoder's tokens are its patches."""
    tower = getattr(model.base_model, path)
    kind = getattr(getattr(tower, "config", None), "model_type", None)
    row = next((row for row in TOWERS if row.type == kind and not row.packed), None)
    if row is None:
        return None
    try:
        blocks, (height, width) = row.blocks_of(tower), _raster(model.config)
    except (AttributeError, TypeError):
        return None
    stated = getattr(model.config, "image_seq_length", None)
    if stated != height * width or not 0 <= _read(model.config)(model.config, len(blocks)) < len(blocks):
        return None
    return row


def _two_way(model: Any) -> bool:
    """Whether tokens of a prompt may attend to later ones of it: as Gemma's say, or by token types, as PaliGemma's."""
    return _ahead(model) or "token_type_ids" in inspect.signature(type(model).forward).parameters


def _ahead(model: Any) -> bool:
    """Whether tokens of one picture look ahead, by token types that Gemma's read from the start of the cache on."""
    return bool(getattr(model.config.get_text_config(decoder=True), "use_bidirectional_attention", None))


def _hang(model: Any) -> bool:
    """Whether its layers need more than hidden states, as Gemma's of the fourth generation say it."""
    text = model.config.get_text_config(decoder=True)
    return any(getattr(text, name, None) for name in ("hidden_size_per_layer_input", "num_kv_shared_layers"))


def _raster(config: Any) -> tuple[int, int]:
    vision = config.vision_config
    return (int(vision.image_size // vision.patch_size),) * 2


def _read(config: Any) -> Callable[[Any, int], int]:
    layer = getattr(config, "vision_feature_layer", -1)
    return lambda config, blocks: (layer if layer >= 0 else layer + blocks + 1) - 1 if isinstance(layer, int) else -1


def _patches(encoded: Encoded) -> list[Layout]:
    """Pictures of one size whose tokens are the encoder's patches."""
    height, width = _raster(encoded.model.config)
    other = next((rows for rows in encoded.rows if rows != height * width), None)
    if other is not None:
        raise FoveateError(
            f"a picture of this {encoded.model.config.model_type!r} model has {other} tokens and its encoder "
            f"{height * width} patches; which token is which patch is not known. Methods that read nothing from the "
            "encoder work, such as fastv"
        )
    return plain(encoded)
