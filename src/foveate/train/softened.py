"""A frozen model whose decoder sees soft masks that decision modules make: what is trained, and its losses.

Shapes: B rows, L sequence, N visual tokens, T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from foveate.core import FoveateError, Keep
from foveate.families import family_of
from foveate.modules.lvpruning import LVPruningModules
from foveate.ops.subsets import even_order, in_classes
from foveate.runtime.decoder.soften import Seen, check_softens, look, soften
from foveate.train.budgets import shared
from foveate.train.learner import Learner
from foveate.train.losses import IGNORED, RatioLoss, causal_loss, even_loss, hint_loss, kept_shares, ratio_loss
from foveate.train.masks import columns, decide, gumbel, limited, soft_mask

TIGHT = 1 / 16
"""Of the visual tokens: budgets up to this share are tight, and rows may want less of them spread evenly."""

Decide = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(stage, visual (B, N, D), text (B, T, D), text mask (B, T)) -> decisions (B, N)."""


class Softened(Learner):
    """LVPruning's modules in training.

    Args:
        base: a loaded vision-language model; it is frozen and put into eval mode.
        modules: its decision modules.
        ratios: shares of the visual tokens to aim at, one for each module.
        causal_weight, ratio_weight: of the two losses (eq. 12).
        hint_weight: of a third one that the paper does not have: which tokens the question is about, where rows say so.
        even_weight: of a fourth one: how much of the budget is best spread evenly, where rows say so; the modules need
            `evenness`.
        told: the modules are told the budget: what they score is shifted so that `ratios` are met on average, and the
            ratio loss has nothing left to do. The order of the scores, all that inference reads, stays free. Without a
            causal loss the model then answers nothing: each stage keeps what inference would keep, which the next one
            sees, and the blocks behind the last do not run.
        ratio_kind: "mse" or "huber".
        temperature: of the Gumbel-softmax.
        limit: largest gradient of the causal loss with respect to one decision; larger ones are cut. None cuts none. A
            dropped token that would have had nearly all attention has a gradient of exp(its lead), thousands of times
            what keeping it can change.
        share: of the visual tokens that a row is given at all, drawn anew each time; below 1 a step costs less. The
            modules score every token by itself, so what they learn of some holds for all.
        answers: let the modules read the answers too, as they are given for teacher forcing.
        checkpointing: recompute each decoder layer in the backward pass instead of keeping what it computed.

    Raises:
        FoveateError: modules of another model, or a model that takes no soft masks.
    """

    def __init__(
        self,
        base: Any,
        modules: LVPruningModules,
        ratios: Sequence[Keep],
        *,
        causal_weight: float = 1.0,
        ratio_weight: float = 2.0,
        hint_weight: float = 0.0,
        even_weight: float = 0.0,
        told: bool = False,
        ratio_kind: RatioLoss = "mse",
        temperature: float = 1.0,
        limit: float | None = None,
        share: float = 1.0,
        answers: bool = False,
        checkpointing: bool = False,
    ) -> None:
        modules.check(base.config)
        check_trains(base, checkpointing)
        super().__init__(base, modules, tuple(ratios), family_of(base).image_token_id(base.config))
        self.ratio_kind, self.temperature = ratio_kind, temperature
        self.weights = Weights(causal_weight, ratio_weight, hint_weight, even_weight)
        self.told, self.alone = told, told and not causal_weight
        self.limit, self.share, self.answers = limit, share, answers
        if checkpointing:
            checkpoint_layers(base)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        features: Tensor | None = None,
        wanted: Tensor | None = None,
        even: Tensor | None = None,
        **given: Tensor,
    ) -> dict[str, Tensor]:
        """The weighted loss, each loss, and the share kept at each stage.

        Args:
            input_ids, attention_mask, labels: (B, L); labels are -100 wherever no answer stands.
            features: (pictures, N, D), what the frozen tower and projector make of them, where that is known.
            wanted: (B, N) as `hint_loss` takes it, for `hint_weight`.
            even: (B, 2) share of a budget that is best spread evenly, where it is more than `TIGHT` of a row's visual
                tokens and where it is not; NaN says nothing. For `even_weight`.
            given: what else the processor makes: `pixel_values` of the pictures in the order of their placeholders,
                their sizes, and token types (B, L).

        Raises:
            FoveateError: pictures and placeholders do not belong together, or token types are missing.
        """
        rows = self.whole(input_ids, attention_mask, labels, features, wanted, given)
        rows = thinned(rows, self.share, self.generator) if self.share < 1 else rows
        passing = Pass(self.text(rows), rows.seen.visual)
        stages = Stages(passing.present, rows.ranks, shares_of(self.ratios, rows.whole))

        def choose(stage: int, visual: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            return limited(self._choose(stage, visual, text, mask, stages), self.limit)

        logits = passing.run(self.base, self.gates.config.layers, choose, rows, not self.alone)
        parts = {} if logits is None else {"causal": causal_loss(logits, rows.labels)}
        parts["ratio"] = ratio_loss(stages.decisions, passing.present, stages.shares, self.ratio_kind)
        if self.weights.hint and rows.wanted is not None:
            parts["hint"] = hint_loss(stages.gaps, rows.wanted, stages.could)
        if self.weights.even and even is not None:
            told = [torch.where(share > TIGHT, even[:, 0], even[:, 1]) for share in stages.shares]
            parts["even"] = even_loss(stages.odds, told)
        loss = torch.stack([getattr(self.weights, name) * part for name, part in parts.items()]).sum()
        kept = kept_shares(stages.decisions, passing.present).mean(dim=1)
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}, "kept": kept.detach()}

    def whole(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        features: Tensor | None,
        wanted: Tensor | None,
        given: Mapping[str, Tensor],
    ) -> Rows:
        """A batch as the decoder gets it, with all of its visual tokens."""
        answered = labels != IGNORED
        seen = look(self.base, input_ids, attention_mask, given, answered=answered, features=features)
        return whole_rows(input_ids, attention_mask, labels, seen, wanted)

    def _choose(self, stage: int, visual: Tensor, text: Tensor, mask: Tensor, stages: Stages) -> Tensor:
        """Decisions (B, N) of one stage, those of earlier ones multiplied in (eq. 10)."""
        visual, text = self.fitted(visual, text)
        scores = self.gates(stage, visual, text, mask)
        gap, left = scores[..., 0] - scores[..., 1], stages.left()
        odds = self.gates.even_odds(stage, text, mask, stages.shares[stage])
        if self.told:
            count = stages.shares[stage] * stages.present.sum(dim=1)
            noise = None if self.alone else gumbel(scores, self.generator).diff(dim=-1)[..., 0]
            ordered = self.ordered(gap, stages.ranks) if self.alone else gap
            made = shared(ordered, odds, stages.ranks, left, count, noise, self.temperature)
        else:
            made = decide(scores, self.temperature, self.generator)
        made = made.detach() if self.alone else made
        return stages.decided(made, gap, odds, left)

    def ordered(self, gap: Tensor, ranks: Tensor) -> Tensor:
        """(B, N) what inference goes by: the scores, or the classes that their borders make; ranks are (B, N)."""
        borders = self.gates.config.borders
        return in_classes(gap.float(), borders, ranks) if borders else gap

    def fitted(self, *values: Tensor) -> list[Tensor]:
        """Hidden states as the modules take them: nothing else casts those of a base in fewer bits."""
        return [one if torch.is_autocast_enabled(one.device.type) else one.to(self.gates.dtype) for one in values]

    def text(self, rows: Rows) -> Tensor:
        """(B, L) which tokens the modules read."""
        text = rows.mask.bool() & ~rows.seen.holders
        return text if self.answers else text & (rows.labels == IGNORED)


class Weights(NamedTuple):
    """Of the losses."""

    causal: float
    ratio: float
    hint: float
    even: float


@dataclass(frozen=True, eq=False)
class Rows:
    """A batch as the decoder gets it."""

    ids: Tensor  # (B, L)
    mask: Tensor  # (B, L), 0 in padding
    labels: Tensor  # (B, L)
    seen: Seen
    ranks: Tensor  # (B, N) each visual token's place in an even order of its picture; rows with fewer are filled up
    whole: Tensor  # (B,) visual tokens before any was left out
    wanted: Tensor | None = None  # (B, N)


def whole_rows(ids: Tensor, mask: Tensor, labels: Tensor, seen: Seen, wanted: Tensor | None = None) -> Rows:
    """Rows with all of their visual tokens; shapes as `Rows` has them."""
    return Rows(ids, mask, labels, seen, even_ranks(seen), seen.visual.sum(dim=1), wanted)


def thinned(rows: Rows, share: float, generator: torch.Generator | None) -> Rows:
    """The rows with a random share of their visual tokens, at their original positions.

    Raises:
        FoveateError: the rows have different numbers of visual tokens.
    """
    visual = rows.seen.visual
    counts = visual.sum(dim=1)
    if bool((counts != counts[0]).any()):
        raise FoveateError(
            f"rows of {counts.tolist()} visual tokens cannot be thinned together; use visual_share=1.0, or micro=1"
        )
    keep = max(1, round(share * int(counts[0])))
    lot = torch.rand(visual.shape, generator=generator, device=visual.device).where(visual, -1.0)
    stays = ~visual
    stays.scatter_(1, lot.topk(keep, dim=1).indices, True)
    columns = stays.nonzero()[:, 1].view(len(stays), -1)
    left = stays[visual].view(len(stays), -1)
    return Rows(
        rows.ids.gather(1, columns),
        rows.mask.gather(1, columns),
        rows.labels.gather(1, columns),
        rows.seen.gathered(columns),
        rows.ranks[left].view(len(stays), -1),
        rows.whole,
        None if rows.wanted is None else rows.wanted[left].view(len(stays), -1),
    )


def even_ranks(seen: Seen) -> Tensor:
    """(B, N) as `Rows` holds them; tokens without one raster are spaced evenly by index."""
    counts = seen.visual.sum(dim=1).tolist()
    grids = [grid or (1, max(1, count)) for grid, count in zip(seen.grids, counts, strict=True)]
    ranks = torch.zeros(len(counts), max(1, *counts), dtype=torch.int64, device=seen.visual.device)
    for row, (grid, count) in enumerate(zip(grids, counts, strict=True)):
        ranks[row, :count] = even_order(*grid)[:count].to(ranks.device)
    return ranks


def shares_of(ratios: Sequence[Keep], whole: Tensor) -> Tensor:
    """(S, B) of its original tokens that each stage is to leave of each row."""
    counts = whole.clamp(min=1).float()
    shares = [(ratio / counts).clamp(max=1.0) if isinstance(ratio, int) else ratio for ratio in ratios]
    return torch.stack([torch.as_tensor(share, device=whole.device).expand_as(counts) for share in shares])


class Stages:
    """What the modules have said so far in one pass.

    Args:
        present: (B, N) bool, which of the N are tokens of their row.
        ranks: (B, N) each token's place in an even order.
        shares: (S, B) to keep.
    """

    def __init__(self, present: Tensor, ranks: Tensor, shares: Tensor) -> None:
        self.present, self.ranks, self.shares = present, ranks, shares
        self.decisions: list[Tensor] = []  # (B, N) of each stage, those of earlier ones multiplied in
        self.gaps: list[Tensor] = []  # (B, N) by how much keeping outweighs removing
        self.could: list[Tensor] = []  # (B, N) bool, the tokens that a stage could choose from
        self.odds: list[Tensor] = []  # (B,) of how much is spread evenly, where the modules say so

    def left(self) -> Tensor:
        """(B, N) bool, what the stages so far have left."""
        if not self.decisions:
            return self.present
        return self.present & (self.decisions[-1].detach() > 0.5)

    def decided(self, made: Tensor, gap: Tensor, odds: Tensor | None, left: Tensor) -> Tensor:
        """Add a stage; its decisions with those of earlier stages multiplied in (eq. 10)."""
        self.gaps.append(gap)
        self.could.append(left)
        if odds is not None:
            self.odds.append(odds)
        self.decisions.append(made * self.decisions[-1] if self.decisions else made)
        return self.decisions[-1]


class Pass:
    """One run of the base with soft masks: where text and visual tokens stand, and what has been decided so far.

    Args:
        text: (B, L) bool, the tokens that modules read.
        visual: (B, L) bool.
    """

    def __init__(self, text: Tensor, visual: Tensor) -> None:
        self.places, self.present = _places(visual)
        self.text_places, self.text_mask = _places(text)
        self.length = visual.shape[1]
        self._keys: Tensor | None = None
        self._masks: dict[int, tuple[Tensor, Tensor]] = {}

    def run(self, base: Any, layers: Sequence[int], choose: Decide, rows: Rows, answer: bool = True) -> Tensor | None:
        """Logits (B, L', V) of the last places, from the one that predicts the first label on; `choose` is asked
        before each of `layers`. None unless it is to answer, and no block behind the last of `layers` runs."""
        stages = {depth: stage for stage, depth in enumerate(layers)}

        def between(number: int, hidden: Tensor, original: Tensor) -> Tensor | None:
            if number in stages:
                visual, text = _take(hidden, self.places), _take(hidden, self.text_places)
                self.decide(choose(stages[number], visual, text, self.text_mask))
                if not answer and number == max(stages):
                    raise _AllChosen
            return self.mask(original)

        with soften(base, between), suppress(_AllChosen):
            output = base(
                input_ids=rows.ids,
                attention_mask=rows.mask,
                use_cache=False,
                logits_to_keep=_answered(rows.labels),
                **rows.seen.options(),
            )
            logits: Tensor = output.logits
            return logits
        return None

    def decide(self, decisions: Tensor) -> None:
        """Let later layers see tokens by these decisions (B, N)."""
        self._keys = columns(decisions, self.places, self.present, self.length)
        self._masks = {}

    def mask(self, original: Tensor) -> Tensor | None:
        """The soft mask as it stands, made once for all layers that share `original`."""
        if self._keys is None:
            return None
        if id(original) not in self._masks:
            self._masks[id(original)] = (original, soft_mask(original, self._keys))
        return self._masks[id(original)][1]


class _AllChosen(Exception):
    """The last stage has chosen, and nothing behind it is wanted."""


def check_trains(base: Any, checkpointing: bool = False) -> None:
    """Refuse a model that modules cannot be trained for.

    Raises:
        FoveateError: as `check_softens`; or layers are to be recomputed, which older versions of transformers do with
            what is hooked to them, so that decisions would be made anew.
    """
    check_softens(base)
    if checkpointing and not can_recompute(base):
        raise FoveateError(
            f"checkpointing=True: transformers {transformers.__version__} recomputes decisions along with a layer; use "
            "5.23 or newer, or leave it out"
        )


def can_recompute(base: Any) -> bool:
    """Whether this version of transformers recomputes layers without what is hooked to them."""
    return hasattr(base, "activation_checkpointing_enable")


def checkpoint_layers(base: Any) -> None:
    """Recompute the decoder's layers in the backward pass; dropout and whatever else training mode does stay off."""
    base.activation_checkpointing_enable()
    for layer in base.get_decoder().layers:
        layer.training = True  # of the layer alone: what it is made of stays in eval mode


def _answered(labels: Tensor) -> int:
    """How many last places are needed to predict every label, at least 2."""
    first = int((labels != IGNORED).any(dim=0).long().argmax())
    return max(2, labels.shape[1] - first + 1)


def _places(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L) bool -> (B, K) places of the True ones in order, and which of the K belong to their row."""
    counts = chosen.sum(dim=1)
    most = max(1, int(counts.max()))
    places = torch.argsort((~chosen).long(), dim=1, stable=True)[:, :most]
    return places, torch.arange(most, device=chosen.device) < counts[:, None]


def _take(hidden: Tensor, places: Tensor) -> Tensor:
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
