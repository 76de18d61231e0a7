"""Encodes pictures and videos once for several rivals: remembers the latest output and what the blocks showed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.core import Block, FoveateError
from foveate.families import family_of
from foveate.runtime.encoder.encode import encoder_of
from foveate.runtime.encoder.probe import Probe


@contextmanager
def share_encoding(model: Any, needs: Iterable[str]) -> Iterator[None]:
    """While this is open, handles on `model` that are given the same pixels again use their first encoding.

    The latest pictures and the latest videos are remembered.

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
    for kind, encode in shared.encode.items():
        setattr(model.base_model, encoder_of(kind), encode)
    model._foveate_encoding = shared
    try:
        yield
    finally:
        del model._foveate_encoding
        for kind in shared.encode:
            delattr(model.base_model, encoder_of(kind))
        shared.probe.remove()


@dataclass(eq=False)
class _Latest:
    """The latest encoding of one kind."""

    given: dict[str, Any] | None = None
    output: Any = None
    blocks: dict[int | str, Block] = field(default_factory=dict)


class Encoding:
    """The latest encodings of one model, of pictures and of videos, and what was seen of them.

    Attributes:
        encode: by kind, what is to stand in for the model's own method.
    """

    def __init__(self, model: Any, needs: Iterable[str]) -> None:
        family = family_of(model)
        self.probe = Probe(model, family, needs)
        self._blocks: dict[int | str, Block] | None = None  # of what was encoded since a handle last took it
        self._encoding = False
        kinds = ("image",) if family.videos is None else ("image", "video")
        self.encode = {kind: self._remembering(getattr(model.base_model, encoder_of(kind))) for kind in kinds}

    def _remembering(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        signature, latest = inspect.signature(stock), _Latest()

        @functools.wraps(stock)
        def encode(*arguments: Any, **options: Any) -> Any:
            if self._encoding:  # some models encode a video by their method for pictures
                return stock(*arguments, **options)
            given = signature.bind(*arguments, **options).arguments
            if latest.given is None or not _same(latest.given, given):
                latest.given = None  # what an encoding that fails leaves is nobody's
                self._encoding = True
                try:
                    latest.output = stock(*arguments, **options)
                finally:
                    self._encoding, latest.blocks = False, self.probe.take()
                latest.given = given
            self._blocks = latest.blocks
            return latest.output

        return encode

    def take(self) -> dict[int | str, Block]:
        """What a probe of its own would have seen since the last call."""
        blocks, self._blocks = self._blocks, None
        return blocks or {}


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
