"""Reading and writing modules of learned methods: safetensors only, checked before use, written whole."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from foveate.core import FoveateError
from foveate.runs import whole_folder

Modules = TypeVar("Modules", bound=PreTrainedModel)


def read(kind: type[Modules], path: str | Path, what: str) -> Modules:
    """Trained modules from a folder or hub id, frozen and in eval mode.

    Args:
        kind: their class, whose configuration class has the `model_type` to expect.
        what: what they are called in messages, in the plural.

    Raises:
        FoveateError: nothing is there, it holds something else, or it is damaged or incomplete.
    """
    source, wanted = str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else str(path), kind.config_class
    try:
        config, _ = wanted.get_config_dict(source)
        found = config.get("model_type")
        if found == wanted.model_type:
            modules, report = kind.from_pretrained(source, use_safetensors=True, output_loading_info=True)
    # The loaders raise OSError, ValueError, KeyError and whatever a damaged file leads to.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise FoveateError(f"no {what} can be loaded from {path}: {reason}") from error
    if found != wanted.model_type:
        raise FoveateError(f"{path} holds a {found!r} model, no {what} ({wanted.model_type!r})")
    lacking = sorted(report["missing_keys"]) + sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if lacking:
        raise FoveateError(f"the {what} in {path} are incomplete: {len(lacking)} tensors, first {lacking[0]}")
    return modules.eval().requires_grad_(False)


def write(modules: PreTrainedModel, folder: str | Path, card: str = "") -> Path:
    """Write modules, and a card if there is one, ready for `read`; every file appears whole, the weights last."""
    with whole_folder(folder) as temporary:
        modules.save_pretrained(temporary)
        if card:
            (temporary / "README.md").write_text(card, encoding="utf-8")
    return Path(folder)


def check_encoder(name: str, what: str, trained: int, found: int) -> None:
    """Refuse an encoder of another shape than modules were trained for.

    Raises:
        FoveateError: `name` is `found`, not `trained`.
    """
    if trained != found:
        raise FoveateError(
            f"these {what} were trained for an encoder with {name}={trained}, not {found}; load that model, or {what} "
            "trained for this one"
        )


def seeded(build: type[Modules], config: object, seed: int) -> Modules:
    """Untrained modules of a shape; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config).eval()
