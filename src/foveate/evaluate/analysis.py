"""Measures how redundant visual tokens are: who receives attention, who fills the prompt, where likeness falls off."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from foveate.core import Block, FoveateError, Selection, Signals
from foveate.families import family_of
from foveate.inference.answers import encode
from foveate.methods.image_text_interaction import ImageTextInteraction
from foveate.runtime.arguments import renamed
from foveate.runtime.encoder.observe import observe
from foveate.runtime.encoder.probe import missing_signals

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

PERCENT = 100
"""Attention curves have PERCENT + 1 points: at 0 %, 1 %, ... of the tokens."""

HELD = 0.8
"""Share of the attention whose holders are counted."""

QUARTER = 25
"""Percent of the tokens whose share of the attention is told beside it."""

PARTS = ("before", "visual", "after", "special")
"""What a prompt is made of: text before the picture, visual tokens, text after them, special tokens."""


# ---------------------------------------------------------------------------------------------------------------------
# measures


def attention_curve(received: Tensor) -> Tensor:
    """Share of the attention that the most attended x % of the tokens receive, for x = 0 ... 100.

    Linear between whole tokens; a diagonal where all receive the same (compare FoPru, figure 1).

    Args:
        received: (B, N), not negative.

    Returns:
        (B, 101) float64.

    Raises:
        FoveateError: NaN or infinite attention.
    """
    heads = torch.nn.functional.pad(_heads(received), (1, 0))  # (B, N + 1): share of the top 0, 1, ... N tokens
    tokens = received.shape[-1]
    place = torch.arange(PERCENT + 1, device=heads.device, dtype=heads.dtype) * tokens / PERCENT
    whole = place.long().clamp(max=tokens - 1)
    return heads[:, whole].lerp(heads[:, whole + 1], (place - whole).expand(len(heads), -1))


def tokens_holding(received: Tensor, share: float = HELD) -> Tensor:
    """Share of the tokens that hold `share` of the attention: the fewest whole tokens that do, (B, N) -> (B,).

    Raises:
        FoveateError: NaN or infinite attention.
    """
    # Sums that reach the share exactly may end a rounding error of float32 below it.
    fewer = (_heads(received) < share - 1e-6).sum(dim=-1)
    return (fewer + 1).double() / received.shape[-1]


def _heads(received: Tensor) -> Tensor:
    """(B, N) -> (B, N) share of all attention that the top 1, 2, ... N tokens receive, float64."""
    if not bool(received.isfinite().all()):
        bad = int((~received.isfinite()).sum())
        raise FoveateError(f"{bad} of {received.numel()} attention sums are NaN or infinite, so they have no order")
    sums = received.double().sort(dim=-1, descending=True).values.cumsum(dim=-1)
    return sums / sums[:, -1:]


def token_counts(ids: Tensor, image_token: int, special: Collection[int]) -> dict[str, int]:
    """How many tokens of a prompt (L,) are of which of `PARTS`; texts between pictures count as after.

    Args:
        image_token: id of the placeholder of one visual token; visual, whether or not it is special too.
        special: ids of tokens that are no text, such as the one that starts a prompt.

    Raises:
        FoveateError: there is no visual token.
    """
    visual = ids == image_token
    if not bool(visual.any()):
        raise FoveateError(f"the prompt of {ids.numel()} tokens holds no visual token (id {image_token})")
    kept_apart = torch.isin(ids, torch.tensor(sorted(special), device=ids.device, dtype=ids.dtype)) & ~visual
    text = ~visual & ~kept_apart
    first = int(visual.int().argmax())
    parts = (text[:first], visual, text[first:], kept_apart)
    return {name: int(part.sum()) for name, part in zip(PARTS, parts, strict=True)}


@dataclass(frozen=True)
class Similarity:
    """The similarity of one picture's patches to CLS and where it falls off (image-text interaction, equations 1-3).

    Attributes:
        curve: (N,) in descending order.
        split: i*, the length of its head; all where the curve is flat.
        count: tokens that the method keeps: alpha times the split, rounded.
    """

    curve: tuple[float, ...]
    split: int
    count: int


def similarity(seen: Mapping[int | str, Block], method: ImageTextInteraction) -> list[Similarity]:
    """The similarity curves of B pictures in the encoder block that `method` reads.

    Args:
        seen: encoder blocks, among them the one that `method.needs` names, with `hidden` (B, N, E) and `cls` (B, E).
    """
    name = method.needs[0].split(".")[1]
    hidden = seen[int(name) if name.isdigit() else name].hidden
    assert hidden is not None
    batch, tokens, _ = hidden.shape
    index = torch.arange(tokens, device=hidden.device).expand(batch, -1)
    signals = Signals(original=tokens, index=index, tower=seen)
    splits = _counts(dataclasses.replace(method, alpha=1.0, keep=None), signals)
    curves = method.similarity(signals).sort(dim=-1, descending=True).values.tolist()
    rows = zip(curves, splits, _counts(method, signals), strict=True)
    return [Similarity(tuple(curve), split, count) for curve, split, count in rows]


def _counts(method: ImageTextInteraction, signals: Signals) -> list[int]:
    """Tokens that the method keeps of each picture."""
    chosen = method.select(signals)
    assert isinstance(chosen, Selection)
    return [kept.numel() for kept in chosen.indices]


# ---------------------------------------------------------------------------------------------------------------------
# a model on some inputs


@dataclass(frozen=True)
class Input:
    """What was measured on one picture and its question.

    Attributes:
        curves: of each encoder block, 101 shares of the attention.
        holding: of each encoder block, the share of tokens that hold 80 % of it.
        tokens: counts by part of the prompt.
        similarity: None where the encoder has no CLS token.
    """

    name: str
    question: str
    curves: tuple[tuple[float, ...], ...]
    holding: tuple[float, ...]
    tokens: dict[str, int]
    similarity: Similarity | None

    @property
    def visual_share(self) -> float:
        """Visual tokens as a share of the prompt."""
        return self.tokens["visual"] / sum(self.tokens.values())


@dataclass(frozen=True)
class Analysis:
    """What was measured on all inputs.

    Attributes:
        encoder: its `model_type`.
        read: the block whose output the projector reads.
        method: whose split was measured.
    """

    encoder: str
    read: int
    method: ImageTextInteraction
    inputs: tuple[Input, ...] = field(repr=False)

    @property
    def blocks(self) -> int:
        """Encoder blocks."""
        return len(self.inputs[0].curves)

    def curve(self, block: int) -> tuple[float, ...]:
        """The attention curve of a block, mean over the inputs."""
        return tuple(map(statistics.fmean, zip(*(one.curves[block] for one in self.inputs), strict=True)))

    def holding(self, block: int) -> list[float]:
        """The share of tokens that hold 80 % of a block's attention, for each input."""
        return [one.holding[block] for one in self.inputs]

    def similarities(self) -> list[Similarity]:
        """Of each input; empty where the encoder has no CLS token."""
        return [one.similarity for one in self.inputs if one.similarity is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, six digits each: means first, then every input."""
        splits = self.similarities()
        return {
            "encoder": self.encoder,
            "blocks": self.blocks,
            "read": self.read,
            "method": str(self.method),
            "attention": [self._block(block) for block in range(self.blocks)],
            "tokens": {part: _short(statistics.fmean(one.tokens[part] for one in self.inputs)) for part in PARTS},
            "visual_share": _short(statistics.fmean(one.visual_share for one in self.inputs)),
            "similarity": {
                "split": _short(statistics.fmean(one.split for one in splits)),
                "count": _short(statistics.fmean(one.count for one in splits)),
            }
            if splits
            else None,
            "inputs": [_input(one) for one in self.inputs],
        }

    def _block(self, block: int) -> dict[str, Any]:
        curve, holding = self.curve(block), self.holding(block)
        return {
            "block": block,
            "top_quarter": _short(curve[QUARTER]),
            "tokens_holding_80": _short(statistics.fmean(holding)),
            "least": _short(min(holding)),
            "most": _short(max(holding)),
            "curve": list(map(_short, curve)),
        }


def _input(one: Input) -> dict[str, Any]:
    blocks = zip(one.holding, one.curves, strict=True)
    found = one.similarity
    return {
        "name": one.name,
        "question": one.question,
        "tokens": one.tokens,
        "visual_share": _short(one.visual_share),
        "similarity": found and {"split": found.split, "count": found.count, "curve": list(map(_short, found.curve))},
        "attention": [{"tokens_holding_80": _short(held), "curve": list(map(_short, curve))} for held, curve in blocks],
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def analyze(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    method: ImageTextInteraction | None = None,
    progress: Callable[[int], None] | None = None,
) -> Analysis:
    """Measure attention, prompt and similarity of a model on pictures, one by one, each with its question.

    Of a picture in tiles attention is the mean over them, and similarity that of the first. Where a block sees windows,
    attention is that of the nearest block which sees whole pictures.

    Args:
        model: a loaded vision-language model.
        processor: its own.
        names: of the pictures; None numbers them from 1.
        method: whose encoder block, split and count the similarity is of; None is its defaults.
        progress: called with 1 after each picture.

    Raises:
        FoveateError: no picture, another number of questions or names, a method that does not read CLS, a model of no
            known family, or an encoder that lacks the method's block.
    """
    method = method or ImageTextInteraction()
    names = [str(number) for number in range(1, len(images) + 1)] if names is None else names
    if not images or not len(images) == len(questions) == len(names):
        counts = f"{len(images)} pictures, {len(questions)} questions and {len(names)} names"
        raise FoveateError(f"{counts} were given; give at least one picture, and one question and name for each")
    if method.attention != "cls":
        raise FoveateError(f"{method} splits no similarity to CLS, which is what is measured; leave out attention=")
    family = family_of(model)
    tower, row = family.tower_of(model)
    blocks = len(row.blocks_of(tower))
    has_cls = not missing_signals(method.needs, row)
    needs = [f"tower.{block}.received" for block in range(blocks)] + (list(method.needs) if has_cls else [])
    measured = []
    for name, image, question in zip(names, images, questions, strict=True):
        inputs = encode(model, processor, [[image]], [question])
        seen = observe(model, renamed(inputs), needs)
        found = similarity(seen, method)[0] if has_cls else None
        special = processor.tokenizer.all_special_ids
        tokens = token_counts(inputs["input_ids"][0], family.image_token_id(model.config), special)
        measured.append(Input(name, question, *_attention(seen, blocks), tokens, found))
        if progress is not None:
            progress(1)
    return Analysis(row.type, family.read_block(model), method, tuple(measured))


def _attention(seen: Mapping[int | str, Block], blocks: int) -> tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]:
    """Curve of each block and share of patches that hold 80 %, of the one picture that was seen: mean of its tiles."""
    received = [_received(seen[block]) for block in range(blocks)]
    curves = [tuple(attention_curve(of_tiles).mean(dim=0).tolist()) for of_tiles in received]
    return tuple(curves), tuple(float(tokens_holding(of_tiles).mean()) for of_tiles in received)


def _received(block: Block) -> Tensor:
    assert block.received is not None
    return block.received
