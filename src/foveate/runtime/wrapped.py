"""Finds the model inside what wraps it, and refuses wrappings under which pruning could not act."""

from __future__ import annotations

import sys
from typing import Any

import transformers
from packaging.version import Version

from foveate.core import FoveateError, Method
from foveate.families.family import Family
from foveate.spec import format as format_spec

_PEFT = "0.21"
"""Older ones call `forward` of the model inside."""


def unwrapped(model: Any) -> Any:
    """The model of transformers that a pipeline, a PEFT model, torch.compile(), several of them or nothing wraps.

    They call the one inside like any caller, so that pruning acts on what it generates.

    Raises:
        FoveateError: a wrapping that hides the prompt's ids.
    """
    model = _inside_graph(outermost(model))
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        _check_peft()
        learning = getattr(model.active_peft_config, "is_prompt_learning", False)
        if learning:
            kind = getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type)
            raise FoveateError(
                f"{kind} puts learned embeddings in front of the prompt, which hides the ids that say what is visual; "
                "adapters that change weights, such as LoRA, work"
            )
        model = model.get_base_model()
    return _inside_graph(model)


def outermost(model: Any) -> Any:
    """The module that is around all others: that of a pipeline, or what was given."""
    return model.model if is_pipeline(model) else model


def _inside_graph(model: Any) -> Any:
    """What torch.compile() has wrapped."""
    return vars(model).get("_modules", {}).get("_orig_mod", model) if hasattr(model, "__dict__") else model


def is_pipeline(model: Any) -> bool:
    """Whether this is a pipeline of transformers."""
    pipelines = sys.modules.get("transformers.pipelines.base")  # which no pipeline comes without
    return pipelines is not None and isinstance(model, pipelines.Pipeline)


def _check_peft() -> None:
    import peft

    if Version(peft.__version__) < Version(_PEFT):
        raise FoveateError(
            f"peft {peft.__version__} calls the model that it wraps past its hooks, so a direct call would not be "
            f"pruned; {_PEFT} or newer does not"
        )


def check_devices(model: Any, part: Method) -> None:
    """Refuse a method that would follow tokens through blocks on several accelerators.

    Weights that a device map leaves on the CPU or on disk come to the one accelerator for each call.

    Raises:
        FoveateError: naming the devices.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()} - {"cpu", "disk"}
    if len(places) > 1 and part.site != "input":
        raise FoveateError(
            f"{format_spec(part)} acts inside the model, whose blocks are on {len(places)} devices "
            f"({', '.join(sorted(places))}); load it on one, or use a method that acts between encoder and decoder"
        )


def check_version(family: Family) -> None:
    """Refuse a family whose parts are not yet in the transformers at hand.

    Raises:
        FoveateError: naming both versions.
    """
    if Version(transformers.__version__) < Version(family.transformers):
        raise FoveateError(
            f"{family.name} needs transformers {family.transformers} or newer; {transformers.__version__} is installed"
        )
