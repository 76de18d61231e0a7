"""Pruned encoders of every family beside the same encoders by hand: what is asked, and whether both agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from models import tiny, tiny_families
from models.untouched import untouched
from references import documented, family_reference, tower_by_hand
from references.tower_by_hand import ByHand, Piece
from torch import Tensor

from foveate.core import Grid, Method, Selection, Signals, Site
from foveate.families import family_of
from foveate.trace import Call

FAMILIES = tuple(name for name in tiny_families.KINDS if documented.served("tome", name))
ATTENTION = ("sdpa", "eager")
ROWS = ("3i4", "2i1i5", "6")
# Of LLaVA-OneVision's pictures the first is scaled down, so that its tokens share patches.
UNSCALED = ("2i1i5", "6", "1i4")
each_family = pytest.mark.parametrize("family", FAMILIES)
each_attention = pytest.mark.parametrize("attn", ATTENTION)


def longest(hidden: Tensor, count: int) -> Tensor:
    """(K, E): the places of the longest rows, ascending."""
    return hidden.double().norm(dim=-1).topk(count).indices.sort().values


def above(hidden: Tensor) -> Tensor:
    """(K,) which rows are longer than the mean."""
    length = hidden.double().norm(dim=-1)
    stay = length > length.mean()
    stay[length.argmax()] = True
    return stay


@dataclass(frozen=True)
class Cut(Method):
    """Cut: keeps the tokens with the longest hidden states behind the block before each stage."""

    site: ClassVar[Site] = "tower"
    needs = ("tower.latest.hidden",)

    layers: tuple[int, ...] = (1, 3)
    keep: tuple[float, ...] = (0.7, 0.4)

    def depths(self, layers: int) -> tuple[int, ...]:
        return self.layers

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return tuple(max(1, round(share * original)) if share < 1 else int(share) for share in self.keep)

    def select(self, signals: Signals) -> Selection:
        hidden, count = signals.tower["latest"].hidden, self.wanted(signals)
        assert hidden is not None
        return Selection([index[longest(rows, count)] for rows, index in zip(hidden, signals.index, strict=True)])


@dataclass(frozen=True)
class RaggedCut(Cut):
    """RaggedCut: keeps those above the average."""

    adaptive: ClassVar[bool] = True
    layers: tuple[int, ...] = (2,)

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return None

    def select(self, signals: Signals) -> Selection:
        hidden = signals.tower["latest"].hidden
        assert hidden is not None
        return Selection([index[above(rows)] for rows, index in zip(hidden, signals.index, strict=True)])


def made(family: str, attn: str = "sdpa") -> Any:
    return tiny.model(family, attn=attn, blocks=6)


def stock(model: Any, given: Any) -> list[family_reference.Seen]:
    """The pictures of all rows."""
    return [one for row in range(len(given.pictures)) for one in family_reference.pictures(model, given.alone(row))]


def features_of(model: Any, given: Any, method: Any) -> tuple[list[Tensor], list[tuple[Tensor, ...]], Call]:
    """Rows of each picture as the decoder gets them, what is not visual among them; deep features; the call."""
    got: list[Any] = []

    def note(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        got.extend(options["mm_encoder_outputs"].values())

    hook = model.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with untouched(model), tiny.prune(model, method) as trace, torch.no_grad():
            model(**given)
    finally:
        hook.remove()
    others = [one.features.shape[0] - one.visual.numel() for one in stock(model, given)]
    lengths = [image.after + other for image, other in zip(trace.images, others, strict=True)]
    rows = torch.cat(list(got[0].pooler_output)).split(lengths)
    deep = [torch.cat(list(one)).split(lengths) for one in getattr(got[0], "deepstack_features", None) or ()]
    return list(rows), [tuple(block[number] for block in deep) for number in range(len(lengths))], trace.latest


def by_hand(model: Any, given: Any, **stages: Any) -> ByHand:
    seen = stock(model, given)
    return tower_by_hand.encoded(
        model, given, [one.visual for one in seen], [one.features.shape[0] for one in seen], **stages
    )


def agree(model: Any, given: Any, method: Method, **stages: Any) -> Call:
    """The same tokens stay by both ways, and the decoder gets the same of them."""
    got, deep, call = features_of(model, given, method)
    hand = by_hand(model, given, **stages)
    for number, (image, seen) in enumerate(zip(call.images, stock(model, given), strict=True)):
        assert image.kept.tolist() == hand.kept(number)
        assert image.after < image.original
        left = stays(seen, image.kept)
        for mine, theirs in zip((got[number], *deep[number]), (hand.rows[number], *hand.deep[number]), strict=True):
            torch.testing.assert_close(mine, theirs[left], atol=2e-4, rtol=2e-4)
        plain = seen.features[left]
        assert (got[number] - plain).abs().max() > 1e-3, "what left is missed"
    return call


def stays(seen: family_reference.Seen, kept: Tensor) -> Tensor:
    """(M,) bool: the rows of a picture that its kept tokens and what is not visual leave."""
    left = torch.ones(seen.features.shape[0], dtype=torch.bool)
    left[seen.visual] = False
    left[seen.visual[kept]] = True
    return left


def dropping(method: Cut) -> Callable[[list[Piece]], Sequence[tuple[int, Any]]]:
    """The same choice by hand: of each tile its part of the picture's budget."""

    def stages(pieces: list[Piece]) -> list[tuple[int, Any]]:
        def stay(number: int, piece: Piece, means: Tensor) -> list[int]:
            if isinstance(method, RaggedCut):
                return [token for token, yes in zip(piece.there, above(means).tolist(), strict=True) if yes]
            counts = method.count(sum(piece.together))
            assert counts is not None
            share = tower_by_hand.divided(counts[number], piece.together)[piece.place]
            return [piece.there[place] for place in longest(means, share).tolist()]

        return [
            (depth, lambda piece, means, number=number: stay(number, piece, means))
            for number, depth in enumerate(method.layers)
        ]

    return stages


def one_per_block(model: Any) -> Callable[[Piece, int], int]:
    read = family_of(model).read_block(model)
    return lambda piece, block: min(1, len(piece.there) // 2) if block <= read else 0
