"""Original positions in an engine that counts on: what is known when a prompt arrives, and what the encoder adds.

A kept token must stand at the position that it has in the unpruned picture, which is known only once the encoder has
run. Until then its column holds where its picture begins, as -1 - begin; each embedding brings its own place in the
picture as channels behind its features. Rewriting a column twice changes nothing, so prompts may come in chunks.

Shapes: L tokens of a pruned prompt, A = 3 axes (a decoder that counts on one uses the first), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AXES = 3
CHANNELS = 2 * (AXES + 1)
"""Bytes behind each embedding: a position on each axis and what its picture takes of them, two bytes each.

A byte is exact in every type that embeddings have, bfloat16 among them."""
MOST = 2**16 - 1
"""The largest position within a picture."""


@dataclass(frozen=True, eq=False)
class Span:
    """One picture in a prompt.

    Attributes:
        offset: its first column of the pruned prompt.
        sources: (P,) which of the R tokens of the unpruned one each of its columns is, -1 in slots.
        length: R.
    """

    offset: int
    sources: Tensor
    length: int


def with_places(features: Tensor, places: Tensor, extent: int) -> Tensor:
    """(K, D) embeddings with their places (A, K) within a picture that takes `extent` positions: (K, D + CHANNELS)."""
    numbers = torch.cat([places, places.new_full((1, places.shape[1]), extent)])
    shown = torch.stack([numbers // 256, numbers % 256], dim=1).flatten(0, 1).T
    return torch.cat([features, shown.to(features)], dim=1)


def split_places(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """What `with_places` joined: (K, D), and (A + 1, K) places and extent."""
    shown = embeddings[:, -CHANNELS:].float().round().long().T.unflatten(0, (AXES + 1, 2))
    return embeddings[:, :-CHANNELS], shown[:, 0] * 256 + shown[:, 1]


def columns_of(length: int, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """Of a pruned prompt of `length` tokens, the unpruned column of each token, and which are slots.

    A slot has the unpruned column in which its picture begins.
    """
    columns = torch.empty(length, dtype=torch.int64)
    slots = torch.zeros(length, dtype=torch.bool)
    at = moved = 0  # columns done, and how far the unpruned prompt is ahead
    for span in spans:
        end = span.offset + span.sources.numel()
        columns[at : span.offset] = torch.arange(at, span.offset) + moved
        start = span.offset + moved
        columns[span.offset : end] = start + span.sources.clamp(min=0)
        slots[span.offset : end] = span.sources < 0
        at, moved = end, moved + span.length - span.sources.numel()
    columns[at:] = torch.arange(at, length) + moved
    return columns, slots


def waiting(unpruned: Tensor, after: int, columns: Tensor, slots: Tensor) -> Tensor:
    """(A, L + 1) positions of a pruned prompt whose slots wait for the encoder; the last column is what follows it.

    Args:
        unpruned: (A, S) positions of the unpruned prompt.
        after: position of the token behind it.
        columns, slots: as `columns_of` gives them.
    """
    positions = unpruned[:, columns]
    positions = torch.where(slots, -1 - positions, positions)
    return torch.cat([positions, positions.new_full((positions.shape[0], 1), after)], dim=1)


def settled(
    positions: Tensor, embeddings: Sequence[Tensor], slots: Tensor, length: int
) -> tuple[list[Tensor], Tensor, int]:
    """The embeddings of a chunk without their places, the positions with these written, and what decoding adds.

    Args:
        positions: (A, L + 1) as `waiting` made them, or (A, L) where an engine stores no more than the prompt.
        slots: columns of those embeddings.
        length: L.
    """
    found, extent = [], None
    if embeddings:
        split = [split_places(one) for one in embeddings]
        found = [features for features, _ in split]
        places = torch.cat([place for _, place in split], dim=1).to(positions.device)
        before = positions[:, slots]
        begins = -1 - before
        positions = positions.clone()
        positions[:, slots] = torch.where(before < 0, begins + places[:-1], before)
        if int(slots[-1]) == length - 1 and int(before[0, -1]) < 0:
            extent = int(begins[0, -1] + places[-1, -1])
    if positions.shape[1] > length:
        after = int(positions[0, -1])
    else:
        # The last token of a text is the farthest; a picture's is not, but then this chunk has just brought it.
        after = int(positions[:, length - 1].max()) + 1 if extent is None else extent
    return found, positions, after - length
