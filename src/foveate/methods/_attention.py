"""What methods share that rank patches by the encoder's attention: that of CLS, or of all patches without one."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

from foveate.core import Block, FoveateError
from foveate.methods._tiles import TileMethod

Attention: TypeAlias = Literal["cls", "received"]


def attention_signal(attention: Attention, block: int | str = "read") -> str:
    """The signal of an encoder block, by default of the one that the projector reads."""
    return f"tower.{block}.{'cls_attention' if attention == 'cls' else 'received'}"


def check_official(official: bool, attention: Attention) -> None:
    """Refuse to give for an authors' code that reads CLS what reads something else."""
    if official and attention != "cls":
        raise FoveateError(
            f"official=True is the authors' code, which ranks by CLS, not by attention={attention!r}; leave out one of "
            "the two"
        )


def attended(block: Block, attention: Attention) -> Tensor:
    """(B, N), float32: what CLS pays to each patch, mean over heads, or what each receives from all patches."""
    if attention == "received":
        assert block.received is not None
        return block.received.float()
    assert block.cls_attention is not None
    return block.cls_attention.float().mean(dim=1)


class RankingMethod(TileMethod):
    """One that reads the attention to the patches, and the patches, of the block that the projector reads."""

    attention: Attention

    @property
    def needs(self) -> tuple[str, ...]:
        return (attention_signal(self.attention), "tower.read.hidden")
