"""From numbers to indices: which K of N tokens stay.

Shapes: B images, N tokens, K kept. Indices are positions on the N axis, int64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveate.core import FoveateError, Grid


def descending(scores: Tensor) -> Tensor:
    """(B, N) scores -> (B, N) positions from the highest to the lowest; equal scores keep the lowest index first.

    Raises:
        FoveateError: a score is NaN or infinite, so that "the highest" has no meaning.
    """
    if not bool(scores.isfinite().all()):
        bad = int((~scores.isfinite()).sum())
        raise FoveateError(f"{bad} of {scores.numel()} scores are NaN or infinite; finite scores are needed to choose")
    return scores.sort(dim=-1, descending=True, stable=True).indices


def top_k(scores: Tensor, k: int) -> Tensor:
    """(B, N) scores -> (B, K) positions of the k highest, ascending. Ties: the lowest index wins."""
    return descending(scores)[:, :k].sort(dim=-1).values


def split_budget(total: int, capacity: list[int]) -> list[int]:
    """Share `total` tokens evenly over tiles, the remainder to tile 0 (the base), none above its `capacity`.

    What a full tile cannot take goes to the others, so that the sum is always `total` (at most the sum of capacities).
    """
    if total > sum(capacity):
        raise FoveateError(f"{total} tokens are asked of {len(capacity)} tiles that hold {sum(capacity)}")
    shares = [0] * len(capacity)
    while (missing := total - sum(shares)) > 0:
        room = [tile for tile, most in enumerate(capacity) if shares[tile] < most]
        each = missing // len(room)
        # The remainder is what is left once all that have room are level.
        for tile in room if each else room[:1]:
            shares[tile] = min(capacity[tile], shares[tile] + (each or missing))
    return shares


def top_k_by_tile(scores: Tensor, tile: Tensor, k: int) -> list[Tensor]:
    """(B, N) scores and tile numbers -> B ascending position tensors (k,), the budget split evenly over the tiles."""
    order = descending(scores)
    chosen = []
    for row, tiles in zip(order, tile, strict=True):
        shares = split_budget(k, torch.bincount(tiles).tolist())
        of_order = tiles[row]
        kept = [row[of_order == number][:share] for number, share in enumerate(shares)]
        chosen.append(torch.cat(kept).sort().values)
    return chosen


def lattice(height: int, width: int, cells: int) -> Tensor:
    """Cut a height x width grid into exactly `cells` cells, as square as they come: (height * width,) cell of each.

    Rows are cut into bands as even as possible, each band into columns as even as possible; cells are numbered in
    raster order. 24 x 24 into 144 gives the 2 x 2 blocks, 24 x 24 into 576 every token its own cell.
    """
    if not 1 <= cells <= height * width:
        raise FoveateError(f"a {height} x {width} grid has 1 to {height * width} cells, not {cells}")
    bands = min(height, cells, math.ceil(math.sqrt(cells * height / width)))
    per_band = [cells // bands + (band < cells % bands) for band in range(bands)]
    starts = [0]
    for count in per_band:
        starts.append(starts[-1] + count)
    band_of_row = [row * bands // height for row in range(height)]
    cell = [starts[band] + column * per_band[band] // width for band in band_of_row for column in range(width)]
    return torch.tensor(cell, dtype=torch.int64)


def cell_centres(cell: Tensor, grid: Grid) -> Tensor:
    """(h * w,) cell of each token -> (cells,) the token nearest to the middle of each cell, ascending by cell.

    The lowest index wins among equally near ones.
    """
    height, width = grid
    row = torch.arange(height, device=cell.device).repeat_interleave(width).double()
    column = torch.arange(width, device=cell.device).repeat(height).double()
    count = torch.bincount(cell).double()
    middle_row = torch.bincount(cell, weights=row) / count
    middle_column = torch.bincount(cell, weights=column) / count
    distance = (row - middle_row[cell]) ** 2 + (column - middle_column[cell]) ** 2
    nearest = torch.full_like(count, math.inf).scatter_reduce(0, cell, distance, "amin")
    tokens = torch.arange(cell.numel(), device=cell.device)
    is_nearest = distance <= nearest[cell] + 1e-9
    first = torch.full_like(count, cell.numel(), dtype=torch.int64)
    return first.scatter_reduce(0, cell[is_nearest], tokens[is_nearest], "amin")


def random_subset(tokens: int, k: int, seed: int, device: torch.device) -> Tensor:
    """(k,) ascending positions out of `tokens`, drawn by a generator made from (seed, tokens) alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + tokens) % 2**63)
    return torch.randperm(tokens, generator=generator)[:k].sort().values.to(device)


def long_tail_split(scores: Tensor) -> list[int]:
    """Where the head of each row's descending curve ends: B counts in 1..N-1, N where the curve is flat.

    With d the row in descending order, the i in 1..N-1 that maximises (N - i) * (d_1 - d_i) / (d_1 - d_N); the first
    of several (image-text interaction, equations 2 and 3; the divisor is the same for all i).
    """
    tokens = scores.shape[-1]
    curve = scores.gather(-1, descending(scores))
    drop = curve[:, :1] - curve
    behind = torch.arange(tokens - 1, -1, -1, device=scores.device)
    split = (drop * behind)[:, : max(1, tokens - 1)].argmax(dim=-1) + 1
    return torch.where(drop[:, -1] > 0, split, tokens).tolist()


def heavy_and_recent(older: Tensor, age: Tensor, heavy: int) -> Tensor:
    """The `heavy` highest of the older cache entries and every newer one: (B, Hkv, heavy + newer), ascending.

    Args:
        older: (B, Hkv, M) scores of the first M entries; the lowest age wins a tie.
        age: (B, Hkv, L) timeline position of every entry, ascending, L >= M.
        heavy: at most M.
    """
    chosen = top_k(older.flatten(0, 1), heavy).unflatten(0, older.shape[:2])
    return torch.cat([age.gather(-1, chosen), age[..., older.shape[-1] :]], dim=-1)
