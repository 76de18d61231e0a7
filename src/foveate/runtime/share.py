"""Encodes pictures once for several rivals: remembers the encoder's latest output and what its blocks showed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from foveate.core import Block, FoveateError
from foveate.families import family_of
from foveate.runtime.probe import Probe


@contextmanager
def share_encoding(model: Any, needs: Iterable[str]) -> Iterator[None]:
    """While this is open, handles on `model` that are given the same pixel tensor again use its first encoding.

    For methods that act behind the encoder. Their answers are those they would give alone: the probe reads what any of
    them needs, once, and every handle is shown what it asked for.

    Args:
        model: a loaded vision-language model of a known family.
        needs: signals of all methods that will run.

    Raises:
        FoveateError: the model is being pruned.
    """
    if getattr(model, "_foveate_handle", None) is not None:
        raise FoveateError("this model is being pruned; share its encoding before a handle is started")
    shared = Encoding(model, needs)
    shared.probe.install()
    model.base_model.get_image_features = shared.encode
    model._foveate_encoding = shared
    try:
        yield
    finally:
        del model._foveate_encoding
        del model.base_model.get_image_features
        shared.probe.remove()


class Encoding:
    """The latest encoding of one model, and what was seen of it."""

    def __init__(self, model: Any, needs: Iterable[str]) -> None:
        self.probe = Probe(model, family_of(model), needs)
        self._given: dict[str, Any] | None = None
        self._output: Any = None
        self._blocks: dict[int | str, Block] = {}
        self._fresh = False  # encoded since a handle last took what was seen
        stock = model.base_model.get_image_features
        signature = inspect.signature(stock)

        @functools.wraps(stock)
        def encode(*arguments: Any, **options: Any) -> Any:
            given = signature.bind(*arguments, **options).arguments
            if self._given is None or not _same(self._given, given):
                self._given = None  # what an encoding that fails leaves is nobody's
                self._output = stock(*arguments, **options)
                self._blocks, self._given = self.probe.take(), given
            self._fresh = True
            return self._output

        self.encode = encode

    def take(self) -> dict[int | str, Block]:
        """What a probe of its own would have seen since the last call."""
        fresh, self._fresh = self._fresh, False
        return self._blocks if fresh else {}


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two calls are given the same."""
    if first.keys() != second.keys():
        return False
    pairs = [(value, second[name]) for name, value in first.items()]
    return all(
        torch.equal(one, other)
        if isinstance(one, Tensor) and isinstance(other, Tensor)
        else one is other or one == other
        for one, other in pairs
    )
