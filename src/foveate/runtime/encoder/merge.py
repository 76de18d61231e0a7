"""Runs encoder blocks from the blocks' own children, so that tokens can merge between attention and MLP.

Shapes: T rows (tiles, or 1 where all run as one sequence), L patches of a row, padded to the longest, H heads, d head
width, E encoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.core import Block, FoveateError
from foveate.families.towers import Tower
from foveate.forms import Merger
from foveate.ops.scores import attention_sums, row_attention
from foveate.runtime.attention import key_mask
from foveate.runtime.encoder.probe import Probe
from foveate.runtime.encoder.watch import PackedWatch
from foveate.runtime.uncopied import Uncopied
from foveate.spec import format as format_spec


@dataclass(frozen=True, eq=False)
class Attended:
    """One block's attention over [CLS, companion, patches], each of the first two where there is one."""

    queries: Tensor  # (T, H, lead + L, d)
    keys: Tensor  # (T, H, lead + L, d)
    mask: Tensor | None
    scale: float

    def block(self, hidden: Tensor, lead: int, summary: int, wanted: set[str]) -> Block:
        """What is to be seen of the block in which tokens merge; gradients reach the stream, not the attention.

        Args:
            hidden: (T, lead + L, E), the stream between attention and MLP.
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
        """(T, H, lead + L) probabilities of one query."""
        valid, bias = key_mask(self.mask, self.keys.shape[0])
        return row_attention(self.queries[:, :, number : number + 1], self.keys, self.scale, valid, bias)[:, :, 0]

    def _sums(self, lead: int, summary: int) -> dict[str, Tensor]:
        valid, bias = key_mask(self.mask, self.keys.shape[0])
        sums = attention_sums(self.queries, self.keys, self.scale, lead, valid, bias)
        received_all = sums.received_all
        if lead > summary:  # the companion's query is no part of it: a method asks for that row by itself
            batch, total = self.keys.shape[0], self.keys.shape[2]
            tokens = received_all.new_full((batch, 1), total, dtype=torch.int64)
            tokens = tokens if valid is None else valid.sum(dim=1, keepdim=True).to(received_all.device)
            of_companion = self._row(summary)[:, :, lead:].mean(dim=1)
            received_all = (received_all * tokens - of_companion) / (tokens - 1)
        return {"received": sums.received, "given": sums.given, "received_all": received_all}


@dataclass(eq=False)
class OpenBlocks(Uncopied):
    """Blocks that run from their own children, from install() to remove().

    Attributes:
        working: pictures whose tokens a method takes are being encoded; else the blocks run as they are.
        between: number of a block, its stream between attention and MLP -> what is left of it.
    """

    blocks: Sequence[Any]
    row: Tower
    working: Callable[[], bool]
    between: Callable[[int, Tensor], Tensor] | None = None
    _stock: dict[int, tuple[str, Any]] = field(default_factory=dict)

    def install(self) -> None:
        """Put this forward in the place of the blocks' own."""
        for number, block in enumerate(self.blocks):
            # Where accelerate brings a block's weights for each call, inside of what does that.
            name = "_old_forward" if hasattr(block, "_hf_hook") else "forward"
            self._stock[number] = name, vars(block).get(name)
            setattr(block, name, partial(self._forward, number, block, getattr(block, name)))

    def remove(self) -> None:
        """The blocks are as they were."""
        for number, (name, stock) in self._stock.items():
            if stock is None:
                delattr(self.blocks[number], name)
            else:
                setattr(self.blocks[number], name, stock)
        self._stock.clear()

    def _forward(self, number: int, block: Any, stock: Any, *arguments: Any, **options: Any) -> Any:
        if not self.working():
            return stock(*arguments, **options)
        assert self.row.children is not None
        (hidden,) = arguments
        first, second, mlp = (getattr(block, name) for name in self.row.children)
        mixed = getattr(block, self.row.attention)(first(hidden), **options)
        hidden = hidden + self._scaled(block, 0, mixed[0] if isinstance(mixed, tuple) else mixed)
        if self.between is not None:
            hidden = self.between(number, hidden)
        return hidden + self._scaled(block, 1, mlp(second(hidden)))

    def _scaled(self, block: Any, place: int, added: Tensor) -> Tensor:
        """What attention (0) or MLP (1) adds to the stream."""
        return added if self.row.scales is None else getattr(block, self.row.scales[place]) * added


@dataclass(eq=False, kw_only=True)
class MergingBlocks(OpenBlocks):
    """The blocks in which one method merges."""

    part: Merger
    probe: Probe
    bias: Callable[[], Tensor | None]  # what weighs the keys, where all patches run as one sequence
    any: bool = True  # some merge
    _attended: list[Attended] = field(default_factory=list)  # by the block at work, in as many calls as it made

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
            watch = self.probe.watch(number, ())
            watch.listener = self._listen
            if isinstance(watch, PackedWatch):
                watch.bias = lambda: self.bias() if self.working() else None

    def _listen(self, queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float) -> None:
        if self.working():
            self._attended.append(Attended(queries, keys, mask, scale))

    def shown(self, hidden: Tensor, lead: int, wanted: set[str]) -> Block:
        """What is to be seen of the block at work; `hidden` is the stream between attention and MLP.

        Raises:
            FoveateError: of an encoder that runs all pictures as one sequence, more than its keys.
        """
        if not self.row.packed:
            return self._attended[-1].block(hidden, lead, self.row.summary, wanted)
        more = wanted - {"hidden", "keys"}
        if more:
            raise FoveateError(
                f"{format_spec(self.part)} reads {', '.join(sorted(more))} of the block in which it merges, and of an "
                "encoder that runs all pictures as one sequence only hidden and keys can be read there"
            )
        keys = torch.cat([one.keys for one in self._attended], dim=2)
        return Block(hidden=hidden.reshape(1, -1, hidden.shape[-1]), keys=keys)

    def forget(self) -> None:
        """The block at work is done."""
        self._attended = []

    def remove(self) -> None:
        super().remove()
        self.forget()
