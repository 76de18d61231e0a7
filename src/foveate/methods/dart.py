"""DART: prune inside the decoder what repeats a few pivot tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.core import (
    FoveateError,
    Keep,
    Method,
    Selection,
    Signals,
    Site,
    check_keep,
)
from foveate.depths import check_depths
from foveate.methods._stages import check_layers
from foveate.ops.pooling import take
from foveate.ops.scores import cosines
from foveate.ops.subsets import descending, least_similar


@dataclass(frozen=True)
class DART(Method):
    """DART: keeps a few pivot tokens and those that least resemble them, so that duplicates leave.

    Behind the first `layer` decoder blocks, the visual tokens with the largest keys of the last of these blocks (L1
    norm over all heads) are pivots and stay; the text tokens after the image with the largest keys are pivots too. Each
    pivot in turn takes the visual tokens of lowest cosine to it, between hidden states after the decoder's final norm,
    among those not taken yet. Pivots come in order: visual ones by falling norm, then text ones.

    The budget is exact, pivots included: what is left of it is shared evenly among all pivots, and what cannot be
    shared evenly goes to the first ones. Where fewer text tokens follow the image all of them are pivots; without any,
    visual pivots do it alone, and a budget of no more than `pivots` is spent on them. The authors' code could not be
    read; the steps are those of a port to another framework.

    Args:
        keep: tokens per image, or a share of them, rounded half to even. The default makes 192 of 576. (The port adds
            its visual pivots to a budget that it cuts to equal picks: 68 tokens for 64.)
        layer: decoder blocks that run at full length.
        pivots: visual pivots, at least 1.
        text_pivots: text pivots, 0 or more.
        official: as in the port, pivots come in the order in which Python walks through a set of their places in the
            prompt; for prompts with one image.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2502.11494"
    site: ClassVar[Site] = "layer"
    needs = (
        "decoder.keys",
        "decoder.text_keys",
        "decoder.normed",
        "decoder.text_normed",
        "text_mask",
        "after_image",
    )

    keep: Keep = 0.333
    layer: int = 2
    pivots: int = 4
    text_pivots: int = 4
    official: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_layers("DART", (self.layer,))
        for name, least in (("pivots", 1), ("text_pivots", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise FoveateError(f"{name}={value!r} is no whole number from {least}; the smallest is {name}={least}")

    def depths(self, layers: int) -> tuple[int, ...]:
        check_depths((self.layer,), layers, "DART")
        return (self.layer,)

    def select(self, signals: Signals) -> Selection:
        decoder = signals.decoder
        assert decoder is not None and decoder.normed is not None and decoder.text_normed is not None
        kept = self.wanted(signals)
        visual, words, present = self.pivots_of(signals, kept)
        pivots = torch.cat([take(decoder.normed, visual), take(decoder.text_normed, words)], dim=1)
        present = torch.cat([torch.ones_like(visual, dtype=torch.bool), present], dim=1)
        if self.official:
            order = _set_order(_in_prompt(signals, visual, words), present)
            pivots, present = take(pivots, order), present.gather(1, order)
        taken = torch.zeros(signals.shape, dtype=torch.bool, device=visual.device).scatter(1, visual, True)
        taken = least_similar(cosines(pivots, decoder.normed), _quotas(kept - visual.shape[1], present), taken)
        chosen = taken.int().sort(dim=1, descending=True, stable=True).indices[:, :kept]
        return Selection([index[places].sort().values for index, places in zip(signals.index, chosen, strict=True)])

    def pivots_of(self, signals: Signals, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, P) visual and (B, Q) text pivots, by falling norm, and (B, Q) which of the text ones there are."""
        decoder = signals.decoder
        assert decoder is not None and decoder.keys is not None and decoder.text_keys is not None
        assert signals.text_mask is not None and signals.after_image is not None
        visual = descending(decoder.keys.float().abs().sum(dim=(1, 3)))[:, : min(self.pivots, kept)]
        asked = signals.text_mask & signals.after_image
        norms = decoder.text_keys.float().abs().sum(dim=(1, 3)).masked_fill(~asked, -1.0)
        words = descending(norms)[:, : self.text_pivots]
        return visual, words, asked.gather(1, words)


def _quotas(picks: int, present: Tensor) -> Tensor:
    """Share `picks` among the pivots that are there, the rest to the first of them: (B, P) bool -> (B, P)."""
    number = present.sum(dim=1, keepdim=True)
    first = present.cumsum(dim=1) <= picks % number
    return (picks // number + first.long()) * present


def _in_prompt(signals: Signals, visual: Tensor, words: Tensor) -> Tensor:
    """(B, P + Q) places of the pivots among all tokens of a prompt with one image, padding not counted."""
    assert signals.text_mask is not None and signals.after_image is not None
    before = (signals.text_mask & ~signals.after_image).sum(dim=1, keepdim=True)
    text = signals.original + signals.text_mask.long().cumsum(dim=1) - 1
    return torch.cat([before + signals.index.gather(1, visual), text.gather(1, words)], dim=1)


def _set_order(places: Tensor, present: Tensor) -> Tensor:
    """(B, P) positions of the pivots in the order of a Python set of their places; those that are not there last."""
    orders = []
    for row, there in zip(places.tolist(), present.tolist(), strict=True):
        position = {place: number for number, place in enumerate(row) if there[number]}
        absent = [number for number in range(len(row)) if not there[number]]
        # A set filled from a list: filled from a dict, it has another capacity and so another order.
        orders.append([position[place] for place in set(list(position))] + absent)  # noqa: C414
    return torch.tensor(orders, device=places.device)
