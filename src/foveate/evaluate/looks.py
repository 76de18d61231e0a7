"""What each rival keeps of a few pictures, stage by stage, and what it makes of their tokens: to be looked at."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from foveate.core import Method
from foveate.inference.answers import decode, encode, greedy
from foveate.inference.pictures import on_white, visible
from foveate.inference.resizing import scalers_of
from foveate.prune import prune

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from foveate.inference.resizing import Scaler
    from foveate.trace import ImageRecord, StageRecord, Trace

LONGEST_SIDE = 448
"""Pixels of a picture that is written down; a larger one is made smaller."""


@dataclass(frozen=True)
class Shown:
    """A question about one picture, and what is right; one that is timed alone may be about a video."""

    image: Any
    question: str
    answer: str


def looks(
    model: Any,
    processor: Any,
    shown: Sequence[Shown],
    rivals: Mapping[str, Sequence[Method]],
    *,
    max_new_tokens: int,
    clip: Any = None,
) -> list[dict[str, Any]]:
    """What every rival keeps of every picture, of values that JSON can hold.

    A picture is written down as the model sees it, PNG in base64. Of each rival there is its `answer` and its `stages`;
    of a stage `method`, `site`, `layer`, `before`, `after`, `kept` (raster numbers of the tokens that stay, those that
    stand at no patch left out), and of one that rates tokens `scores`, by raster number, null where none is left.
    A rival that scales the picture has no stages; `scaled` says its `size`, and tokens `before` and `after`.
    `grid` is the raster's height and width; it is null where tokens form none, and then nothing is kept of them.

    Args:
        rivals: stages by spec; one without stages is the unpruned model.
        clip: as `prune` takes it.

    Raises:
        FoveateError: a method cannot run on this model.
    """
    scalers = scalers_of(model, processor, rivals)
    handles = {
        spec: prune(model, [*stages], processor=processor, clip=clip) if stages and spec not in scalers else None
        for spec, stages in rivals.items()
    }
    found = []
    for one in shown:
        whole = encode(model, processor, [[one.image]], [one.question])
        seen: dict[str, dict[str, Any]] = {}
        grid = None
        for spec, handle in handles.items():
            small = scalers.get(spec)
            inputs = whole if small is None else small.encode([[one.image]], [one.question])
            length = inputs["input_ids"].shape[1]
            with handle or nullcontext() as trace:
                output = greedy(model, inputs, max_new_tokens=max_new_tokens)
            stages, raster = ([], None) if trace is None else _stages(trace)
            grid = grid or raster
            seen[spec] = {"answer": decode(processor, model, output, length)[0], "stages": stages}
            if small is not None:
                seen[spec]["scaled"] = _scaled(small, one.image.size)
        png = _png(visible(on_white(one.image), processor.image_processor))
        head = {"question": one.question, "right": one.answer, "png": png, "grid": grid}
        found.append({**head, "rivals": seen})
    return found


def _scaled(scaler: Scaler, whole: tuple[int, int]) -> dict[str, Any]:
    size = scaler.size(whole)
    return {"size": [*size], "before": scaler.tokens(whole), "after": scaler.tokens(size)}


def _stages(trace: Trace) -> tuple[list[dict[str, Any]], list[int] | None]:
    """The stages of the only picture of a call, and its raster."""
    (record,) = trace.images
    grid = None if record.grid is None else [*record.grid]
    found, there = [], torch.arange(record.original)
    for stage in record.stages:
        drawn = stage.kept if stage.extra is None else stage.kept[~stage.extra]
        found.append(
            {
                "method": stage.method,
                "site": stage.site,
                "layer": stage.layer,
                "before": stage.before,
                "after": stage.after,
                "kept": drawn.tolist() if grid else [],
                "scores": _scores(stage, there, record) if grid else None,
            }
        )
        there = stage.kept
    return found, grid


def _scores(stage: StageRecord, there: Tensor, record: ImageRecord) -> list[float | None] | None:
    """What a stage made of the tokens that were there, at their places in the raster."""
    if stage.scores is None or stage.scores.numel() != there.numel():
        return None
    placed: list[float | None] = [None] * record.original
    for number, score in zip(there.tolist(), stage.scores.float().tolist(), strict=True):
        placed[number] = float(f"{score:.4g}") if math.isfinite(score) else None
    return placed


def _png(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    file = io.BytesIO()
    small.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
