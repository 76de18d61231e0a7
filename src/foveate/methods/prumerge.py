"""PruMerge: prune by the attention of CLS in the encoder's last block, and merge what is pruned into what stays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from foveate.core import (
    Block,
    FoveateError,
    Keep,
    Selection,
    Signals,
    Site,
    check_choices,
    check_keep,
)
from foveate.forms import Stepwise
from foveate.methods._attention import Attention, attended, attention_signal, check_official
from foveate.methods._merged import (
    Space,
    check_space,
    everything,
    in_raster_order,
    merged_signal,
    merged_tokens,
    of_all_rows,
    with_rest,
)
from foveate.ops.device import Steps
from foveate.ops.pooling import nearest_neighbours, others, take, weighted_sums
from foveate.ops.scores import unsplit_cls_attention
from foveate.ops.subsets import descending, outlier_counts, outliers


class _Pick(NamedTuple):
    """Places of b images."""

    kept: Tensor  # (b, P)
    pruned: Tensor  # (b, M), the token of the rest is made of
    among: Tensor  # (b, A), where the kept ones find their neighbours


@dataclass(frozen=True)
class PruMerge(Stepwise):
    """PruMerge: keeps the patches whose CLS attention stands out and merges similar pruned ones into them.

    The attention is softmax(q_cls . k / sqrt(E)) over CLS and patches in the encoder's last block, at full width: the
    paper's equation has no heads and the code does not split them. Without `keep`, the patches above
    Q3 + 1.5 * (Q3 - Q1) of their image stay. Each is replaced by the average, weighted by that attention, of itself and
    its most similar pruned patches by the cosine of the keys; a pruned patch may join several, and all pruned ones
    together become one more token, their weighted average, which stands at the largest index that is free. The merged
    tokens are encoder tokens in raster order.

    The authors' code (`official`) draws neighbours from the kept patches too, adds a_j * x_j of each neighbour to the
    patch in place of an average, does the same for the last token, takes the quartiles over the whole batch and hands
    the tokens on by falling attention; all but that order is reproduced.

    Args:
        keep: tokens per image, or a share of them, rounded half to even: `keep` - 1 patches and the token of the
            rest; all hands everything on as it is. None for the image's own count, the outliers and the rest.
        neighbours: pruned patches that join a kept one; as many as there are where those are fewer.
        official: the code's merge and, without `keep`, its count.
        attention: "cls" as in the paper; "received" takes the attention that each patch receives from all patches
            instead, for encoders without CLS: also of the last block, where it is split into
            heads and averaged over them. Not with `official`.
        space: "encoded" merges tokens of the encoder as in the paper; "projected" merges them behind the projector,
            for projectors that take no single ones. Not with `official`.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.15388"
    site: ClassVar[Site] = "input"
    encoded: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    keep: Keep | None = None
    neighbours: int = 32
    official: bool = False
    attention: Attention = "cls"
    space: Space = "encoded"

    def __post_init__(self) -> None:
        check_choices(self)
        check_official(self.official, self.attention)
        check_space(self.official, self.space)
        if self.keep is not None:
            check_keep(self.keep)
        if type(self.neighbours) is not int or self.neighbours < 1:
            raise FoveateError(f"neighbours={self.neighbours!r} is no number of patches; the least is neighbours=1")
        # The class speaks for the defaults.
        object.__setattr__(self, "adaptive", self.keep is None)
        object.__setattr__(self, "encoded", self.space == "encoded")

    @property
    def needs(self) -> tuple[str, ...]:
        cls = ("tower.last.key_cls", "tower.last.query_cls")
        ranking = cls if self.attention == "cls" else (attention_signal(self.attention, "last"),)
        return (merged_signal(self.space), "tower.last.keys", *ranking)

    def steps(self, signals: Signals) -> Steps[Selection]:
        last, left = signals.tower["last"], signals.shape[1]
        assert last.keys is not None
        total = None if self.keep is None else self.wanted(signals)
        if total == left:
            return everything(signals)
        keys = last.keys.transpose(1, 2).flatten(2)
        index, tokens, keys, weights = in_raster_order(
            signals, merged_tokens(signals, self.space), keys, self._weights(last)
        )
        selections, row = [], 0
        for pick in (yield from self._picks(weights, total)):
            rows = slice(row, row + pick.kept.shape[0])
            merged = self._merged(tokens[rows], keys[rows], weights[rows], pick)
            selections.append(with_rest(index[rows], pick.kept, pick.pruned, *merged, self.space))
            row = rows.stop
        return of_all_rows(selections)

    def _weights(self, last: Block) -> Tensor:
        """(B, N) logarithm of the attention, finite also where a patch receives none."""
        if self.attention == "received":
            received = attended(last, self.attention)
            return received.clamp_min(torch.finfo(received.dtype).tiny).log()
        assert last.keys is not None and last.key_cls is not None and last.query_cls is not None
        return unsplit_cls_attention(last.query_cls, last.key_cls, last.keys)

    def _picks(self, weights: Tensor, total: int | None) -> Steps[Iterable[_Pick]]:
        """What to keep of all rows at once, or of one after the other.

        Args:
            weights: (B, N) logarithm of the attention.
            total: tokens to hand on; None for each image's own number, which is asked for.
        """
        order = descending(weights)
        if total is not None:
            return [self._pick(order, total - 1)]
        (found,) = yield [outliers(weights.exp(), self.official)]
        counts = outlier_counts(found, (len(order), order.shape[1]))
        return (self._pick(row, self._patches(count)) for row, count in zip(order.split(1), counts, strict=True))

    def _patches(self, outliers: int) -> int:
        """Patches to keep of an image that has so many outliers."""
        return outliers

    def _pick(self, order: Tensor, patches: int) -> _Pick:
        """The choice of `patches` to keep out of (b, N) places by falling attention."""
        return self._around(order[:, :patches], order.shape[1])

    def _around(self, kept: Tensor, tokens: int) -> _Pick:
        pruned = others(kept, tokens)
        return _Pick(kept, pruned, torch.cat([kept, pruned], dim=1) if self.official else pruned)

    def _merged(self, tokens: Tensor, keys: Tensor, weights: Tensor, pick: _Pick) -> tuple[Tensor, Tensor]:
        """(b, P, E) what stands for the kept patches and (b, 1, E) for the rest, in the dtype of the tokens."""
        count = min(self.neighbours, pick.among.shape[1] - self.official)
        places = torch.cat([pick.kept[..., None], nearest_neighbours(keys, pick.kept, pick.among, count)], dim=-1)
        shares = take(weights, places.flatten(1)).view_as(places)
        of_rest = take(weights, pick.pruned)[:, None]
        if self.official:
            shares, of_rest = shares.exp(), of_rest.exp()
            shares[..., 0] = 1.0
        else:
            shares, of_rest = shares.softmax(dim=-1), of_rest.softmax(dim=-1)
        merged, rest = weighted_sums(tokens, places, shares), weighted_sums(tokens, pick.pruned[:, None], of_rest)
        return merged.to(tokens.dtype), rest.to(tokens.dtype)
