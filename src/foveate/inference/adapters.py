"""Adapters of models that were tuned while tokens were pruned: what they are written with, and what may be read."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.checkpoints import ADAPTER
from foveate.core import FoveateError, Method, short
from foveate.paths import Given, checked, read_json
from foveate.runs import whole_folder, write_json
from foveate.runtime.tuned import TUNED, refuse_other

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


def check_asked(folder: Given | None, rivals: Iterable[Iterable[Method]], *, any_spec: bool = False) -> None:
    """Refuse what a model with this adapter cannot be pruned by, before it is loaded; nothing without an adapter.

    Args:
        rivals: stages of each; one without stages is not pruned, and never refused.

    Raises:
        FoveateError: as `read_record`, peft is missing, another spec, or `any_spec` without an adapter.
    """
    if folder is None:
        if any_spec:
            raise FoveateError("any_spec=True (--any-spec) is about an adapter, and none was given (--adapter)")
        return
    record = read_record(folder)
    check_peft()
    for stages in rivals:
        if not any_spec and (asked := tuple(stages)):
            refuse_other(record["prune"], asked)


def load_tuned(name: str, adapter: Given | None = None, *, any_spec: bool = False, **place: Any) -> Loaded:
    """A model with an adapter, or as it is without one.

    Args:
        any_spec: as `attach` has it.
        place: further arguments of `load`.

    Raises:
        FoveateError: as `load` and `attach`.
    """
    from foveate.inference.loading import load

    loaded = load(name, **place)
    return loaded if adapter is None else attach(loaded, adapter, any_spec=any_spec)


def check_peft() -> Any:
    """PEFT; FoveateError where it is missing."""
    try:
        import peft
    except ImportError as error:
        raise FoveateError("adapters need peft; install foveate[train]") from error
    return peft


def with_adapters(model: Any, shape: Any) -> Any:
    """A model with new adapters, by a `peft.LoraConfig`; its own weights are frozen.

    Raises:
        FoveateError: peft is missing.
    """
    with _renamed():
        return check_peft().get_peft_model(model, shape)


@contextmanager
def _renamed() -> Iterator[None]:
    """PEFT asks transformers by a name that it has since given up; nobody who calls it can help that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


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
    peft = check_peft()
    try:
        with _renamed():
            model = peft.PeftModel.from_pretrained(loaded.model, str(checked(folder))).merge_and_unload()
    # peft and safetensors raise what a damaged file or another model leads to.
    except Exception as error:
        told = short(" ".join(str(error).split()), 300)
        raise FoveateError(f"the adapter {folder} cannot be put into {loaded.name}: {told}") from error
    if not any_spec:
        setattr(model, TUNED, record["prune"])
    return dataclasses.replace(loaded, name=f"{loaded.name} with {Path(folder)}", model=model.eval())
