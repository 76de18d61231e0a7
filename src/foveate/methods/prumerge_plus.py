"""PruMerge+: PruMerge with patches that are spread evenly over the picture beside those that CLS attends to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import Grid
from foveate.methods.prumerge import PruMerge, _Pick
from foveate.ops.device import Steps, on_device
from foveate.ops.pooling import take
from foveate.ops.subsets import descending, outlier_counts, outliers


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMergePlus: keeps patches of outstanding CLS attention and as many evenly spaced ones, and merges the others.

    As PruMerge, with spatial samples: half of the kept patches (one more where their number is odd) are those of
    highest attention, the other half lies evenly spaced, in raster order, over the patches that remain, so that none
    is chosen twice. Without `keep`, the attention's half are its outliers.

    The authors' code (`official`) samples every s-th patch of the whole raster but its last. Without `keep`, s is a
    third of the outliers' spacing N / k, both rounded down (here at least 1), which takes about three samples per
    outlier; with 97 outliers of 576 every patch stays. With `keep`, s is the spacing of half as many best ones, and
    samples that are among these already stand twice in its output: here they stand once, so that fewer than `keep`
    tokens are handed on and `count` knows no number. As in the code, such a patch counts twice as a neighbour, and as
    many pruned patches of lowest index are lost to the merge.

    Args:
        keep: tokens per image, or a share of them, rounded half to even: `keep` - 1 patches and the token of the
            rest; all hands everything on as it is. None for the image's own count, twice the outliers and the rest.
        neighbours: pruned patches that join a kept one; as many as there are where those are fewer.
        official: the code's samples, merge and count; where every patch stays there is no token of the rest.
        attention: "cls" as in the paper; "received" takes the attention that each patch receives from all patches
            instead, for encoders without CLS: also of the last block, where it is split into
            heads and averaged over them. Not with `official`.
        space: "encoded" merges tokens of the encoder as in the paper; "projected" merges them behind the projector,
            for projectors that take no single ones. Not with `official`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "adaptive", self.keep is None or self.official)

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        """One stage; None unless `keep` fixes it, which it does not under `official`."""
        return None if self.official else super().count(original, grid, tiles)

    def asked(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        """What `keep` comes to, of which `official` hands on fewer."""
        return super().count(original, grid, tiles)

    def _patches(self, outliers: int) -> int:
        return 2 * outliers

    def _pick(self, order: Tensor, patches: int) -> _Pick:
        samples = patches // 2
        best, remaining = order[:, : patches - samples], order[:, patches - samples :].sort(dim=-1).values
        # The middles of as many equal stretches of what remains.
        middle = (2 * torch.arange(samples, device=order.device) + 1) * remaining.shape[1] // max(1, 2 * samples)
        kept = torch.cat([best, take(remaining, middle.expand(len(order), -1))], dim=1)
        return self._around(kept, order.shape[1])

    def _picks(self, weights: Tensor, total: int | None) -> Steps[Iterable[_Pick]]:
        if not self.official:
            return (yield from super()._picks(weights, total))
        found = [outliers(weights.exp(), together=True)] if total is None else []
        order, *found = yield [descending(weights), *found]
        return self._sampled(order, total, found, weights.device)

    def _sampled(
        self, order: Tensor, total: int | None, found: Sequence[Tensor], device: torch.device
    ) -> Iterator[_Pick]:
        """The code's choice of each row, whose samples may already be among its best ones.

        Args:
            order: (B, N) places by falling attention, on the host.
            found: the outliers of the batch, on the host, where there is no `total`.
            device: of the tokens.
        """
        tokens = order.shape[1]
        best = (total - 1) // 2 if total is not None else outlier_counts(found[0], (len(order), tokens))[0]
        spacing = int(1 / (best / tokens)) if best else tokens
        start, step = (0, max(1, spacing // 3)) if total is None else (spacing // 2, spacing)
        samples = torch.arange(start, max(start, tokens - 1), step) if best else order[0, :0]
        for row in (torch.cat([highest[:best], samples]) for highest in order):
            pick = self._around(row.unique()[None], tokens)
            if total is not None:
                pruned = pick.pruned[:, row.numel() - pick.kept.shape[1] :]
                pick = _Pick(pick.kept, pruned, torch.cat([row[None], pruned], dim=1))
            yield _Pick(*(on_device(places, device) for places in pick))
