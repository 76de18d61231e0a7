"""Reading and writing modules of learned methods: safetensors only, checked before anything is built, written whole."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from foveate.core import FoveateError, short
from foveate.paths import LONGEST_PATH, checked, read_json
from foveate.runs import whole_folder

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""The two files of trained modules; no other is opened, whatever lies beside them."""

WIDEST, DEEPEST, MOST_STAGES = 65_536, 1_000, 64
"""Bounds of a hidden size, of a number of blocks and of how many stages have modules, beyond all models there are."""

FLOATS = ("F64", "F32", "BF16", "F16")
"""Types that weights can have, as safetensors writes them."""


class ModulesConfig(PreTrainedConfig):
    """The shape of trained modules; of a stored one only the fields that its class names itself are read."""

    def check_shape(self) -> None:
        """Refuse what no modules can be built of.

        Raises:
            FoveateError: a field outside its range, or fields that do not fit together.
        """
        raise NotImplementedError(f"{type(self).__name__} has no check_shape()")


Modules = TypeVar("Modules", bound=PreTrainedModel)


def read(kind: type[Modules], path: str | Path, what: str) -> Modules:
    """Trained modules from a folder or hub id, frozen and in eval mode, in the type that they are stored in.

    Args:
        kind: their class, whose configuration class has the `model_type` to expect.
        what: what they are called in messages, in the plural.

    Raises:
        FoveateError: nothing is there, it holds something else, its configuration is of no modules that can be built,
            or its tensors are damaged or not those that the configuration says.
    """
    given, wanted = checked(path), kind.config_class
    source = given if given.is_dir() else path
    stored = read_json(_file(source, CONFIG, what), f"{CONFIG} of the {what} in {short(str(path), LONGEST_PATH)}")
    found = stored.get("model_type") if isinstance(stored, dict) else None
    if found != wanted.model_type:
        told = short(repr(found))
        raise FoveateError(f"{short(str(path), LONGEST_PATH)} holds a {told} model, no {what} ({wanted.model_type!r})")
    config = _configured(wanted, stored, f"the {what} in {short(str(path), LONGEST_PATH)}")
    with torch.device("meta"):
        modules = kind(config)
    try:
        modules.load_state_dict(_weights(modules, _file(source, WEIGHTS, what), what, path), assign=True)
    except FoveateError:
        raise
    # Damaged files lead to SafetensorError, and their reading to whatever the system says.
    except Exception as error:
        raise _unloadable(what, path, error) from error
    return modules.eval().requires_grad_(False)


def find(path: str | Path, folder: str) -> str:
    """The folder or hub id of modules: `mini` names those that ship with Foveate's own model.

    A folder of a model that holds modules in `folder` stands for these.
    """
    if str(path) == "mini":
        return str(resources.files("foveate") / "scenes" / "checkpoint" / folder)
    given = checked(path)
    if (given / folder / CONFIG).is_file():
        return str(given / folder)
    return str(given) if given.is_dir() else str(path)


def _configured(kind: type[Any], stored: dict[str, Any], where: str) -> Any:
    """The configuration, from its own fields alone: others, such as `num_labels`, make transformers work or wait."""
    own = {name: stored[name] for name in inspect.get_annotations(kind) if name in stored}
    try:
        config = kind(**own)
    except Exception as error:  # of the types of fields, each with a class of its own
        reason = short(" ".join(str(error).split()), 200)
        raise FoveateError(f"the configuration of {where} cannot be used: {reason}") from error
    try:
        config.check_shape()
    except FoveateError as error:
        raise FoveateError(f"the configuration of {where} cannot be used: {error}") from error
    return config


def _file(source: str | Path, name: str, what: str) -> Path:
    """A file of a folder, or of a hub repository."""
    if isinstance(source, Path):
        if not (source / name).is_file():
            raise FoveateError(f"no {what} can be loaded from {source}: there is no {name}, and nothing else is read")
        return source / name
    try:
        return Path(cached_file(source, name))
    except Exception as error:  # of the hub's client, of many kinds
        raise _unloadable(what, source, error) from error


def _unloadable(what: str, path: str | Path, error: Exception) -> FoveateError:
    reason = short(" ".join(str(error).split()), 300) or type(error).__name__
    return FoveateError(f"no {what} can be loaded from {short(str(path), LONGEST_PATH)}: {reason}")


def _weights(modules: PreTrainedModel, file: Path, what: str, path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, which must be the modules' own: by name, shape and type, as its header says."""
    wanted = {name: tuple(value.shape) for name, value in modules.state_dict().items()}
    with safe_open(file, "pt") as stored:
        found = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
        shapes = {name: tuple(one.get_shape()) for name, one in found.items()}
        lacking = sorted(name for name in wanted if shapes.get(name) != wanted[name])
        if lacking:
            first = lacking[0]
            told = f" of shape {shapes[first]}, not {wanted[first]}" if first in shapes else ""
            raise FoveateError(f"the {what} in {path} are incomplete: {len(lacking)} tensors, first {first}{told}")
        unknown = sorted(shapes.keys() - wanted.keys())
        if unknown:
            first = short(unknown[0])
            raise FoveateError(f"the {what} in {path} have no place for {len(unknown)} of their tensors, first {first}")
        types = sorted({one.get_dtype() for one in found.values()})
        if len(types) > 1 or types[0] not in FLOATS:
            told = f"are stored as {' and '.join(types)}"
            raise FoveateError(f"the {what} in {path} {told}; all must have one type of {', '.join(FLOATS)}")
        return {name: stored.get_tensor(name) for name in found}


def write(modules: PreTrainedModel, folder: str | Path, card: str = "") -> Path:
    """Write modules, and a card if there is one, ready for `read`; every file appears whole, the weights last.

    Raises:
        FoveateError: they cannot be written, such as on a full disk.
    """
    folder = checked(folder)
    with whole_folder(folder) as temporary:
        modules.save_pretrained(temporary)
        if card:
            (temporary / "README.md").write_text(card, encoding="utf-8")
    return folder


def check_range(name: str, value: object, most: int) -> None:
    """Refuse a field of a configuration that is no whole number from 1 to `most`.

    Raises:
        FoveateError: it is not.
    """
    if type(value) is not int or not 1 <= value <= most:
        raise FoveateError(f"{name}={short(repr(value))} is no whole number from 1 to {most}")


def check_layers(layers: Sequence[object], most: int) -> None:
    """Refuse depths of modules that are no whole numbers from 1 to `most`, rising strictly.

    Raises:
        FoveateError: they are not, or there are none or too many.
    """
    if not 1 <= len(layers) <= MOST_STAGES:
        raise FoveateError(f"layers names {len(layers)} depths; there can be 1 to {MOST_STAGES}")
    for layer in layers:
        check_range("a depth of layers", layer, most)
    if any(later <= earlier for earlier, later in pairwise(layers)):  # type: ignore[operator]
        raise FoveateError(f"layers={short(repr(list(layers)))} do not rise strictly")


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
