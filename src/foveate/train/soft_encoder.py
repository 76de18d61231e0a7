"""A frozen model whose encoder sees soft masks that DynamicViT's predictors make: what is trained, and its losses.

Shapes: B rows of one picture each, N patches, L sequence, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.core import FoveateError, Keep
from foveate.families import family_of
from foveate.modules.dynamicvit import DynamicViTPredictors
from foveate.ops.subsets import even_order
from foveate.runtime.decoder.soften import look
from foveate.runtime.encoder.soften import check_softens_encoder, encode_softly
from foveate.train.budgets import shared
from foveate.train.learner import Learner
from foveate.train.losses import (
    IGNORED,
    RatioLoss,
    causal_loss,
    hint_loss,
    kept_shares,
    likeness_loss,
    ratio_loss,
    token_loss,
)
from foveate.train.masks import decide, gumbel, limited, soft_mask
from foveate.train.softened import Pass, Stages, check_trains, shares_of, whole_rows


class Weights(NamedTuple):
    """Of the losses."""

    causal: float
    ratio: float
    likeness: float
    tokens: float
    hint: float = 0.0


class SoftEncoder(Learner):
    """DynamicViT's predictors in training.

    Before some encoder blocks a predictor decides for each patch; later blocks and the whole decoder see the patches
    that it drops as if they were gone. The unpruned model is the teacher.

    Args:
        base: a loaded vision-language model; it is frozen and put into eval mode.
        predictors: of its encoder.
        ratios: shares of the patches to aim at, one for each predictor.
        weights: of the answers, the kept shares, the likeness of what is said to what the unpruned model says, and that
            of the kept tokens to what it makes of them; and of hints which tokens show anything that is asked about, in
            rows that say so. With hints and none of the answers, the likenesses and the tokens, the model answers
            nothing: each stage keeps what inference would keep, and no block behind the last predictor runs.
        told: what the predictors score is shifted so that `ratios` are met on average, and the ratio loss has nothing
            left to do. The order of the scores, all that inference reads, stays free.
        ratio_kind: "mse" or "huber".
        temperature: of the Gumbel-softmax.
        limit: largest gradient with respect to one decision; None cuts none.

    Raises:
        FoveateError: predictors of another encoder, or a model that takes no soft masks.
    """

    def __init__(
        self,
        base: Any,
        predictors: DynamicViTPredictors,
        ratios: Sequence[Keep],
        weights: Weights,
        *,
        told: bool = False,
        ratio_kind: RatioLoss = "mse",
        temperature: float = 1.0,
        limit: float | None = None,
    ) -> None:
        check_softens_encoder(base)
        check_trains(base)
        predictors.check(base.config.vision_config)
        family = family_of(base)
        super().__init__(base, predictors, tuple(ratios), family.image_token_id(base.config))
        self.alone = told and not (weights.causal or weights.likeness or weights.tokens)
        self.weights, self.told, self.limit = weights, told, limit
        self.ratio_kind, self.temperature = ratio_kind, temperature
        self._summary = family.tower_of(base)[1].summary
        self._ranks = even_order(*family.grid(base.config))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        wanted: Tensor | None = None,
        **given: Tensor,
    ) -> dict[str, Tensor]:
        """The weighted loss, each loss, and the share kept at each stage.

        Args:
            input_ids, attention_mask, labels: (B, L); labels are -100 wherever no answer stands.
            wanted: (B, N) not 0 for the tokens of things that a question could be about, for the hints.
            given: `pixel_values` of one picture a row, in their order, and what else the processor makes.

        Raises:
            FoveateError: another number of pictures than rows, or hints alone teach and the rows give none.
        """
        if len(given.get("pixel_values", ())) != len(input_ids):
            raise FoveateError(
                f"{len(given.get('pixel_values', ()))} pictures for {len(input_ids)} rows; each row needs one"
            )
        if self.alone and wanted is None:
            raise FoveateError("hints alone teach, and these rows give none; give causal_weight= as well")
        known = {name: value for name, value in given.items() if name != "even"}
        stages = self._stages(len(input_ids), input_ids.device)
        parts = {} if self.alone else self._answered((input_ids, attention_mask, labels, known), stages)
        if self.alone:
            with suppress(_AllChosen):
                encode_softly(self.base, known, lambda block, hidden: self._mask(block, hidden, stages))
        parts["ratio"] = ratio_loss(stages.decisions, stages.present, stages.shares, self.ratio_kind)
        if self.weights.hint and wanted is not None:
            parts["hint"] = hint_loss(stages.gaps, wanted.ne(0).to(wanted.dtype), stages.could)
        loss = torch.stack([getattr(self.weights, name) * part for name, part in parts.items()]).sum()
        kept = kept_shares(stages.decisions, stages.present).mean(dim=1)
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}, "kept": kept.detach()}

    def _answered(self, text: tuple[Tensor, Tensor, Tensor, dict[str, Tensor]], stages: Stages) -> dict[str, Tensor]:
        """The losses of what the model says, which lets the predictors decide: of ids, mask, labels and pixels."""
        _, _, labels, known = text
        features = encode_softly(self.base, known, lambda block, hidden: self._mask(block, hidden, stages))
        logits = self._logits(*text, features, limited(stages.decisions[-1], self.limit))
        parts = {"causal": causal_loss(logits, labels)}
        if self.weights.likeness or self.weights.tokens:
            with torch.no_grad():
                whole = encode_softly(self.base, known)
                teacher = self._logits(*text, whole, None)
            parts["likeness"] = likeness_loss(logits, teacher, labels)
            parts["tokens"] = token_loss(features, whole, stages.decisions[-1])
        return parts

    def _stages(self, rows: int, device: torch.device) -> Stages:
        """What the predictors are to leave of so many pictures; nothing has been said yet."""
        ranks = self._ranks.to(device).expand(rows, -1)
        counts = torch.full((rows,), ranks.shape[1], device=device)
        return Stages(torch.ones_like(ranks, dtype=torch.bool), ranks, shares_of(self.ratios, counts))

    def _mask(self, block: int, hidden: Tensor, stages: Stages) -> Tensor | None:
        """What encoder block `block` is to see, after its predictor has decided where it has one."""
        layers = list(self.gates.config.layers)
        if block in layers:
            self._decide(layers.index(block), hidden[:, self._summary :], stages)
            if self.alone and block == layers[-1]:
                raise _AllChosen
        if not stages.decisions:
            return None
        decisions = limited(stages.decisions[-1], self.limit).float()
        keys = torch.cat([decisions.new_ones(len(decisions), self._summary), decisions], dim=1)
        return soft_mask(torch.zeros((), device=keys.device).expand(1, 1, *[keys.shape[1]] * 2), keys)

    def _decide(self, stage: int, patches: Tensor, stages: Stages) -> None:
        """Add the decisions (B, N) of one stage."""
        left = stages.left()
        policy = stages.decisions[-1] if stages.decisions else left.float()
        scores = self.gates(stage, patches, policy)
        gap = scores[..., 0] - scores[..., 1]
        if self.told:
            count = stages.shares[stage] * stages.present.sum(dim=1)
            noise = None if self.alone else gumbel(scores, self.generator).diff(dim=-1)[..., 0]
            made = shared(gap, None, stages.ranks, left, count, noise, self.temperature)
            made = made.detach() if self.alone else made
        else:
            made = decide(scores, self.temperature, self.generator)
        stages.decided(made, gap, None, left)

    def _logits(
        self, ids: Tensor, mask: Tensor, labels: Tensor, given: dict[str, Tensor], features: Tensor, kept: Tensor | None
    ) -> Tensor:
        """(B, L', V) of the last places, the decoder seeing the kept patches alone; None is all."""
        seen = look(self.base, ids, mask, given, answered=labels != IGNORED, features=features)
        rows = whole_rows(ids, mask, labels, seen)
        passing = Pass(mask.bool() & ~seen.holders, seen.visual)
        if kept is not None:
            passing.decide(kept)
        logits = passing.run(self.base, (), _never, rows)
        assert logits is not None
        return logits


class _AllChosen(Exception):
    """The last predictor has decided, and nothing behind it is wanted."""


def _never(stage: int, visual: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    raise AssertionError("no module stands in the decoder")
