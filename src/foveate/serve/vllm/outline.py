"""What of a model its configuration alone tells: the row of its family, and how its pictures lie in a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING

from foveate.serve.vllm.rooms import FAMILIES, Encoded, Family, FoveateError, Layout, check_version

ENGINE = "vLLM"


class Outline:
    """A model without weights: enough to say which tokens a picture has, in every process of an engine.

    Attributes:
        config: of the whole model.
        family: its row.
        tower: the description of its encoder.
        model, encoder: with configurations and nothing else.

    Raises:
        FoveateError: no row of the families describes the model.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.family = family_of(config)
        self.tower = self.family.described(config.vision_config.model_type)
        if self.family.check is not None:
            self.family.check(config, self.tower)
        # Layouts ask the model for its own packing of tiles, which reads nothing but the configuration.
        self.model = SimpleNamespace(config=config, base_model=_hollow(config))
        self.encoder = SimpleNamespace(config=config.vision_config)
        if self.tower.full_attention is not None:
            self.encoder.window_size = config.vision_config.window_size

    def layouts(self, kind: str, given: Mapping[str, Any], rows: Sequence[int]) -> list[Layout]:
        """How some items lie.

        Args:
            kind: "image" or "video".
            given: what the processor made of them, sizes among it.
            rows: placeholders of each.
        """
        describe = self.family.layouts if kind == "image" else self.family.videos
        if describe is None:  # nothing is pruned of them, so that nothing need be known
            return [_whole(count) for count in rows]
        return describe(Encoded(self.model, self.encoder, given, rows, lambda: rows))

    def per_item(self, kind: str, given: Mapping[str, Any], rows: Sequence[int]) -> list[list[Layout]]:
        """The layouts of each item: one, or one for each tile where text stands between tiles."""
        left = iter(self.layouts(kind, given, rows))
        found = []
        for count in rows:
            mine: list[Layout] = []
            while sum(layout.placeholders for layout in mine) < count:
                mine.append(next(left))
            found.append(mine)
        return found


def family_of(config: Any) -> Family:
    """The row of a configuration.

    Raises:
        FoveateError: there is none, or the installed transformers is older than the row allows.
    """
    kind = getattr(config, "model_type", None)
    for family in FAMILIES:
        if kind in family.types:
            check_version(family)
            return family if family.varies is None else replace(family, **family.varies(config))
    known = ", ".join(family.name for family in FAMILIES)
    raise FoveateError(f"{kind!r} is no family that can be pruned in {ENGINE}; families: {known}")


def _whole(count: int) -> Layout:
    """So many tokens, of which nothing is known."""
    numbers = torch.arange(count)
    return Layout(count, numbers, numbers[:, None], (count,))


def _hollow(config: Any) -> Any:
    """An instance of the family's model with nothing in it but the configuration."""
    kind = MODEL_MAPPING[type(config)]
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.config = config
    return made
