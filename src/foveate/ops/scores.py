"""From attention to one number per token: streamed sums over attention maps that are never kept.

Shapes: B images, H heads, N tokens (M of them queries), d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of the attention map that are computed at once are limited so that B * H * rows * N stays below this many values
# (64 MiB of float32): memory grows with N, not with its square.
CHUNK_VALUES = 1 << 24


@dataclass(frozen=True, eq=False)
class AttentionSums:
    """Sums over an attention map, mean over heads, the leading `skip` tokens (CLS) told apart from the N patches."""

    received: Tensor  # (B, N) mean over patch queries of the probability on each patch
    given: Tensor  # (B, N) mean over patch keys of each patch query's probability
    received_all: Tensor  # (B, N) as received, the mean taken over all queries, CLS included


def attention_sums(queries: Tensor, keys: Tensor, scale: float, skip: int = 0) -> AttentionSums:
    """What each token receives and gives under softmax(q k^T * scale), in O(N) memory.

    The softmax runs over all keys, the `skip` leading ones included; those are then dropped on both axes without
    renormalising (FoPru, equations 1 to 3, where the map has one row and column per visual token).

    Args:
        queries: (B, H, skip + N, d).
        keys: (B, H, skip + N, d).
    """
    batch, heads, total, _ = queries.shape
    tokens = total - skip
    summary = _received(queries[:, :, :skip], keys, scale)[0] if skip else queries.new_zeros(batch, total).float()
    received = queries.new_zeros(batch, total, dtype=torch.float32)
    given = []
    rows = max(1, CHUNK_VALUES // (batch * heads * total))
    for start in range(skip, total, rows):
        column, on_skipped = _received(queries[:, :, start : start + rows], keys, scale, skip)
        received += column
        given.append((1.0 - on_skipped) / tokens)
    received_all = (received + summary) / total
    return AttentionSums(received[:, skip:] / tokens, torch.cat(given, dim=1), received_all[:, skip:])


def _received(queries: Tensor, keys: Tensor, scale: float, skip: int = 0) -> tuple[Tensor, Tensor]:
    """Column sums (B, N) of a few rows of the map, mean over heads, and each row's mass on the first `skip` keys (B, M).

    The division by the row sum is folded into the sum over rows, so that the map is written once and read once.
    """
    weights = torch.matmul(queries * scale, keys.transpose(-1, -2)).float()
    weights = weights.sub_(weights.amax(dim=-1, keepdim=True)).exp_()
    share = 1.0 / weights.sum(dim=-1, keepdim=True)
    columns = torch.matmul(share.transpose(-1, -2), weights).squeeze(-2).mean(dim=1)
    on_skipped = (weights[..., :skip].sum(dim=-1) * share.squeeze(-1)).mean(dim=1)
    return columns, on_skipped


def row_attention(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Probabilities of single queries: (B, H, M, d) and (B, H, N, d) -> (B, H, M, N), float32."""
    return torch.matmul(query * scale, keys.transpose(-1, -2)).float().softmax(dim=-1)


def more_dispersed(first: Tensor, second: Tensor) -> Tensor:
    """(B, N) each: per image the vector of larger variance; the second on a tie (FoPru, equation 4)."""
    wins = first.var(dim=-1, unbiased=False) > second.var(dim=-1, unbiased=False)
    return torch.where(wins[:, None], first, second)


def less_dispersed(first: Tensor, second: Tensor) -> Tensor:
    """(B, N) each: the vector that `more_dispersed` rejects (FoPru, Table 3, "w/o Variance")."""
    wins = first.var(dim=-1, unbiased=False) > second.var(dim=-1, unbiased=False)
    return torch.where(wins[:, None], second, first)
