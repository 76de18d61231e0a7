"""What a folder of trained modules may hold: checked by name, shape and type, alike for every kind of modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from foveate.core import FoveateError
from foveate.methods import get
from foveate.modules import crossget, dynamicvit, lvpruning, storage

SAVERS: dict[str, Callable[[Path], Any]] = {
    "lvpruning": lambda folder: lvpruning.save(
        lvpruning.build(lvpruning.LVPruningConfig(width=8, heads=2, layers=[1, 2, 3], base_layers=4)), folder
    ),
    "dynamicvit": lambda folder: dynamicvit.save(
        dynamicvit.build(dynamicvit.DynamicViTConfig(width=8, blocks=6, layers=[2, 3, 4])), folder
    ),
    "crossget": lambda folder: crossget.save(
        crossget.CrossGETTokens(crossget.CrossGETConfig(width=8, blocks=6)), folder
    ),
}
LOADERS: dict[str, Callable[[Path], Any]] = {
    "lvpruning": lvpruning.load,
    "dynamicvit": dynamicvit.load,
    "crossget": crossget.load,
}
each_kind = pytest.mark.parametrize("kind", SAVERS)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    """Write modules of a kind and say where."""

    def save(kind: str) -> Path:
        SAVERS[kind](tmp_path / kind)
        return tmp_path / kind

    return save


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


HUGE = 10**9
SHAPES = {
    "lvpruning": [
        ({"heads": -1}, "heads=-1 is no whole number from 1 to 8"),
        ({"heads": 0}, "heads=0 is no whole number from 1 to 8"),
        ({"heads": 3}, "width=8 cannot be shared evenly by heads=3"),
        ({"heads": True}, "heads"),
        ({"heads": "8"}, "heads"),
        ({"heads": 2.0}, "heads"),
        ({"width": HUGE}, "width=1000000000 is no whole number from 1 to 65536"),
        ({"blocks": HUGE}, "blocks=1000000000 is no whole number from 1 to 16"),
        ({"base_layers": HUGE}, "base_layers=1000000000 is no whole number from 1 to 1000"),
        ({"layers": ["a"]}, "layers"),
        ({"layers": []}, "layers names 0 depths; there can be 1 to 64"),
        ({"layers": [0, 1, 2]}, "a depth of layers=0 is no whole number from 1 to 3"),
        ({"layers": [1, 2, HUGE]}, "a depth of layers=1000000000 is no whole number from 1 to 3"),
        ({"layers": [2, 1, 3]}, r"layers=\[2, 1, 3\] do not rise strictly"),
        ({"layers": [1, 2]}, "3 ratios for 2 layers; give one for each"),
        ({"ratios": [0.5, 0.5, 1.5]}, r"ratios=.*1\.5.* are not all shares in \(0, 1\]"),
        ({"ratios": "half"}, "ratios"),
    ],
    "dynamicvit": [
        ({"width": 6}, "width=6 cannot be halved twice; the predictors need a multiple of 4"),
        ({"width": -4}, "width=-4 is no whole number from 1 to 65536"),
        ({"width": HUGE}, "width=1000000000 is no whole number from 1 to 65536"),
        ({"blocks": HUGE}, "blocks=1000000000 is no whole number from 1 to 1000"),
        ({"layers": ["a"]}, "layers"),
        ({"layers": [2, 3, 7]}, "a depth of layers=7 is no whole number from 1 to 6"),
        ({"layers": list(range(1, 101)), "blocks": 200}, "layers names 100 depths; there can be 1 to 64"),
    ],
    "crossget": [
        ({"blocks": HUGE}, "blocks=1000000000 is no whole number from 1 to 1000"),
        ({"blocks": 0}, "blocks=0 is no whole number from 1 to 1000"),
        ({"width": None}, "width"),
        ({"width": [8]}, "width"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "change", "message"), [(kind, *case) for kind, cases in SHAPES.items() for case in cases]
)
def test_a_shape_that_cannot_be_is_refused_before_anything_is_built(
    kind: str, change: dict[str, Any], message: str, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(kind)
    configure(folder, **change)
    monkeypatch.setattr(storage, "_weights", None)  # whoever gets so far has built something
    with pytest.raises(FoveateError, match=rf"the configuration of .* in .*{kind} cannot be used: .*{message}"):
        LOADERS[kind](folder)


@each_kind
def test_fields_that_are_not_the_modules_own_are_not_read(kind: str, saved: Callable[[str], Path]) -> None:
    """Of these, transformers would make a dictionary of a billion entries, read a pickle, or fail."""
    folder = saved(kind)
    configure(
        folder, num_labels=HUGE, transformers_weights="adapter_model.bin", id2label=3, quantization_config={"a": 1}
    )
    before = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    assert all(
        torch.equal(value.to(before[name].dtype), before[name])
        for name, value in LOADERS[kind](folder).state_dict().items()
    )


@each_kind
@pytest.mark.parametrize("content", ["[]", "3", "{", "[" * 100_000, ""])
def test_a_configuration_that_is_none(kind: str, content: str, saved: Callable[[str], Path]) -> None:
    folder = saved(kind)
    (folder / "config.json").write_text(content)
    with pytest.raises(FoveateError, match=r"cannot be read as JSON|holds a None model"):
        LOADERS[kind](folder)


@each_kind
def test_tensors_are_those_that_the_configuration_says(kind: str, saved: Callable[[str], Path]) -> None:
    folder = saved(kind)
    whole = (folder / "model.safetensors").read_bytes()
    name = next(iter(load_file(folder / "model.safetensors")))
    cases: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
        (lambda tensors: tensors.pop(name), f"are incomplete: 1 tensors, first {name}$"),
        (lambda tensors: tensors.update({name: torch.zeros(3)}), rf"first {name} of shape \(3,\), not \("),
        (lambda tensors: tensors.update(more=torch.zeros(3)), "have no place for 1 of their tensors, first more"),
        (
            lambda tensors: tensors.update({one: value.to(torch.int8) for one, value in tensors.items()}),
            "are stored as I8; all must have one type of F64, F32, BF16, F16",
        ),
    ]
    for change, message in cases:
        rewrite(folder, change)
        with pytest.raises(FoveateError, match=message):
            LOADERS[kind](folder)
        (folder / "model.safetensors").write_bytes(whole)
    LOADERS[kind](folder)


def test_tensors_have_one_type(saved: Callable[[str], Path]) -> None:
    folder = saved("lvpruning")
    rewrite(
        folder, lambda tensors: tensors.update({name: value.float() for name, value in [next(iter(tensors.items()))]})
    )
    with pytest.raises(FoveateError, match="are stored as BF16 and F32; all must have one type of"):
        lvpruning.load(folder)


@each_kind
def test_no_other_file_is_opened(kind: str, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an index that names a pickle, nor an adapter, which would lead elsewhere."""
    folder = saved(kind)
    names = list(load_file(folder / "model.safetensors"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/name"}))
    monkeypatch.setattr(torch, "load", None)
    LOADERS[kind](folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FoveateError, match=r"there is no model\.safetensors, and nothing else is read"):
        LOADERS[kind](folder)


@each_kind
def test_a_path_that_can_be_none(kind: str) -> None:
    for path, message in {"x" * 300: "holds a name of 300 bytes", "a\0b": "NUL", "~no-such-user": "no user"}.items():
        with pytest.raises(FoveateError, match=message):
            get(kind).from_pretrained(path)


def test_modules_of_a_hub_come_from_the_same_two_files(
    tmp_path: Path, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache as the hub's client leaves it."""
    made = saved("crossget")
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    made.rename(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert crossget.load("owner/name").config.blocks == 6
    with pytest.raises(FoveateError, match="no cross tokens of CrossGET can be loaded from owner/other: "):
        crossget.load("owner/other")
