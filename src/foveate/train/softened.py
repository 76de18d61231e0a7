"""A frozen model whose decoder sees soft masks that decision modules make: what is trained, and its losses.

Shapes: B rows, L sequence, N visual tokens, T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from foveate.core import FoveateError
from foveate.families import family_of
from foveate.modules.lvpruning import LVPruningModules
from foveate.runtime.soften import Seen, check_softens, look, soften
from foveate.train.losses import IGNORED, RatioLoss, causal_loss, hint_loss, kept_shares, ratio_loss
from foveate.train.masks import columns, decide, soft_mask

Decide = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(stage, visual (B, N, D), text (B, T, D), text mask (B, T)) -> decisions (B, N)."""


class Softened(nn.Module):
    """The modules in training. The model is no part of this module's tree: nothing here trains, saves or shards it.

    Args:
        base: a loaded vision-language model; it is frozen and put into eval mode.
        modules: its decision modules.
        ratios: shares of the visual tokens to aim at, one for each module.
        causal_weight, ratio_weight: of the two losses (eq. 12).
        hint_weight: of a third one that the paper does not have: which tokens the question is about, where rows say so.
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

    # By its open signature the Trainer would take it for a loss that is divided by the parts of a step already.
    accepts_loss_kwargs = False

    def __init__(
        self,
        base: Any,
        modules: LVPruningModules,
        ratios: Sequence[float],
        *,
        causal_weight: float = 1.0,
        ratio_weight: float = 2.0,
        hint_weight: float = 0.0,
        ratio_kind: RatioLoss = "mse",
        temperature: float = 1.0,
        limit: float | None = None,
        share: float = 1.0,
        answers: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        modules.check(base.config)
        check_trains(base, checkpointing)
        self.gates = modules
        self._base = [base.eval().requires_grad_(False)]  # in a list, so that it is no submodule
        self.ratios, self.ratio_kind, self.temperature = tuple(ratios), ratio_kind, temperature
        self.weights = (causal_weight, ratio_weight, hint_weight)
        self.limit, self.share, self.answers = limit, share, answers
        self.image_token = family_of(base).image_token_id(base.config)
        self.generator: torch.Generator | None = None  # of the noise; None is torch's own
        if checkpointing:
            checkpoint_layers(base)

    @property
    def base(self) -> Any:
        """The frozen model."""
        return self._base[0]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        features: Tensor | None = None,
        wanted: Tensor | None = None,
        **given: Tensor,
    ) -> dict[str, Tensor]:
        """The weighted loss, both losses, and the share kept at each stage.

        Args:
            input_ids, attention_mask, labels: (B, L); labels are -100 wherever no answer stands.
            features: (pictures, N, D), what the frozen tower and projector make of them, where that is known.
            wanted: (B, N) bool, the visual tokens that each row is about, for `hint_weight`.
            given: what else the processor makes: `pixel_values` of the pictures in the order of their placeholders,
                their sizes, and token types (B, L).

        Raises:
            FoveateError: pictures and placeholders do not belong together, or token types are missing.
        """
        decisions: list[Tensor] = []
        gaps: list[Tensor] = []
        answered = labels != IGNORED
        seen = look(self.base, input_ids, attention_mask, given, answered=answered, features=features)
        rows = Rows(input_ids, attention_mask, labels, seen, wanted)
        if self.share < 1:
            rows = thinned(rows, self.share, self.generator)
        passing = Pass(self._text(rows), rows.seen.visual)

        def choose(stage: int, visual: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            scores = self.gates(stage, *self._fitted(visual, text), mask)
            gaps.append(scores[..., 0] - scores[..., 1])
            made = decide(scores, self.temperature, self.generator)
            decisions.append(made * decisions[-1] if decisions else made)  # eq. 10
            return self._limited(decisions[-1])

        logits = passing.run(self.base, self.gates.config.layers, choose, rows)
        causal = causal_loss(logits, rows.labels)
        ratio = ratio_loss(decisions, passing.present, self.ratios, self.ratio_kind)
        kept = kept_shares(decisions, passing.present).mean(dim=1)
        loss = self.weights[0] * causal + self.weights[1] * ratio
        told = {"causal": causal.detach(), "ratio": ratio.detach(), "kept": kept.detach()}
        if self.weights[2] and rows.wanted is not None:
            hint = hint_loss(gaps, rows.wanted)
            loss, told["hint"] = loss + self.weights[2] * hint, hint.detach()
        return {"loss": loss, **told}

    def _fitted(self, *values: Tensor) -> list[Tensor]:
        """Hidden states as the modules take them: nothing else casts those of a base in fewer bits."""
        return [one if torch.is_autocast_enabled(one.device.type) else one.to(self.gates.dtype) for one in values]

    def _limited(self, decisions: Tensor) -> Tensor:
        """The same decisions, whose gradients are cut at the limit."""
        if self.limit is None or not decisions.requires_grad:
            return decisions
        shown, limit = decisions.clone(), self.limit
        shown.register_hook(lambda gradient: gradient.clamp(-limit, limit))
        return shown

    def _text(self, rows: Rows) -> Tensor:
        """(B, L) which tokens the modules read."""
        text = rows.mask.bool() & ~rows.seen.holders
        return text if self.answers else text & (rows.labels == IGNORED)


@dataclass(frozen=True, eq=False)
class Rows:
    """A batch as the decoder gets it."""

    ids: Tensor  # (B, L)
    mask: Tensor  # (B, L), 0 in padding
    labels: Tensor  # (B, L)
    seen: Seen
    wanted: Tensor | None = None  # (B, N) bool


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
        None if rows.wanted is None else rows.wanted[left].view(len(stays), -1),
    )


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

    def run(self, base: Any, layers: Sequence[int], choose: Decide, rows: Rows) -> Tensor:
        """Logits (B, L', V) of the last places, from the one that predicts the first label on; `choose` is asked
        before each of `layers`."""
        stages = {depth: stage for stage, depth in enumerate(layers)}

        def between(number: int, hidden: Tensor, original: Tensor) -> Tensor | None:
            if number in stages:
                visual, text = _take(hidden, self.places), _take(hidden, self.text_places)
                self._decided(choose(stages[number], visual, text, self.text_mask))
            return self.mask(original)

        with soften(base, between):
            output = base(
                input_ids=rows.ids,
                attention_mask=rows.mask,
                use_cache=False,
                logits_to_keep=_answered(rows.labels),
                **rows.seen.options(),
            )
        logits: Tensor = output.logits
        return logits

    def _decided(self, decisions: Tensor) -> None:
        self._keys = columns(decisions, self.places, self.present, self.length)
        self._masks = {}

    def mask(self, original: Tensor) -> Tensor | None:
        """The soft mask as it stands, made once for all layers that share `original`."""
        if self._keys is None:
            return None
        if id(original) not in self._masks:
            self._masks[id(original)] = (original, soft_mask(original, self._keys))
        return self._masks[id(original)][1]


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
