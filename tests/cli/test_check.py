"""`foveate check`: its tables, its JSON, its exit code."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from transformers import LlavaConfig

from foveate import methods
from foveate.inference.loading import Loaded
from foveate.methods.random import Random


def test_a_model_that_holds(call: Any, folder: Path) -> None:
    result = call("check", folder, "--device", "cpu")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[:5] == [
        "model     LlavaForConditionalGeneration (llava)",
        "family    llava-1.5",
        "encoder   clip_vision_model, 4 blocks, the projector reads block 2 (counted from 0)",
        "decoder   4 layers, sdpa attention",
        "tokens    36 of a picture of 448 x 336 pixels",
    ]
    runs = {line.split()[0]: line for line in lines[7 : 7 + len(methods.names())]}
    assert list(runs) == list(methods.names())
    assert runs["fopru"].split() == ["fopru", "yes"]
    assert runs["cdpruner"].split(maxsplit=1)[1] == "yes, with a CLIP (--clip) and a question"
    assert any(line.startswith("random:keep=18 keeps exactly its count") for line in lines)
    assert lines[-1] == "all hold"


def test_json(call: Any, folder: Path) -> None:
    result = call("check", folder, "--device", "cpu", "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert (found["family"], found["tokens"], found["passed"]) == ("llava-1.5", [36], True)
    assert found["name"] == str(folder)
    assert len(found["outcomes"]) == 28
    assert found["methods"].keys() == set(methods.names())


def test_a_model_that_does_not_hold(call: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Random.select

    def shuffled(self: Random, signals: Any) -> Any:
        return stock(dataclasses.replace(self, seed=int(torch.randint(1000, ()))), signals)

    monkeypatch.setattr(Random, "select", shuffled)
    result = call("check", folder, "--device", "cpu")
    assert result.code == 1
    assert result.out.splitlines()[-1].endswith("do not hold")
    broken = next(line for line in result.out.splitlines() if line.startswith("random:keep=18 repeats itself"))
    assert broken.split()[3:] == ["NO", "two", "runs", "differ"]


def test_a_model_of_another_kind(call: Any, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    text = {**config["text_config"], "architectures": ["LlamaForCausalLM"]}
    (copy / "config.json").write_text(json.dumps(text), encoding="utf-8")
    result = call("check", copy, "--device", "cpu")
    assert (result.code, result.out) == (1, "")
    assert "is a 'llama' model (LlamaForCausalLM), no vision-language model" in result.err


def test_what_is_assumed_of_a_model_without_a_row(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Newcomer(LlavaConfig):
        model_type = "newcomer"

    model = tiny.model()
    processor = tiny.processor(model)
    model.config.__class__ = Newcomer
    monkeypatch.setattr("foveate.inference.loading.load", lambda name, **_: Loaded(name, model, processor))
    result = call("check", "newcomer")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[1] == "family    newcomer: no row, made of the standard parts that were found"
    assert lines[2].startswith("assumed   each entry of pooler_output is one picture")
    assert any(line.startswith("fopru:keep=18 keeps exactly") for line in lines)
    model.get_decoder().norm = None
    result = call("check", "newcomer")
    assert (result.code, result.out) == (1, "")
    assert "a row cannot be made for it without get_decoder().norm" in result.err


@pytest.mark.slow
def test_mini(call: Any) -> None:
    result = call("check", "mini", "--device", "cpu", "--dtype", "float32")
    assert (result.code, result.err) == (0, "")
    assert "tokens    576 of a picture" in result.out
