"""Questions about scenes as training rows: a pool of pictures whose visual tokens the frozen tower computes once."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from foveate.core import FoveateError
from foveate.families import family_of
from foveate.scenes import generator, mini, packing, questions
from foveate.train.conversations import Extent, Row, expand, extent_of, tokens

POOL = 4096
EVEN = {"count": (0.75, 0.35), "describe": (0.4, 0.1)}
"""How much of an ample and of a tight budget is best spread evenly for a kind of question; of others nothing.

Measured: with all objects' tokens for the rest, `mini` answers most questions right so."""

_CHUNK = 32  # pictures drawn and encoded at once


class SceneQuestions(Dataset[Row]):
    """One question about one picture for each number.

    Rows know what they ask about: the patches of that object, and those of the others, which distract; all objects for
    a description. They say nothing of a count, for which all objects first leaves fewer right than a random choice, nor
    of what is not there; and they know how much of a budget is best spread evenly (`EVEN`). Only training with
    `hint_weight` or `even_weight` looks at that.

    Args:
        base: the frozen model, whose tower and projector make the visual tokens; it must see 336 x 336 pixels.
        processor: its processor.
        samples: how many rows there are.
        pool: different pictures among them; each is drawn and encoded when it is first needed, and kept.
        seed: of pictures and questions.
        mix: how often each kind of question is asked.
        split: of the pictures; "test" for rows that are never trained on.
        pixels: rows hold the pictures themselves, for what acts inside the encoder.
    """

    def __init__(
        self,
        base: Any,
        processor: Any,
        samples: int,
        *,
        pool: int = POOL,
        seed: int = 0,
        mix: Mapping[str, float] = packing.MIX,
        split: generator.Split = "train",
        pixels: bool = False,
    ) -> None:
        for name, value in (("samples", samples), ("pool", pool)):
            if value < 1:
                raise FoveateError(f"{name}={value} is below 1; the smallest is {name}=1")
        family, side = family_of(base), getattr(base.config.vision_config, "image_size", None)
        if not family.fixed or not family.pointwise:
            raise FoveateError(
                f"scenes are one tile of {generator.SIZE} x {generator.SIZE} pixels, which {family.name} does not take "
                "as it is; give --data and --images"
            )
        if side != generator.SIZE:
            raise FoveateError(f"scenes are {generator.SIZE} x {generator.SIZE} pixels, the model sees {side} x {side}")
        self.base, self.processor, self.samples = base, processor, samples
        self.pool, self.seed, self.mix, self.split = min(pool, samples), seed, dict(mix), split
        self.pixels = pixels
        self.image_token = family.image_token_id(base.config)
        self._chunks: dict[int, tuple[generator.Scenes, Tensor | None]] = {}

    def __len__(self) -> int:
        return self.samples

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        told = {"samples": self.samples, "pool": self.pool, "seed": self.seed, "mix": self.mix, "split": self.split}
        return {"kind": "scenes", **told}

    def extent(self) -> Extent:
        """The longest row to be expected: questions are of much the same length."""
        return extent_of((self[number] for number in range(min(_CHUNK, len(self)))), self.image_token)

    def __getitem__(self, number: int) -> Row:
        chunk, row = divmod(number % self.pool, _CHUNK)
        scenes, features = self._chunk(chunk)
        draw = random.Random(f"{self.seed} {number}")
        asked = packing.choose(questions.questions(scenes, row, draw), 10**6, draw, self.mix)[0]
        ids, labels = tokens(self.processor, ((asked.text, asked.answer),))
        boxes = scenes.patches()[row]
        ids, labels = expand(ids, labels, self.image_token, boxes.shape[1])
        wanted = torch.zeros(boxes.shape[1], dtype=torch.int8)
        if asked.target is not None:
            wanted[boxes.any(dim=0)] = -1
            wanted[boxes[asked.target]] = 1
        elif asked.kind in ("count", "describe"):
            wanted[boxes.any(dim=0)] = 1
        even, kind = torch.tensor([EVEN.get(asked.kind, (0.0, 0.0))]), asked.kind
        told: dict[str, Any] = {"wanted": wanted[None], "even": even, "kind": kind}
        if features is None:
            return Row(ids, labels, {"pixel_values": mini.normalise(scenes.pixels[row : row + 1])}, **told)
        return Row(ids, labels, features=features[row : row + 1], **told)

    def _chunk(self, number: int) -> tuple[generator.Scenes, Tensor | None]:
        """Scenes without their pixels, and their visual tokens (pictures, N, D); or with them, and None."""
        if number not in self._chunks:
            scenes = generator.generate(_CHUNK, seed=(self.seed * 1_000_003 + number) % 2**31, split=self.split)
            if self.pixels:
                self._chunks[number] = scenes, None
                return self._chunks[number]
            pixels = mini.normalise(scenes.pixels).to(self.base.device, self.base.dtype)
            with torch.no_grad():
                features = torch.stack(list(self.base.get_image_features(pixels, return_dict=True).pooler_output))
            self._chunks[number] = (replace(scenes, pixels=scenes.pixels[:, :, :0, :0]), features.cpu())
        return self._chunks[number]
