"""Image-text interaction: prune inside the encoder where the similarity to CLS falls off, then cap the KV cache."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from foveate.core import (
    FoveateError,
    Keep,
    Method,
    Selection,
    Signals,
    Site,
    check_choices,
    check_keep,
)
from foveate.methods._attention import Attention, attended, attention_signal
from foveate.methods.h2o import H2O
from foveate.ops.device import Unread, on_device
from foveate.ops.scores import cls_similarity
from foveate.ops.subsets import descending, long_tail_split


@dataclass(frozen=True)
class ImageTextInteraction(Method):
    """ImageTextInteraction: keeps the patches in the head of their similarity to CLS, then caps the KV cache.

    First part: the similarity softmax(cls . patch / sqrt(E)) in descending order is a long-tailed curve; its split i*
    (equation 3) times `alpha` is the image's own count. Second part: heavy and recent cache entries of text and image
    together (`H2O` of the same budgets); with 0.5 and 0.5 nothing leaves in the prompt and the cache stops growing
    there. A call without a cache (`use_cache=False`, or training with gradient checkpointing) has nothing to cap: the
    first part acts alone, and the trace says so.

    The paper prints alpha = 0.075, with which at most 43 of 576 tokens could stay, and reports 127 and more on
    average; `calibrate` finds the alpha of a wanted average.

    Args:
        alpha: the count is max(1, round(alpha * i*)), half to even and at most all; a flat curve keeps everything.
        keep: a fixed number of most similar patches, or a share of them, for every image (the rival of Table 1), in
            place of the split.
        where: encoder blocks that run in full before tokens leave, such as 3; "3/24": until as deep a block has run as
            the last of 3 is in an encoder of 24, the paper's; or "output": the block that the projector reads (the
            paper says both).
        visual_only: leave the cache alone (the ablation of Tables 2 and 4).
        heavy: cache entries chosen by attention received, or a share of the prompt's.
        recent: newest cache entries, likewise.
        attention: "cls" as in the paper; "received" takes the attention that each patch receives from all patches
            instead, for encoders without CLS: its share in that of all, in the same block, in place of the similarity.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2409.01162"
    site: ClassVar[Site] = "tower"
    adaptive: ClassVar[bool] = True

    alpha: float = 1.0
    keep: Keep | None = None
    where: int | str = "3/24"
    visual_only: bool = False
    heavy: Keep = 0.5
    recent: Keep = 0.5
    attention: Attention = "cls"

    def __post_init__(self) -> None:
        check_choices(self)
        if isinstance(self.alpha, bool) or not 0.0 < self.alpha < float("inf"):
            raise FoveateError(f"alpha={self.alpha} is no positive number; alpha=1.0 keeps the head of the curve")
        if self.keep is not None:
            check_keep(self.keep)
        blocks, of = (0, 1) if self.where == "output" else _blocks(self.where)
        if self.where != "output" and not (blocks >= 1 and (of == 0 or blocks < of)):
            raise FoveateError(
                f"where={self.where!r} is neither a number of encoder blocks from 1 nor 'output'; in proportion to an "
                "encoder's depth they are written '3/24'"
            )
        H2O(self.heavy, self.recent)
        # The class speaks for the defaults; these two depend on the fields.
        object.__setattr__(self, "adaptive", self.keep is None)
        object.__setattr__(self, "site", "input" if self.where == "output" else "tower")

    @property
    def needs(self) -> tuple[str, ...]:
        block = self._block()
        if self.attention == "received":
            return (attention_signal(self.attention, block),)
        return (f"tower.{block}.hidden", f"tower.{block}.cls")

    def _block(self) -> int | str:
        """The name of the block that is read: the last that runs in full."""
        if self.where == "output":
            return "read"
        blocks, of = _blocks(self.where)
        return f"{blocks - 1}/{of}" if of else blocks - 1

    def parts(self) -> tuple[Method, ...]:
        """The split in the encoder, and the budget of the cache."""
        if self.visual_only:
            return (self,)
        return dataclasses.replace(self, visual_only=True), H2O(self.heavy, self.recent)

    def depths(self, layers: int) -> tuple[int, ...]:
        """ENCODER blocks, of `layers`, that run in full before tokens leave; empty at the encoder's output."""
        if self.where == "output":
            return ()
        blocks, of = _blocks(self.where)
        if of:
            return (min(layers - 1, 1 + round((blocks - 1) * layers / of)),)
        if blocks >= layers:
            raise FoveateError(
                f"ImageTextInteraction: where={self.where} is outside 1..{layers - 1} of an encoder of {layers} blocks"
            )
        return (blocks,)

    def select(self, signals: Signals) -> Selection:
        """The first part's."""
        similarity = self.similarity(signals)
        left = signals.shape[1]
        order = descending(similarity)
        if self.keep is not None:
            kept = zip(signals.index, order[:, : self.wanted(signals)], strict=True)
            return Selection([index[places].sort().values for index, places in kept], scores=similarity)
        # Of every split on the host: not every device has float64.
        counts = on_device(_counts(torch.arange(left + 1), left, self.alpha), order.device)[long_tail_split(similarity)]
        raster = signals.index.sort(dim=-1)
        stays = order.argsort(dim=-1) < counts[:, None]
        return Selection(Unread(raster.values, stays.gather(1, raster.indices)), scores=similarity)

    def calibrate(self, signals: Signals | Iterable[Signals], target: Keep) -> ImageTextInteraction:
        """The same method with the alpha whose average count over these images is nearest to `target`.

        The average is a step function of alpha with finitely many values, so that the nearest is found exactly; the
        lower one wins a tie.

        Args:
            signals: of the images to calibrate on.
            target: tokens per image on average, or a share of them.

        Raises:
            FoveateError: no images, a target above their tokens, or a count fixed by `keep`.
        """
        if self.keep is not None:
            raise FoveateError(f"keep={self.keep} fixes the count, so alpha decides nothing; calibrate with keep=None")
        batches = [signals] if isinstance(signals, Signals) else list(signals)
        tokens = [batch.shape[1] for batch in batches for _ in batch.index]
        if not tokens:
            raise FoveateError("calibration needs the signals of at least one image")
        check_keep(target, "target")
        most = sum(tokens) / len(tokens)
        wanted = target * most if isinstance(target, float) else target
        if wanted > most:
            raise FoveateError(f"target={target} is above the {most:g} tokens that these images have on average")
        splits = [split for batch in batches for split in long_tail_split(self.similarity(batch)).tolist()]
        curves = Counter(zip(splits, tokens, strict=True))
        if all(split == length for split, length in curves):
            return self
        return dataclasses.replace(self, alpha=_nearest_alpha(curves, wanted))

    def similarity(self, signals: Signals) -> Tensor:
        """What is split: the similarity of each patch to CLS (equation 1) in the encoder block that is read, or the
        share of the attention that it receives there: (B, N), sums to 1.
        """
        block = signals.tower[self._block()]
        if self.attention == "received":
            received = attended(block, self.attention)
            return received / received.sum(dim=-1, keepdim=True)
        assert block.hidden is not None and block.cls is not None
        return cls_similarity(block.hidden, block.cls)


def _blocks(where: int | str) -> tuple[int, int]:
    """(3, 0) of 3 and (3, 24) of "3/24"; (0, 0) of what is neither."""
    if isinstance(where, str):
        blocks, _, of = where.partition("/")
        return (int(blocks), int(of)) if blocks.isdigit() and of.isdigit() else (0, 0)
    return (where, 0) if type(where) is int else (0, 0)


def _counts(splits: Tensor, tokens: int | Tensor, alpha: float) -> Tensor:
    """(B,) tokens kept of curves that split at `splits`; a flat one splits behind its last token and keeps all."""
    return (alpha * splits.double()).round().clamp(min=1).clamp(max=tokens).long().where(splits != tokens, tokens)


def _nearest_alpha(curves: Counter[tuple[int, int]], wanted: float) -> float:
    """The alpha with which the average of `_counts` is nearest to `wanted`, lower on a tie.

    An image's count rises from c to c + 1 where alpha passes (c + 0.5) / split, so that between two neighbouring steps
    of all images together the average is constant, and from step to step it rises.

    Args:
        curves: how many images have which (split, tokens); not all of them flat.
    """
    curved = [(split, tokens) for split, tokens in curves if split != tokens]
    steps = sorted({(count + 0.5) / split for split, tokens in curved for count in range(1, tokens)})
    edges = [0.0, *steps, 2 * steps[-1]]
    spans = list(pairwise(edges))
    splits, lengths = torch.tensor(list(curves)).T
    images = torch.tensor(list(curves.values()))

    def average(span: tuple[float, float]) -> float:
        alpha = sum(span) / 2
        return float((_counts(splits, lengths, alpha) * images).sum()) / curves.total()

    reached = bisect_left(spans, wanted, key=average)
    nearest = min(spans[max(0, reached - 1) : reached + 1], key=lambda span: abs(average(span) - wanted))
    return _shortest(*nearest)


def _shortest(low: float, high: float) -> float:
    """A number between `low` and `high` with few decimals, so that specs read well."""
    middle = (low + high) / 2
    return next((short for places in range(1, 17) if low < (short := round(middle, places)) < high), middle)
