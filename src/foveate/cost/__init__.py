"""What a model costs, by arithmetic alone: floating-point operations, bytes of keys and values, equivalent tokens."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foveate.cost.flops import (
        Convention,
        decode_flops,
        decoder_flops,
        equivalent_tokens,
        kv_bytes,
        lvpruning_modules,
        prefill_flops,
        projector_flops,
        tower_flops,
    )
    from foveate.cost.plan import visual_per_layer
    from foveate.cost.shapes import PRESETS, DecoderShape, ModelShape, ProjectorShape, TowerShape, shape

__all__ = [
    "PRESETS",
    "Convention",
    "DecoderShape",
    "ModelShape",
    "ProjectorShape",
    "TowerShape",
    "decode_flops",
    "decoder_flops",
    "equivalent_tokens",
    "kv_bytes",
    "lvpruning_modules",
    "prefill_flops",
    "projector_flops",
    "shape",
    "tower_flops",
    "visual_per_layer",
]

_SHAPES = {"PRESETS", "DecoderShape", "ModelShape", "ProjectorShape", "TowerShape", "shape"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "shapes" if name in _SHAPES else "plan" if name == "visual_per_layer" else "flops"
    return getattr(import_module(f"{__name__}.{room}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
