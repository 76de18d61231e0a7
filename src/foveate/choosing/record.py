"""Builds the trace's record of one prefill: what each stage left and what the decoder has to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.choosing.images import Image
from foveate.choosing.timeline import Timeline
from foveate.cost.flops import decode_flops, decoder_flops, kv_bytes, projector_flops, tower_flops
from foveate.families.shapes import ModelShape
from foveate.trace import Budget, Call, ImageRecord


class Stopwatch:
    """Times one span of work: device events where there is a device to time, else the clock."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self._start = 0.0
        self._milliseconds: float | None = None

    def __enter__(self) -> Stopwatch:
        if self._events:
            self._events[0].record()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._events:
            self._events[1].record()
        else:
            self._milliseconds = (time.perf_counter() - self._start) * 1e3

    def __call__(self) -> float:
        """Milliseconds; on a device this waits until the work is done."""
        if self._milliseconds is None and self._events:
            self._events[1].synchronize()
            self._milliseconds = self._events[0].elapsed_time(self._events[1])
        return self._milliseconds or 0.0


def record(
    model: Any,
    shape: ModelShape,
    images: Sequence[Image],
    *,
    index: Tensor,
    prompt_length: int,
    text: Sequence[int],
    past: Sequence[int],
    timeline: Timeline,
    past_entries: int,
    repeats: int,
    proportional: bool,
    stopwatches: Sequence[Callable[[], float]],
    notes: Sequence[str] = (),
) -> Call:
    """The record of one call, as far as its stages have come.

    Args:
        shape: the model's, read from its configuration once.
        index: (B, S') original position of each shortened one.
        prompt_length: columns of the caller's prompt.
        text: (B,) tokens of each row's new part that are neither visual nor padding.
        past: (B,) valid entries that each row's cache held before; `past_entries` with padding.
        timeline: what the cache holds after the prefill.
        repeats: beams or samples per row, each with a cache of its own.
        proportional: grids have their pictures' own proportions.
        notes: what else there is to say of it.
    """
    layers, width = shape.decoder.layers, model.dtype.itemsize
    length = past_entries + index.shape[1]
    kv_lengths = _kv_lengths(model.config, [timeline.holds(layer, length) for layer in range(layers)])

    def budget(counts: Sequence[Sequence[int]], lengths: Sequence[int], towards: int) -> Budget:
        held = kv_bytes(shape.decoder, lengths, width, index.shape[0] * repeats)
        return _budget(shape, images, counts, text, past, towards, held)

    return Call(
        images=tuple(_image(image, proportional) for image in images),
        prompt_length=prompt_length,
        length=index.shape[1],
        text=sum(text) / max(1, len(text)),
        index=index.detach().cpu(),
        budget=budget(
            [_per_layer(image, layers) for image in images], kv_lengths, _before_decoder(shape, images, True)
        ),
        unpruned=budget(
            [[image.original] * layers for image in images],
            _kv_lengths(model.config, [past_entries + prompt_length] * layers),
            _before_decoder(shape, images, False),
        ),
        kv_lengths=kv_lengths,
        stopwatch=lambda: sum(stopwatch() for stopwatch in stopwatches),
        notes=tuple(notes),
    )


def _image(image: Image, proportional: bool) -> ImageRecord:
    return ImageRecord(image.row, image.original, image.grid, image.stages, proportional)


def _budget(
    shape: ModelShape,
    images: Sequence[Image],
    counts: Sequence[Sequence[int]],
    text: Sequence[int],
    past: Sequence[int],
    towards: int,
    held: int,
) -> Budget:
    """What a prefill costs.

    Args:
        counts: of each image, the tokens that each layer sees.
        towards: operations before the decoder.
        held: bytes of keys and values.
    """
    flops, none = towards, [0] * shape.decoder.layers
    for row, words in enumerate(text):
        mine = [count for image, count in zip(images, counts, strict=True) if image.row == row]
        flops += _row_flops(shape, [words + sum(seen) for seen in zip(*mine, none, strict=True)], past[row])
    tokens = tuple(sum(seen) / len(images) for seen in zip(*counts, strict=True))
    return Budget(tokens, float(flops), held)


def _before_decoder(shape: ModelShape, images: Sequence[Image], pruned: bool) -> int:
    """Operations of encoder and projector on all images, with or without what left inside the encoder, and of the
    modules by which methods chose."""
    flops = sum(stage.flops for image in images for stage in image.stages) if pruned else 0
    for image in images:
        tiles = [None] if image.patches is None else list(image.patches)
        encoded = image.encoded if pruned and image.encoded is not None else [None] * len(tiles)
        for patches, blocks in zip(tiles, encoded, strict=True):
            lengths = None if blocks is None else [length + shape.tower.cls for length in blocks]
            flops += tower_flops(shape.tower, convention="roofline", lengths=lengths, patches=patches)
        if image.patches is not None:
            tokens = sum(image.patches) // shape.projector.merge
        elif pruned and image.projected is not None:
            tokens = image.projected
        else:
            tokens = image.original
        flops += projector_flops(shape.projector, tokens=tokens)
    return flops


def _per_layer(image: Image, layers: int) -> list[int]:
    """Tokens of an image that each decoder layer sees, as far as its stages have come."""
    seen = [image.original] * layers
    for stage in image.stages:
        first = stage.layer or 0
        seen[first:] = [stage.after] * (layers - first)
    return seen


def _row_flops(shape: ModelShape, lengths: Sequence[int], past: int) -> int:
    if past:
        # Each new token attends to what the cache holds and to the new ones before it, like a decoding step.
        steps = decode_flops(shape, visual=(0,) * len(lengths), text=past, convention="roofline", steps=max(lengths))
        return round(steps * sum(lengths) / (max(lengths) * len(lengths)))
    return decoder_flops(shape.decoder, lengths=[max(1, length) for length in lengths], convention="roofline")


def _kv_lengths(config: Any, held: Sequence[int]) -> tuple[int, ...]:
    """Entries that each layer's cache keeps of those it was given: a sliding window keeps the last window - 1."""
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * len(held)
    return tuple(
        min(length, window - 1) if window and kind == "sliding_attention" else length
        for length, kind in zip(held, kinds, strict=True)
    )
