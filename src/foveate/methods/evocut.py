"""EvoCut: prune by how a patch changes on its way through the encoder, without any attention map."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.core import FoveateError, Keep, Signals, Site, check_choices
from foveate.forms import Scorer
from foveate.ops.scores import distinctiveness

BLOCKS = tuple(f"{block}/24" for block in range(10, 24))
"""Encoder blocks (0-based, of 24) whose outputs the paper's 13 transitions lie between."""


@dataclass(frozen=True)
class EvoCut(Scorer):
    """EvoCut: keeps the patches that the encoder's later blocks change in another direction than most.

    A transition is what a block does: the difference between its output and its input, per token, of length 1. Its
    directions are clustered, and a token's distinctiveness is 1 minus its largest cosine to a cluster's centre. The
    score is the running mean of it over the transitions, decay * score + (1 - decay) * distinctiveness from 0, so that
    later blocks weigh most. Tokens of all tiles of an image are clustered and ranked together.

    The paper leaves open how clusters start and how blocks are numbered. Here nothing is random (`start`); and the
    paper's transitions 12 to 24 are counted from 1: the outputs of blocks 11 to 23 (from 0) against the block before
    each, in proportion where the encoder has not 24. The last one is among them even where the projector reads the
    block before. Where two names mean one block nothing changes between them, and that transition does not count.

    Args:
        keep: tokens per image, or a share of them, rounded half to even. The default makes 192 of 576.
        blocks: encoder blocks (0-based, rising) whose outputs are compared, each with the next. None: the paper's.
        clusters: of directions, their M; an image of fewer tokens has fewer.
        iterations: of assigning tokens to clusters.
        start: tokens that clusters start from. "farthest": the longest change, then each time the one farthest from
            those before, so that no cluster is missed, yet single outliers become clusters of their own and are not
            distinctive then. "lengths": at even steps through the order of length, as a random draw would spread them.
        decay: share of the score that stays at each transition, 0 to 1 without 1.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2606.01756"
    site: ClassVar[Site] = "input"

    keep: Keep = 0.333
    blocks: tuple[int, ...] | None = None
    clusters: int = 8
    iterations: int = 2
    start: Literal["farthest", "lengths"] = "lengths"
    decay: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        for name in ("clusters", "iterations"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise FoveateError(f"{name}={value!r} is no whole number from 1; the smallest is {name}=1")
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float) or not 0.0 <= self.decay < 1.0:
            raise FoveateError(f"decay={self.decay!r} is outside 0 <= decay < 1; the paper's is decay=0.95")
        if self.blocks is not None:
            self._check_blocks(self.blocks)

    def _check_blocks(self, blocks: tuple[int, ...]) -> None:
        if any(type(block) is not int or block < 0 for block in blocks):
            raise FoveateError(f"blocks={blocks} are not all numbers of encoder blocks; the first is 0")
        if len(blocks) < 2 or any(later <= earlier for earlier, later in pairwise(blocks)):
            raise FoveateError(f"blocks={blocks} are not two or more that rise, such as blocks=(10, 11, 12)")

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(f"tower.{block}.hidden" for block in self._states())

    def _states(self) -> tuple[int | str, ...]:
        return BLOCKS if self.blocks is None else self.blocks

    def score(self, signals: Signals) -> Tensor:
        states = [signals.tower[block].hidden for block in self._states()]
        score = torch.zeros(signals.shape, device=signals.index.device)
        for before, after in pairwise(states):
            assert before is not None and after is not None
            change = after.float() - before.float()
            found = distinctiveness(change, self.clusters, self.iterations, self.start)
            changed = (change != 0).flatten(1).any(dim=1, keepdim=True)
            score = torch.where(changed, self.decay * score + (1.0 - self.decay) * found, score)
        return score
