"""Encoders by hand in the references, and families whose projector needs every patch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from references import reference
from references.encoder_by_hand import of_record
from torch import Tensor

from foveate import families
from foveate.trace import Call, ImageRecord

# ---------------------------------------------------------------------------------------------------------------------
# the encoder by hand


@pytest.fixture
def encoder_by_hand(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the references read pictures that an encoder run by hand has encoded with the traced choices."""
    stock = reference.encode
    known: dict[bytes, tuple[ImageRecord, Sequence[int]]] = {}

    def encode(model: Any, pixel_values: Tensor | None) -> list[Tensor]:
        found = stock(model, pixel_values)
        for number, full in enumerate(found):
            assert pixel_values is not None
            image, depths = known[pixel_values[number].numpy().tobytes()]
            seen = of_record(model, image, pixel_values[number], depths)
            found[number] = torch.full_like(full, 1e3).index_copy(0, seen.index, seen.read)
        return found

    def learn(given: dict[str, Tensor], call: Call, *depths: int) -> None:
        for image, pixels in zip(call.images, given["pixel_values"], strict=True):
            known[pixels.numpy().tobytes()] = (image, depths)

    monkeypatch.setattr(reference, "encode", encode)
    return learn


# ---------------------------------------------------------------------------------------------------------------------
# projectors that are not pointwise


@pytest.fixture
def gridded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family as if its projector needed every patch at its place."""
    rows = tuple(dataclasses.replace(family, pointwise=False) for family in families.FAMILIES)
    monkeypatch.setattr(families, "FAMILIES", rows)
