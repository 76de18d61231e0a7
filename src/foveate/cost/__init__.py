"""What a model costs, by arithmetic alone: operations, bytes, roofline seconds, equivalent tokens."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foveate.cost.devices import HARDWARE, Hardware, Precision, fitted, hardware, hardware_of, precision
    from foveate.cost.estimates import Cost, Stage, estimate
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
    from foveate.cost.plan import Plan, token_plan, visual_per_layer
    from foveate.cost.presets import PRESETS
    from foveate.cost.shapes import shape
    from foveate.cost.sweeps import sweep
    from foveate.cost.training import TrainingMemory, training_memory
    from foveate.families.shapes import DecoderShape, ModelShape, ProjectorShape, TowerShape

_ROOMS = {
    "estimates": ("Cost", "Stage", "estimate"),
    "flops": (
        "Convention",
        "decode_flops",
        "decoder_flops",
        "equivalent_tokens",
        "kv_bytes",
        "lvpruning_modules",
        "prefill_flops",
        "projector_flops",
        "tower_flops",
    ),
    "devices": ("HARDWARE", "Hardware", "Precision", "fitted", "hardware", "hardware_of", "precision"),
    "plan": ("Plan", "token_plan", "visual_per_layer"),
    "presets": ("PRESETS",),
    "foveate.families.shapes": ("DecoderShape", "ModelShape", "ProjectorShape", "TowerShape"),
    "shapes": ("shape",),
    "sweeps": ("sweep",),
    "training": ("TrainingMemory", "training_memory"),
}
_HOMES = {name: room if "." in room else f"{__name__}.{room}" for room, names in _ROOMS.items() for name in names}

__all__ = [
    "HARDWARE",
    "PRESETS",
    "Convention",
    "Cost",
    "DecoderShape",
    "Hardware",
    "ModelShape",
    "Plan",
    "Precision",
    "ProjectorShape",
    "Stage",
    "TowerShape",
    "TrainingMemory",
    "decode_flops",
    "decoder_flops",
    "equivalent_tokens",
    "estimate",
    "fitted",
    "hardware",
    "hardware_of",
    "kv_bytes",
    "lvpruning_modules",
    "precision",
    "prefill_flops",
    "projector_flops",
    "shape",
    "sweep",
    "token_plan",
    "tower_flops",
    "training_memory",
    "visual_per_layer",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
