"""Which MODELs load, and what is said of those that do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from transformers import LlamaConfig, LlamaForCausalLM

import foveate
from foveate.core import FoveateError, UsageError
from foveate.families.rows import FAMILIES
from foveate.inference.loading import find, find_device, load


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def refusal(path: Path) -> str:
    with pytest.raises(FoveateError) as caught:
        load(str(path), device="cpu")
    assert not isinstance(caught.value, UsageError)
    return str(caught.value)


def test_a_folder_loads(folder: Path) -> None:
    loaded = load(str(folder), device="cpu", dtype="bfloat16")
    assert loaded.name == str(folder)
    assert (loaded.model.dtype, loaded.model.device.type, loaded.model.training) == (torch.bfloat16, "cpu", False)
    assert loaded.processor.image_token_id == tiny.IMAGE


def test_names() -> None:
    assert find("mini") == foveate.MINI
    assert find("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"


def test_names_that_cannot_be_are_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for name, message in {
        f"{tmp_path}/none": "there is no folder",
        "./none": "there is no folder ./none, and it is no hub id",
        "a/b/c": "there is no folder a/b/c",
        str(tmp_path): "holds no config.json, so it is no checkpoint of transformers",
        str(tmp_path / "model.safetensors"): "is a file; give the folder of the checkpoint, a hub id, or mini",
    }.items():
        with pytest.raises(UsageError, match=message):
            find(name)


def test_a_hub_id_that_cannot_be_reached() -> None:
    with pytest.raises(FoveateError, match="nobody/nothing cannot be loaded: "):
        load("nobody/nothing", device="cpu")


def test_a_damaged_checkpoint(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"the weights of {copy} cannot be loaded: a safetensors file is damaged" in refusal(copy)


def test_a_checkpoint_that_lacks_weights(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in sorted(tensors) if "mlp.up_proj" in name)
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    message = refusal(copy)
    assert "are incomplete: 1 tensors are missing or of another shape, the first is" in message
    assert "mlp.up_proj.weight" in message


def test_a_checkpoint_of_another_shape(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 64
    (copy / "config.json").write_text(json.dumps(config))
    assert "the weights of" in refusal(copy)


def test_weights_that_could_run_code(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "there is no safetensors file in its folder" in refusal(copy)
    torch.save({}, copy / "pytorch_model.bin")
    message = refusal(copy)
    assert "pytorch_model.bin is no safetensors file, and other formats can run code when they are read" in message


def test_a_config_that_cannot_be_read(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert f"{copy} cannot be loaded: " in refusal(copy)


def test_a_model_that_reads_no_pictures(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert refusal(tmp_path) == (
        f"{tmp_path} is a 'llama' model (LlamaForCausalLM), no vision-language model; families that can be pruned: "
        f"{', '.join(family.name for family in FAMILIES)}"
    )


def test_a_checkpoint_without_processor(copy: Path) -> None:
    for path in copy.glob("*processor*"):
        path.unlink()
    assert f"the processor of {copy} cannot be loaded" in refusal(copy) or "no image processor" in refusal(copy)


def test_devices() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in {"cpu", "cuda", "mps"}
    with pytest.raises(UsageError, match="device='cuda:99', but torch sees"):
        find_device("cuda:99")
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        find_device("gpu")


def test_nothing_of_loading_is_printed(folder: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    load(str(folder), device="cpu")
    assert capsys.readouterr() == ("", "")
