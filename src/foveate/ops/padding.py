"""Tensors of unlike sizes in one: filled up with zeros at the end of their axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def joined(values: Sequence[Tensor]) -> Tensor:
    """Along the first axis; the others are filled up to the longest of all.

    Args:
        values: (n, ...) each, of one number of axes.
    """
    longest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    filled = []
    for value in values:
        missing = [most - size for most, size in zip(longest, value.shape[1:], strict=True)]
        filled.append(nn.functional.pad(value, [side for more in reversed(missing) for side in (0, more)]))
    return torch.cat(filled)
