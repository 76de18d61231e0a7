"""The two losses of LVPruning: predicting the answers, and keeping the shares that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""The label of a token that no loss reads."""

RatioLoss: TypeAlias = Literal["mse", "huber"]


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the labelled tokens, each predicted one place before it: (B, L, V) and (B, L).

    Where `logits` hold the last places of the sequence only, they are aligned at the end.
    """
    wanted = labels[:, labels.shape[1] - logits.shape[1] + 1 :]
    return functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), wanted.to(logits.device).flatten(), ignore_index=IGNORED
    )


def ratio_loss(
    decisions: Sequence[Tensor], present: Tensor, ratios: Sequence[float], kind: RatioLoss = "mse", beta: float = 0.5
) -> Tensor:
    """How far the kept shares are from `ratios` (eq. 11), mean over stages and rows.

    Args:
        decisions: of each stage (B, N), those of earlier stages multiplied in (eq. 10).
        present: (B, N) bool, which of the N are tokens of their row.
        kind: "mse" squares the difference as eq. 11 does; "huber" is quadratic up to `beta` and linear beyond, the
            loss that the paper's next sentence names.
    """
    shares = kept_shares(decisions, present)
    target = torch.tensor(ratios, device=shares.device, dtype=shares.dtype)[:, None].expand_as(shares)
    if kind == "huber":
        return functional.smooth_l1_loss(shares, target, beta=beta)
    return functional.mse_loss(shares, target)


def hint_loss(scores: Sequence[Tensor], wanted: Tensor) -> Tensor:
    """How well the scores tell wanted tokens from others: cross-entropy, either kind weighing half, mean over stages.

    Args:
        scores: of each stage (B, N), by how much keeping outweighs removing.
        wanted: (B, N) bool.
    """
    target = wanted.to(scores[0].dtype)
    weight = 0.5 * target / target.sum().clamp(min=1) + 0.5 * (1 - target) / (1 - target).sum().clamp(min=1)
    found = [functional.binary_cross_entropy_with_logits(one, target, weight, reduction="sum") for one in scores]
    return torch.stack(found).mean()


def kept_shares(decisions: Sequence[Tensor], present: Tensor) -> Tensor:
    """(S, B) share of its visual tokens that each row keeps at each stage; 0 for a row without any."""
    count = present.sum(dim=1).clamp(min=1)
    return torch.stack([(stage * present).sum(dim=1) / count for stage in decisions])
