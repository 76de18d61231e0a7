"""What methods share that rank patches by the encoder's attention: that of CLS, or of all patches without one."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

from foveate.core import Block

Attention: TypeAlias = Literal["cls", "received"]


def attention_signal(attention: Attention) -> str:
    """The signal of the block that the projector reads."""
    return "tower.read.cls_attention" if attention == "cls" else "tower.read.received"


def attended(block: Block, attention: Attention) -> Tensor:
    """(B, N), float32: what CLS pays to each patch, mean over heads, or what each receives from all patches."""
    if attention == "received":
        assert block.received is not None
        return block.received.float()
    assert block.cls_attention is not None
    return block.cls_attention.float().mean(dim=1)
