"""Where vLLM meets the plug-in: architecture, positions and switches follow from one name in hf_overrides."""

from __future__ import annotations

import functools
from typing import Any

import vllm
import vllm.config.model as model_configuration
from vllm import ModelRegistry

from foveate.serve.vllm.asked import SPEC
from foveate.serve.vllm.outline import Outline
from foveate.serve.vllm.routes import ANY, ANY_MOE, IN_TREE_CLASSES, STOCK_ENCODER_CLASSES, architecture
from foveate.serve.vllm.settings import check_vllm, rules_of

_ROOM = "foveate.serve.vllm"
_ONE_AXIS = [1, 0, 0]
"""Makes vLLM keep positions on three axes where the decoder counts on one; the sizes of the axes are not used."""


def install() -> None:
    """Make the plug-in's classes known, and let configurations that name a spec choose among them."""
    for name in (ANY, ANY_MOE):
        ModelRegistry.register_model(name, f"{_ROOM}.transformers_backend:{name}")
    for name in IN_TREE_CLASSES.values():
        ModelRegistry.register_model(name, f"{_ROOM}.in_tree:{name}")
    for name in STOCK_ENCODER_CLASSES.values():
        ModelRegistry.register_model(name, f"{_ROOM}.stock_encoder:{name}")
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
