"""Compares what a pruned model gave with the reference, row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from models import tiny, tiny_calls
from references import family_reference, reference
from torch import Tensor

from foveate.core import Method
from foveate.trace import Call, ImageRecord

TOLERANCE = 1e-4  # of logits that are 5 to 10 apart where a mistake is made


def prompts(
    model: Any,
    given: dict[str, Tensor],
    *calls: Call,
    merged: Sequence[Sequence[Tensor] | None] | None = None,
    renumber: bool = False,
    prefix: Sequence[int] | None = None,
) -> list[reference.Prompt]:
    """The reference's shortened rows, given what each call kept of their pictures.

    Args:
        given: ids, mask and pictures of the whole sequence, pictures in the order of the rows.
        calls: the prefills that brought the pictures, in order.
        merged: for each call, tensors that stand in for the kept tokens of each picture.
        renumber: count positions anew.
        prefix: tokens of each row's first turn, where they all see each other; None for all.
    """
    made = []
    for row in range(given["input_ids"].shape[0]):
        one = tiny.alone(given, row, model.config.image_token_id)
        ids = one["input_ids"][0]
        mine = [
            (turn, number)
            for turn, call in enumerate(calls)
            for number, image in enumerate(call.images)
            if image.row == row
        ]
        images = [calls[turn].images[number] for turn, number in mine]
        stand_in = None
        if merged is not None:
            stand_in = [None if (of_turn := merged[turn]) is None else of_turn[number] for turn, number in mine]
        if isinstance(one, tiny_calls.Call):
            first = None if prefix is None else prefix[row]
            made.append(_of_family(model, one, images, stand_in, renumber, first))
            continue
        made.append(
            reference.shorten(
                model,
                ids,
                one.get("pixel_values"),
                [_kept_before_the_decoder(image) for image in images],
                stand_in,
                drops=_drops(_columns(ids == model.config.image_token_id, images), ids.numel(), images),
                renumber=renumber,
            )
        )
    return made


def _of_family(
    model: Any,
    given: tiny_calls.Call,
    images: Sequence[ImageRecord],
    stand_in: Sequence[Tensor | None] | None,
    renumber: bool,
    prefix: int | None,
) -> reference.Prompt:
    """One row of a family beside LLaVA-1.5."""
    ids, seen = given["input_ids"][0], family_reference.pictures(model, given)
    return family_reference.shorten(
        model,
        given,
        seen,
        [_kept_before_the_decoder(image) for image in images],
        stand_in,
        extra=[_extra_before_the_decoder(image) for image in images],
        drops=_drops(family_reference.visual_columns(ids, seen), ids.numel(), images),
        renumber=renumber,
        prefix=prefix,
    )


def _kept_before_the_decoder(image: ImageRecord) -> Tensor:
    before = [stage for stage in image.stages if stage.layer is None]
    return before[-1].kept if before else torch.arange(image.original)


def _extra_before_the_decoder(image: ImageRecord) -> Tensor | None:
    before = [stage for stage in image.stages if stage.layer is None]
    return before[-1].extra if before else None


def _columns(visual: Tensor, images: Sequence[ImageRecord]) -> list[Tensor]:
    """Of each picture, the columns of its tokens. `visual`: (S,) bool, the placeholders of the row."""
    return list(visual.nonzero().squeeze(-1).split([image.original for image in images]))


def _drops(visual: Sequence[Tensor], length: int, images: Sequence[ImageRecord]) -> list[reference.Drop]:
    """What leaves inside the decoder. `visual`: of each picture, the columns of its visual tokens."""
    other = torch.ones(length, dtype=torch.bool)
    for columns in visual:
        other[columns] = False
    text = other.nonzero().squeeze(-1)
    stay: dict[int, list[Tensor]] = {}
    for columns, image in zip(visual, images, strict=True):
        for stage in image.stages:
            if stage.layer is not None:
                stay.setdefault(stage.layer, [text]).append(columns[stage.kept])
    return [reference.Drop(depth, torch.cat(columns)) for depth, columns in sorted(stay.items())]


def worst(model: Any, rows: Sequence[reference.Prompt], result: Any, steps: int) -> float:
    """Largest difference between the logits of a greedy or sampled answer and the reference's."""
    logits = torch.stack(result.logits, dim=1)
    assert logits.shape[1] == steps
    found = [
        (reference.answer_logits(model, prompt, result.sequences[row, -steps:]) - logits[row]).abs().max()
        for row, prompt in enumerate(rows)
    ]
    return float(torch.stack(found).max())


def in_columns(rows: Tensor, columns: Tensor, length: int) -> Tensor:
    """What is left of a row (n, D), of these `columns`, in all of its columns (length, D).

    In each column stands what the last token up to it gave, and zero where there is none.
    """
    found = rows.new_zeros(length, rows.shape[-1])
    for column in range(length):
        before = (columns <= column).nonzero().squeeze(-1)
        if before.numel():
            found[column] = rows[before[-1]]
    return found


@torch.no_grad()
def direct(model: Any, prompt: reference.Prompt, length: int) -> tuple[Tensor, list[Tensor]]:
    """Logits (length, V) and hidden states (length, D) of a direct call on a row of so many tokens, in its columns."""
    states: list[tuple[Tensor, Tensor]] = []
    nothing = prompt.embeddings[:0]
    logits, columns = reference.decode(model, prompt, nothing, torch.empty(0, dtype=torch.int64), states)
    return in_columns(logits, columns, length), [in_columns(*state, length) for state in states]


def keeping_all(method: Method) -> Method | None:
    """The method with a budget of everything; None for one that decides its own count."""
    keep = getattr(method, "keep", None)
    if keep is None:
        return None
    return dataclasses.replace(method, keep=tuple(1.0 for _ in keep) if isinstance(keep, tuple) else 1.0)  # type: ignore[call-arg]
