"""Sets chosen one token at a time: the greedy engine and the three gains that it maximises.

Every round takes the token of the highest gain among those that are left, the lowest index on a tie, so that K distinct
tokens always come out and the first picks do not depend on how many follow. The loops wait for nothing on the host and
launch few kernels per round.

Shapes: B images or tiles, N tokens, R things to cover, K picks, D width. Picks are (B, K) positions on the N axis,
int64, in the order in which they were taken. `free` (B, N) bool is False in padding, which is taken only when nothing
else is left; None without any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from foveate.core import FoveateError
from foveate.ops.device import refuse_any

LARGEST = 2**27
"""Numbers of a table of cosines beyond which rows are computed as they are needed: half a GB, 11,585 tokens."""

CACHED = 2**18
"""Numbers that are worked on at once, so that they stay in a core's cache."""

MANY = 2**20
"""Numbers of a table to be covered from which on a CPU looks only at the rows that a pick changes."""

NOTHING = 1e-6
"""Share of its first gain below which a token adds nothing but rounding, where gains are what differences leave."""

BLOCK = 384
"""Rows of a table of cosines that are computed at once, against the columns up to their own only."""

FILLED = 128
"""Rows of a Cholesky factor that are read at once: those that hold nothing yet only in the last block."""

COPY = 1.0 - 1e-6
"""Cosines above this are those of a token and its copy, but for float32 rounding, and count as 1."""

EXHAUSTED = 1e-5
"""A token of which no more than this share is new, given those taken, is nothing new but for float32 rounding."""


@torch.no_grad()
def farthest(
    features: Tensor,
    count: int,
    first: Tensor | None = None,
    weight: Tensor | None = None,
    free: Tensor | None = None,
) -> Tensor:
    """Max-min: each pick is the token farthest from all taken before, in cosine distance times its weight.

    A table of N x N cosines is kept where it is smaller than the features, or is read often and within `LARGEST`; else
    O(N * D) memory. A token without length is at distance 1 from every other.

    Args:
        features: (B, N, D).
        count: K, at most N.
        first: (B, N) whose highest is the first pick; by default the distance to the nearest other token (no padding
            then).
        weight: (B, N), at least 0; None for 1.
    """
    if first is None and free is not None:
        raise FoveateError("with padding the distance to the nearest other token is no first pick; give first=")
    cosines = _Cosines(features, features.shape[1] if first is None else count)
    _check_finite(first, weight)
    gain = 1.0 - cosines.nearest() if first is None else first.detach().float()
    weight = torch.ones_like(gain) if weight is None else weight.detach().float()
    nearest = torch.full_like(gain, -1.0)

    def take(pick: Tensor) -> Tensor:
        return torch.maximum(nearest, cosines.row(pick), out=nearest)

    # weight * (1 - nearest), as weight - weight * nearest.
    return _greedy(count, _closed(gain, free), _closed(weight, free), -weight, take)


@torch.no_grad()
def covering(
    similarity: Tensor,
    count: int,
    row_weight: Tensor | None = None,
    weight: Tensor | None = None,
    free: Tensor | None = None,
) -> Tensor:
    """Max-sum coverage: each pick raises most, over all rows, the highest similarity to anything taken.

    gain_j = weight_j * sum_r row_weight_r * max(0, similarity_rj - best_r), where best_r is the highest similarity of
    row r to a token taken before, and 0 at first. O(R * N) memory.

    Args:
        similarity: (B, R, N); what is below 0 covers nothing.
        count: K, at most N.
        row_weight: (B, R), at least 0, and 0 in padding; None for 1.
        weight: (B, N), at least 0; None for 1.
    """
    # What each token would still add to each row.
    rest = similarity.detach().float().clamp(min=0.0)
    if row_weight is not None:
        rest.mul_(row_weight.detach().float()[..., None])
    gain = rest.sum(dim=1)
    _check_finite(gain, weight)
    weight = torch.ones_like(gain) if weight is None else weight.detach().float()
    base = _closed(torch.zeros_like(gain), free)
    total, least = gain.double(), NOTHING * gain  # many small differences are taken from the total
    by_rows = rest.device.type == "cpu" and rest[0].numel() >= MANY

    def take(pick: Tensor) -> Tensor:
        added = rest.gather(2, pick[:, None].expand(-1, rest.shape[1], 1))
        if not by_rows:
            return rest.sub_(added).clamp_(min=0.0).sum(dim=1)
        found = _cover_rows(rest, added, total).float()
        return found.masked_fill_(found <= least, 0.0)

    return _greedy(count, torch.addcmul(base, gain, weight), base, weight, take)


def _cover_rows(rest: Tensor, added: Tensor, total: Tensor) -> Tensor:
    """Take `added` (B, R, 1) from `rest` (B, R, N) and what that loses from `total` (B, N): only rows that change.

    The k-th pick covers about one row of k better than those before, so that all picks together read the table a few
    times rather than K times. Which rows they are is a number for the host, which only a CPU has without waiting.
    """
    for table, amounts, sums in zip(rest, added.squeeze(2), total, strict=True):
        for changed in amounts.nonzero().squeeze(1).split(max(1, CACHED // table.shape[1])):
            covered = table.index_select(0, changed)
            torch.minimum(covered, amounts[changed, None], out=covered)
            table.index_add_(0, changed, covered, alpha=-1)  # exactly zero where all of it is covered
            sums.sub_(covered.sum(dim=0))
    return total


@torch.no_grad()
def diverse(features: Tensor, count: int, weight: Tensor, free: Tensor | None = None) -> Tensor:
    """Max-volume: each pick is the token of the largest conditional variance, given those taken, times its weight.

    Greedy maximisation of det(L_S) for L = diag(r) C diag(r), C the cosines and weight = r ** 2, by an incremental
    Cholesky factor of C. O(N * (K + D)) memory, and a table of cosines as in `farthest`. Once nothing new is left (K
    above the rank), the weight alone decides.

    Args:
        features: (B, N, D).
        count: K, at most N.
        weight: (B, N), at least 0.
    """
    cosines = _Cosines(features, count, beside=max(1, count))
    weight = weight.detach().float()
    _check_finite(weight)
    base = _closed(torch.zeros_like(weight), free)
    # The variance that is left, and below it what each pick had in common with each token, earlier picks aside.
    variance, shared = cosines.beside[:, :1], cosines.beside[:, 1:].zero_()
    variance.copy_(cosines.own()[:, None]).clamp_min_(EXHAUSTED)
    # The same, over the variance of the pick.
    scaled = torch.zeros_like(shared)
    slots = enumerate(zip(shared.split(1, dim=1), scaled.split(1, dim=1), strict=True))

    def take(pick: Tensor) -> Tensor:
        row, column = cosines.column(pick)
        taken, (new, over) = next(slots)
        # What is still empty is left out by the block, as most of the time goes into reading.
        filled = min((taken // FILLED + 1) * FILLED, scaled.shape[1])
        torch.baddbmm(row, column[:, 1 : filled + 1].mT, scaled[:, :filled], alpha=-1, out=new)
        # Over infinity: a pick that was nothing new takes nothing from the others.
        torch.div(new, torch.nn.functional.threshold(column[:, :1], EXHAUSTED, torch.inf), out=over)
        return variance.addcmul_(new, over, value=-1).clamp_min_(EXHAUSTED).squeeze(1)

    return _greedy(count, torch.addcmul(base, variance.squeeze(1), weight), base, weight, take)


def _greedy(count: int, gain: Tensor, base: Tensor, weight: Tensor, take: Callable[[Tensor], Tensor]) -> Tensor:
    """K times the highest of `gain`; then base + weight * take(pick), with base -inf where nothing may be taken.

    torch.argmax gives the first of several maxima on every device.
    """
    picks: list[Tensor] = []
    base = base.clone()
    for remaining in range(count, 0, -1):
        pick = gain.argmax(dim=-1, keepdim=True)
        picks.append(pick)
        if remaining > 1:
            base.scatter_(1, pick, -torch.inf)
            gain = torch.addcmul(base, take(pick), weight)
    return torch.cat(picks, dim=1) if picks else gain.new_empty(len(gain), 0, dtype=torch.int64)


def _closed(values: Tensor, free: Tensor | None) -> Tensor:
    """The values, -inf where there is no token."""
    return values if free is None else values.masked_fill(~free, -torch.inf)


def _check_finite(*scores: Tensor | None) -> None:
    for values in scores:
        if values is not None:
            bad = (~values.isfinite()).sum()
            refuse_any(bad, f"{{}} of {values.numel()} scores are NaN or infinite; finite scores are needed to choose")


def _unit(values: Tensor) -> Tensor:
    """(B, N, D) -> the same directions at length 1, float32; what has no length stays zero.

    Raises:
        FoveateError: a value is NaN or infinite, so that there is no direction.
    """
    values = values.detach().float()
    length = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    bad = (~length.isfinite()).sum()
    refuse_any(bad, f"{{}} of {length.numel()} vectors hold NaN or infinity; finite ones are needed to compare")
    directions: Tensor = values / length.clamp_min(torch.finfo(torch.float32).tiny)
    return directions


class _Cosines:
    """Cosines among the tokens of each image: a table where that is smaller or read often, products on demand else.

    The table is exactly symmetric, so that two mutual neighbours tie.
    """

    def __init__(self, features: Tensor, reads: int, beside: int = 0) -> None:
        """`reads` rows will be asked for; `beside` rows more stand ready for whoever reads the same column of both.

        A row by itself moves all features, 24 times what a row of the table takes to compute.
        """
        self.unit = _unit(features)
        batch, tokens, width = features.shape
        self.table: Tensor | None = None
        kept = tokens <= width or (24 * reads >= tokens and batch * tokens**2 <= LARGEST)
        self.all = self.unit.new_empty(batch, beside + (tokens if kept else 0), tokens)
        self.beside = self.all[:, :beside]
        if kept:
            self.table = self.all[:, beside:]
            for start, rows in self._blocks():
                stop = rows.shape[2]
                self.table[:, start:stop, :stop] = rows
                self.table[:, :start, start:stop] = rows[..., :start].mT

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Blocks of rows from `start`, with the columns up to their last row: (start, (B, M, start + M))."""
        for start in range(0, self.unit.shape[1], BLOCK):
            stop = min(start + BLOCK, self.unit.shape[1])
            rows = torch.bmm(self.unit[:, start:stop], self.unit[:, :stop].mT)
            own = rows[..., start:]
            own.copy_((own + own.mT) / 2)
            yield start, rows.masked_fill_(rows > COPY, 1.0)

    def row(self, pick: Tensor) -> Tensor:
        """(B, 1) positions -> (B, N)."""
        if self.table is not None:
            own: Tensor = self.table.gather(1, pick[..., None].expand(-1, 1, self.table.shape[2]))
            return own.squeeze(1)
        chosen = self.unit.gather(1, pick[..., None].expand(-1, 1, self.unit.shape[2]))
        row = torch.bmm(chosen, self.unit.mT).squeeze(1)
        return row.masked_fill_(row > COPY, 1.0)

    def column(self, pick: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1) positions -> (B, 1, N) cosines, and the picked column of what stands beside them, (B, beside, 1)."""
        column = self.all.gather(2, pick[..., None].expand(-1, self.all.shape[1], 1))
        if self.table is None:
            return self.row(pick)[:, None], column
        beside = self.beside.shape[1]
        return column[:, beside:].mT, column[:, :beside]

    def own(self) -> Tensor:
        """(B, N): 1, and 0 for a token without length."""
        return (self.unit != 0).any(dim=-1).float()

    def nearest(self) -> Tensor:
        """(B, N): the cosine to the most similar other token, -1 where there is none."""
        nearest = self.unit.new_full(self.unit.shape[:2], -1.0)
        if self.table is not None:
            diagonal = self.table.diagonal(dim1=1, dim2=2)
            before = diagonal.clone()
            diagonal.fill_(-1.0)
            nearest = self.table.amax(dim=-1)
            diagonal.copy_(before)
            return nearest
        for start, rows in self._blocks():
            stop = rows.shape[2]
            rows[..., start:].diagonal(dim1=1, dim2=2).fill_(-1.0)
            nearest[:, :stop] = torch.maximum(nearest[:, :stop], rows.amax(dim=1))
            nearest[:, start:stop] = torch.maximum(nearest[:, start:stop], rows.amax(dim=2))
        return nearest
