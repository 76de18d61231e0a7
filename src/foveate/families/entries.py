"""The entries of a model's configuration, whatever it is made of, and the sizes that it states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.core import FoveateError

Entries = Mapping[str, Any]


def entries(config: Any) -> Entries:
    """The entries of a config, whatever it is made of."""
    if isinstance(config, Mapping):
        return config
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if hasattr(config, "__dict__"):
        return dict(vars(config))
    raise FoveateError(f"a {type(config).__name__} is no config: it has neither entries nor to_dict()")


def size(stated: Entries, key: str, where: str) -> int:
    """A size that a config states.

    Raises:
        FoveateError: it states none.
    """
    value = stated.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise FoveateError(
            f"{where} states {key}={value!r}, which is no size; "
            "a config object made by transformers fills in what a config.json leaves out"
        )
    return value


def side(stated: Entries, key: str, where: str) -> int:
    """A side of a square, given once or for both directions."""
    value = stated.get(key)
    if isinstance(value, list | tuple) and len(set(value)) == 1:
        return size({key: value[0]}, key, where)
    return size(stated, key, where)
