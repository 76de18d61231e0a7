"""What an engine is told by hf_overrides, and what cannot be right and is refused when it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from packaging.version import Version

from foveate.serve.vllm.asked import ALL, METHODS, SPEC, Rules
from foveate.serve.vllm.outline import Outline
from foveate.serve.vllm.rooms import FoveateError, did_you_mean, format_spec, parse_stages
from foveate.serve.vllm.routes import runs_before

CLIP = "foveate_clip"
"""A further name in hf_overrides: where CLIP lies."""
TESTED = "0.32"
"""The vLLM that this was tested with, of which any patch release will do."""


def check_vllm(version: str) -> None:
    """Refuse a vLLM that was not tested: its insides are no promise.

    Raises:
        FoveateError: naming both versions.
    """
    found = Version(version)
    if f"{found.major}.{found.minor}" != TESTED:
        raise FoveateError(f"vLLM {version} is not among those that Foveate was tested with; install vllm=={TESTED}.*")


def written(spec: Any) -> str:
    """The spec of methods or their text, as hf_overrides take it.

    Raises:
        FoveateError: an unknown method or field.
    """
    if isinstance(spec, str):
        return spec if spec.strip() == "none" else format_spec(parse_stages(spec))
    return format_spec(spec)


def clip_of(config: Any) -> str | None:
    """Where the CLIP of a model lies: as hf_overrides say, or in the folder `clip` beside its weights."""
    given = getattr(config, CLIP, None)
    if given is not None:
        return str(given)
    beside = Path(str(getattr(config, "_name_or_path", ""))) / "clip"
    return str(beside) if (beside / "config.json").is_file() else None


def rules_of(config: Any, outline: Outline) -> Rules:
    """What an engine of this configuration allows.

    Raises:
        FoveateError: its spec cannot run.
    """
    methods = getattr(config, METHODS, None)
    names = None
    if methods is not None:
        from foveate.methods import names as known

        names = tuple(name.strip() for name in str(methods).split(",") if name.strip())
        for name in names:
            if name not in known() and names != (ALL,):
                raise FoveateError(f"{METHODS} names an unknown method {name!r}; {did_you_mean(name, known())}")
    before = runs_before(config, outline)
    return Rules(getattr(config, SPEC), outline.family, outline.tower, names, clip_of(config) is not None, before)
