"""Encoders whose tokens merge, run by hand: one picture, block by block, explicit softmax, loops over tokens.

Shapes: S tokens (CLS, patches, cross token), E encoder width, H heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TWO = ("3i4", "i1")
"""Prompts with a picture each."""


@dataclass(eq=False)
class Token:
    """One row of the stream."""

    row: Tensor  # (E,)
    index: int | None  # of the patch that it grew from; None for CLS and the cross token
    members: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        return max(1, len(self.members))


@dataclass(eq=False)
class Run:
    """One picture through the encoder, up to the block that the projector reads."""

    tokens: list[Token]  # the patches left, by index; behind a cross token with it
    lengths: list[int]  # of each block: the patches that its attention ran on
    attention: Tensor  # (H, S, S) of the last block
    seen: list[int | None]  # (S,) indices of the tokens that it ran on

    def put_back(self, patches: int) -> Tensor:
        """(N, E) each patch with its group's state; the cross token at its place."""
        rows: list[Any] = [None] * patches
        for token in self.tokens:
            for member in token.members:
                rows[member] = token.row
        for token in self.tokens:
            rows[token.index if token.index is not None else -1] = token.row
        return torch.stack(rows)


def cosine(first: Tensor, second: Tensor) -> float:
    first, second = first.double(), second.double()
    return float(first @ second / (first.norm() * second.norm()))


def attend(block: Any, tokens: list[Token], proportional: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Attention output (S, E), probabilities (H, S, S) and keys averaged over heads (S, d)."""
    attention = block.self_attn
    normed = block.layer_norm1(torch.stack([token.row for token in tokens]))
    queries, keys, values = (
        projection(normed).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    logits = queries @ keys.transpose(1, 2) / math.sqrt(queries.shape[-1])
    if proportional:
        logits = logits + torch.tensor([math.log(token.size) for token in tokens])
    weights = logits.softmax(dim=-1)
    mixed = (weights @ values).transpose(0, 1).flatten(1)
    return attention.out_proj(mixed), weights, keys.mean(dim=0)


def start(model: Any, pixels: Tensor) -> tuple[list[Token], list[Token], Sequence[Any]]:
    """CLS (or nothing), the patches, and the blocks."""
    tower = model.model.vision_tower
    hidden = tower.embeddings(pixels)
    has_cls = hasattr(tower, "pre_layrnorm")
    if has_cls:
        hidden = tower.pre_layrnorm(hidden)
    rows = list(hidden[0])
    cls = [Token(rows.pop(0), None)] if has_cls else []
    return cls, [Token(row, place, [place]) for place, row in enumerate(rows)], tower.encoder.layers


def add(block: Any, tokens: list[Token], added: Tensor) -> None:
    for token, row in zip(tokens, added, strict=True):
        token.row = token.row + row


def mlp(block: Any, tokens: list[Token]) -> None:
    """One by one."""
    for token in tokens:
        token.row = token.row + block.mlp(block.layer_norm2(token.row[None]))[0]


def into(target: Token, source: Token) -> Token:
    """The mean weighted by size, under the target's index."""
    row = (source.row * source.size + target.row * target.size) / (source.size + target.size)
    return Token(row, target.index, target.members + source.members)


@torch.no_grad()
def tome(model: Any, pixels: Tensor, rs: Sequence[int], proportional: bool = True) -> Run:
    """ToMe with rs[b] merges in block b. pixels: (1, 3, height, width)."""
    cls, patches, blocks = start(model, pixels)
    lengths = []
    for block, r in zip(blocks, rs, strict=False):
        lengths.append(len(patches))
        tokens = cls + patches
        mixed, weights, metric = attend(block, tokens, proportional)
        seen = [token.index for token in tokens]
        add(block, tokens, mixed)
        if r:
            patches = step(tokens, metric, r, len(cls))
        tokens = cls + patches
        mlp(block, tokens)
    patches.sort(key=lambda token: token.index or 0)
    return Run(patches, lengths, weights, seen)


def step(tokens: list[Token], metric: Tensor, r: int, cls: int) -> list[Token]:
    """The patches in the order of the authors' code."""
    first, second = range(cls * 2, len(tokens), 2), range(1, len(tokens), 2)
    edges = []
    for a in first:
        likeness = [cosine(metric[a], metric[b]) for b in second]
        best = max(range(len(likeness)), key=lambda place: likeness[place])
        edges.append((likeness[best], a, second[best]))
    edges.sort(key=lambda edge: -edge[0])
    merged = {b: tokens[b] for b in second}
    for _, a, b in edges[:r]:
        merged[b] = into(merged[b], tokens[a])
    rest = [a for _, a, _ in edges[r:]]
    return [tokens[a] for a in (sorted(rest) if cls else rest)] + [merged[b] for b in second]


@torch.no_grad()
def crossget(
    model: Any,
    pixels: Tensor,
    rs: Sequence[int],
    learned: Tensor | None = None,
    proportional: bool = True,
    patches: int = 36,
) -> Run:
    """CrossGET with rs[b] merges in block b; the cross token stands last. learned: (blocks, E)."""
    every = set(range(patches))
    (cls,), left, blocks = start(model, pixels)
    cross = Token(cls.row, None)
    lengths = []
    for number, (block, r) in enumerate(zip(blocks, rs, strict=False)):
        lengths.append(len(left))
        if learned is not None:
            cross.row = cross.row + learned[number]
        tokens = [cls, *left, cross]
        mixed, weights, metric = attend(block, tokens, proportional)
        seen = [token.index for token in tokens]
        add(block, tokens, mixed)
        before = {token.index for token in left}
        if r:
            mean = weights.mean(dim=0)
            importance = mean[:-1].mean(dim=0) + mean[-1]
            left = ensemble(left, metric[1:-1], importance[1:-1].tolist(), r)
        mlp(block, [cls, *left, cross])
    # It takes the largest index that the last merge set free.
    kept = {token.index for token in left}
    freed = (before - kept) or (every - kept)
    cross.index = max(index for index in freed if index is not None)
    left = sorted([*left, cross], key=lambda token: token.index or 0)
    return Run(left, lengths, weights, seen)


def ensemble(patches: list[Token], metric: Tensor, importance: list[float], r: int) -> list[Token]:
    """Complete-graph soft matching, and the weighted merge."""
    count = len(patches)
    alike = [[-math.inf if a == b else cosine(metric[a], metric[b]) for b in range(count)] for a in range(count)]
    # Rounded, so that two nearest neighbours are exactly as near and the lower place ranks first.
    order = sorted(range(count), key=lambda place: (-round(max(alike[place]), 9), place))
    rank = {place: number for number, place in enumerate(order)}
    score = {
        a: importance[a] - max([alike[a][b] for b in range(count) if rank[b] > rank[a]], default=-math.inf)
        for a in range(count)
    }
    sources = sorted(score, key=lambda place: (score[place], place))[:r]
    rows = [token.row * token.size for token in patches]
    summed, members = list(rows), [list(token.members) for token in patches]
    for source in sources:
        stay = [place for place in range(count) if place not in sources]
        target = max(stay, key=lambda place: alike[source][place])
        both = torch.tensor([importance[source], importance[target]]).softmax(dim=0)
        summed[target] = summed[target] + 2 * both[0] * rows[source] + (2 * both[1] - 1) * rows[target]
        members[target] += members[source]
    return [
        Token(summed[place] / len(members[place]), patches[place].index, members[place])
        for place in range(count)
        if place not in sources
    ]


def rows(run: Run) -> Tensor:
    """(K, E) what the projector reads."""
    return torch.stack([token.row for token in run.tokens])


def indices(run: Run) -> list[int | None]:
    """(K,) of the patches that the rows grew from."""
    return [token.index for token in run.tokens]


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
