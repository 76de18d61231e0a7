"""Builds the trace's record of one prefill: what each stage left and what the decoder has to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.core import Budget, Call, ImageRecord
from foveate.cost.flops import decode_flops, decoder_flops, kv_bytes, projector_flops, tower_flops
from foveate.cost.shapes import ModelShape
from foveate.runtime.choose import Image


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
    images: Sequence[Image],
    *,
    index: Tensor,
    prompt_length: int,
    text: Sequence[int],
    past: Sequence[int],
    past_entries: int,
    repeats: int,
    stopwatch: Callable[[], float],
) -> Call:
    """The record of one call.

    Args:
        index: (B, S') original position of each shortened one.
        prompt_length: columns of the caller's prompt.
        text: (B,) tokens of each row's new part that are neither visual nor padding.
        past: (B,) valid entries that each row's cache held before; `past_entries` with padding.
        repeats: beams or samples per row, each with a cache of its own.
    """
    config = model.config
    shape = ModelShape.from_config(config)
    layers = shape.decoder.layers
    width = model.dtype.itemsize
    length = past_entries + index.shape[1]
    full = past_entries + prompt_length
    kv_lengths = _kv_lengths(config, layers, length)
    batch = index.shape[0] * repeats

    def budget(count: Callable[[Image], int], lengths: Sequence[int]) -> Budget:
        visual = [sum(count(image) for image in images if image.row == row) for row in range(len(text))]
        flops = tower_flops(shape.tower, convention="roofline", tiles=len(images))
        flops += projector_flops(shape.projector, tokens=sum(image.original for image in images))
        for row, words in enumerate(text):
            flops += _row_flops(shape, visual[row] + words, past[row])
        mean = sum(visual) / max(1, len(images))
        return Budget((mean,) * layers, float(flops), kv_bytes(shape.decoder, lengths, width, batch))

    records = tuple(ImageRecord(image.row, image.original, image.grid, tuple(image.stages)) for image in images)
    return Call(
        images=records,
        prompt_length=prompt_length,
        length=index.shape[1],
        text=sum(text) / max(1, len(text)),
        index=index.detach().cpu(),
        budget=budget(lambda image: image.index.numel(), kv_lengths),
        unpruned=budget(lambda image: image.original, _kv_lengths(config, layers, full)),
        kv_lengths=kv_lengths,
        stopwatch=stopwatch,
    )


def _row_flops(shape: ModelShape, new: int, past: int) -> int:
    if past:
        layers = shape.decoder.layers
        return decode_flops(shape, visual=(0,) * layers, text=past, convention="roofline", steps=new)
    return decoder_flops(shape.decoder, lengths=(max(1, new),) * shape.decoder.layers, convention="roofline")


def _kv_lengths(config: Any, layers: int, length: int) -> tuple[int, ...]:
    """Entries that each layer's cache holds: a sliding window keeps the last window - 1."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    window = getattr(text, "sliding_window", None)
    return tuple(min(length, window - 1) if window and kind == "sliding_attention" else length for kind in kinds)
