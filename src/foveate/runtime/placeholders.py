"""Which ids of a prompt stand for visual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from foveate.families.family import Family
from foveate.runtime.arguments import bring_pixels, text_config
from foveate.runtime.decoder.cache import timeline_of
from foveate.runtime.seams import CACHE


class Placeholders:
    """The placeholders of one model.

    Attributes:
        image: the id of a picture's.
        ids: by kind, "image" or "video"; None where a family has none of that kind.
    """

    def __init__(self, model: Any, family: Family) -> None:
        self._model = model
        self.image = family.image_token_id(model.config)
        self.ids: dict[str, Any] = {"image": self.image, "video": getattr(model.config, "video_token_id", None)}

    def are(self, ids: Tensor) -> Tensor:
        """Which ids stand for visual tokens, of pictures or videos."""
        visual, video = ids == self.image, self.ids["video"]
        return visual if video is None else visual | (ids == video)

    def padding(self) -> int:
        """Any id but a placeholder's: padding is masked, but placeholders are counted."""
        pad = getattr(text_config(self._model), "pad_token_id", None)
        pad = 0 if pad is None or pad < 0 else int(pad)
        visual = set(self.ids.values())
        return pad if pad not in visual else next(other for other in range(3) if other not in visual)

    def none_in(self, ids: object, given: Mapping[str, Any]) -> bool:
        """Whether neither a prompt nor the cache that it follows has any picture, so that all runs as it is."""
        timeline = timeline_of(given.get(CACHE))
        if timeline is not None and any(timeline.pictured):
            return False
        if bring_pixels(given):
            return False  # without waiting for the device
        return isinstance(ids, Tensor) and not bool(self.are(ids).any())
