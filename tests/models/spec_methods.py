"""Methods with fields of every kind, which specs of tests may name, and what a spec is compared by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from foveate import methods
from foveate.core import FoveateError, Keep, Method
from foveate.methods.uniform import Uniform
from foveate.spec import parse_stages

REGISTERED = methods.names()


@dataclass(frozen=True)
class Probe(Method):
    """Probe: a field of every kind that a method may have."""

    keep: Keep = 0.25
    shares: tuple[float, ...] = (0.5, 0.3, 0.1)
    layers: tuple[int, ...] | None = None
    budgets: tuple[Keep, ...] = (1.0,)
    pair: tuple[int, float] = (1, 2.0)
    words: tuple[str, ...] = ()
    note: str = ""
    label: str | None = None
    flag: bool = True
    maybe: bool | None = None
    level: Literal["low", "high", "none", 2] = "low"
    where: int | Literal["output"] = 3
    count_of: int = 7
    rate: float = 0.5
    made: tuple[int, ...] = dataclasses.field(default_factory=lambda: (1, 2))
    derived: int = dataclasses.field(default=0, init=False)


@dataclass(frozen=True)
class Demanding(Method):
    """Demanding: two fields without a default."""

    keep: Keep
    alpha: float
    beta: float = 1.0


@dataclass(frozen=True)
class Trained(Method):
    """Trained: comes from a folder."""

    path: str | None = None
    keep: Keep = 0.5
    loaded: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    @classmethod
    def from_pretrained(cls, path: str, **settings: Any) -> Trained:
        cls.loaded.append((path, settings))
        return cls(path=path, **settings)


@dataclass(frozen=True)
class Elsewhere(Method):
    """Elsewhere: trained too, but its folder is no field."""

    keep: Keep = 0.5

    @classmethod
    def from_pretrained(cls, path: str, **settings: Any) -> Elsewhere:
        Trained.loaded.append((path, settings))
        return cls(**settings)


OWN: dict[str, type[Method]] = {kind.__name__.lower(): kind for kind in (Probe, Demanding, Trained, Elsewhere)}
OWN["3d"] = Uniform  # other packages choose their own names


@contextmanager
def named() -> Iterator[None]:
    """The classes above can be named in a spec, beside the real ones."""
    with pytest.MonkeyPatch.context() as patch:
        real: Callable[[str], type[Method]] = methods.get
        patch.setattr(methods, "get", lambda name: OWN.get(name) or real(name))
        yield


def told(text: str) -> str:
    """What the user reads about a wrong spec."""
    with pytest.raises(FoveateError) as error:
        parse_stages(text)
    return str(error.value)


def exactly(left: object, right: object) -> bool:
    """Equal in value and in type: 1 is one token, 1.0 is all of them, and Python calls them equal."""
    return repr(left) == repr(right)
