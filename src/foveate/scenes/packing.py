"""Packs several questions about one picture into one sequence, so that its tokens are computed once for all."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from foveate.core import FoveateError
from foveate.scenes import vocabulary
from foveate.scenes.generator import Scenes
from foveate.scenes.mini import EOS, PAD, TOKENS
from foveate.scenes.questions import Question, questions

IGNORED = -100  # the label of a token that no loss reads
MIX: Mapping[str, float] = {"digit": 4, "color": 3, "existence": 3, "count": 1, "describe": 1}
"""How often each kind of question is asked of one picture, relative to the others."""

_ID = {word: place for place, word in enumerate(vocabulary.WORDS)}


@dataclass(frozen=True)
class Packed:
    """Text of B sequences that all start with a picture; T tokens follow it, and padding is `<pad>` in segment -1.

    Attributes:
        ids: (B, T) int64, `USER question ASSISTANT answer <eos>` one after the other.
        segment: (B, T) int64, the number of the question that a token belongs to, -1 for padding.
        offset: (B, T) int64, a token's place in its own question, so that each question starts right after the picture.
        labels: (B, T) int64, the token that follows, where that is part of an answer; else -100.
        target: (B, T) int64, the place in `Scenes` of the object that a token's question is about, -1 where of none.
    """

    ids: Tensor
    segment: Tensor
    offset: Tensor
    labels: Tensor
    target: Tensor

    def to(self, device: str | torch.device) -> Packed:
        return Packed(*(getattr(self, field.name).to(device) for field in fields(self)))


def tokens(question: Question) -> tuple[list[int], int]:
    """Ids of `USER question ASSISTANT answer <eos>`, and how many of them come before the answer."""
    prompt = ["USER", *question.text.split(), "ASSISTANT"]
    return [*(_ID[word] for word in prompt), *(_ID[word] for word in question.answer.split()), EOS], len(prompt)


def choose(asked: Sequence[Question], room: int, draw: random.Random, mix: Mapping[str, float] = MIX) -> list[Question]:
    """Questions out of `asked`, in random order, that fit into `room` tokens; `mix` weighs the kinds, 0 is never."""
    kinds = {kind: [one for one in asked if one.kind == kind] for kind, share in mix.items() if share}
    for rest in kinds.values():
        draw.shuffle(rest)
    chosen: list[Question] = []
    while any(kinds.values()):
        open_kinds = [kind for kind, rest in kinds.items() if rest]
        kind = draw.choices(open_kinds, [mix[kind] for kind in open_kinds])[0]
        question = kinds[kind].pop()
        length = len(tokens(question)[0])
        if length > room:
            break
        chosen.append(question)
        room -= length
    return chosen


def pack(rows: Sequence[Sequence[Question]], length: int) -> Packed:
    """Lay out each row's questions in `length` tokens.

    Raises:
        FoveateError: a row's questions need more than `length` tokens.
    """
    shape = (len(rows), length)
    packed = Packed(*(torch.full(shape, empty, dtype=torch.int64) for empty in (PAD, -1, 0, IGNORED, -1)))
    for row, asked in enumerate(rows):
        start = 0
        for number, question in enumerate(asked):
            ids, prompt = tokens(question)
            stop = start + len(ids)
            if stop > length:
                raise FoveateError(
                    f"the questions of row {row} need {stop} tokens or more; length={length} is too small"
                )
            packed.ids[row, start:stop] = torch.tensor(ids)
            packed.segment[row, start:stop] = number
            packed.target[row, start:stop] = -1 if question.target is None else question.target
            packed.offset[row, start:stop] = torch.arange(len(ids))
            packed.labels[row, start + prompt - 1 : stop - 1] = torch.tensor(ids[prompt:])
            start = stop
    return packed


def ask(scenes: Scenes, length: int, draw: random.Random, mix: Mapping[str, float] = MIX) -> Packed:
    """Random questions about each picture, as many as fit into `length` tokens."""
    return pack([choose(questions(scenes, row, draw), length, draw, mix) for row in range(len(scenes))], length)


def ask_about(scenes: Scenes, length: int, draw: random.Random) -> tuple[Packed, Tensor]:
    """Random questions about one object of each picture, and which one: (B,) its place in `Scenes`."""
    asked, about = [], []
    for row in range(len(scenes)):
        every = [one for one in questions(scenes, row, draw) if one.target is not None]
        about.append(draw.choice([one.target for one in every]))
        asked.append(choose([one for one in every if one.target == about[-1]], length, draw))
    return pack(asked, length), torch.tensor(about)


def attention_mask(packed: Packed, prefix: int, dtype: torch.dtype) -> Tensor:
    """Who may look at whom: (B, 1, L, L) with L = prefix + T, 0 where allowed and the lowest number elsewhere.

    The prefix (`<bos>` and the picture) is causal; a question's token sees the whole prefix and what came before it in
    its own question, so that its answer is the one it would get alone.
    """
    batch, length = packed.ids.shape
    device = packed.ids.device
    own = packed.segment[:, :, None] == packed.segment[:, None, :]  # (B, T, T)
    seen = torch.ones(batch, prefix + length, prefix + length, dtype=torch.bool, device=device)
    seen[:, prefix:, prefix:] = own
    seen = seen.tril()
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def position_ids(packed: Packed, places: Tensor) -> Tensor:
    """Positions (B, L) of `<bos>`, the picture's tokens at `places` (B, N) and the text: each question starts at 577.

    `places` are raster indices; a picture that is given by few of its tokens keeps their original positions.
    """
    bos = torch.zeros_like(places[:, :1])
    return torch.cat((bos, places + 1, packed.offset + 1 + TOKENS), dim=1)
