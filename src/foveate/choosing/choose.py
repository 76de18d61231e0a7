"""Runs stages on the tokens of one call: asks the method, and applies what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from foveate.choosing.asking import Answer, ask
from foveate.choosing.images import Image, TileTokens, Tokens
from foveate.choosing.later import Later
from foveate.choosing.signals import Depth, Prompt, Sources, size_of
from foveate.core import Block, FoveateError, Method
from foveate.ops.device import beside, on_device
from foveate.spec import format as format_spec
from foveate.trace import StageRecord

T = TypeVar("T", bound=Tokens)


@dataclass(frozen=True, eq=False)
class Outcome(Generic[T]):
    """What a stage inside encoder or decoder left of some tokens."""

    tokens: T
    features: Tensor | None  # (K, E) their hidden states, where they merged; else each has its own


def choose(
    parts: Sequence[Method],
    images: Sequence[Image],
    blocks: Mapping[int | str, Block],
    prompt: Prompt,
    project: Callable[[Tensor], Tensor] | None,
) -> list[Image]:
    """Let every part that acts between encoder and decoder act on every image in turn; what is left of each.

    Args:
        blocks: what the probe saw, B = the images in order, N = their original tokens.
        project: maps encoded tokens (K, E) to decoder tokens (K, D); None where the projector is not pointwise.
    """
    left = list(images)
    for part in parts if images else ():
        sources = Sources(blocks, prompt, None, left[0].features.device)
        answers = ask(part, left, sources)
        left = [_shortened(part, answer, image, project) for answer, image in zip(answers, left, strict=True)]
    return left


def choose_inside(
    part: Method,
    images: Sequence[T],
    like: Tensor,
    blocks: Mapping[int | str, Block],
    prompt: Prompt,
    at: Depth,
    later: Later | None = None,
) -> list[Outcome[T]]:
    """Let one stage inside the decoder or the encoder act on every image.

    Args:
        later: where a method merges, notes what it answers, to be read and refused behind its last block.
        like: has device and dtype of the hidden states.
        blocks: as `choose` has them.
    """
    answers = ask(part, images, Sources(blocks, prompt, at, like.device, later))
    return [
        _shortened_inside(part, answer, image, like.dtype, prompt, at, later)
        for answer, image in zip(answers, images, strict=True)
    ]


def _shortened(part: Method, answer: Answer, image: Image, project: Callable[[Tensor], Tensor] | None) -> Image:
    """What of an image goes into the decoder."""
    name, kept = format_spec(part), answer.kept
    if answer.features is None:
        features = image.features[on_device(_positions(name, kept, image), image.features.device)]
    else:
        features = answer.features
        if answer.encoded:
            if project is None:
                raise FoveateError(
                    f"{name} returns encoded tokens, but this family's projector merges neighbours and cannot map "
                    "single ones; methods that return projected tokens, or none, work"
                )
            features = project(features)
        features = features.to(image.features.dtype)
    return replace(image, features=features, **_noted(part, name, answer, kept, image))


def _shortened_inside(
    part: Method,
    answer: Answer,
    tokens: T,
    dtype: torch.dtype,
    prompt: Prompt,
    at: Depth,
    later: Later | None,
) -> Outcome[T]:
    """Inside encoder or decoder: every kept token is one of the block's, with its own hidden state or a new one."""
    name, kept = format_spec(part), answer.kept
    if answer.encoded:
        raise FoveateError(f"{name} returns tokens for the projector where only the block's own stream fits")
    extra = None if answer.groups is None else answer.extra
    positions = _positions(name, kept, tokens, extra, later)
    changed: dict[str, Any] = {}
    flops = 0
    if isinstance(tokens, Image):
        changed["features"] = tokens.features[on_device(positions, tokens.features.device)]
        flops = part.flops(tokens.index.numel(), int(prompt.is_text[tokens.row].sum()))
    if isinstance(tokens, TileTokens):
        changed.update(_regrouped(name, answer.groups, positions, tokens), unread=later is not None)
    changed.update(_noted(part, name, answer, kept, tokens, at, flops))
    return Outcome(replace(tokens, **changed), None if answer.features is None else answer.features.to(dtype))


def _noted(
    part: Method,
    name: str,
    answer: Answer,
    kept: Tensor,
    tokens: Tokens,
    at: Depth | None = None,
    flops: int = 0,
) -> dict[str, Any]:
    """What a stage changes of any tokens, its own record included."""
    before, stages = tokens.index.numel(), tokens.stages
    if part.merging and at is not None and at.stage and stages and stages[-1].method == name:
        before, stages = stages[-1].before, stages[:-1]  # the merges of all blocks count as one stage
    layer = None if at is None else at.layer
    scores = None if part.merging else answer.scores  # those of one block say little of all
    stage = StageRecord(name, part.site, layer, before, kept.numel(), kept, answer.extra, flops, scores)
    return {
        "index": kept,
        "extra": answer.extra,
        "untouched": tokens.untouched and kept.numel() == tokens.original and _rising(answer, part),
        "adapted": tokens.adapted or part.adaptive,
        "stages": (*stages, stage),
    }


def _rising(answer: Answer, part: Method) -> bool:
    """Whether what was kept of all tokens is in their order; of blocks in which tokens merge, whether none did."""
    return answer.groups is None if part.merging else bool((answer.kept[1:] > answer.kept[:-1]).all())


def _positions(
    name: str, kept: Tensor, tokens: Tokens, extra: Tensor | None = None, later: Later | None = None
) -> Tensor:
    """Where the kept original indices stand among the tokens that are left; 0 for `extra` ones, which stand nowhere."""
    place = kept.new_full((tokens.original,), -1)
    order = torch.arange(tokens.index.numel())
    positions = place.index_copy(0, beside(tokens.index, kept), beside(order, kept))[kept]
    if extra is not None:
        positions = positions.masked_fill(extra, 0)
    if later is not None:
        words = f"{name} keeps {{}} tokens which an earlier stage has dropped"
        later.complaints.add((positions < 0).sum(), words)
        return positions.clamp(min=0)
    if bool((positions < 0).any()):
        gone = kept[positions < 0][0].item()
        raise FoveateError(f"{name} keeps token {gone}, which an earlier stage has dropped")
    return positions


def _regrouped(name: str, groups: Tensor | None, positions: Tensor, tokens: TileTokens) -> dict[str, Any]:
    """How many patches each output token stands for, and which one a patch is in."""
    if groups is None and tokens.size is None and tokens.group is None:
        return {}
    present, left, size = tokens.index.numel(), positions.numel(), tokens.size
    if groups is None:
        size = None if size is None else beside(size, positions)[positions]
        went = positions.new_full((present,), -1).index_copy(0, positions, beside(torch.arange(left), positions))
    else:
        went = groups
        if went.numel() != present:
            raise FoveateError(f"{name} says where {went.numel()} tokens went, but {present} were there")
        if left < present or size is not None:
            each = beside(size_of(tokens), positions)
            sizes = each.new_zeros(left + 1).index_add(0, went.where(went >= 0, left), each)
            size = sizes[:left].clamp(min=1.0)
    group = None if tokens.group is None else beside(tokens.group, positions)
    return {"size": size, "group": None if group is None else went[group.clamp(min=0)].where(group >= 0, -1)}
