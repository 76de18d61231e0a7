"""Resize: the picture scaled down before the processor makes tokens of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.core import Keep, Method, Site, check_keep


@dataclass(frozen=True)
class Resize(Method):
    """Resize: scales the picture down to what the budget buys, which many methods fail to beat (VTC-Bench).

    The model is shown the largest picture of the same proportions of which its processor makes no more tokens than the
    budget, as if its user had scaled it: encoder, decoder and positions are those of a small picture. It needs a
    processor that makes fewer tokens of a smaller picture; those of one fixed grid, or of tiles of one size, scale a
    small picture up again, and are refused.

    It acts before there are pixels to prune, so that `prune()` refuses it: `foveate eval`, `run` and `bench` scale
    pictures, and `foveate.scale_down` does in Python. It stands alone: other methods count their budget of the tokens
    that the whole picture has, of which a small one has none.

    Args:
        keep: tokens per image at most, or a share of those that the whole picture has, rounded half to even.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2510.07143"
    site: ClassVar[Site] = "picture"

    keep: Keep = 0.25

    def __post_init__(self) -> None:
        check_keep(self.keep)
