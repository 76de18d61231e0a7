"""Which of vLLM's two ways runs a family: its own kernels, or transformers' model inside it; and why none does."""

from __future__ import annotations

from typing import Any

from packaging.version import Version

from foveate.serve.vllm.asked import SPEC, parts_of
from foveate.serve.vllm.outline import Outline
from foveate.serve.vllm.rooms import FAMILIES, Family, FoveateError, did_you_mean

ROUTE = "foveate_route"
"""Name in hf_overrides that forces one."""
TRANSFORMERS, IN_TREE = "transformers", "in-tree"
BELOW = "5.20"
"""The transformers that the tested vLLM takes is older than this."""
ANY, ANY_MOE = "FoveateForConditionalGeneration", "FoveateMoEForConditionalGeneration"
IN_TREE_CLASSES = {
    "llava-1.5": "FoveateLlavaForConditionalGeneration",
    "qwen2.5-vl": "FoveateQwen2_5_VLForConditionalGeneration",
    "qwen3-vl": "FoveateQwen3VLForConditionalGeneration",
    "internvl": "FoveateInternVLForConditionalGeneration",
}
"""Families with a class of their own on vLLM's kernels, and its name."""
STOCK_ENCODER_CLASSES = {"qwen3-vl": "FoveateQwen3VLOnStockEncoder"}
"""Those among them that no other way runs, with transformers' encoder where tokens leave before it."""
_IN_TREE_TOWERS = {"llava-1.5": ("clip_vision_model",)}
"""Encoders that such a class reads, where its family has several."""


def why_not(family: Family) -> str | None:
    """Why no way runs a family; None where one does."""
    if family.two_way and family.answers_typed:
        return "all of its prompt looks both ways, and vLLM lets pictures alone do so, on CPUs not even these"
    if family.two_way:
        return "its pictures look both ways, and vLLM's attention on CPUs lets none do so; on GPUs it was not tested"
    if Version(family.transformers) >= Version(BELOW):
        return f"it needs transformers {family.transformers} or newer, and vLLM takes older ones than {BELOW}"
    if family.deepstack is not None and family.name not in IN_TREE_CLASSES:
        return "deeper blocks take features of the picture, which vLLM's transformers backend leaves out, pruned or not"
    return None


def routes_of(name: str) -> list[str]:
    """The ways in which a family runs, the usual one first."""
    family = next(family for family in FAMILIES if family.name == name)
    if why_not(family) is not None:
        return []
    own = [IN_TREE] if name in IN_TREE_CLASSES else []
    return own if family.deepstack is not None else [*own, TRANSFORMERS]


def route_of(config: Any, outline: Outline) -> str:
    """The way that runs a model: vLLM's own kernels where they do what the spec asks, or as hf_overrides say.

    Raises:
        FoveateError: there is no such way for the family.
    """
    asked, name = getattr(config, ROUTE, None), outline.family.name
    reason = why_not(outline.family)
    if reason is not None:
        raise FoveateError(f"{name} cannot be pruned in vLLM: {reason}")
    if asked not in (None, TRANSFORMERS, IN_TREE):
        raise FoveateError(f"{ROUTE}={asked!r} is no route; {did_you_mean(str(asked), (TRANSFORMERS, IN_TREE))}")
    routes = routes_of(name)
    if outline.tower.type not in _IN_TREE_TOWERS.get(name, (outline.tower.type,)):
        routes = [TRANSFORMERS]
    if asked is not None and asked not in routes:
        raise FoveateError(f"{ROUTE}={asked!r}: {name} with {outline.tower.type} runs {' or '.join(routes)} alone")
    return asked or (TRANSFORMERS if _before(config) and TRANSFORMERS in routes else routes[0])


def runs_before(config: Any, outline: Outline) -> bool:
    """Whether tokens may leave before the encoder of a model, as it is run."""
    if route_of(config, outline) == TRANSFORMERS:
        return True
    return outline.family.name in STOCK_ENCODER_CLASSES and _before(config)


def _before(config: Any) -> bool:
    """Whether the engine's own spec lets tokens leave before the encoder."""
    return any(part.site == "pixels" for part in parts_of(getattr(config, SPEC)))


def architecture(config: Any, outline: Outline) -> str:
    """The class that runs a model.

    Raises:
        FoveateError: there is none for the family.
    """
    if route_of(config, outline) == IN_TREE:
        classes = STOCK_ENCODER_CLASSES if runs_before(config, outline) else IN_TREE_CLASSES
        return classes[outline.family.name]
    decoder = config.get_text_config()
    experts = getattr(decoder, "num_experts", None) or getattr(decoder, "n_routed_experts", None)
    return ANY_MOE if experts else ANY
