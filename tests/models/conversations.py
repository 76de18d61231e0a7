"""Batches of conversations with a pruned model, and the same conversations one by one by the reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from models import tiny
from models.untouched import untouched
from references.reference_decoder import Conversation
from torch import Tensor

import foveate
from foveate.core import Grid, Method, Selection, Signals, Site
from foveate.trace import Call

STEPS = 8
DECODERS = (*tiny.DECODERS, "mistral, wide window")
ATTENTION = ("sdpa", "eager")
ROWS = ("3i4", "2i1i5", "6")
"""One picture, two pictures and none."""


@dataclass(frozen=True)
class RaggedInside(Method):
    """RaggedInside: keeps another number of tokens of each image, by what the last token attends to."""

    site: ClassVar[Site] = "layer"
    adaptive: ClassVar[bool] = True
    needs = ("decoder.last_query",)

    layer: int = 2

    def depths(self, layers: int) -> tuple[int, ...]:
        return (self.layer,)

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return None

    def select(self, signals: Signals) -> Selection:
        assert signals.decoder is not None and signals.decoder.last_query is not None
        scores = signals.decoder.last_query.double().mean(dim=1)
        kept = []
        for row, index in zip(scores, signals.index, strict=True):
            chosen = row > row.mean() * 1.05
            chosen[row.argmax()] = True
            kept.append(index[chosen])
        return Selection(kept)


def generate(model: Any, given: dict[str, Tensor], **options: Any) -> Any:
    """A greedy answer, or whatever `options` make of it, with its logits."""
    settings = dict(max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True)
    return model.generate(**given, **{**settings, **options})


@dataclass(eq=False)
class Turn:
    """One call of generate(): what it newly brought, what it answered, and what its input stages kept."""

    given: dict[str, Tensor]
    answer: Tensor  # (R, M)
    call: Call | None
    repeats: int = 1


def rows_of(turns: Sequence[Turn], model: Any, methods: Sequence[Method], renumber: bool = False) -> list[Tensor]:
    """Of each row of the last turn, (M, V) what predicts its answer."""
    batch = turns[-1].answer.shape[0]
    return [logits_of(turns, model, methods, row, renumber)[0] for row in range(batch)]


def logits_of(
    turns: Sequence[Turn], model: Any, methods: Sequence[Method], row: int, renumber: bool = False
) -> tuple[Tensor, Conversation]:
    """(M, V) of the last turn of one row, and the conversation as it then stands."""
    talk = Conversation(model, methods, renumber=renumber)
    said: Tensor | None = None
    found = torch.empty(0)
    for turn in turns:
        of = row // turn.repeats
        one = tiny.alone(turn.given, of, model.config.image_token_id)
        ids = one["input_ids"][0]
        if said is not None:
            ids = torch.cat([said[-1:], ids])
        kept = None
        if turn.call is not None:
            images = [image for image in turn.call.images if image.row == of]
            before = [[stage for stage in image.stages if stage.layer is None] for image in images]
            kept = [
                stages[-1].kept if stages else torch.arange(image.original)
                for image, stages in zip(images, before, strict=True)
            ]
        said = turn.answer[row]
        found = talk.answer(ids, one.get("pixel_values"), said, kept)
    return found, talk


def worst(out: Any, rows: Sequence[Tensor]) -> float:
    """Largest difference between the logits of an answer (R rows, M steps) and the reference's."""
    logits = torch.stack(out.logits, dim=1)
    return float(torch.stack([(mine - theirs).abs().max() for mine, theirs in zip(logits, rows, strict=True)]).max())


def continued(first: dict[str, Tensor], answer: Tensor, second: dict[str, Tensor]) -> dict[str, Tensor]:
    """What generate() is given for a second turn: the whole conversation, and only the new pictures."""
    mask = [first["attention_mask"], torch.ones_like(answer[:, first["input_ids"].shape[1] :])]
    given = {
        "input_ids": torch.cat([answer, second["input_ids"]], dim=1),
        "attention_mask": torch.cat([*mask, second["attention_mask"]], dim=1),
    }
    if "pixel_values" in second:
        given["pixel_values"] = second["pixel_values"]
    return given


def sizes(cache: Any) -> list[tuple[int, ...]]:
    """Shape of each layer's keys."""
    return [tuple(layer.keys.shape) for layer in cache.layers]


def held_by(cache: Any) -> int:
    """Bytes of a cache's keys and values."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def wide(core: dict[str, tuple[str, ...]], methods: Iterable[str]) -> Any:
    """Every method on every decoder, under both kinds of attention in turns; outside the core it is slow."""
    cases = []
    for row, name in enumerate(methods):
        for column, decoder in enumerate(DECODERS):
            for attn in ATTENTION:
                fast = name in core.get(decoder, ()) and attn == "sdpa"
                if fast or attn == ATTENTION[(row + column) % 2]:
                    cases.append(pytest.param(name, decoder, attn, marks=() if fast else pytest.mark.slow))
    return pytest.mark.parametrize(("name", "decoder", "attn"), cases)


def each_decoder(*fast: str) -> Any:
    """Every decoder; all but the named ones are slow."""
    return pytest.mark.parametrize(
        "decoder", [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in DECODERS]
    )


def made(decoder: str, attn: str = "sdpa") -> Any:
    """A tiny model; the wide window is shorter than the prompts, yet pictures are seen through it."""
    if decoder != "mistral, wide window":
        return tiny.model(decoder=decoder, attn=attn)
    model = tiny.model(decoder="mistral-sliding", attn=attn)
    model.config.text_config.sliding_window = 24
    return model


def answered(model: Any, given: dict[str, Tensor], methods: list[Method], **options: Any) -> tuple[Any, Turn]:
    """An answer under pruning, and the turn as the reference wants it."""
    with untouched(model), foveate.prune(model, methods) as trace:
        out = generate(model, given, **options)
        call = trace.latest
    repeats = out.sequences.shape[0] // given["input_ids"].shape[0]
    return out, Turn(given, out.sequences[:, given["input_ids"].shape[1] :], call, repeats)
