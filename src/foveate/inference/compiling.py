"""Options with which `generate()` decodes compiled: the tokens of an answer, on a static cache, as one graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from foveate.core import FoveateError, Method
from foveate.spec import format as format_spec

_WIDEST = 1 << 30  # columns or rows of a weight: any


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
    if model.device.type == "cpu":
        config.mode, config.options = None, {**_products_of_one_row(), **_grouped_heads()}
    return {"cache_implementation": "static", "compile_config": config}


def _products_of_one_row() -> dict[str, Any]:
    """Options by which torch's compiler writes a token's products with the weights itself, where it would call BLAS.

    Such a product reads each weight once, and BLAS is made for products of many rows: on a CPU without AVX-512 it reads
    half as fast as memory gives. The compiler leaves those of over 2,048 columns to it unless told otherwise.
    """
    from torch._inductor.fx_passes import decompose_mem_bound_mm

    # Its own option for this is read when the module is imported, which may have been at any time.
    decompose_mem_bound_mm.cpu_max_other_dimension_decomposition = _WIDEST
    return {"post_grad_fusion_options": {"decompose_mm_pass": {"cpu_max_other_dimension_decomposition": _WIDEST}}}


def _grouped_heads() -> dict[str, Any]:
    """Options by which query heads that share keys read the cache once, where transformers copies it for each."""
    from foveate.inference.grouped import GroupedHeads  # loads torch's compiler, which a second goes by for

    return {"post_grad_custom_pre_pass": GroupedHeads()}


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
