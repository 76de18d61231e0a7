"""Watches one encoder block: what a method wants of it, without an N x N map."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from foveate.choosing.signals import TOKEN_AXIS
from foveate.core import Block, names_of
from foveate.ops import fused
from foveate.ops.padding import joined
from foveate.ops.scores import attention_sums, row_attention
from foveate.runtime.attention import Observed, key_mask

_SUMS = names_of(Block, room="encoder", attention="sums")


class Watch(Observed):
    """One encoder block under observation, its attention and its output.

    Attributes:
        summary: leading tokens that are no patches; a token may run beside CLS for a while.
        listener: told the queries, keys, mask and scale of every call.
    """

    def __init__(self, block: nn.Module, attention: Any, fields: set[str], summary: int) -> None:
        super().__init__(attention)
        self.block, self.fields, self.summary = block, fields, summary
        self.listener: Callable[[Tensor, Tensor, Tensor | None, float], None] | None = None
        self.seen: dict[str, list[Tensor]] = {name: [] for name in fields}
        self._hook: Any = None
        self._log_sums: Tensor | None = None  # (B, H, CLS + N) of the rows of the call at hand, where they are known

    def install(self) -> None:
        """Start observing the block."""
        super().install()
        self._hook = self.block.register_forward_hook(self._read_output)

    def remove(self) -> None:
        """Stop; the block is as it was."""
        if self.config is not None:
            self._hook.remove()
        super().remove()

    def attend(self, queries: Tensor, keys: Tensor, *rest: Any, **options: Any) -> Any:
        """The attention that the model would have run, and what its kernel says besides of each row's sum."""
        if not self.fields.intersection(_SUMS) or not fused.helps(queries):
            return super().attend(queries, keys, *rest, **options)
        with fused.RowSums() as seen:
            output = super().attend(queries, keys, *rest, **options)
        self._log_sums = seen.of(queries, keys)
        return output

    @torch.no_grad()
    def read_attention(
        self, queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
    ) -> None:
        """Note what this call's queries and keys (B, H, CLS + N, d) say about each patch."""
        log_sums, self._log_sums = self._log_sums, None
        if self.listener is not None:
            self.listener(queries, keys, mask, scale)
        patches = slice(self.summary, None)
        valid, bias = key_mask(mask, keys.shape[0])
        if self.fields.intersection(_SUMS):
            sums = attention_sums(queries, keys, scale, self.summary, valid, bias, log_sums if mask is None else None)
            for name in self.fields.intersection(_SUMS):
                self.seen[name].append(getattr(sums, name))
        if "cls_attention" in self.fields:
            probabilities = row_attention(queries[:, :, :1], keys, scale, valid, bias)
            self.seen["cls_attention"].append(probabilities[:, :, 0, patches])
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
        taken = {name: joined(values) for name, values in self.seen.items() if values}
        self.seen = {name: [] for name in self.fields}
        return Block(**taken)

    def latest(self) -> Block:
        """What was seen in the latest encoding."""
        return Block(**{name: values[-1] for name, values in self.seen.items() if values})


class PackedWatch(Watch):
    """One block of an encoder that runs the patches of all pictures as one sequence, each attending to itself.

    What it shows has one row: the pictures' patches behind each other. A picture is told from the next by the calls
    that its attention makes, by the bounds that flash attention is given, or by the mask.
    """

    bounds: list[int] | None = None  # of the pictures, in the call at hand
    bias: Callable[[], Tensor | None] | None = None  # asks for what is added to the logits of each key, (N,)
    _begun: int = 0  # keys of the calls that the block has made since its attention began
    _added: Tensor | None = None  # that of the call at hand

    def __init__(self, block: nn.Module, attention: Any, fields: set[str], summary: int) -> None:
        super().__init__(block, attention, fields, summary)
        self._run: dict[str, slice] = {}  # what the latest run of the block has shown, in as many calls as it made

    def weighed(self, mask: Tensor | None, keys: Tensor) -> Tensor | None:
        """The mask of a call on some of the patches, (1, H, n, d), with what weighs them."""
        bias = None if self.bias is None else self.bias()
        self._added = None
        if bias is None:
            self._begun = 0
            return mask
        count = keys.shape[2]
        self._added = bias[self._begun : self._begun + count][None]
        self._begun = (self._begun + count) % bias.numel()
        added = self._added[:, None, None]
        if mask is None:
            return added
        if mask.dtype == torch.bool:
            return added.expand(mask.shape).masked_fill(~mask, torch.finfo(added.dtype).min)
        return (mask + added).clamp(min=torch.finfo(added.dtype).min)

    def note_bounds(self, bounds: Tensor | None) -> None:
        """Where each picture begins, as flash attention is told."""
        self.bounds = None if bounds is None else bounds.tolist()

    @torch.no_grad()
    def read_attention(
        self, queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
    ) -> None:
        """Note what this call's queries and keys (1, H, N, d) say about each patch."""
        log_sums, self._log_sums = self._log_sums, None
        if self.listener is not None:
            self.listener(queries, keys, mask, scale)
        bounds = _segments(mask) if self.bounds is None else self.bounds
        bounds = [0, keys.shape[2]] if bounds is None else bounds
        for start, end in pairwise(bounds):
            if self.fields.intersection(_SUMS):
                added = None if self._added is None else self._added[:, start:end].float()
                alone = log_sums if added is None and end - start == keys.shape[2] else None
                sums = attention_sums(queries[:, :, start:end], keys[:, :, start:end], scale, 0, None, added, alone)
                for name in self.fields.intersection(_SUMS):
                    self.seen[name].append(getattr(sums, name))
        if "keys" in self.fields:
            self.seen["keys"].append(keys)

    def _read_output(self, block: nn.Module, arguments: Any, output: Any) -> None:
        hidden = (output[0] if isinstance(output, tuple) else output).detach()
        if "hidden" in self.fields:
            self.seen["hidden"].append(hidden if hidden.ndim == 3 else hidden[None])
        before = {name: self._run[name].stop if name in self._run else 0 for name in self.seen}
        self._run = {name: slice(before[name], len(values)) for name, values in self.seen.items()}

    def take(self) -> Block:
        """What was seen since the last call, in one row, and forget it."""
        taken = {name: torch.cat(values, dim=TOKEN_AXIS[name]) for name, values in self.seen.items() if values}
        self.seen, self._run = {name: [] for name in self.fields}, {}
        return Block(**taken)

    def latest(self) -> Block:
        """What was seen in the latest encoding, in one row."""
        found = {name: self.seen[name][run] for name, run in self._run.items()}
        return Block(**{name: torch.cat(values, dim=TOKEN_AXIS[name]) for name, values in found.items() if values})


def _segments(mask: Tensor | None) -> list[int] | None:
    """Bounds of the squares along the diagonal of a (1, 1, N, N) mask, outside which it is closed."""
    if mask is None:
        return None
    square = mask[0, 0]
    open_ = square if square.dtype == torch.bool else square > torch.finfo(square.dtype).min / 2
    first = open_.int().argmax(dim=-1)  # of each row, the first patch of its picture
    starts: list[int] = first.unique_consecutive().tolist()
    return [*starts, square.shape[0]]
