"""The losses of learned methods: the answers, the shares asked for, likeness to a teacher, and hints of scenes."""

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


def likeness_loss(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Kullback-Leibler divergence of what is said of the labelled tokens from what a teacher says, mean over tokens.

    Args:
        logits, teacher: (B, L, V) of the last places of the sequence.
        labels: (B, L) or longer, aligned at the end.
    """
    told = labels[:, labels.shape[1] - logits.shape[1] + 1 :] != IGNORED
    said, wanted = (one[:, :-1][told].float().log_softmax(dim=-1) for one in (logits, teacher))
    return functional.kl_div(said, wanted, reduction="batchmean", log_target=True)


def token_loss(tokens: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
    """Mean squared difference of kept tokens (B, N, D) from what a teacher makes of them; kept is (B, N) 0 or 1."""
    weight = kept.detach()[..., None]
    squared = (tokens.float() - teacher.float()).square() * weight
    return squared.sum() / (weight.sum() * tokens.shape[-1]).clamp(min=1)


def ratio_loss(
    decisions: Sequence[Tensor],
    present: Tensor,
    ratios: Sequence[float] | Tensor,
    kind: RatioLoss = "mse",
    beta: float = 0.5,
) -> Tensor:
    """How far the kept shares are from `ratios` (eq. 11), mean over stages and rows.

    Args:
        decisions: of each stage (B, N), those of earlier stages multiplied in (eq. 10).
        present: (B, N) bool, which of the N are tokens of their row.
        ratios: of each stage, or (S, B) of each stage and row.
        kind: "mse" squares the difference as eq. 11 does; "huber" is quadratic up to `beta` and linear beyond, the
            loss that the paper's next sentence names. With a beta of 0.5 it is the same up to a difference of 0.5.
    """
    shares = kept_shares(decisions, present)
    target = torch.as_tensor(ratios, device=shares.device, dtype=shares.dtype)
    target = target.view(len(target), -1).expand_as(shares)
    if kind == "huber":
        return functional.smooth_l1_loss(shares, target, beta=beta)
    return functional.mse_loss(shares, target)


MARGIN = 2.0
"""How far the scores of what a question asks about, of the background and of what distracts are to be apart."""


def hint_loss(scores: Sequence[Tensor], wanted: Tensor, left: Sequence[Tensor] | None = None) -> Tensor:
    """How well the scores put wanted tokens first and distracting ones last, mean over stages.

    Ordinal logistic: wanted tokens are to score above `MARGIN`, distracting ones below its negative, the others in
    between. Either side of either border weighs half. Within a row each wanted token is also to score above each
    distracting one, whatever the borders: both are objects, and without this modules learn that objects distract and
    never which one is asked about. Rows without a wanted token say nothing.

    Args:
        scores: of each stage (B, N), by how much keeping outweighs removing.
        wanted: (B, N) 1 for what the question is about, -1 for what would distract from it, else 0.
        left: of each stage (B, N) bool, the tokens that it could choose from; None is all at all stages.
    """
    told = (wanted > 0).any(dim=1, keepdim=True).expand_as(wanted)
    borders, pairs = [], []
    for number, one in enumerate(scores):
        counts = told if left is None else told & left[number]
        borders += [_border(one - MARGIN, wanted > 0, counts), _border(one + MARGIN, wanted >= 0, counts)]
        pairs.append(_apart(one, counts & (wanted > 0), counts & (wanted < 0)))
    return torch.stack(borders).mean() + torch.stack(pairs).mean()


def _border(scores: Tensor, above: Tensor, counts: Tensor) -> Tensor:
    """Cross-entropy of lying on the right side of 0, either side weighing half, over the tokens that count."""
    loss = functional.binary_cross_entropy_with_logits(scores.float(), above.float(), reduction="none")
    sides = [counts & above, counts & ~above]
    return torch.stack([0.5 * (loss * side).sum() / side.sum().clamp(min=1) for side in sides]).sum()


def _apart(scores: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """Logistic loss of every pair of a row that holds one of `above` and one of `below`, mean over pairs, then rows."""
    pairs = above[:, :, None] & below[:, None, :]
    loss = functional.softplus(scores.float()[:, None, :] - scores.float()[:, :, None]) * pairs
    count = pairs.sum(dim=(1, 2))
    return (loss.sum(dim=(1, 2)) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def even_loss(odds: Sequence[Tensor], even: Sequence[Tensor]) -> Tensor:
    """Cross-entropy of the shares that are spread evenly against those that rows ask for, mean over stages and rows.

    Args:
        odds: of each stage (B,), logarithms.
        even: of each stage (B,), from 0 to 1; NaN says nothing.
    """
    said, wanted = torch.stack(list(odds)), torch.stack(list(even))
    loss = functional.binary_cross_entropy_with_logits(said, wanted.nan_to_num(0.0), reduction="none")
    told = ~wanted.isnan()
    return (loss * told).sum() / told.sum().clamp(min=1)


def kept_shares(decisions: Sequence[Tensor], present: Tensor) -> Tensor:
    """(S, B) share of its visual tokens that each row keeps at each stage; 0 for a row without any."""
    count = present.sum(dim=1).clamp(min=1)
    return torch.stack([(stage * present).sum(dim=1) / count for stage in decisions])
