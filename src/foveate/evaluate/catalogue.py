"""What can be said about every method without running it: what it keeps, where it acts, what it reads, its budgets."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from foveate import methods
from foveate.core import FoveateError, Keep, Method

ACTS = {
    "picture": "before the processor",
    "pixels": "before the encoder",
    "tower": "inside the encoder",
    "input": "before the decoder",
    "layer": "inside the decoder",
    "cache": "on the cache",
}
"""Where each site is."""


def describe(name: str) -> dict[str, Any]:
    """One row about a registered method, of values that JSON can hold.

    `sees` are signals (DESIGN's names: "tower.read.received"), `defaults` the fields that have one, `official` whether
    the method can reproduce code that departs from its paper, `trained` whether it needs learned weights.
    """
    kind = methods.get(name)
    parts = kind.example().parts()
    fields = [field for field in dataclasses.fields(kind) if field.init]
    required = [field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING]
    trained = hasattr(kind, "from_pretrained")
    # A method may fill in what its other fields leave open.
    plain = kind if required or trained else kind()
    defaults = {field.name: getattr(plain, field.name) for field in fields if field.default is not dataclasses.MISSING}
    return {
        "name": name,
        "class": kind.__name__,
        "keeps": methods.summary(kind),
        "site": "+".join(dict.fromkeys(part.site for part in parts)),
        "acts": ", then ".join(dict.fromkeys(ACTS[part.site] for part in parts)),
        "needs": list(dict.fromkeys(need for part in parts for need in part.needs)),
        "defaults": defaults,
        "required": required,
        "adaptive": any(part.adaptive for part in parts),
        "official": any(field.name == "official" for field in fields),
        "trained": trained,
        "paper": kind.paper or None,
    }


def about(name: str) -> tuple[str, dict[str, str]]:
    """A method's docstring: the text below its first line, and what it says of each argument."""
    text = inspect.cleandoc(methods.get(name).__doc__ or "").partition("\n")[2].strip()
    body, _, rest = text.partition("Args:\n")
    arguments: dict[str, str] = {}
    field = ""
    for line in rest.splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            field, _, said = line.strip().partition(": ")
            arguments[field] = said
        elif field and line.strip():
            arguments[field] += " " + line.strip()
    return body.strip(), arguments


def at(name: str, keep: Keep | tuple[Keep, ...], original: int, weights: str | None = None) -> Method:
    """A method with its defaults that keeps `keep` of `original` tokens at each of its stages.

    Args:
        keep: for all stages, or for each.
        weights: where a trained method has its weights from, as `from=` of a spec says it.

    Raises:
        FoveateError: it acts on the cache alone, has no budget to set, or cannot reach this one.
    """
    kind: Any = methods.get(name)
    example = kind.example()
    if all(part.site == "cache" for part in example.parts()):
        raise FoveateError(f"{name} drops cache entries, not visual tokens")
    if not any(field.name == "keep" for field in dataclasses.fields(kind)):
        raise FoveateError(f"{name} has no budget to set")
    stages = getattr(example, "keep", None)
    wanted: Any = (keep,) * len(stages) if isinstance(stages, tuple) and not isinstance(keep, tuple) else keep
    made: Method = kind(keep=wanted) if weights is None else kind.from_pretrained(weights, keep=wanted)
    for part in made.parts():
        part.count(original)
    return made
