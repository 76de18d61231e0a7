"""Runs encoder blocks whose tokens merge between attention and MLP, from the blocks' own children.

Shapes: B images, K patches left (padded to the longest of the batch), H heads, d head width, E encoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.core import Block, FoveateError, Merger
from foveate.families import Tower
from foveate.ops.scores import attention_sums, row_attention
from foveate.runtime.probe import Probe, key_mask
from foveate.spec import format as format_spec


@dataclass(frozen=True, eq=False)
class Attended:
    """One block's attention over [CLS, companion, patches], each of the first two where there is one."""

    queries: Tensor  # (B, H, lead + K, d)
    keys: Tensor  # (B, H, lead + K, d)
    mask: Tensor | None
    scale: float

    def block(self, hidden: Tensor, lead: int, summary: int, wanted: set[str]) -> Block:
        """What a method may see of the block in which it merges; gradients reach the stream, not the attention.

        Args:
            hidden: (B, lead + K, E), the stream between attention and MLP.
            lead: leading tokens that are no patches; one more than `summary` where a companion runs.
            wanted: fields of Block; `hidden`, `cls` and `cross` are there in any case.
        """
        found: dict[str, Tensor] = {"hidden": hidden[:, lead:]}
        if summary:
            found["cls"] = hidden[:, 0]
        if lead > summary:
            found["cross"] = hidden[:, summary]
        return Block(**found, **self._fields(lead, summary, wanted - found.keys()))

    @torch.no_grad()
    def _fields(self, lead: int, summary: int, wanted: set[str]) -> dict[str, Tensor]:
        each = {"keys": self.keys[:, :, lead:]}
        if summary:
            each |= {"key_cls": self.keys[:, :, 0], "query_cls": self.queries[:, :, 0]}
        if lead > summary:
            each["cross_key"] = self.keys[:, :, summary]
        found = {name: value for name, value in each.items() if name in wanted}
        rows = {"cls_attention": 0} | ({"cross_attention": summary} if lead > summary else {})
        found |= {name: self._row(row)[:, :, lead:] for name, row in rows.items() if name in wanted}
        if wanted & {"received", "given", "received_all"}:
            found |= {name: value for name, value in self._sums(lead, summary).items() if name in wanted}
        return found

    def _row(self, number: int) -> Tensor:
        """(B, H, lead + K) probabilities of one query."""
        valid, bias = key_mask(self.mask, self.keys.shape[0])
        return row_attention(self.queries[:, :, number : number + 1], self.keys, self.scale, valid, bias)[:, :, 0]

    def _sums(self, lead: int, summary: int) -> dict[str, Tensor]:
        valid, bias = key_mask(self.mask, self.keys.shape[0])
        sums = attention_sums(self.queries, self.keys, self.scale, lead, valid, bias)
        received_all = sums.received_all
        if lead > summary:  # the companion's query is no part of it: a method asks for that row by itself
            batch, total = self.keys.shape[0], self.keys.shape[2]
            tokens = torch.full((batch, 1), total) if valid is None else valid.sum(dim=1, keepdim=True)
            tokens = tokens.to(received_all.device)
            of_companion = self._row(summary)[:, :, lead:].mean(dim=1)
            received_all = (received_all * tokens - of_companion) / (tokens - 1)
        return {"received": sums.received, "given": sums.given, "received_all": received_all}


@dataclass(eq=False)
class MergingBlocks:
    """The blocks in which one method merges, from install() to remove()."""

    part: Merger
    blocks: Sequence[Any]
    row: Tower
    probe: Probe
    working: Callable[[], bool]  # a picture whose tokens merge is being encoded
    merge: Callable[[int, Tensor], Tensor]  # block, its stream (B, lead + K, E) -> what is left of it
    any: bool = True  # some merge
    attended: Attended | None = None  # of the block at work
    _stock: dict[int, Any] = field(default_factory=dict)

    def check(self, kind: str) -> None:
        """Refuse an encoder whose blocks or attention cannot do this.

        Raises:
            FoveateError: the parts of its blocks are unknown, or its attention `kind` takes no weights for keys.
        """
        if self.row.children is None:
            raise FoveateError(
                f"{format_spec(self.part)} merges between attention and MLP, and how the blocks of {self.row.type} are "
                "made up is not described; use a method that drops tokens between blocks"
            )
        if self.part.proportional and kind not in {"sdpa", "eager"}:
            raise FoveateError(
                f"{format_spec(self.part)} weighs each key by the tokens in it, which attention {kind!r} cannot; use "
                "proportional=false, or load the model with attn_implementation='sdpa'"
            )

    def watch(self) -> None:
        """Let the probe hand over queries and keys of every block; before it is installed."""
        for number in range(len(self.blocks)):
            self.probe.watch(number, ()).listener = self._listen

    def _listen(self, queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float) -> None:
        if self.working():
            self.attended = Attended(queries, keys, mask, scale)

    def install(self) -> None:
        """Put this forward in the place of the blocks' own."""
        for number, block in enumerate(self.blocks):
            self._stock[number] = vars(block).get("forward")
            block.forward = partial(self._forward, number, block, block.forward)

    def remove(self) -> None:
        """The blocks are as they were."""
        for number, stock in self._stock.items():
            if stock is None:
                del self.blocks[number].forward
            else:
                self.blocks[number].forward = stock
        self._stock.clear()
        self.attended = None

    def _forward(
        self, number: int, block: Any, stock: Any, hidden: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Any:
        if not self.working():
            return stock(hidden, attention_mask, **options)
        assert self.row.children is not None
        first, second, mlp = (getattr(block, name) for name in self.row.children)
        attention = getattr(block, self.row.attention)
        mixed = attention(hidden_states=first(hidden), attention_mask=attention_mask, **options)
        left = self.merge(number, hidden + (mixed[0] if isinstance(mixed, tuple) else mixed))
        self.attended = None
        return left + mlp(second(left))
