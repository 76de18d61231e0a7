"""FastV: prune inside the decoder by what the last prompt token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.core import Signals, Site
from foveate.depths import check_depths
from foveate.forms import Scorer
from foveate.methods._stages import check_layers


@dataclass(frozen=True)
class FastV(Scorer):
    """FastV: keeps the visual tokens that the last prompt token attends to after a few decoder blocks.

    The first `layer` blocks run in full; the attention of block `layer` - 1 (0-based), averaged over heads, ranks the
    tokens. The choice is made once per image and stands while decoding; the authors' accuracy figures mask tokens and
    rank them anew at every generated token, which saves nothing.

    Args:
        keep: tokens per image, or a share of them, rounded half to even as in the authors' transformers version;
            their R is 1 - keep.
        layer: decoder blocks that run at full length, their K.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.06764"
    site: ClassVar[Site] = "layer"
    needs = ("decoder.last_query",)

    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers("FastV", (self.layer,))

    def depths(self, layers: int) -> tuple[int, ...]:
        check_depths((self.layer,), layers, "FastV")
        return (self.layer,)

    def score(self, signals: Signals) -> Tensor:
        assert signals.decoder is not None and signals.decoder.last_query is not None
        return signals.decoder.last_query.float().mean(dim=1)
