"""Sums over attention maps by a processor's own fused kernel, which knows each row's sum once the model has attended.

Shapes: B images, H heads, N tokens, M queries, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_KERNEL: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""What scaled_dot_product_attention() comes down to on a CPU; it gives (output, logarithm of each row's sum)."""

_PARTS = 3
"""Columns of bfloat16 that say a number of float32 to its last bit but one or two."""

_WIDTH = 8
"""Widths of a head of which the kernel is fast are multiples of this."""


def helps(queries: Tensor) -> bool:
    """Whether the kernel sums these queries' attention faster than tiles do.

    In bfloat16 it takes exponentials of products that it never writes down. In float32 multiplying takes longer than
    that, and a tile needs no rows' sums.
    """
    return _KERNEL is not None and queries.device.type == "cpu" and queries.dtype == torch.bfloat16


class RowSums(TorchDispatchMode):
    """While this is open, notes what the kernel says of each row of an attention map."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Tensor, Tensor, bool, Tensor]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        """Run an operation, and look at what it gives where it is the kernel."""
        named = named or {}
        if operation is torch.ops.aten.scaled_dot_product_attention.default:  # whole in inference mode
            with self:
                return operation.decompose(*given, **named)
        found = operation(*given, **named)
        if _KERNEL is not None and operation is _KERNEL.default:
            plain = len(given) <= 3 and named.get("attn_mask") is None and not named.get("is_causal")
            self._calls.append((given[0], given[1], plain, found[1]))
        return found

    def of(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """(B, H, M) logarithm of each row's sum; None where the kernel was not asked for these, or not for all keys."""
        if len(self._calls) != 1:
            return None
        asked, answering, plain, log_sums = self._calls[0]
        alike = asked.shape == queries.shape and answering.shape == keys.shape
        return log_sums.detach() if plain and alike else None


def column_sums(queries: Tensor, keys: Tensor, scale: float, log_sums: Tensor) -> Tensor:
    """What each key is given by all queries: (B, H, N), float32.

    It is the sum over the queries of exp(q . k * scale - log_sums), so its logarithm is what the kernel says of the
    rows of keys that attend to queries, where each query's logit is lowered by its own `log_sums`. That stands in
    further columns of the queries, which the keys multiply by 1.

    Args:
        queries: (B, H, M, d) bfloat16.
        keys: (B, H, N, d).
        log_sums: (B, H, M) float32.
    """
    width = queries.shape[-1]
    wide = -(-(width + _PARTS) // _WIDTH) * _WIDTH
    asked, answering = (values.new_zeros(*values.shape[:3], wide) for values in (queries, keys))
    asked[..., :width], answering[..., :width] = queries, keys
    answering[..., width : width + _PARTS] = 1
    left = log_sums / -scale  # which the kernel multiplies by the scale again
    for part in range(width, width + _PARTS):
        asked[..., part] = left
        left = left - asked[..., part]
    of_keys: Tensor = _KERNEL(answering, asked, asked, scale=scale)[1]
    return of_keys.exp()
