"""Worked examples of methods that choose a set: their inputs, and what is asked of every one of these methods."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from models.batches import assert_rows_stand_alone
from torch import Tensor

from foveate.core import Block, Method, Signals
from foveate.ops.subsets import split_budget


def waves(speed: float, rows: int, columns: int) -> Tensor:
    """(1, rows, columns): sin(speed * i * j + 0.37 * i ** 2 - 0.11 * j) for i, j from 1."""
    i = torch.arange(1, rows + 1, dtype=torch.float64)[:, None]
    j = torch.arange(1, columns + 1, dtype=torch.float64)
    return torch.sin(speed * i * j + 0.37 * i * i - 0.11 * j)[None].float()


PATCHES = waves(0.53, 36, 12)
ATTENTION = (2 * waves(0.9, 1, 36)[0]).softmax(dim=-1)[:, None]
"""(1, 1, 36): a single head."""


def salient(hidden: Tensor = PATCHES, attention: Tensor = ATTENTION, **more: Any) -> Signals:
    """What the methods see that ask for the encoder's patches and its CLS attention."""
    batch, tokens, _ = hidden.shape
    block = Block(hidden=hidden, cls_attention=attention)
    return seen(batch, tokens, tower={"read": block}, **more)


def seen(batch: int, tokens: int, **more: Any) -> Signals:
    settings: dict[str, Any] = dict(original=tokens, index=torch.arange(tokens).repeat(batch, 1))
    return Signals(**(settings | more))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept(method: Method, signals: Signals) -> list[list[int]]:
    answer: Any = method.select(signals)
    answer.check(signals.original, signals.shape[0], type(method).__name__)
    assert answer.features is None and answer.extra is None and answer.ordered
    return [row.tolist() for row in answer.indices]


def assert_picks(method: Any, signals: Signals, picks: list[int]) -> None:
    """Each budget keeps so many of the first picks; so their order is checked too."""
    for budget in range(1, len(picks) + 1):
        assert kept(dataclasses.replace(method, keep=budget), signals) == [sorted(picks[:budget])]


def taken(signals: Any, image: int, places: Tensor, tokens: int) -> Any:
    """One image's signals at some of its tokens, wherever an axis of `tokens` tells that tokens are counted."""
    if isinstance(signals, Tensor):
        row = signals[image : image + 1]
        axes = [axis for axis in range(1, row.ndim) if row.shape[axis] == tokens]
        return row.index_select(axes[0], places) if axes else row
    if dataclasses.is_dataclass(signals):
        fields = {f.name: taken(getattr(signals, f.name), image, places, tokens) for f in dataclasses.fields(signals)}
        return type(signals)(**fields)
    if isinstance(signals, dict):
        return {name: taken(value, image, places, tokens) for name, value in signals.items()}
    return signals


def assert_every_tile_stands_alone(method: Any, signals: Signals, tile: Tensor) -> None:
    """Tiles of any size get their even share, chosen as if each were the whole picture; rows do not see each other.

    No other axis may be as long as that of the tokens.
    """
    tiled = dataclasses.replace(signals, tile=tile)
    assert_rows_stand_alone(method, [tiled])
    answers, tokens = kept(method, tiled), signals.shape[1]
    for image, answer in enumerate(answers):
        numbers = sorted(set(tile[image].tolist()))
        sizes = [int((tile[image] == number).sum()) for number in numbers]
        expected = []
        for number, share in zip(numbers, split_budget(method.keep, sizes), strict=True):
            places = (tile[image] == number).nonzero().flatten()
            if share:
                alone = taken(signals, image, places, tokens)
                expected += kept(dataclasses.replace(method, keep=share), alone)[0]
        assert answer == sorted(expected)
        assert len(answer) == method.keep


UNEVEN = torch.tensor([[0] * 20 + [1, 2] * 6 + [3] * 4, [2, 0, 0, 1] * 9])
"""(2, 36): four tiles of 20, 6, 6 and 4 tokens; three of 18, 9 and 9."""
