"""Modules that torch.compile has compiled: which methods work beside them, and when what is compiled runs.

A graph is captured around the hooks by which pruning acts, and what they do on the host is lost in it. So while a
handle is at work, a compiled decoder or whatever is compiled around it runs prompts as they were written, hooks and
all, and the tokens of an answer compiled. generate() divides its work in the same way where it compiles by itself:
decoding on a static cache, and no prompt. It does so on accelerators alone; on a CPU nothing is compiled that nobody
has asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foveate.choosing.signals import JOINT
from foveate.core import FoveateError, Method
from foveate.runtime.calls import Calls
from foveate.runtime.uncopied import Uncopied
from foveate.spec import format as format_spec


@dataclass(frozen=True, eq=False)
class _Point:
    """One compiled module."""

    name: str  # of the module, from the model on
    module: nn.Module  # as it was written
    around: tuple[int, ...]  # ids of the modules that it is in
    wrapper: Any = None  # what torch.compile() has made of it; None where the module itself was changed
    parent: nn.Module | None = None  # of the wrapper, in which it stands as `key`; None where nothing is around it
    key: str = ""

    def holds(self, module: nn.Module) -> bool:
        """Whether this is `module`, or around it, or inside it."""
        return id(module) in self.around or any(one is module for one in self.module.modules())

    def written(self) -> Callable[[], None]:
        """Put the module where its wrapper is; what undoes that."""
        assert self.parent is not None
        modules = self.parent._modules
        modules[self.key] = self.module
        return lambda: modules.update({self.key: self.wrapper})


class Compiled(Uncopied):
    """The compiled modules of one model, from install() to remove().

    Args:
        top: the model as the user gave it, whatever is around it included.
        model: the model of transformers inside.
    """

    def __init__(self, top: Any, model: Any, parts: Sequence[Method]) -> None:
        self.top, self.model, self.parts = top, model, tuple(parts)
        self._undo: list[Callable[[], None]] = []

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """While this is open, modules that torch.compile() has wrapped stand where their wrappers did.

        Raises:
            FoveateError: a hook of a method would be inside a graph, naming both and what works instead.
        """
        points = list(_points(self.top))
        undo = [point.written() for point in points if point.parent is not None]
        try:
            self._check(points)
            yield
        finally:
            for back in undo:
                back()

    def install(self, calls: Calls, entered: Collection[nn.Module]) -> None:
        """From now on what is compiled around hooks runs for the tokens of an answer alone.

        Args:
            entered: the modules around the decoder's layers, from the model on.

        Raises:
            FoveateError: as in `as_written`.
        """
        points = list(_points(self.top))
        self._undo += [point.written() for point in points if point.parent is not None]
        self._check(points)
        told_apart = {id(module) for module in entered}
        for point in points:
            if point.holds(self.model.get_decoder()):
                self._divide(point, calls, told_apart)
            elif point.wrapper is not None:
                self._replace(point.module, "_compiled_call_impl", point.wrapper.dynamo_ctx(point.module._call_impl))

    def remove(self) -> None:
        """All is compiled as it was."""
        while self._undo:
            self._undo.pop()()

    def _check(self, points: Sequence[_Point]) -> None:
        if not points:
            return
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        inside = next((part for part in self.parts if part.site in ("layer", "cache")), None)
        reading = next((part for part in self.parts if _looks_into_the_encoder(part)), None)
        for point in points:
            about_decoder = point.holds(decoder)
            if about_decoder and inside is not None:
                raise FoveateError(
                    f"{point.name} is compiled by torch.compile, and {format_spec(inside)} acts inside the decoder "
                    "while it answers, which a graph has no place for; give the model as it was before torch.compile, "
                    "or use a method that acts before the decoder, such as fopru"
                )
            if not about_decoder and reading is not None and point.module is not head:
                raise FoveateError(
                    f"{point.name} is compiled by torch.compile, and {format_spec(reading)} looks into the encoder, "
                    "which a graph does not show; give that module as it was before torch.compile, or use a method "
                    "that reads the features alone, such as divprune"
                )

    def _divide(self, point: _Point, calls: Calls, entered: set[int]) -> None:
        module: Any = point.module
        own = vars(module)
        if point.wrapper is not None and point.parent is None:  # generate() calls what is inside
            self._replace(point.wrapper, "forward", module.__call__)
        elif point.wrapper is not None or own.get("_compiled_call_impl") is not None:
            graph = own.get("_compiled_call_impl") or point.wrapper.dynamo_ctx(module._call_impl)
            divided = _divided(module, module._call_impl, graph, calls, id(module) in entered)
            self._replace(module, "_compiled_call_impl", divided)
        else:  # its hooks have run
            graph = own["forward"]
            self._replace(module, "forward", _divided(module, graph._torchdynamo_orig_callable, graph, calls, False))

    def _replace(self, module: Any, name: str, function: Callable[..., Any]) -> None:
        own = vars(module)
        before = {name: own[name]} if name in own else None
        own[name] = function
        self._undo.append(lambda: own.pop(name) if before is None else own.update(before))


def _looks_into_the_encoder(part: Method) -> bool:
    return part.site in ("pixels", "tower") or any(need.startswith("tower.") or need in JOINT for need in part.needs)


def _divided(
    module: nn.Module, written: Callable[..., Any], graph: Callable[..., Any], calls: Calls, entered: bool
) -> Callable[..., Any]:
    """A call of `module` that runs the graph for tokens of an answer, and what was written for all else.

    Args:
        entered: whether this is a module that somebody may call by itself, which is a prompt of its own.
    """

    @functools.wraps(written)  # whose signature transformers reads
    def call(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or not calls.answering(module if entered else None):
            return written(*arguments, **options)
        try:
            return graph(*arguments, **options)
        finally:
            if entered:
                calls.await_calls()  # the hooks inside, which would have noted it, are in the graph

    return call


def _untouched(top: Any) -> bool:
    """Whether nothing can be compiled from `top` on, at a glance: hardly any model has something that is."""
    modules = [top]
    for module in modules:  # which grows meanwhile
        own = module.__dict__  # a module that is asked for what it has not takes its time
        if "forward" in own or own.get("_compiled_call_impl") is not None:
            return False
        children = own["_modules"]
        if children:  # most have none
            if "_orig_mod" in children:
                return False
            modules += [child for child in children.values() if child is not None]
    return True


def _points(top: Any) -> Iterator[_Point]:
    """All that is compiled from `top` on."""
    if _untouched(top):
        return
    waiting: list[tuple[Any, tuple[str, ...], tuple[Any, ...]]] = [(top, (), ())]
    while waiting:
        module, names, around = waiting.pop()
        own = vars(module)
        children = own["_modules"]
        inner = children.get("_orig_mod") if children else None
        if inner is not None:
            path = tuple(id(one) for one in around)
            name = ".".join(names) or "the model"
            yield _Point(name, inner, path, module, around[-1] if around else None, names[-1] if names else "")
            waiting.append((inner, names, around))
            continue
        forward = own.get("forward")
        if own.get("_compiled_call_impl") is not None or hasattr(forward, "_torchdynamo_orig_callable"):
            yield _Point(".".join(names) or "the model", module, tuple(id(one) for one in around))
        if children:
            inside = (*around, module)
            named = [(key, child) for key, child in children.items() if child is not None]
            waiting += [(child, (*names, key), inside) for key, child in reversed(named)]
