"""Options with which `generate()` decodes compiled: the tokens of an answer, on a static cache, as one graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from foveate.core import FoveateError, Method
from foveate.spec import format as format_spec


def check_static(stages: Iterable[Method]) -> None:
    """Refuse methods that a static cache has no room for.

    Raises:
        FoveateError: naming the first.
    """
    for method in stages:
        if any(part.site == "cache" for part in method.parts()):
            raise FoveateError(
                f"{format_spec(method)} evicts entries, and compiled decoding needs a static cache, which cannot "
                "shrink; leave compiling out, or use a method that acts before the cache, such as fastv"
            )


def compiled_decoding(model: Any) -> dict[str, Any]:
    """Options of `generate()`; transformers compiles by itself on accelerators alone, here it does so on a CPU too.

    The first answer of each prompt's length waits for the graph, seconds to minutes.

    Raises:
        FoveateError: what translates graphs for this device is missing.
    """
    from transformers import CompileConfig

    _check_compiler(model.device)
    config = CompileConfig()
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def _check_compiler(device: torch.device) -> None:
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except RuntimeError as error:
            raise FoveateError(
                "compiling for the CPU needs a C++ compiler, and none is found; install g++ or clang++, or name one in "
                "the environment variable CXX"
            ) from error
    elif device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise FoveateError("compiling for a GPU needs Triton, and it is not installed; pip install triton")
