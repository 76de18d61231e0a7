"""Names in checkpoints that lead to other formats, to other folders or to other models are refused before loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from models import tiny
from safetensors.torch import load_file, save_file

from foveate.checkpoints import check_names
from foveate.core import FoveateError
from foveate.inference.loading import load
from foveate.scenes import mini
from foveate.scenes.joint_space import train_clip_text
from foveate.scenes.recipe import train_mini

INDEX = "model.safetensors.index.json"
CASES: list[tuple[str, Any, str]] = [
    (INDEX, {"weight_map": {"a": "pytorch_model.bin"}}, "pytorch_model.bin', which is no safetensors file, and other"),
    (
        INDEX,
        {"weight_map": {"a": "a.safetensors", "b": "b.pt"}},
        f"{INDEX} of it names 'b.pt', which is no safetensors",
    ),
    (INDEX, {"weight_map": {"a": 3}}, "names '3', which is no safetensors file"),
    (INDEX, {"weight_map": {"a": "../x.safetensors"}}, "names '../x.safetensors', which is outside of it"),
    (INDEX, {"weight_map": {"a": "/etc/x.safetensors"}}, "names '/etc/x.safetensors', which is outside of it"),
    (INDEX, {"weight_map": ["a.bin"]}, f"weight_map in {INDEX} of it is list, no table of files"),
    (INDEX, "[" * 100_000, f"{INDEX} of it cannot be read as JSON: its brackets are nested too deep"),
    (
        "config.json",
        {"transformers_weights": "adapter_model.bin"},
        "names 'adapter_model.bin', which is no safetensors",
    ),
    ("config.json", {"transformers_weights": "../x.safetensors"}, "which is outside of it"),
    ("config.json", {"transformers_weights": ["a"]}, r"names \['a'\], which is no safetensors file"),
    ("adapter_config.json", {"base_model_name_or_path": "owner/name"}, r"it holds an adapter \(adapter_config\.json\)"),
]


def write(folder: Path, file: str, value: Any) -> None:
    stored = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(value if isinstance(value, str) else json.dumps({**stored, **value}))


@pytest.mark.parametrize(("file", "value", "message"), CASES)
def test_names_that_lead_astray(file: str, value: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, file, value)
    with pytest.raises(FoveateError, match=message):
        check_names(tmp_path, "it")


def test_an_index_that_the_configuration_names_is_read_too(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"transformers_weights": "own.safetensors.index.json"})
    check_names(tmp_path, "it")
    write(tmp_path, "own.safetensors.index.json", {"weight_map": {"a": "a.bin"}})
    with pytest.raises(FoveateError, match=r"own\.safetensors\.index\.json of it names 'a\.bin'"):
        check_names(tmp_path, "it")


def test_a_checkpoint_in_several_files_loads(tmp_path: Path) -> None:
    model = tiny.model()
    tiny.save(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load(str(tmp_path), device="cpu")
    assert all(torch.equal(value, loaded.model.state_dict()[name]) for name, value in model.state_dict().items())


def pickled(folder: Path) -> Path:
    """Let an index lead to a pickle, as if it were one of several files."""
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    torch.save(tensors, folder / "rest.bin")
    file.unlink()
    write(folder, INDEX, {"metadata": {}, "weight_map": dict.fromkeys(tensors, "rest.bin")})
    return folder


def test_no_entrance_reads_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    tiny.save(model, tmp_path / "model")
    mini.save(mini.build(config=mini.llava_config(size=28, width=16, layers=2)), tmp_path / "mini")
    tiny.clip(model)[0].save_pretrained(tmp_path / "clip")
    for name in ("model", "mini", "clip"):
        pickled(tmp_path / name)
    monkeypatch.setattr(torch, "load", None)
    message = "names 'rest.bin', which is no safetensors file, and other formats can run code when they are read"
    with pytest.raises(FoveateError, match=message):
        load(str(tmp_path / "model"), device="cpu")
    with pytest.raises(FoveateError, match=message):
        train_mini(tmp_path / "run", max_seconds=1, start=tmp_path / "mini")
    with pytest.raises(FoveateError, match=message):
        train_clip_text(tmp_path / "mini", tmp_path / "made", max_seconds=1)
    with pytest.raises(FoveateError, match=message):
        tiny.foveate.prune(model, "cdpruner:keep=4", clip=tmp_path / "clip", question="what ?")


def test_a_repository_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache as the hub's client leaves it; what cannot be asked there is left to whoever loads the model."""
    files = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    files.mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    save_file({"a": torch.zeros(2)}, files / "model.safetensors")
    check_names("owner/name", "it")
    check_names("owner/other", "it")
    write(files, INDEX, {"weight_map": {"a": "a.bin"}})
    with pytest.raises(FoveateError, match=r"of it names 'a\.bin'"):
        check_names("owner/name", "it")
