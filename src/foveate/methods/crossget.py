"""CrossGET: merge patches inside the encoder that resemble others and matter little, beside a cross token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.core import Block, Keep, Selection, Signals
from foveate.forms import Merger
from foveate.methods._trained import TrainedMethod
from foveate.ops.merging import complete_matching, ensemble_merge, in_raster_order


@dataclass(frozen=True)
class CrossGET(TrainedMethod, Merger):
    """CrossGET: keeps ensembles of patches that resemble each other, weighted by the attention that each one receives.

    A cross token, which starts as a copy of CLS, runs through the encoder; before each block a learned vector is added
    to it. In every block up to the one that the projector reads, between attention and MLP, importance is the attention
    a patch receives (mean over heads and over all queries but the cross token's) plus the cross token's attention to
    it. Patches ranked by their highest cosine similarity (keys, mean over heads) may look at lower-ranked ones only;
    the r lowest values of importance minus that similarity merge into the most similar patch that stays (complete-graph
    soft matching), weighted by importance (cross-guided matching and ensemble).

    This is the LLaVA part of the authors' code, which prunes in CLIP alone and there merges 13 patches in each of 23
    blocks. The paper trains the vectors together with the language model, `foveate train crossget` beside a frozen
    one; without trained ones they are zero, as before training, and the cross token stays a copy of CLS that counts
    twice. As in the code it reaches the decoder: as an
    extra token that counts in `keep`, at the largest index that the last merge sets free. Where all patches stay there
    is none. Equal similarities, which two nearest neighbours always have, rank the lower index first.

    Args:
        keep: tokens per image at the end, or a share of them, rounded half to even, the cross token included.
        r: in its place, patches that each block merges away (more than half of them counts as half), or one number per
            block; 13 unless `keep` is given.
        proportional: log(size) is added to a token's attention logits.
        path: folder or hub id of trained cross tokens, "mini" for those of the model that ships with Foveate; in a spec
            it is written `from=`.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2305.17455"
    beside: ClassVar[int] = 1
    needs = (
        "tower.latest.hidden",
        "tower.latest.keys",
        "tower.latest.received_all",
        "tower.latest.cross",
        "tower.latest.cross_attention",
    )

    path: str | None = None
    modules: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.keep is None and self.r is None:
            object.__setattr__(self, "r", 13)
        super().__post_init__()

    @classmethod
    def from_pretrained(
        cls, path: str, keep: Keep | None = None, r: int | tuple[int, ...] | None = None, proportional: bool = True
    ) -> CrossGET:
        """CrossGET with the cross tokens of a folder or hub id.

        Raises:
            FoveateError: none can be loaded from there.
        """
        return cls(keep=keep, r=r, proportional=proportional, path=str(path))._ready()

    @classmethod
    def of(cls, tokens: Any, keep: Keep | None = None, r: int | tuple[int, ...] | None = None) -> CrossGET:
        """CrossGET with cross tokens that are in memory, such as those in training."""
        made = cls(keep=keep, r=r, path="memory")
        object.__setattr__(made, "modules", tokens)
        return made

    @classmethod
    def example(cls, config: Any = None) -> CrossGET:
        """Without training, three quarters of the tokens."""
        return cls(keep=0.75)

    def check_model(self, config: Any) -> None:
        """Refuse a model whose encoder the cross tokens were not trained for.

        Raises:
            FoveateError: another width or number of blocks.
        """
        if self.path is not None:
            self._trained().check(config.vision_config)

    def _load(self, path: str) -> Any:
        from foveate.modules.crossget import load

        return load(path)

    def companion(self, block: int, cls: Tensor, before: Tensor | None) -> Tensor | None:
        """The cross token before a block: what became of it, out of reach of gradients, plus the learned vector."""
        token = cls if before is None else before.detach()
        if self.path is None:
            return token
        cross: Tensor = self._trained()(token, block)
        return cross

    def select(self, signals: Signals) -> Selection:
        block = signals.tower["latest"]
        assert block.hidden is not None and signals.size is not None
        index, features, group = signals.index, block.hidden, None
        # There is no cross token where the budget is everything; what others have dropped since changes nothing then.
        r = 0 if block.cross is None else self.merges(signals)
        if r:
            assert block.keys is not None
            matching = complete_matching(block.keys.float().mean(dim=1), _importance(block), r)
            merged = ensemble_merge(features, signals.size, matching)
            index, features, group = index.gather(1, merged.representative), merged.features, merged.group
        extra = None
        if signals.stage + 1 == signals.stages and index.shape[1] < signals.original and block.cross is not None:
            free = _free_index(signals, index)
            if group is None:
                group = torch.arange(index.shape[1], device=index.device).expand_as(index)
            index = torch.cat([index, free], dim=1)
            features = torch.cat([features, block.cross[:, None].to(features.dtype)], dim=1)
            index, features, group = in_raster_order(index, features, group)
            extra = list(index == free)
        if group is None:
            return Selection(list(index))
        return Selection(list(index), list(features), extra=extra, groups=list(group))


def _importance(block: Block) -> Tensor:
    """(B, N) attention received plus that of the cross token."""
    assert block.received_all is not None and block.cross_attention is not None
    return block.received_all.float() + block.cross_attention.float().mean(dim=1)


def _free_index(signals: Signals, kept: Tensor) -> Tensor:
    """(B, 1) the largest original index that this merge sets free; where it merges nothing, the largest free one."""
    free = torch.ones(kept.shape[0], signals.original, dtype=torch.int64, device=kept.device)
    free = free.scatter(1, signals.index, 2).scatter(1, kept, 0)
    places = torch.arange(signals.original, device=kept.device)
    return (free * signals.original + places).argmax(dim=-1, keepdim=True)
