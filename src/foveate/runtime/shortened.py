"""One prompt on its way through encoder and decoder: what is left of its pictures, and what the decoder is to get.

Shapes: B rows, S' columns of the shortened prompt, E entries that the cache held before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.choosing.images import Image
from foveate.choosing.record import Stopwatch
from foveate.choosing.shorten import Plan
from foveate.choosing.signals import Prompt
from foveate.choosing.timeline import Group, Timeline
from foveate.ops.device import on_device
from foveate.trace import Call


@dataclass(eq=False)
class Shortened:
    """The context of one prefill, which whatever acts on it behind the encoder reads and changes."""

    ids: Tensor  # (B, E + S') where the caller's ids repeat the cached prompt, else (B, S')
    options: dict[str, Any]
    timeline: Timeline
    plan: Plan
    images: list[Image]
    prompt: Prompt
    entries: int  # E
    earlier: list[Group]  # what the cache said of deep layers before
    stopwatches: list[Stopwatch]
    record: Callable[[Sequence[Image]], Call] | None = None  # makes the trace's record; None where there is none
    encoded: Any = None  # transformers' output for the images, before shortening
    kind: str = "image"  # or "video": what its images are
    removed: int = 0
    settled: bool = False  # its stages inside the decoder have acted and the trace knows
    repeats: int = 1
    keep: int | Tensor = 0  # of a direct call whose columns are counted behind the decoder, its `logits_to_keep`
    cache: Any = None  # that the decoder fills; None without one
    fed: int = 0  # tokens that its first layer has been given of it
    notes: list[str] = field(default_factory=list)  # what the trace is to say besides

    def noted(self) -> Call:
        """The trace's record, as far as stages have come."""
        assert self.record is not None
        return self.record(self.images)

    def rows_of(self, image: Image) -> slice:
        """An image's rows in the decoder's batch: one for each beam or sample of its prompt."""
        first = image.row * self.repeats
        return slice(first, first + self.repeats)

    def repeat_encoded(self, times: int) -> dict[str, Any]:
        """`mm_encoder_outputs` with what is left of each image, each row's group of images repeated."""
        kind = type(self.encoded)
        features = [image.features for image in self.images]
        made = {"pooler_output": self._repeated(features, times, self.encoded.pooler_output)}
        deep = getattr(self.encoded, "deepstack_features", None)
        if deep is not None:
            made["deepstack_features"] = [self._repeated(self._left(of_block), times, of_block) for of_block in deep]
        return {self.kind: kind(**made)}

    def _left(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Of features that an encoder hands over beside the pooled ones, those of what is left of each image.

        Tokens that stand for no patch have none.
        """
        flat = torch.cat(list(rows))
        lengths = [image.original for image in self.images]
        found = []
        for image, mine in zip(self.images, flat.split(lengths), strict=True):
            kept = mine[on_device(image.index, mine.device)]
            if image.extra is not None:
                kept = kept.masked_fill(on_device(image.extra, kept.device)[:, None], 0.0)
            found.append(kept)
        return found

    def _repeated(self, features: Sequence[Tensor], times: int, like: Any) -> Any:
        """What is left of each image, each row's group `times` over, in the container that the model hands over."""
        whole = [image.woven(one) for image, one in zip(self.images, features, strict=True)]
        rows = range(self.plan.index.shape[0])
        groups = [[one for image, one in zip(self.images, whole, strict=True) if image.row == row] for row in rows]
        repeated = [one for group in groups for _ in range(times) for one in group]
        return torch.cat(repeated)[None] if isinstance(like, Tensor) else repeated
