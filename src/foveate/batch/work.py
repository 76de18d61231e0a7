"""Rows to answers: sorted by length within a window, asked in batches, each row's fault in its own answer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from foveate.batch.rows import Picture, Row
from foveate.core import FoveateError, Method
from foveate.inference.answers import decode, encode, greedy
from foveate.inference.loading import Loaded
from foveate.inference.pictures import load_image, picture_of
from foveate.prune import prune
from foveate.trace import Trace

WINDOW = 16
"""Batches whose rows are sorted together, so that rows of one length meet."""

Answer = dict[str, Any]


def answers(
    loaded: Loaded,
    rows: Iterable[Row],
    stages: Sequence[Method],
    *,
    folder: Path,
    batch: int,
    max_new_tokens: int,
    clip: str | None = None,
) -> Iterator[list[Answer]]:
    """The answers to rows, a batch at a time, in an order of their own.

    Args:
        stages: what pictures are pruned by; none for unpruned answers.
        folder: where relative paths of pictures begin.
        batch: rows that are asked together.
        max_new_tokens: of an answer.

    Yields:
        For each row {id, answer, tokens: {before, after}, ms}, or {id, error}; `ms` is its share of its batch.
    """
    model, processor = loaded.model, loaded.processor
    handle = prune(model, stages, processor=processor, clip=clip) if stages else nullcontext()
    with handle as trace:
        asking = _Asking(loaded, trace, folder, max_new_tokens)
        for window in _windows(rows, batch * WINDOW):
            faulty = [row for row in window if row.fault is not None]
            if faulty:
                yield [{"id": row.id, "error": row.fault} for row in faulty]
            sound = sorted((row for row in window if row.fault is None), key=_length)
            for start in range(0, len(sound), batch):
                yield asking.ask(sound[start : start + batch])


def _windows(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    window: list[Row] = []
    for row in rows:
        window.append(row)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def _length(row: Row) -> tuple[int, int]:
    """What padding depends on: pictures first, then words."""
    return len(row.pictures), len(row.question)


def open_picture(picture: Picture, folder: Path) -> Any:
    """A picture of a row; relative paths begin in `folder`.

    Raises:
        FoveateError: it cannot be read.
    """
    if isinstance(picture, bytes):
        return picture_of(picture, "the picture")
    return load_image(folder / picture)


class _Asking:
    """A model that is asked batches, which it halves where they fail."""

    def __init__(self, loaded: Loaded, trace: Trace | None, folder: Path, max_new_tokens: int) -> None:
        self.loaded, self.trace, self.folder, self.longest = loaded, trace, folder, max_new_tokens

    def ask(self, rows: Sequence[Row]) -> list[Answer]:
        """The answers to one batch."""
        made: list[Answer] = []
        readable, pictures = [], []
        for row in rows:
            try:
                pictures.append([open_picture(picture, self.folder) for picture in row.pictures])
                readable.append(row)
            except FoveateError as error:
                made.append({"id": row.id, "error": str(error)})
        return made + self._answered(readable, pictures)

    def _answered(self, rows: list[Row], pictures: list[list[Any]]) -> list[Answer]:
        if not rows:
            return []
        try:
            return self._together(rows, pictures)
        # One row that is refused, or too much memory at once, is no fault of the others.
        except (FoveateError, torch.OutOfMemoryError) as error:
            if len(rows) == 1:
                return [{"id": rows[0].id, "error": str(error)}]
            half = len(rows) // 2
            return self._answered(rows[:half], pictures[:half]) + self._answered(rows[half:], pictures[half:])

    def _together(self, rows: list[Row], pictures: list[list[Any]]) -> list[Answer]:
        model, processor = self.loaded.model, self.loaded.processor
        start = time.perf_counter()
        inputs = encode(model, processor, pictures, [row.question for row in rows])
        output = greedy(model, inputs, max_new_tokens=self.longest)
        texts = decode(processor, model, output, inputs["input_ids"].shape[1])
        spent = round((time.perf_counter() - start) * 1e3 / len(rows), 2)
        tokens = self._tokens(len(rows))
        return [
            {"id": row.id, "answer": text, **({"tokens": count} if count else {}), "ms": spent}
            for row, text, count in zip(rows, texts, tokens, strict=True)
        ]

    def _tokens(self, count: int) -> list[dict[str, int] | None]:
        """Visual tokens of each row before and after the last stage; None where nothing was pruned."""
        if self.trace is None:
            return [None] * count
        tokens = [{"before": 0, "after": 0} for _ in range(count)]
        for image in self.trace.latest.images:
            tokens[image.row]["before"] += image.original
            tokens[image.row]["after"] += image.after
        return list(tokens)
