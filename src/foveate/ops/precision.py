"""Which precisions a machine's processor computes in."""

from __future__ import annotations

import torch


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products in bfloat16; without them they take several times as long."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
