"""Stages inside the decoder, and second turns, for the tests of several files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from models import doubles
from models.conversations import (
    RaggedInside,
)

from foveate import FastV, FoPru, PyramidDrop, SparseVLM
from foveate.core import Method, Site


@dataclass(frozen=True)
class Fixed(doubles.Fixed):
    """Fixed: keeps the indices it is told, after two blocks."""

    site: ClassVar[Site] = "layer"

    def depths(self, layers: int) -> tuple[int, ...]:
        return (2,)


METHODS: dict[str, list[Method]] = {
    "fastv": [FastV(layer=1, keep=0.25)],
    "pyramiddrop": [PyramidDrop(layers=(1, 2, 3), keep=(0.5, 0.25, 0.125))],
    "sparsevlm": [SparseVLM(layers=(1, 3), keep=(0.5, 0.2))],
    "sparsevlm recycling": [SparseVLM(layers=(1, 2), keep=(0.5, 0.25), recycle=True)],
    "fopru+fastv": [FoPru(keep=0.5), FastV(layer=2, keep=0.25)],
    "fastv+pyramiddrop": [FastV(layer=1, keep=0.6), PyramidDrop(layers=(2, 3), keep=(0.3, 0.2))],
    "ragged": [RaggedInside(layer=2)],
    "ragged+pyramiddrop": [doubles.Ragged(), PyramidDrop(layers=(1, 3), keep=(0.2, 0.1))],
    "ragged+sparsevlm": [doubles.Ragged(), SparseVLM(layers=(1, 2, 3), keep=(9, 4, 2))],
    "one depth": [FastV(layer=2, keep=0.5), FastV(layer=2, keep=0.2)],
    "one depth, two readers": [FastV(layer=2, keep=0.5), SparseVLM(layers=(2, 3), keep=(0.3, 0.2))],
}
MAIN = ("fastv", "pyramiddrop", "sparsevlm recycling", "fopru+fastv", "ragged")
SLIDING = ("mistral-sliding", "qwen2-mixed")
SECOND_TURNS = {"text only": ("5", "3", "4"), "a new picture": ("5", "1i3", "2i1")}
