"""From numbers to indices: which K of N tokens stay.

Shapes: B images, N tokens, K kept. Indices are positions on the N axis, int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from foveate.core import FoveateError, Grid
from foveate.ops.device import on_device, refuse_any


def descending(scores: Tensor) -> Tensor:
    """(B, N) scores -> (B, N) positions from the highest to the lowest; equal scores keep the lowest index first.

    Raises:
        FoveateError: a score is NaN or infinite, so that "the highest" has no meaning.
    """
    _check_finite(scores)
    return scores.sort(dim=-1, descending=True, stable=True).indices


def _check_finite(scores: Tensor) -> None:
    bad = (scores * 0).count_nonzero()  # what is not finite is NaN then
    refuse_any(bad, f"{{}} of {scores.numel()} scores are NaN or infinite; finite scores are needed to choose")


def top_k(scores: Tensor, k: int) -> Tensor:
    """(B, N) scores -> (B, K) positions of the k highest, ascending. Ties: the lowest index wins."""
    return descending(scores)[:, :k].sort(dim=-1).values


def split_budget(total: int, capacity: Sequence[int]) -> list[int]:
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


def split_by_size(total: int, sizes: Sequence[int], least: int = 1) -> list[int]:
    """Share `total` tokens over tiles in proportion to their sizes, `least` to each, the lowest place on a tie.

    Each token goes where a tile's size over what it already has is highest (the method of highest averages, Adams'
    divisors), so that a larger total never takes a token from a tile, and a total of all is each tile's all.

    Args:
        total: from `least` per tile to the sum of the sizes.
    """
    seats = [(tile, size / (seat - 1)) for tile, size in enumerate(sizes) for seat in range(least + 1, size + 1)]
    seats.sort(key=lambda seat: -seat[1])
    shares = [min(least, size) for size in sizes]
    for tile, _ in seats[: total - sum(shares)]:
        shares[tile] += 1
    return shares


def top_k_by_tile(scores: Tensor, tile: Tensor, sizes: Sequence[Sequence[int]], k: int) -> list[Tensor]:
    """(B, N) scores, tile numbers and tokens of each tile -> B ascending positions (k,), shared evenly by the tiles."""
    rows = zip(descending(scores), tile, sizes, strict=True)
    return [best_of_tiles(row, tiles, counts, split_budget(k, counts)).sort().values for row, tiles, counts in rows]


def best_of_tiles(order: Tensor, tile: Tensor, sizes: Sequence[int], shares: Sequence[int]) -> Tensor:
    """(N,) positions, best first, and (N,) tile numbers -> the first shares[t] of each tile t, the best first.

    Args:
        sizes: of each tile, how many tokens it has.
    """
    tiles = tile[order].argsort(stable=True).split(list(sizes))
    turns = torch.cat([of_tile[:share] for of_tile, share in zip(tiles, shares, strict=True)])
    return order[turns.sort().values]


def each_tile(
    tile: Tensor, sizes: Sequence[Sequence[int]], k: int, choose: Callable[[Tensor, Tensor, int], Tensor]
) -> list[Tensor]:
    """Let `choose` pick within every tile, the budget split evenly over the tiles: B ascending position tensors (k,).

    Tiles of one size and one share are asked about together, across the images.

    Args:
        tile: (B, N) tile numbers.
        sizes: of each image the tokens of each tile.
        choose: takes (R,) numbers of the images that R tiles belong to, (R, n) positions of their tokens and the share;
            gives the (R, share) chosen among the n.
    """
    order = tile.argsort(dim=-1, stable=True)
    alike: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
    for image, counts in enumerate(sizes):
        start = 0
        for size, share in zip(counts, split_budget(k, counts), strict=True):
            if share:
                alike.setdefault((size, share), []).append((image, order[image, start : start + size]))
            start += size
    chosen: list[list[Tensor]] = [[] for _ in tile]
    for (_, share), found in alike.items():
        images = on_device(torch.tensor([image for image, _ in found]), tile.device)
        positions = torch.stack([places for _, places in found])
        picked = positions.gather(1, choose(images, positions, share))
        for (image, _), row in zip(found, picked, strict=True):
            chosen[image].append(row)
    return [torch.cat(rows).sort().values for rows in chosen]


def split_in_proportion(total: int, weights: Sequence[float], capacity: Sequence[int]) -> list[int]:
    """Share `total` tokens in proportion to `weights`, none above its `capacity`: largest remainder, then lowest place.

    What a full place cannot take goes to the others in proportion; where no place with room has weight, evenly. The sum
    is always `total` (at most the sum of capacities).
    """
    if total > sum(capacity):
        raise FoveateError(f"{total} tokens are asked of {len(capacity)} tiles that hold {sum(capacity)}")
    shares = [0] * len(capacity)
    while (missing := total - sum(shares)) > 0:
        room = [place for place, most in enumerate(capacity) if shares[place] < most]
        weight = {place: max(0.0, weights[place]) for place in room}
        if not sum(weight.values()):
            weight = dict.fromkeys(room, 1.0)
        exact = {place: missing * weight[place] / sum(weight.values()) for place in room}
        whole = {place: math.floor(exact[place]) for place in room}
        rest = missing - sum(whole.values())
        for place in sorted(room, key=lambda place: (whole[place] - exact[place], place))[:rest]:
            whole[place] += 1
        for place in room:
            shares[place] = min(capacity[place], shares[place] + whole[place])
    return shares


def without_duplicates(similarity: Tensor, order: Tensor, keep: int, removed: int = 8) -> Tensor:
    """Drop tokens that resemble others, a few per round, until `keep` are left: (B, keep) in the list's order.

    Each round sets the even places of the list against the odd ones, drops the (at most) `removed` even ones of largest
    similarity to any odd one, and lists the surviving even ones by falling similarity, then the odd ones (VisPruner).

    Args:
        similarity: (B, N, N).
        order: (B, R) the positions listed at first.
        keep: 0..R.
    """
    nearest_of = _among if order.device.type != "cpu" or order.shape[1] < NEAR else _Neighbours()
    while (left := order.shape[1]) > keep > 0:
        even, odd = order[:, ::2], order[:, 1::2]
        nearest = nearest_of(similarity, even, odd)
        by_nearest = nearest.sort(dim=-1, descending=True, stable=True).indices
        drop = min(removed, left - keep, even.shape[1])
        order = torch.cat([even.gather(1, by_nearest[:, drop:]), odd], dim=1)
    return order[:, :keep]


NEAR = 256
"""Listed tokens below which all even ones are compared with all odd ones, which is then as fast."""


def _among(similarity: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """(B, E) largest similarity of each of `even` to any of `odd`, of all of them."""
    images = torch.arange(even.shape[0], device=even.device)[:, None, None]
    return similarity[images, even[:, :, None], odd[:, None, :]].amax(dim=-1)


class _Neighbours:
    """The same, by a short list of each token's nearest neighbours that are still listed.

    Half of those listed are odd, so that one of the first few is; whether all have one is a number for the host, which
    only a CPU has without waiting. Lists are made anew when half of what they were made of has left.
    """

    FEW, FIRST = 16, 4  # how many are listed, and how many of them are looked at of every token
    ROWS = 256  # whose neighbours are looked for at once

    def __init__(self) -> None:
        self.made_of = 0

    def __call__(self, similarity: Tensor, even: Tensor, odd: Tensor) -> Tensor:
        listed = even.shape[1] + odd.shape[1]
        if listed < NEAR:
            return _among(similarity, even, odd)
        if 2 * listed < self.made_of or not self.made_of:
            self._look(similarity, torch.cat([even, odd], dim=1))
        opposite = torch.zeros(similarity.shape[:2], dtype=torch.bool)
        opposite.scatter_(1, odd, True)
        few = even[..., None].expand(-1, -1, self.FIRST)
        there = opposite.gather(1, self.near.gather(1, few).flatten(1)).view_as(few)
        first = there.to(torch.uint8).argmax(dim=-1, keepdim=True)
        value = self.value.gather(1, few).gather(2, first).squeeze(2)
        image, place = (~there.any(dim=-1)).nonzero(as_tuple=True)  # about one in sixteen
        token = even[image, place]
        there = opposite[image[:, None], self.near[image, token]]
        first = there.to(torch.uint8).argmax(dim=-1, keepdim=True)
        value[image, place] = self.value[image, token].gather(1, first).squeeze(1)
        lost = (~there.any(dim=-1)).nonzero().flatten()
        for number, where in zip(image[lost].tolist(), place[lost].tolist(), strict=True):
            value[number, where] = similarity[number, even[number, where], odd[number]].max()
        return value

    def _look(self, similarity: Tensor, listed: Tensor) -> None:
        """Each listed token's nearest ones among the others, nearest first."""
        batch, tokens = similarity.shape[:2]
        self.made_of = listed.shape[1]
        self.near = listed.new_zeros(batch, tokens, self.FEW)
        self.value = similarity.new_zeros(batch, tokens, self.FEW)
        for image, places in enumerate(listed):
            # Columns are picked where that saves more than it costs; a few rows at a time stay in the cache.
            gone = None if 2 * places.numel() <= tokens else torch.ones(tokens, dtype=torch.bool)
            if gone is not None:
                gone[places] = False
            for rows in places.split(self.ROWS):
                table = similarity[image, rows].scatter_(1, rows[:, None], -torch.inf)
                table = table[:, places] if gone is None else table.masked_fill_(gone, -torch.inf)
                value, near = table.topk(self.FEW, dim=-1)
                self.near[image, rows] = places[near] if gone is None else near
                self.value[image, rows] = value


def least_similar(similarity: Tensor, quota: Tensor, taken: Tensor) -> Tensor:
    """Let P pivots in turn take the tokens least similar to them among those not taken yet: (B, N) bool (DART).

    Args:
        similarity: (B, P, N).
        quota: (B, P) how many each pivot takes; together at most those not taken.
        taken: (B, N) bool, gone from the start and True in the answer too.
    """
    places = torch.arange(taken.shape[1], device=taken.device).expand_as(taken)
    for number in range(similarity.shape[1]):
        order = similarity[:, number].masked_fill(taken, torch.inf).sort(dim=-1, stable=True).indices
        rank = torch.empty_like(order).scatter_(1, order, places)
        taken = taken | (rank < quota[:, number, None])
    return taken


def grid_neighbours(grid: Grid, wrap: bool = False, device: torch.device | None = None) -> Tensor:
    """(h * w, 4) position to the left, to the right, above and below; -1 beyond the border.

    With `wrap` the position before, the one after, the one a row before and the one a row after in raster order,
    clamped to the raster: rows run on into each other.
    """
    height, width = grid
    place = torch.arange(height * width, device=device)
    beside = torch.stack([place - 1, place + 1, place - width, place + width], dim=-1)
    if wrap:
        return beside.clamp(0, height * width - 1)
    row, column = place // width, place % width
    inside = torch.stack([column > 0, column < width - 1, row > 0, row < height - 1], dim=-1)
    return beside.where(inside, -1)


def with_neighbours(chosen: Tensor, neighbours: Tensor) -> Tensor:
    """(B, A) positions and (N, m) neighbours of each, -1 for none -> (B, N) bool: the chosen ones and theirs."""
    tokens = neighbours.shape[0]
    around = torch.cat([chosen[..., None], neighbours[chosen]], dim=-1).flatten(1)
    mask = torch.zeros(chosen.shape[0], tokens + 1, dtype=torch.bool, device=chosen.device)
    return mask.scatter_(1, around.where(around >= 0, tokens), True)[:, :tokens]


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

    The lowest index wins among equally near ones. Both are on the host.
    """
    height, width = grid
    row = torch.arange(height).repeat_interleave(width).double()
    column = torch.arange(width).repeat(height).double()
    count = torch.bincount(cell).double()
    middle_row = torch.bincount(cell, weights=row) / count
    middle_column = torch.bincount(cell, weights=column) / count
    distance = (row - middle_row[cell]) ** 2 + (column - middle_column[cell]) ** 2
    nearest = torch.full_like(count, math.inf).scatter_reduce(0, cell, distance, "amin")
    tokens = torch.arange(cell.numel())
    is_nearest = distance <= nearest[cell] + 1e-9
    first = torch.full_like(count, cell.numel(), dtype=torch.int64)
    return first.scatter_reduce(0, cell[is_nearest], tokens[is_nearest], "amin")


@lru_cache(maxsize=32)
def even_places(height: int, width: int, count: int) -> Tensor:
    """(count,) the token nearest to the middle of each cell of a `lattice`, ascending by cell, on the host."""
    return cell_centres(lattice(height, width, count), (height, width))


@lru_cache(maxsize=32)
def even_order(height: int, width: int) -> Tensor:
    """(h * w,) rank of each token of a grid, 0 first, so that the first k are spread evenly for every k.

    Each token in turn is one of those farthest from all before it. A fixed draw decides between equally far ones, as
    the lowest index would fill the top of the picture first.
    """
    tokens = height * width
    generator = torch.Generator().manual_seed(0)
    lot = torch.rand(tokens, generator=generator, dtype=torch.float64) / 2  # squared distances are whole numbers
    row, column = torch.arange(tokens) // width, torch.arange(tokens) % width
    apart = torch.full((tokens,), 4.0 * (height**2 + width**2), dtype=torch.float64)
    rank = torch.empty(tokens, dtype=torch.int64)
    for turn in range(tokens):
        token = int((apart + lot).argmax())
        rank[token] = turn
        apart = torch.minimum(apart, ((row - row[token]) ** 2 + (column - column[token]) ** 2).double())
        apart[token] = -1.0
    return rank


def best_and_even(scores: Tensor, rank: Tensor, k: int, even: Sequence[int]) -> Tensor:
    """The highest scores, and of the others those that come first in an even order: (B, k) positions, ascending.

    Args:
        scores: (B, N); ties: the lowest index wins.
        rank: (B, N) place of each token in an order whose every beginning is spread evenly, see `even_order`.
        even: B numbers in 0..k, how many of the k are chosen by that order.
    """
    order = descending(scores)
    chosen = []
    for row, ranks, count in zip(order, rank, even, strict=True):
        best, rest = row[: k - count], row[k - count :]
        chosen.append(torch.cat([best, rest[ranks[rest].argsort()[:count]]]))
    return torch.stack(chosen).sort(dim=-1).values


def in_classes(scores: Tensor, borders: Sequence[float], rank: Tensor) -> Tensor:
    """(B, N) scores of which only counts how many borders they are above; in each class an even order decides.

    Args:
        scores: (B, N).
        borders: no two the same.
        rank: (B, N) place of each token in an order whose every beginning is spread evenly, see `even_order`.

    Raises:
        FoveateError: a score is NaN or infinite.
    """
    _check_finite(scores)
    above = torch.stack([scores > border for border in borders]).sum(dim=0)
    return above - rank / (rank.amax(dim=-1, keepdim=True) + 1)


def random_subset(tokens: int, k: int, seed: int, device: torch.device) -> Tensor:
    """(k,) ascending positions out of `tokens`, drawn by a generator made from (seed, tokens) alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + tokens) % 2**63)
    return on_device(torch.randperm(tokens, generator=generator)[:k].sort().values, device)


def long_tail_split(scores: Tensor) -> Tensor:
    """Where the head of each row's descending curve ends: (B,) counts in 1..N-1, N where the curve is flat.

    With d the row in descending order, the i in 1..N-1 that maximises (N - i) * (d_1 - d_i) / (d_1 - d_N); the first
    of several (image-text interaction, equations 2 and 3; the divisor is the same for all i).
    """
    tokens = scores.shape[-1]
    curve = scores.gather(-1, descending(scores))
    drop = curve[:, :1] - curve
    behind = torch.arange(tokens - 1, -1, -1, device=scores.device)
    split = (drop * behind)[:, : max(1, tokens - 1)].argmax(dim=-1) + 1
    return torch.where(drop[:, -1] > 0, split, tokens)


def heavy_and_recent(older: Tensor, entries: int, heavy: int) -> Tensor:
    """The `heavy` highest of the older cache entries and every newer one: (B, Hkv, heavy + newer) slots, ascending.

    Args:
        older: (B, Hkv, M) scores of the first M entries; the lowest slot wins a tie.
        entries: L >= M.
        heavy: at most M.
    """
    count = older.shape[-1]
    slots = torch.arange(heavy + entries - count, device=older.device)
    if heavy == count - 1:  # for each token of an answer one entry leaves: the last of the lowest
        _check_finite(older)
        leaves = count - 1 - older.flip(-1).argmin(dim=-1, keepdim=True)
        return slots + (slots >= leaves)
    chosen = top_k(older.flatten(0, 1), heavy).unflatten(0, older.shape[:2])
    newer = slots[heavy:] + (count - heavy)
    return torch.cat([chosen, newer.expand(*older.shape[:2], -1)], dim=-1)


def outliers(scores: Tensor, together: bool = False) -> Tensor:
    """How many scores of each row of (B, N) lie above Q3 + 1.5 * (Q3 - Q1) of that row: (B,), where the scores are.

    Quartiles are interpolated linearly.

    Args:
        together: of the flattened batch, (1,).
    """
    rows = scores.float().flatten()[None] if together else scores.float()
    # Made by a kernel: numbers of Python's would wait for the device.
    low, high = rows.quantile(torch.linspace(0.25, 0.75, 2, device=rows.device), dim=-1)
    found: Tensor = (rows > (high + 1.5 * (high - low))[:, None]).sum(dim=-1)
    return found


def outlier_counts(found: Tensor, shape: tuple[int, int]) -> list[int]:
    """B counts in 0..N, of the `outliers` of (B, N) scores: each row's own, or int(N * share) of those found together.

    Args:
        found: (B,) or (1,), on the host.
    """
    counts: list[int] = found.tolist()
    batch, tokens = shape
    return counts if len(counts) == batch else [int(tokens * (counts[0] / (batch * tokens)))] * batch
