"""The forms of a Method: Scorer, one number a token; Stepwise, choosing by what it reads; Merger, one merge a block."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.ops.device import Steps

from foveate.core import FoveateError, Grid, Keep, Method, Selection, Signals, Site, check_keep, tokens_to_keep


@dataclass(frozen=True)
class Scorer(Method):
    """A method that is one number per token: the highest `keep` stay, in raster order; ties go to the lowest index."""

    keep: Keep = 0.5

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def score(self, signals: Signals) -> Tensor:
        """(B, N), the higher the better."""
        raise NotImplementedError(f"{type(self).__name__} has no score()")

    def select(self, signals: Signals) -> Selection:
        from foveate.ops.subsets import top_k

        scores = self.score(signals)
        kept = top_k(scores, self.wanted(signals))
        rows = zip(signals.index, kept, strict=True)
        return Selection([row[chosen].sort().values for row, chosen in rows], scores=scores)


@dataclass(frozen=True)
class Stepwise(Method):
    """A method that has to know numbers on the host before it can go on: how many tokens stand out, say.

    Whoever reads what a device has waits for it. What `steps` asks for is read for pictures of all sizes together.
    """

    def steps(self, signals: Signals) -> Steps[Selection]:
        """Yields tensors, is sent the same on the host, as often as it takes, and returns what stays."""
        raise NotImplementedError(f"{type(self).__name__} has no steps()")

    def select(self, signals: Signals) -> Selection:
        """What the steps come to, taken alone; who overrides it is asked in place of them."""
        from foveate.ops.device import taken

        return taken([self.steps(signals)])[0]


@dataclass(frozen=True)
class Merger(Method):
    """A method that merges tokens inside the encoder, between attention and MLP of its blocks.

    It acts in every block up to the one that the projector reads and is asked once for each (`signals.stage` of
    `signals.stages`), but counts as one stage. No block merges away more than half of its patches. With `keep`, each
    block merges away the same number of patches, the smallest that gets there, until what is missing is less.

    Args:
        keep: tokens per image at the end, or a share of them, rounded half to even.
        r: in its place, patches that each block merges away (more than half of them counts as half), or one number per
            block, the blocks behind them merging none.
        proportional: attention weighs a token by the number of patches in it: log(size) is added to its logits.
    """

    site: ClassVar[Site] = "tower"
    merging: ClassVar[bool] = True

    keep: Keep | None = None
    r: int | tuple[int, ...] | None = None
    proportional: bool = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        if (self.keep is None) == (self.r is None):
            raise FoveateError(f"{name}: keep={self.keep} and r={self.r}; give one of them")
        if self.keep is not None:
            check_keep(self.keep)
        for number in self.r if isinstance(self.r, tuple) else () if self.r is None else (self.r,):
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise FoveateError(f"{name}: r={number!r} is no number of patches from 0; the smallest is r=0")
        # The class speaks for the defaults; with one number per block, the blocks of an encoder decide the count.
        object.__setattr__(self, "adaptive", isinstance(self.r, int))

    def depths(self, layers: int) -> tuple[int, ...]:
        """Encoder blocks that run before each merge: all from 0; `layers` counts them up to the one that is read."""
        if isinstance(self.r, tuple) and len(self.r) > layers:
            raise FoveateError(
                f"{type(self).__name__}: r names {len(self.r)} blocks; {layers} run up to the one that the projector "
                f"reads, so the most is {layers}"
            )
        return tuple(range(layers))

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        if self.keep is not None:
            count = tokens_to_keep(self.keep, original)
            self._patches(count, original)
            return (count,)
        if isinstance(self.r, int) or tiles > 1:  # every tile merges as many, and how many each has is not known here
            return None
        left = original - sum(self.schedule(original, len(self.r or ())))
        return (left + self.beside if left < original else left,)

    def schedule(
        self, tokens: int, blocks: int, original: int | None = None, keep: int | None = None
    ) -> tuple[int, ...]:
        """How many of `tokens` patches each of `blocks` blocks merges away.

        Args:
            original: tokens of the image before any stage; `tokens` where None.
            keep: tokens at the end, in place of the method's own `keep`.

        Raises:
            FoveateError: `keep` is outside the reach of so many blocks; the message says what is reachable.
        """
        if self.keep is None:
            every_block = (self.r,) * blocks if isinstance(self.r, int) else (*(self.r or ()), *[0] * blocks)
            return _halving(tokens, 0, every_block[:blocks])
        original = original or tokens
        wanted = self.keep if keep is None or self._means(keep, original) else keep
        target = self._patches(tokens_to_keep(wanted, original, tokens), original)
        least = tokens - sum(_halving(tokens, 0, (tokens,) * blocks))
        if target < least:
            raise FoveateError(
                f"{type(self).__name__}: keep={wanted} asks for {target + self.beside} of {tokens} tokens, but "
                f"{blocks} blocks that each merge away at most half reach {least + self.beside} to {tokens}; the least "
                f"is keep={least + self.beside}"
            )
        every = -((target - tokens) // blocks)  # evenly, rounded up; more where half of the tokens is less than that
        while sum(merged := _halving(tokens, target, (every,) * blocks)) < tokens - target:
            every += 1
        return merged

    def _means(self, count: int, original: int) -> bool:
        """Whether the method's own `keep` comes to `count` tokens."""
        with contextlib.suppress(FoveateError):
            return self.keep is not None and tokens_to_keep(self.keep, original) == count
        return False

    def _patches(self, count: int, original: int) -> int:
        """Patches among `count` tokens at the end; where all patches stay, no other token joins them."""
        if count <= self.beside < original:
            least = self.beside + 1
            raise FoveateError(f"{type(self).__name__}: keep={self.keep} leaves no patch; the least is keep={least}")
        return count if count == original else count - self.beside

    def merges(self, signals: Signals) -> int:
        """How many patches the block at hand merges away.

        Where other methods have dropped patches since the first block, the rest is planned anew. It depends on nothing
        but counts, so that a picture in a batch gets what it gets alone.
        """
        stage, left = signals.stage, signals.shape[1]
        if isinstance(self.r, int):
            return min(self.r, left // 2)
        if self.r is not None:
            return min(self.r[stage], left // 2) if stage < len(self.r) else 0
        if stage:
            with contextlib.suppress(FoveateError):  # of a budget that other methods have made reachable
                plan = self.schedule(signals.original, signals.stages, keep=signals.keep)
                if left == signals.original - sum(plan[:stage]):
                    return plan[stage]
        return self.schedule(left, signals.stages - stage, signals.original, signals.keep)[0]

    def companion(self, block: int, cls: Tensor, before: Tensor | None) -> Tensor | None:
        """A token (B, E) that runs beside CLS through encoder block `block`; None for a method without.

        Args:
            block: 0-based; asked before each block in turn.
            cls: (B, E), the block's input.
            before: (B, E), what the block before made of the companion; None at the first block.
        """
        return None


def _halving(tokens: int, target: int, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """What each block merges away of what it wants: at most half of its tokens, and none below `target`."""
    merged: list[int] = []
    for most in wanted:
        merged.append(min(most, tokens - target, tokens // 2))
        tokens -= merged[-1]
    return tuple(merged)
