"""How often pruning makes the host wait for the device: counted on any machine, one line for each method.

python benchmarks/waits.py [SPEC ...] [--batch N] [--tokens N] [--where]

A CPU waits for nothing, so that the counter tells the device's tensors from the host's by where they come from: a
model's weights and inputs, and all that is made of them, are on the device; what is read with .cpu() or made without
naming a device is on the host. A wait is whatever makes the host read the device's answer: scalars, .cpu(), .tolist(),
nonzero, masks as indices, unique, equal, bincount; and tensors of Python numbers made on a device. Those that the
library asks for count, not those of transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import foveate
from foveate.evaluate.bench_model import random_inputs, random_model

METHODS = ("fopru", "divprune", "fastv", "pyramiddrop", "sparsevlm", "tome:keep=0.5", "h2o", "snapkv")

_READING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "is_nonzero",
    "bincount",
}
_METHODS = {Tensor.cpu: "cpu", Tensor.tolist: "tolist", Tensor.numpy: "numpy"}
_MADE = {torch.tensor, torch.as_tensor}


@dataclass
class Waits:
    """What was counted, by the line of the library that asked.

    Attributes:
        ours: of a line, "file:number what", how often.
        others: those of transformers and torch.
        mixed: where an operation was given tensors of both, which a device refuses or waits for.
    """

    ours: Counter[str] = field(default_factory=Counter)
    others: int = 0
    mixed: Counter[str] = field(default_factory=Counter)
    host: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)  # tensors of the host

    @property
    def total(self) -> int:
        """How often the library waited."""
        return self.ours.total()

    def on_host(self, *values: Any) -> bool:
        """Whether none of these tensors is on the device."""
        return all(value in self.host for value in tree_leaves(values) if isinstance(value, Tensor))

    def mark(self, values: Any) -> Any:
        """These are the host's from now on."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                self.host[value] = True
        return values

    def count(self, what: str) -> None:
        """One wait, of whoever is nearest on the stack."""
        line = _asking(what)
        if line is None:
            self.others += 1
        else:
            self.ours[line] += 1


def _asking(what: str) -> str | None:
    """The line of the library that asks for something; None where transformers is nearer."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] == "foveate":
            return f"{name}:{frame.f_lineno} {what}"
        if name.partition(".")[0] == "transformers":
            return None
        frame = frame.f_back
    return None


class _Calls(TorchFunctionMode):
    """What never reaches the dispatcher: reading whole tensors, and tensors of Python numbers."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits
        self.names_device = False  # the call at hand says on which device its result is to be

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        outer, self.names_device = self.names_device, options.get("device") is not None
        try:
            return self._called(function, arguments, options)
        finally:
            self.names_device = outer

    def _called(self, function: Any, arguments: Any, options: dict[str, Any]) -> Any:
        waits = self.waits
        if function in _METHODS:
            if not waits.on_host(arguments[0]) and not _within("of_cpu"):
                waits.count(_METHODS[function])
            found = function(*arguments, **options)
            return waits.mark(found.detach()) if function is Tensor.cpu else found
        if function in _MADE:
            made = function(*arguments, **options)
            if not self.names_device:
                return waits.mark(made)
            waits.count("tensor")
            return made
        if function is torch.from_numpy:
            return waits.mark(function(*arguments, **options))
        if function is Tensor.to and waits.on_host(arguments[0]) and self._stays():
            return waits.mark(function(*arguments, **options))
        if function is Tensor.to and waits.on_host(arguments[0]) and _device_of(arguments, options) is not None:
            if not options.get("non_blocking") and not _within("on_device"):
                waits.count("to")
            made = function(*arguments, **options).detach()
            waits.host.pop(made, None)
            return made
        return function(*arguments, **options)

    def _stays(self) -> bool:
        """Whether the device that a `to` names is the host: of a family's own packing, or of a tensor that is there."""
        beside = _within("beside")
        at_home = beside is not None and self.waits.on_host(beside.f_locals["other"])
        return at_home or _within("_packed_coordinates") is not None


def _device_of(arguments: Any, options: dict[str, Any]) -> Any:
    """The device that a `to` names; None where it names a dtype alone."""
    named = [options.get("device"), *arguments[1:]]
    return next((one for one in named if isinstance(one, str | torch.device | Tensor)), None)


def _within(name: str) -> FrameType | None:
    """The frame of one of the library's functions that wait for nothing, where this is in it.

    `on_device` waits for a CPU alone, `of_cpu` is for CPUs alone, `_packed_coordinates` plans on the host.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == name and str(frame.f_globals.get("__name__", "")).startswith("foveate."):
            return frame
        frame = frame.f_back
    return None


class _Operations(TorchDispatchMode):
    """What reaches the dispatcher."""

    def __init__(self, waits: Waits, calls: _Calls) -> None:
        super().__init__()
        self.waits, self.calls = waits, calls

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        given = [value for value in tree_leaves((arguments, options)) if isinstance(value, Tensor)]
        host = self.waits.on_host(given) if given else not self.calls.names_device
        name = function.overloadpacket.__name__
        if len({value in self.waits.host for value in given if value.ndim}) == 2:  # a number may be anywhere
            self.waits.mixed[_asking(name) or name] += 1
        if not host and (name in _READING or _masked(name, arguments)):
            self.waits.count(name)
        found = function(*arguments, **options)
        return self.waits.mark(found) if host else found


def _masked(name: str, arguments: Any) -> bool:
    """Whether a mask is used as an index, so that the number of what it opens must be known."""
    if name not in {"index", "index_put", "index_put_", "_index_put_impl_", "repeat_interleave"}:
        return False
    if name == "repeat_interleave":
        return len(arguments) > 1 and isinstance(arguments[1], Tensor)
    masks = [index for index in arguments[1] if index is not None and index.dtype == torch.bool]
    # One number for all of a mask is written without counting.
    return bool(masks) and not (name != "index" and arguments[2].ndim == 0)


@contextmanager
def counted() -> Iterator[Waits]:
    """Count the waits of everything in here."""
    waits = Waits()
    calls = _Calls(waits)
    with calls, _Operations(waits, calls):
        yield waits


def of_method(model: Any, inputs: dict[str, Tensor], spec: str | None, tokens: int) -> tuple[Waits, Waits]:
    """The waits of a prefill, and those of `tokens` further ones."""
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    handle = None if spec is None else foveate.prune(model, spec).start()
    try:
        model.generate(**inputs, **options, max_new_tokens=1)  # whatever is looked up once
        with counted() as prefill:
            model.generate(**inputs, **options, max_new_tokens=1)
        with counted() as both:
            model.generate(**inputs, **options, max_new_tokens=1 + tokens)
    finally:
        if handle is not None:
            handle.stop()
    both.ours.subtract(prefill.ours)
    both.others -= prefill.others
    return prefill, both


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("specs", nargs="*", default=METHODS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--where", action="store_true", help="list the lines that wait")
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    model = random_model("mini", dtype=torch.float32)
    inputs = random_inputs(model, text=60, batch=asked.batch)
    table = Table("method", "waits a prefill", "waits a token", "transformers' a prefill")
    console = Console()
    for spec in asked.specs:
        prefill, later = of_method(model, inputs, spec, asked.tokens)
        table.add_row(spec, str(prefill.total), f"{later.total / asked.tokens:.3g}", str(prefill.others))
        if asked.where:
            for line, times in prefill.ours.most_common():
                console.print(f"{spec}: {times} {line}")
    console.print(table)


if __name__ == "__main__":
    main()
