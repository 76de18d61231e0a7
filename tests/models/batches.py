"""Signals taken apart into rows and put together again: what a method says of a row alone and of the row in a batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from foveate.core import CacheSelection, Method, Selection, Signals


def answers(method: Method, signals: list[Signals]) -> list[Any]:
    """The method's answers, stage after stage, from a memory that is empty at first."""
    memory: dict[str, Any] = {}
    return [method.select(dataclasses.replace(stage, memory=memory)) for stage in signals]


def alone(value: Any, row: int) -> Any:
    """One row of every tensor inside, and everything else as it is."""
    if isinstance(value, Tensor):
        return value[row : row + 1]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: alone(getattr(value, field.name), row) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, dict):
        return {name: alone(one, row) for name, one in value.items()}
    return value


def together(values: list[Any]) -> Any:
    """The opposite of `alone`: one batch of the rows of several."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        return dataclasses.replace(first, **{name: together([getattr(one, name) for one in values]) for name in names})
    if isinstance(first, dict):
        return {name: together([one[name] for one in values]) for name in first}
    return first


def row_of(answer: Any, row: int) -> Any:
    """What an answer says of one row, as an answer for that row alone."""
    if isinstance(answer, CacheSelection):
        return CacheSelection(answer.positions[row : row + 1])
    features = None if answer.features is None else answer.features[row : row + 1]
    return dataclasses.replace(answer, indices=answer.indices[row : row + 1], features=features)


def rows_of(signals: Signals) -> int:
    """B, of the cache at a cache site."""
    if signals.cache is not None and signals.cache.age is not None:
        return signals.cache.age.shape[0]
    return signals.shape[0]


def assert_same(got: Any, expected: Selection | CacheSelection, **close: float) -> None:
    """Integers exactly, floats closely."""
    if isinstance(expected, CacheSelection):
        assert torch.equal(got.positions, expected.positions)
        return
    assert len(got.indices) == len(expected.indices)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got.indices, expected.indices, strict=True))
    assert (got.features is None) == (expected.features is None)
    for mine, theirs in zip(got.features or [], expected.features or [], strict=True):
        torch.testing.assert_close(mine, theirs, **close)


def assert_rows_stand_alone(method: Method, signals: list[Signals]) -> list[Any]:
    """Ask for the batch and for each row of it; the batch's answers."""
    batch = answers(method, signals)
    for row in range(rows_of(signals[0])):
        single = answers(method, [alone(stage, row) for stage in signals])
        for got, expected in zip(single, batch, strict=True):
            assert_same(got, row_of(expected, row))
    return batch
