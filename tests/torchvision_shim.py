"""Lets a torchvision that is built for GPUs load beside a torch for CPUs: for tests alone.

It registers what its operators do on tensors without data, which fails where its library of operators has not loaded.
Naming the operators first is enough. `make test-vllm` and `make test-video` put this file where every process of their
environments loads it.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _Finder(importlib.abc.MetaPathFinder):
    """Acts when the module that needs the names is looked for; finds nothing itself."""

    library: Any = None  # the names live as long as it does

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision._meta_registrations" and self.library is None:
            import torch

            if not hasattr(torch.ops.torchvision, "nms"):
                self.library = torch.library.Library("torchvision", "DEF")
                for schema in _SCHEMAS:
                    self.library.define(schema)


sys.meta_path.insert(0, _Finder())
