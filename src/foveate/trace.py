"""What pruning did and what it cost: Budget, the records of a call, and the Trace that holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor
from foveate.core import FoveateError, Grid, Site


@dataclass(frozen=True)
class Budget:
    """What a prefill costs, defined once for every method.

    Attributes:
        tokens: (layers,) visual tokens per image at each decoder layer, mean over the images.
        prefill_flops: floating-point operations of the prefill, tower and projector included, all rows together.
        kv_bytes: bytes of keys and values that the prompt leaves in the cache, all rows together.
    """

    tokens: tuple[float, ...]
    prefill_flops: float
    kv_bytes: int

    @property
    def equivalent_tokens(self) -> float:
        """Visual tokens averaged over the decoder layers."""
        return sum(self.tokens) / len(self.tokens) if self.tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "tokens": list(self.tokens),
            "equivalent_tokens": self.equivalent_tokens,
            "prefill_flops": self.prefill_flops,
            "kv_bytes": self.kv_bytes,
        }


@dataclass(frozen=True, eq=False)
class StageRecord:
    """What one stage did to one image."""

    method: str  # its spec
    site: Site
    layer: int | None  # decoder blocks that ran at full length before it; None before the decoder
    before: int
    after: int
    kept: Tensor  # (K,) original indices
    extra: Tensor | None = None  # (K,) bool: tokens that are not to be drawn
    flops: int = 0  # operations of choosing, where modules of the method's own do it
    scores: Tensor | None = None  # (before,) of the tokens that were there, where the method says what it made of them


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image of a call: its prompt row, its tokens before any stage, its grid and what each stage left."""

    row: int
    original: int
    grid: Grid | None
    stages: tuple[StageRecord, ...]
    proportional: bool = False  # the grid has the picture's own proportions; else one of any shape may have made it

    @property
    def after(self) -> int:
        """Tokens left after the last stage."""
        return self.stages[-1].after if self.stages else self.original

    @property
    def encoded(self) -> int:
        """Tokens whose patches entered the encoder."""
        return next((stage.after for stage in reversed(self.stages) if stage.site == "pixels"), self.original)

    @property
    def kept(self) -> Tensor:
        """(K,) original indices left after the last stage."""
        if self.stages:
            return self.stages[-1].kept
        import torch

        return torch.arange(self.original)

    @property
    def extra(self) -> Tensor | None:
        """(K,) bool over `kept`: tokens that are not to be drawn."""
        return self.stages[-1].extra if self.stages else None


@dataclass(frozen=True, eq=False)
class Call:
    """One prefill: what came in, what each stage left, and what it cost beside the unpruned prompt."""

    images: tuple[ImageRecord, ...]
    prompt_length: int  # padded length of the caller's prompt
    length: int  # ... of the shortened one
    text: float  # tokens per row that are neither visual nor padding, mean over the rows
    index: Tensor  # (B, length) original position of each shortened one, -1 in padding
    budget: Budget
    unpruned: Budget
    kv_lengths: tuple[int, ...]  # entries that each decoder layer's cache holds after the prefill
    stopwatch: Callable[[], float] = field(default=lambda: 0.0, repr=False)
    notes: tuple[str, ...] = ()  # what of the method did not act in this call, and why

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values after the prefill, re-padding of ragged rows included."""
        return self.budget.kv_bytes

    @property
    def milliseconds(self) -> float:
        """Time spent choosing tokens; waits for the device on first reading."""
        return self.stopwatch()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, ready for JSON; kept indices as lists."""
        images = [
            {
                "row": image.row,
                "original": image.original,
                "grid": image.grid,
                "encoder_tokens": image.encoded,
                "stages": [
                    {
                        "method": stage.method,
                        "site": stage.site,
                        "layer": stage.layer,
                        "before": stage.before,
                        "after": stage.after,
                        "kept": stage.kept.tolist(),
                    }
                    for stage in image.stages
                ],
            }
            for image in self.images
        ]
        return {
            "images": images,
            "prompt_length": self.prompt_length,
            "length": self.length,
            "text": self.text,
            "kv_lengths": list(self.kv_lengths),
            "budget": self.budget.to_dict(),
            "unpruned": self.unpruned.to_dict(),
            "milliseconds": self.milliseconds,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        if not self.images:
            return f"no picture: {self.text:.4g} tokens of text in each row, run as they are"
        counts = []
        for image in self.images:
            steps = [image.original, *(stage.after for stage in image.stages)]
            counts.append(" -> ".join(map(str, steps)))
        tokens = f"{counts[0]} tokens" if len(set(counts)) == 1 else "; ".join(counts) + " tokens"
        if len(counts) > 1 and len(set(counts)) == 1:
            tokens += f" in each of {len(counts)} images"
        if any(stage.site == "pixels" for image in self.images for stage in image.stages):
            whole, given = sum(one.original for one in self.images), sum(one.encoded for one in self.images)
            tokens += f" | encoder tokens {whole} -> {given}"
        flops, full = self.budget.prefill_flops, self.unpruned.prefill_flops
        saved = f" ({flops / full:.0%})" if full else ""
        return (
            f"{tokens} | prefill {readable(full, 'FLOPs')} -> {readable(flops, 'FLOPs')}{saved} | "
            f"KV {readable(self.unpruned.kv_bytes, 'B')} -> {readable(self.kv_bytes, 'B')} | "
            f"choosing {self.milliseconds:.2f} ms{''.join(f' | {note}' for note in self.notes)}"
        )


class Trace:
    """What a handle did: the latest call's record, earlier ones in `history`.

    Every attribute of the latest `Call` can be read on the trace itself.
    """

    history_limit: ClassVar[int] = 1000

    def __init__(self) -> None:
        self.history: list[Call] = []

    @property
    def latest(self) -> Call:
        """The latest call.

        Raises:
            FoveateError: no prompt with an image has run yet.
        """
        if not self.history:
            raise FoveateError(
                "nothing has been pruned yet: the trace fills when the model sees a prompt with an image"
            )
        return self.history[-1]

    def add(self, call: Call) -> None:
        """Record a call; the oldest goes once `history_limit` are kept."""
        self.history.append(call)
        del self.history[: -self.history_limit]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in _CALL_ATTRIBUTES:
            raise AttributeError(f"Trace has no attribute {name!r}")
        return getattr(self.latest, name)

    def __str__(self) -> str:
        return str(self.latest) if self.history else "nothing pruned yet"

    def __repr__(self) -> str:
        return f"<Trace of {len(self.history)} calls: {self}>"


_CALL_ATTRIBUTES = frozenset(
    {f.name for f in dataclasses.fields(Call)}
    | {n for n, v in vars(Call).items() if isinstance(v, property)}
    | {"to_dict"}
)


def readable(value: float, unit: str) -> str:
    """A number with a decimal prefix: 8.453e12, "FLOPs" -> "8.45 TFLOPs"."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:  # what three digits would round up to 1000 of the smaller unit
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
