"""Checkpoints of whole models: every name in them is looked at before a weight is read; only safetensors are."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any

from foveate.core import FoveateError, short
from foveate.paths import checked, read_json

SUFFIX = ".safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
EXPLICIT = "transformers_weights"
"""The entry of a configuration that names the file of the weights."""


def check_names(source: str | Path, name: str) -> None:
    """Refuse a checkpoint that leads to weights which are no safetensors, or that lie outside of it.

    `use_safetensors=True` is not enough: an index of safetensors may name pickles, a configuration may name its weights
    itself, and an adapter's configuration leads to weights of its own and to a model elsewhere.

    Args:
        source: a folder or hub id.
        name: how messages call it.

    Raises:
        FoveateError: such a name, an index that is none, or an adapter.
    """
    if _file(source, ADAPTER) is not None:
        raise FoveateError(
            f"{name} holds an adapter ({ADAPTER}), which leads to weights elsewhere; merge it into its model "
            "(merge_and_unload, then save_pretrained) and give that folder"
        )
    explicit = _entry(source, "config.json", EXPLICIT, name)
    if explicit is not None:
        index = isinstance(explicit, str) and explicit.endswith(".index.json")
        _check(str(explicit).removesuffix(".index.json") if index else explicit, f"{EXPLICIT} in config.json of {name}")
    files = explicit if isinstance(explicit, str) and explicit.endswith(".index.json") else INDEX
    named = _entry(source, files, "weight_map", name)
    if named is not None and not isinstance(named, dict):
        raise FoveateError(f"weight_map in {files} of {name} is {type(named).__name__}, no table of files")
    for file in sorted(set(map(str, (named or {}).values()))):
        _check(file, f"{files} of {name}")


def _check(file: Any, where: str) -> None:
    """Refuse a name that is no safetensors file beside the one that names it."""
    told = short(repr(file))
    if not isinstance(file, str) or not file.endswith(SUFFIX):
        raise FoveateError(
            f"{where} names {told}, which is no safetensors file, and other formats can run code when they are read; "
            "convert it"
        )
    if PurePosixPath(file).is_absolute() or ".." in Path(file).parts:
        raise FoveateError(f"{where} names {told}, which is outside of it; files of a checkpoint lie in its folder")


def _entry(source: str | Path, file: str, key: str, name: str) -> Any:
    """One entry of a JSON file of a checkpoint; None without the file or the entry."""
    path = _file(source, file)
    stored = None if path is None else read_json(path, f"{file} of {name}")
    return stored.get(key) if isinstance(stored, dict) else None


def fingerprint(model: Any) -> str:
    """A digest of a module's parameters and buffers, bit by bit, computed where they are.

    Two sums per tensor, one of them weighted by place, tell any change that training makes.
    """
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        bits = value.detach().contiguous().flatten()
        bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()]).long()
        places = torch.arange(bits.numel(), device=bits.device) % 65_521 + 1
        sums = torch.stack([bits.sum(), (bits * places).sum()]).tolist()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} {sums}\n".encode())
    return digest.hexdigest()


def _file(source: str | Path, file: str) -> Path | None:
    """Where a file of a folder or hub id is; None where there is none, or where the hub cannot say."""
    folder = checked(source)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(
            str(source), file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False
        )
    except OSError:  # whoever loads the model next says what is wrong with the hub
        return None
    return None if found is None else Path(found)
