"""Reads attention while a model runs its own: one inert attention name with its mask twin."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.core import FoveateError
from foveate.runtime.uncopied import Uncopied

PROBE = "foveate_probe"
"""Name under which the observing attention is registered. It stays registered: transformers cannot take it back."""


class Observed(Uncopied):
    """One attention module under observation, from install() to remove()."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.config: Any = None  # the module's own, while the probe's is in its place
        self.implementation = ""

    def install(self) -> None:
        """Give this module a configuration of its own that names the probe; nothing else is touched."""
        self.config = self.attention.config
        self.implementation = self.config._attn_implementation
        config = copy.copy(self.config)
        config._attn_implementation_internal = PROBE
        self.attention.config = config
        self.attention._foveate_watch = self

    def remove(self) -> None:
        """Put the module back as it was; nothing to do for one that is not observed."""
        if self.config is not None:
            self.attention.config, self.config = self.config, None
            del self.attention._foveate_watch

    def attend(self, queries: Tensor, *rest: Any, **options: Any) -> Any:
        """The attention that the model would have run."""
        eager = getattr(sys.modules[type(self.attention).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager)
        return function(self.attention, queries, *rest, **options)

    def weighed(self, mask: Tensor | None, keys: Tensor) -> Tensor | None:
        """The mask that the model's attention is to run with."""
        return mask

    def note_bounds(self, bounds: Tensor | None) -> None:
        """Where each picture begins in a packed sequence; nothing to note where none is packed."""

    def read_attention(
        self, queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
    ) -> None:
        """Note what this call's queries and keys (B, H, L, d) say."""
        raise NotImplementedError(f"{type(self).__name__} reads nothing")


def key_mask(mask: Tensor | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """Which keys are no padding, (B, N) bool, and what is added to the logits of the others, (B, N); None for nothing.

    Args:
        mask: (B, N), or (B or 1, 1, 1, N) bool or additive.

    Raises:
        FoveateError: the mask differs from query to query.
    """
    if mask is None:
        return None, None
    if mask.ndim == 4 and mask.shape[2] > 1 and bool((mask != mask[:, :, :1]).any()):
        raise FoveateError("this encoder masks each patch in its own way, so attention sums cannot be read from it")
    keys = mask if mask.ndim == 2 else mask[:, 0, 0]
    if not keys.is_floating_point():
        return keys.bool().expand(batch, -1), None
    open_ = keys > torch.finfo(keys.dtype).min / 2
    return open_.expand(batch, -1), keys.float().masked_fill(~open_, 0.0).expand(batch, -1)


def _register() -> None:
    if PROBE not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(PROBE, _attend)
        # Without its twin an unknown name would get no mask at all.
        AttentionMaskInterface.register(PROBE, sdpa_mask)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    watch: Observed = module._foveate_watch
    output = watch.attend(query, key, value, watch.weighed(attention_mask, key), **options)
    scale = options.get("scaling")
    more = {"softcap": options["softcap"]} if options.get("softcap") else {}
    watch.note_bounds(options.get("cu_seq_lens_q"))
    watch.read_attention(query, key, attention_mask, query.shape[-1] ** -0.5 if scale is None else scale, **more)
    return output
