"""Reads a vision encoder's attention and hidden states while it runs: only named blocks, only what a method needs."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.core import Block, FoveateError
from foveate.families import Family, Tower
from foveate.ops.scores import attention_sums, row_attention

PROBE = "foveate_probe"
"""Name under which the observing attention is registered. It stays registered: transformers cannot take it back."""

_SUMS = ("received", "given", "received_all")
_OF_CLS = ("cls", "cls_attention", "key_cls", "query_cls")
FIELDS = ("hidden", *_OF_CLS, *_SUMS, "keys")


def tower_needs(needs: Iterable[str]) -> dict[str, set[str]]:
    """{"read": {"received"}} from ("tower.read.received", "features"): the fields wanted of each encoder block."""
    wanted: dict[str, set[str]] = {}
    for need in needs:
        room, _, rest = need.partition(".")
        if room == "tower":
            block, _, name = rest.partition(".")
            wanted.setdefault(block, set()).add(name)
    return wanted


def missing_signals(needs: Iterable[str], tower: Tower) -> list[str]:
    """Which of a method's tower signals this encoder cannot give: CLS fields of an encoder without CLS."""
    return [
        f"tower.{block}.{name}"
        for block, names in tower_needs(needs).items()
        for name in sorted(names)
        if name not in FIELDS or (name in _OF_CLS and tower.summary == 0)
    ]


class Watch:
    """One encoder block under observation; lives on its attention module while the probe is installed."""

    def __init__(self, block: nn.Module, attention: nn.Module, fields: set[str], summary: int) -> None:
        self.block, self.attention, self.fields, self.summary = block, attention, fields, summary
        self.seen: dict[str, list[Tensor]] = {name: [] for name in fields}
        self.config = attention.config
        self.implementation = self.config._attn_implementation
        self._hook: Any = None

    def install(self) -> None:
        """Give this block's attention a configuration of its own that names the probe; nothing else is touched."""
        config = copy.copy(self.config)
        config._attn_implementation_internal = PROBE
        self.attention.config = config
        self.attention._foveate_watch = self
        self._hook = self.block.register_forward_hook(self._read_output)

    def remove(self) -> None:
        """Put the block back as it was."""
        self.attention.config = self.config
        del self.attention._foveate_watch
        self._hook.remove()

    def attend(self, queries: Tensor, *rest: Any, **options: Any) -> Any:
        """The attention that the model would have run."""
        eager = getattr(sys.modules[type(self.attention).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager)
        return function(self.attention, queries, *rest, **options)

    @torch.no_grad()
    def read_attention(self, queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float) -> None:
        """Note what this call's queries and keys (B, H, CLS + N, d) say about each patch."""
        if mask is not None:
            raise FoveateError("attention of a padded encoder input cannot be read; give images of one size")
        patches = slice(self.summary, None)
        if self.fields.intersection(_SUMS):
            sums = attention_sums(queries, keys, scale, self.summary)
            for name in self.fields.intersection(_SUMS):
                self.seen[name].append(getattr(sums, name))
        if "cls_attention" in self.fields:
            self.seen["cls_attention"].append(row_attention(queries[:, :, :1], keys, scale)[:, :, 0, patches])
        for name, value in (("keys", keys[:, :, patches]), ("key_cls", keys[:, :, 0]), ("query_cls", queries[:, :, 0])):
            if name in self.fields:
                self.seen[name].append(value)

    def _read_output(self, block: nn.Module, arguments: Any, output: Any) -> None:
        hidden = (output[0] if isinstance(output, tuple) else output).detach()
        if "hidden" in self.fields:
            self.seen["hidden"].append(hidden[:, self.summary :])
        if "cls" in self.fields:
            self.seen["cls"].append(hidden[:, 0])

    def take(self) -> Block:
        """What was seen since the last call, images along the first axis, and forget it."""
        taken = {name: torch.cat(values) for name, values in self.seen.items() if values}
        self.seen = {name: [] for name in self.fields}
        return Block(**taken)


class Probe:
    """Observes the encoder blocks that the methods need, from install() to remove()."""

    def __init__(self, model: Any, family: Family, needs: Iterable[str]) -> None:
        tower, row = family.tower_of(model)
        blocks = row.blocks_of(tower)
        numbers = {"read": family.read_block(model), "last": len(blocks) - 1}
        wanted: dict[int, set[str]] = {}
        self._names: dict[str, int] = {}
        for name, fields in tower_needs(needs).items():
            number = numbers[name] if name in numbers else int(name)
            if not 0 <= number < len(blocks):
                raise FoveateError(f"encoder block {number} is outside 0..{len(blocks) - 1}")
            wanted.setdefault(number, set()).update(fields)
            self._names[name] = number
        self._watches = {
            number: Watch(blocks[number], getattr(blocks[number], row.attention), fields, row.summary)
            for number, fields in wanted.items()
        }

    def install(self) -> None:
        """Start observing."""
        _register()
        for watch in self._watches.values():
            watch.install()

    def remove(self) -> None:
        """Stop observing; the encoder is as it was."""
        for watch in self._watches.values():
            watch.remove()

    def take(self) -> dict[int | str, Block]:
        """Blocks by number and by name, B = the images encoded since the last call, in order."""
        seen: dict[int | str, Block] = {number: watch.take() for number, watch in self._watches.items()}
        seen.update({name: seen[number] for name, number in self._names.items()})
        return seen


def _register() -> None:
    if PROBE not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(PROBE, _attend)
        # Without its twin an unknown name would get no mask at all.
        AttentionMaskInterface.register(PROBE, sdpa_mask)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    watch: Watch = module._foveate_watch
    output = watch.attend(query, key, value, attention_mask, **options)
    scale = options.get("scaling")
    watch.read_attention(query, key, attention_mask, query.shape[-1] ** -0.5 if scale is None else scale)
    return output
