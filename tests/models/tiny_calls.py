"""Calls of the tiny families: prompts and their pictures as a processor would hand them over."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from models.tiny_families import kind_of
from models.tiny_parts import EOS, IMAGE, PAD, VIDEO, Picture
from torch import Tensor


class Call(dict[str, Tensor]):
    """Keyword arguments of a call that remember the model and the pictures of each row."""

    model: Any
    pictures: list[list[Picture]]

    def alone(self, row: int) -> Call:
        """One row as it would be by itself: without padding, with its own pictures only."""
        valid = self["attention_mask"][row].bool()
        ids = self["input_ids"][row][valid][None]
        return call(self.model, ids, torch.ones_like(ids), [self.pictures[row]])

    def continued(self, answer: Tensor, second: Call) -> tuple[Call, Call]:
        """A conversation's second call, and the whole conversation as one prompt.

        Args:
            answer: (B, S + M) ids of the first prompt and its answer.
        """
        ids = torch.cat([answer, second["input_ids"]], dim=1)
        grown = torch.ones_like(answer[:, self["input_ids"].shape[1] :])
        mask = torch.cat([self["attention_mask"], grown, second["attention_mask"]], dim=1)
        both = [[*before, *now] for before, now in zip(self.pictures, second.pictures, strict=True)]
        return call(self.model, ids, mask, second.pictures), call(self.model, ids, mask, both)


def call(
    model: Any,
    ids: Tensor,
    mask: Tensor | None,
    pictures: Sequence[Sequence[Picture]],
) -> Call:
    """The tensors of a call: ids, mask, token types and pixels."""
    made = Call(input_ids=ids)
    if mask is not None:
        made["attention_mask"] = mask
    kind = kind_of(model)
    made.update(kind.types(ids))
    stills = [[one for one in row if not one.video] for row in pictures]
    videos = [one for row in pictures for one in row if one.video]
    if any(stills):
        made.update(kind.collate(stills, ids))
    if videos and kind.collate_videos is not None:
        made.update(kind.collate_videos(videos))
    made.model, made.pictures = model, [list(row) for row in pictures]
    return made


def inputs(model: Any, rows: Sequence[str], padding: str, generator: torch.Generator, batch_mask: bool) -> Call:
    """What a processor would make of some layouts: a number is so many words, `i` a picture, `v` a video."""
    pictures: list[list[Picture]] = []
    lines: list[Tensor] = []
    number = 0
    for row in rows:
        pieces: list[Tensor] = []
        mine: list[Picture] = []
        for piece in row.replace("i", " i ").replace("v", " v ").split():
            if piece == "v":
                video = kind_of(model).video
                assert video is not None
                mine.append(dataclasses.replace(video(model, number, generator), row=lines))
                number += 1
                for run in mine[-1].runs or (mine[-1].tokens,):
                    pieces += [torch.full((run,), VIDEO), torch.randint(EOS + 1, IMAGE, (1,), generator=generator)]
            elif piece == "i":
                picture = kind_of(model).picture(model, number, row.count("i"), generator)
                mine.append(dataclasses.replace(picture, row=lines))
                number += 1
                for place, run in enumerate(mine[-1].runs or (mine[-1].tokens,)):
                    if place:
                        pieces.append(torch.randint(EOS + 1, IMAGE, (1,), generator=generator))
                    pieces.append(torch.full((run,), IMAGE))
            else:
                pieces.append(torch.randint(EOS + 1, IMAGE, (int(piece),), generator=generator))
        pictures.append(mine)
        lines.append(torch.cat(pieces))
    longest = max(one.numel() for one in lines)
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for place, one in enumerate(lines):
        where = slice(longest - one.numel(), None) if padding == "left" else slice(0, one.numel())
        ids[place, where] = one
        mask[place, where] = 1
    return call(model, ids, mask if batch_mask else None, pictures)


def repeating(given: Call) -> Call:
    """The same call with pictures of which a part is of one colour, so that tokens repeat."""

    def plain(picture: Picture) -> Picture:
        pixels = picture.pixels.clone()
        if pixels.ndim == 2:  # the patches of a picture, a row each
            pixels[pixels.shape[0] // 3 :] = 0.3
        else:
            pixels[..., pixels.shape[-2] // 2 :, :] = 0.3
        return dataclasses.replace(picture, pixels=pixels)

    pictures = [[plain(picture) for picture in row] for row in given.pictures]
    return call(given.model, given["input_ids"], given.get("attention_mask"), pictures)
