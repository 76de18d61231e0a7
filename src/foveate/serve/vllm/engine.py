"""Where vLLM meets the plug-in: architecture, positions and switches follow from one name in hf_overrides."""

from __future__ import annotations

import functools
from typing import Any

import vllm
import vllm.config.model as model_configuration
from vllm import ModelRegistry

from foveate.serve.vllm.asked import SPEC
from foveate.serve.vllm.outline import Outline
from foveate.serve.vllm.rooms import FoveateError, did_you_mean
from foveate.serve.vllm.settings import IN_TREE, ROUTE, TRANSFORMERS, check_vllm, rules_of

_ROOM = "foveate.serve.vllm"
_ANY, _ANY_MOE = "FoveateForConditionalGeneration", "FoveateMoEForConditionalGeneration"
_IN_TREE = {
    "llava-1.5": "FoveateLlavaForConditionalGeneration",
    "qwen2.5-vl": "FoveateQwen2_5_VLForConditionalGeneration",
    "qwen3-vl": "FoveateQwen3VLForConditionalGeneration",
    "internvl": "FoveateInternVLForConditionalGeneration",
}
"""Families with a class of their own on vLLM's kernels, and its name."""
_ONE_AXIS = [1, 0, 0]
"""Makes vLLM keep positions on three axes where the decoder counts on one; the sizes of the axes are not used."""


def install() -> None:
    """Make the plug-in's classes known, and let configurations that name a spec choose among them."""
    for name in (_ANY, _ANY_MOE):
        ModelRegistry.register_model(name, f"{_ROOM}.transformers_backend:{name}")
    for name in _IN_TREE.values():
        ModelRegistry.register_model(name, f"{_ROOM}.in_tree:{name}")
    stock = model_configuration.get_config
    if getattr(stock, "_foveate", False):
        return

    @functools.wraps(stock)
    def get_config(*arguments: Any, **options: Any) -> Any:
        return prepared(stock(*arguments, **options))

    get_config._foveate = True  # type: ignore[attr-defined]
    model_configuration.get_config = get_config


def prepared(config: Any) -> Any:
    """A configuration that names a spec, with all that follows from it; any other as it is.

    Raises:
        FoveateError: the spec cannot run on this model, or vLLM is another than the tested one.
    """
    if getattr(config, SPEC, None) is None:
        return config
    check_vllm(vllm.__version__)
    outline = Outline(config)
    config.foveate = rules_of(config, outline).spec
    # The stock one stays behind it: names of weights are mapped by it.
    config.architectures = [architecture(config, outline), *(config.architectures or [])]
    if outline.family.positions is None:
        config.mrope_section = _ONE_AXIS
    return config


def architecture(config: Any, outline: Outline) -> str:
    """The class that runs a model: on vLLM's own kernels where there is one, or as hf_overrides say.

    Raises:
        FoveateError: there is no such route for the family.
    """
    asked, name = getattr(config, ROUTE, None), outline.family.name
    if outline.family.two_way:
        raise FoveateError(
            f"pictures of {name} look both ways, which vLLM's attention on CPUs leaves out and which was not tested on "
            "GPUs; prune it on transformers"
        )
    if asked not in (None, TRANSFORMERS, IN_TREE):
        raise FoveateError(f"{ROUTE}={asked!r} is no route; {did_you_mean(str(asked), (TRANSFORMERS, IN_TREE))}")
    if asked == IN_TREE and name not in _IN_TREE:
        raise FoveateError(f"{name} has no class on vLLM's own kernels; those that have: {', '.join(_IN_TREE)}")
    deep = outline.family.deepstack is not None
    if deep and (asked == TRANSFORMERS or name not in _IN_TREE):
        raise FoveateError(
            f"{name} adds features of the picture to deeper blocks, which vLLM's transformers backend leaves out, "
            "pruned or not"
        )
    if asked != TRANSFORMERS and name in _IN_TREE:
        return _IN_TREE[name]
    experts = getattr(config.get_text_config(), "num_experts", None) or getattr(
        config.get_text_config(), "n_routed_experts", None
    )
    return _ANY_MOE if experts else _ANY
