"""Loads the MODEL of every command: `mini`, a folder, or a hub id; safetensors only, no code of others unless asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.core import FoveateError, UsageError, did_you_mean, short, usage
from foveate.paths import checked

DTYPES = ("auto", "float32", "bfloat16", "float16")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

Device = Annotated[str, typer.Option(metavar="D", help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(metavar="T", help="auto (as stored), float32, bfloat16, float16.")]
Clip = Annotated[
    str | None,
    typer.Option(metavar="C", help="Folder or hub id of the CLIP whose vision tower the encoder is; mini has its own."),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Python code that a hub repository ships.")]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Decode on a static cache as one compiled graph; the first answer waits.")
]
Adapter = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Of foveate train finetune; it is pruned by the spec it records.")
]
AnySpec = Annotated[bool, typer.Option("--any-spec", help="Prune a model with an adapter by any spec.")]


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer, its processor, and the name that the caller gave it."""

    name: str
    model: Any
    processor: Any


def find(name: str) -> str:
    """The folder or hub id behind a MODEL argument.

    Raises:
        UsageError: neither `mini`, nor a folder that is there, nor a name that a hub can have.
    """
    import foveate

    if name == "mini":
        return foveate.MINI
    with usage():
        path = checked(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{name} holds no config.json, so it is no checkpoint of transformers; give its folder")
        return str(path)
    if path.exists():
        raise UsageError(f"{name} is a file; give the folder of the checkpoint, a hub id, or mini")
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise UsageError(f"there is no folder {short(name)}, and it is no hub id (owner/name); mini is always there")
    return name


def load(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    check: Callable[[Any], None] | None = None,
    check_processor: Callable[[Any], None] | None = None,
) -> Loaded:
    """Load a model and its processor with stock `from_pretrained`.

    Args:
        check: called with the model's configuration, before its weights are read.
        check_processor: called with its processor, likewise.

    Raises:
        UsageError: an unknown model, device or dtype.
        FoveateError: weights that are damaged, incomplete or no safetensors, or a model that reads no pictures.
    """
    source = find(name)
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {short(repr(dtype))}; {did_you_mean(dtype, DTYPES)}")
    place = find_device(device)
    _quiet()
    config = _config(name, source, trust_remote_code)
    _check_vision(name, config)
    if check is not None:
        check(config)
    processor = load_processor(name, source, trust_remote_code)
    if check_processor is not None:
        check_processor(processor)
    return Loaded(name, _weights(name, source, config, dtype, trust_remote_code).eval().to(place), processor)


def find_device(name: str) -> Any:
    """The torch device of a --device option.

    Raises:
        UsageError: no such device on this machine.
    """
    import torch

    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"unknown device {short(repr(name))}; {did_you_mean(name, ('auto', 'cpu', 'cuda', 'mps'))}"
        ) from error
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(has_mps)}.get(device.type, 0)
    if (device.index or 0) >= there:
        raise UsageError(f"device={name!r}, but torch sees {there} {device.type} devices here; cpu is always there")
    return device


def slow_precision(model: Any) -> str | None:
    """What to say of a model in half precision on a CPU that computes prompts in it many times slower; else None."""
    import torch

    from foveate.ops.precision import cpu_multiplies_bfloat16

    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or cpu_multiplies_bfloat16():
        return None
    return "this CPU has no instructions for bfloat16: prompts are several times faster with --dtype float32"


def _quiet() -> None:
    """Results own stdout, and Foveate's progress stderr."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _config(name: str, source: str, trust: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust)
    # The loaders raise OSError, ValueError, KeyError and whatever a damaged file leads to.
    except Exception as error:
        raise FoveateError(f"{name} cannot be loaded: {_reason(error)}") from error


def _check_vision(name: str, config: Any) -> None:
    """Refuse a model that reads no pictures, before its weights are read."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from foveate.families.rows import FAMILIES

    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in (
        getattr(config, "auto_map", None) or {}
    ):
        return
    kind = ", ".join(getattr(config, "architectures", None) or ["no architecture stated"])
    families = ", ".join(family.name for family in FAMILIES)
    raise FoveateError(
        f"{name} is a {config.model_type!r} model ({kind}), no vision-language model; families that can be pruned: "
        f"{families}"
    )


def _weights(name: str, source: str, config: Any, dtype: str, trust: bool) -> Any:
    from transformers import AutoModelForImageTextToText

    from foveate.checkpoints import check_names

    check_names(source, name)
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust,
            output_loading_info=True,
        )
    except Exception as error:
        raise FoveateError(f"the weights of {name} cannot be loaded: {_weights_reason(source, error)}") from error
    # transformers fills what is missing with random numbers, which would answer at random.
    lacking = sorted(report["missing_keys"]) + sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if lacking:
        raise FoveateError(
            f"the weights of {name} are incomplete: {len(lacking)} tensors are missing or of another shape, "
            f"the first is {lacking[0]}"
        )
    return model


def load_processor(name: str, source: str, trust: bool = False) -> Any:
    """The processor of a model.

    Args:
        name: what messages call the model.
        source: its folder or hub id, as `find` gives it.
        trust: run Python code that its repository ships.

    Raises:
        FoveateError: it cannot be loaded, or prepares no pictures.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust)
    except Exception as error:
        raise FoveateError(f"the processor of {name} cannot be loaded: {_reason(error)}") from error
    if getattr(processor, "image_processor", None) is None:
        raise FoveateError(f"{name} ships no image processor, so pictures cannot be prepared for it")
    return processor


def _weights_reason(source: str, error: Exception) -> str:
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if others:
            return f"{others[0]} is no safetensors file, and other formats can run code when they are read; convert it"
        return "there is no safetensors file in its folder"
    if type(error).__name__ == "SafetensorError":
        return f"a safetensors file is damaged ({_reason(error)}); fetch it again"
    return _reason(error)


def _reason(error: Exception) -> str:
    """The first sentence of a loader's message, which can run over many lines."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
