"""Asks a method about pictures, those that are alike together, and checks what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foveate.choosing.images import TileTokens, Tokens
from foveate.choosing.signals import Sources, signals_of
from foveate.core import FoveateError, Method, Selection, Signals
from foveate.forms import Stepwise
from foveate.ops.device import Complaints, noting, read_together, taken
from foveate.ops.subsets import split_by_size
from foveate.spec import format as format_spec


@dataclass(frozen=True, eq=False)
class Answer:
    """What a method decided for one image; see Selection."""

    kept: Tensor  # on the host, as masks and groups are, unless they are read later
    features: Tensor | None
    extra: Tensor | None
    groups: Tensor | None
    encoded: bool  # the features are still to be projected
    ordered: bool
    scores: Tensor | None  # for those who look on; where the method left them


def _groups(images: Sequence[Tokens], keeps: Sequence[int | None]) -> list[list[int]]:
    """Numbers of the images that share original count, grid, tiles, budget and what each stage left: one Signals each.

    Images that parted at one stage stay apart, even where a later one leaves as many of both: they have other memories.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, (image, keep) in enumerate(zip(images, keeps, strict=True)):
        history = tuple(stage.after for stage in image.stages)
        tiles = image.tile is None, image.tiling
        key = (image.original, image.index.numel(), history, image.grid, tiles, image.untouched, keep)
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def budget_of(part: Method, image: Tokens, stage: int = 0) -> int | None:
    """The tokens that a stage is to leave of this image; None where the method decides.

    After an adaptive stage a budget is a ceiling: it is lowered to what that stage happened to leave. A tile of a
    picture has its part of the picture's.

    Raises:
        FoveateError: a picture's budget is too small for its tiles.
    """
    if part.adaptive or getattr(part, "keep", None) is None:
        return None
    if isinstance(image, TileTokens) and image.share is not None:
        count = _of_tile(part, image.share, stage)
    else:
        asked = part.asked(image.original, image.grid, max(1, len(image.tiling)))
        count = None if asked is None else asked[stage]
    return count if count is None or not image.adapted else min(count, image.index.numel())


def _of_tile(part: Method, share: tuple[int, tuple[int, ...]], stage: int) -> int | None:
    """The part of a picture's budget that falls to one of its tiles, in proportion to their tokens."""
    place, sizes = share
    asked = part.asked(sum(sizes), None, len(sizes))
    if asked is None:
        return None
    least = 1 + part.beside
    for count in asked:  # of all stages, before the first has acted
        if count < least * len(sizes):
            raise FoveateError(
                f"{format_spec(part)} asks for {count} tokens of a picture whose {len(sizes)} tiles keep {least} each "
                f"inside the encoder; the least is keep={least * len(sizes)}"
            )
    return _shares(asked[stage], sizes, least)[place]


@lru_cache(maxsize=1024)
def _shares(total: int, sizes: tuple[int, ...], least: int) -> tuple[int, ...]:
    """`split_by_size`, which every tile asks for, and a method that merges once for each block."""
    return tuple(split_by_size(total, sizes, least))


def ask(part: Method, images: Sequence[Tokens], sources: Sources) -> list[Answer]:
    """What a method decides for each image, those that are alike asked about together."""
    stage = 0 if sources.at is None or part.merging else sources.at.stage
    keeps = [budget_of(part, image, stage) for image in images]
    name, later = format_spec(part), sources.later
    complaints = Complaints() if later is None else later.complaints
    groups = _groups(images, keeps)
    shown = (
        signals_of(part, [images[number] for number in numbers], numbers, keeps[numbers[0]], sources)
        for numbers in groups
    )
    given = list(_select(part, name, shown, complaints))
    answers: dict[int, Answer] = {}
    originals = [images[numbers[0]].original for numbers in groups]
    if later is None:
        # Images of all sizes together: each size would wait for the device.
        counts, *read = read_together([complaints.counts(), *(selection.unread() for selection in given)])
        complaints.refuse(counts)
        checked = [
            one.checked(values, original, name) for one, values, original in zip(given, read, originals, strict=True)
        ]
    else:
        checked = [later.add(one, original, name) for one, original in zip(given, originals, strict=True)]
    for numbers, selection in zip(groups, checked, strict=True):
        for place, number in enumerate(numbers):
            features, extra, groups_ = (
                None if rows is None else rows[place]
                for rows in (selection.features, selection.extra, selection.groups)
            )
            encoded = selection.features is not None and selection.space == "encoded"
            scores = None if selection.scores is None else selection.scores[place].detach()
            kept, ordered = selection.indices[place], selection.ordered
            answers[number] = Answer(kept, features, extra, groups_, encoded, ordered, scores)
    return [answers[number] for number in range(len(images))]


def _select(part: Method, name: str, shown: Iterable[Signals], complaints: Complaints) -> Iterator[Selection]:
    """What a method answers to each, in so far as that can be checked without waiting for the device."""
    shown = (_complete(part, name, signals) for signals in shown)
    if isinstance(part, Stepwise) and type(part).select is Stepwise.select:
        # Each by itself would wait for the device.
        everything = list(shown)
        if everything:
            with _apart(everything[0], complaints):
                given = taken([part.steps(signals) for signals in everything])
            yield from (_formed(one, name, signals) for one, signals in zip(given, everything, strict=True))
        return
    for signals in shown:
        with _apart(signals, complaints):
            selection = part.select(signals)
        yield _formed(selection, name, signals)


@contextmanager
def _apart(signals: Signals, complaints: Complaints) -> Iterator[None]:
    """Where methods choose: what they refuse is noted, and no autocast of the caller's is at work, which is for models.

    Scores and greedy loops need the float32 that they ask for.
    """
    with torch.autocast(signals.index.device.type, enabled=False), noting(complaints):
        yield


def _complete(part: Method, name: str, signals: Signals) -> Signals:
    """The same, with all that the method reads."""
    # Between the stages of a part inside the encoder, what a later one reads has not run yet.
    lacking = [] if part.site == "tower" else signals.lacking(part.needs)
    if lacking:
        raise FoveateError(f"{name} reads {', '.join(lacking)}, which this call does not show; use another method")
    return signals


def _formed(selection: object, name: str, signals: Signals) -> Selection:
    """What a method answered, if it is a selection for so many images."""
    if not isinstance(selection, Selection):
        raise FoveateError(f"{name} answered with {type(selection).__name__} where a Selection is needed")
    selection.check_form(signals.shape[0], name)
    return selection
