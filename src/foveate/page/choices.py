"""What can be chosen on the page: methods that run on the model with a budget, and devices to predict for."""

from __future__ import annotations

from typing import Any

from foveate import methods, spec
from foveate.core import FoveateError, Method
from foveate.cost import HARDWARE, hardware_of
from foveate.cost.sweeps import at_share
from foveate.evaluate import catalogue
from foveate.inference.loading import Loaded
from foveate.prune import check_prunable

USUAL = 576
"""Tokens of a picture that budgets are tried on before one has come."""


def budgeted(loaded: Loaded, clip: str | None = None) -> list[str]:
    """Names of the methods that run on a model and whose budget a slider can set.

    Learned methods are not among them: a request cannot say where their weights lie.
    """
    found = []
    for name in methods.names():
        if catalogue.describe(name)["trained"]:
            continue
        try:
            made = _at(name, 0.5)
            check_prunable(loaded.model, made, processor=loaded.processor, clip=clip)
        except FoveateError:
            continue
        found.append(name)
    return found


def spec_at(name: str, percent: float) -> str:
    """The spec of a method that keeps so many percent of a picture's tokens; of several stages, in the first.

    Raises:
        FoveateError: the method cannot keep so few.
    """
    return spec.format(_at(name, percent / 100))


def _at(name: str, share: float) -> Method:
    usual = catalogue.describe(name)["defaults"].get("keep")
    if isinstance(usual, tuple):
        return at_share(methods.get(name)(), share, USUAL)
    return catalogue.at(name, share, USUAL)


def devices() -> list[str]:
    """Names of the devices that the cost model knows."""
    return list(HARDWARE)


def device_of(model: Any) -> str:
    """The name of the device that a model is on, or of one that people rent."""
    if model.device.type == "cuda":
        import torch

        row = hardware_of(torch.cuda.get_device_name(model.device))
        if row is not None:
            return row.name
    return "h100"
