"""Rows to train the tiny model on, and rows that fail on the way, as a kill or a power cut would."""

from __future__ import annotations

import time
from typing import Any

import torch
from models import tiny

from foveate.train.conversations import Extent, Row
from foveate.train.losses import IGNORED


class Few:
    """A few rows of random words about random pictures; the last word is the answer."""

    def __init__(self, count: int = 40, seed: int = 0, pause: float = 0.0) -> None:
        self.count, self.seed, self.pause = count, seed, pause

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "few", "count": self.count, "seed": self.seed}

    def extent(self) -> Extent:
        return Extent(visual=tiny.TOKENS, text=12)

    def __getitem__(self, number: int) -> Row:
        time.sleep(self.pause)
        given = tiny.inputs(tiny.model(), f"2i{3 + number % 3}", seed=self.seed * 1000 + number)
        ids = given["input_ids"][0]
        labels = torch.full_like(ids, IGNORED)
        labels[-1] = ids[-1]
        return Row(ids, labels, {"pixel_values": given["pixel_values"]})


class Killed(Exception):
    """Stands for the power that fails."""


class Dying(Few):
    """Rows of which only so many can be read."""

    def __init__(self, most: int, count: int = 40) -> None:
        super().__init__(count)
        self.left = most

    def __getitem__(self, number: int) -> Row:
        self.left -= 1
        if self.left < 0:
            raise Killed
        return super().__getitem__(number)
