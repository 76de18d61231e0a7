"""Adapters of models that were tuned while tokens were pruned: what they are written with, and what may be read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.checkpoints import ADAPTER
from foveate.core import FoveateError, short
from foveate.paths import Given, checked, read_json
from foveate.runs import whole_folder, write_json
from foveate.runtime.tuned import TUNED

if TYPE_CHECKING:
    from foveate.inference.loading import Loaded

RECORD = "foveate.json"
"""The spec that an adapter was tuned under, and the model that it belongs to."""

WEIGHTS = "adapter_model.safetensors"


def write(model: Any, folder: Given, *, spec: str, name: str) -> None:
    """Write the adapter of a PEFT model, with the spec that it was tuned under.

    Args:
        name: how the user calls the model that it belongs to.

    Raises:
        FoveateError: it cannot be written.
    """
    base = model.get_base_model()
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary, save_embedding_layers=False)
        for left in [*temporary.iterdir()]:
            if left.name not in (ADAPTER, WEIGHTS):
                left.unlink()
        write_json(temporary / RECORD, {"prune": spec, "model": name, "model_type": base.config.model_type})


def read_record(folder: Given) -> dict[str, str]:
    """What is recorded of an adapter: `prune`, `model` and `model_type`.

    Raises:
        FoveateError: it is no adapter of `foveate train finetune`, or has weights that are no safetensors.
    """
    path = checked(folder)
    for file in (RECORD, ADAPTER, WEIGHTS):
        if not (path / file).is_file():
            raise FoveateError(f"{path} holds no {file}; give the folder of an adapter of foveate train finetune")
    found = read_json(path / RECORD, str(path / RECORD))
    names = ("prune", "model", "model_type")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in names):
        raise FoveateError(f"{path / RECORD} does not say which spec and model the adapter belongs to")
    return {name: found[name] for name in names}


def attach(loaded: Loaded, folder: Given, *, any_spec: bool = False) -> Loaded:
    """The model with an adapter merged into its weights, which is pruned by the spec that it was tuned under alone.

    Args:
        any_spec: let it be pruned by others too.

    Raises:
        FoveateError: as `read_record`, the adapter is of another kind of model, or peft is missing.
    """
    record = read_record(folder)
    kind = loaded.model.config.model_type
    if record["model_type"] != kind:
        raise FoveateError(
            f"{folder} is an adapter of {record['model']}, a {record['model_type']} model; {loaded.name} is a {kind}"
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise FoveateError("adapters need peft; install foveate[train]") from error
    try:
        model = PeftModel.from_pretrained(loaded.model, str(checked(folder))).merge_and_unload()
    # peft and safetensors raise what a damaged file or another model leads to.
    except Exception as error:
        told = short(" ".join(str(error).split()), 300)
        raise FoveateError(f"the adapter {folder} cannot be put into {loaded.name}: {told}") from error
    if not any_spec:
        setattr(model, TUNED, record["prune"])
    return dataclasses.replace(loaded, name=f"{loaded.name} with {Path(folder)}", model=model.eval())
