"""Checks of numbers that fields of several methods are."""

from __future__ import annotations

from foveate.core import FoveateError


def check_share(name: str, value: float, paper: float) -> None:
    """Refuse what is no share from 0 to 1; `paper` is the paper's."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise FoveateError(f"{name}={value!r} is no share in [0, 1]; the paper's is {name}={paper}")


def check_power(name: str, value: float) -> None:
    """Refuse an exponent that is no number from 0 to 8; beyond, float32 no longer tells the weights apart."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 8.0:
        nearest = 8.0 if isinstance(value, int | float) and value > 8 else 0.0
        raise FoveateError(f"{name}={value!r} is no number in [0, 8]; the nearest is {name}={nearest}")


def check_positive(name: str, value: float, usual: float) -> None:
    """Refuse what is no finite number above 0; `usual` is one that is."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
        raise FoveateError(f"{name}={value!r} is no positive number; the usual one is {name}={usual}")
