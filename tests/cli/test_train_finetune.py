"""`foveate train finetune`: from LLaVA's JSON to an adapter, on after a kill, and what is refused before it loads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import tiny
from safetensors.torch import load_file

from foveate.inference import adapters

SPEC = "fopru:keep=9"
TEMPLATE = (
    "{% for message in messages %}w3 {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
SAID = """[{{"image": "{}", "conversations": [
    {{"from": "human", "value": "w10"}}, {{"from": "gpt", "value": "w11"}}]}}]"""
KILLED = """
import os, sys
from foveate.cli import main
from foveate.train import finetune
stock = finetune._Tuner._save
def killed(trainer, *arguments, **options):
    stock(trainer, *arguments, **options)
    if trainer.state.global_step == 3:
        os.kill(os.getpid(), 9)  # the optimizer's state is still to be written
finetune._Tuner._save = killed
main(sys.argv[1:])
"""


@pytest.fixture
def where(tmp_path: Path, instructions: tuple[Path, Path]) -> list[str]:
    """A checkpoint with a chat template, LLaVA's JSON of six entries, one without its picture, and the pictures."""
    model = tiny.model()
    model.save_pretrained(tmp_path / "model")
    processor = tiny.processor(model)
    processor.chat_template = TEMPLATE
    processor.save_pretrained(tmp_path / "model")
    data, images = instructions
    given = {"--model": tmp_path / "model", "--data": data, "--images": images, "--device": "cpu"}
    return [str(part) for pair in given.items() for part in pair]


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_adapter(call: Any, where: list[str], tmp_path: Path) -> None:
    """Killed while it writes a checkpoint, in a process of its own."""
    settings = f"--prune {SPEC} --batch 2 --epochs 2 --steps 4 --save-steps 1 --rate 1e-2 --rank 4 --no-bf16".split()
    options = ["train", "finetune", *where, *settings, "--out"]
    whole = call(*options, tmp_path / "whole")
    assert (whole.code, whole.out) == (0, f"{tmp_path / 'whole' / 'adapter'}\n"), whole.err
    assert "5 entries; left out: 1 with a missing picture\nmissing pictures: gone.png\n" in whole.err
    assert f"batch 2, pruned by {SPEC}\n" in whole.err and "Warning" not in whole.err
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, *map(str, options), str(out)]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (out / "adapter").exists() and not (out / "checkpoint-3" / "optimizer.pt").exists()
    assert "already holds a run; go on with it by --resume" in call(*options, out).err
    result = call(*options, out, "--resume")
    assert result.code == 0, result.err
    first, second = (load_file(folder / "adapter" / adapters.WEIGHTS) for folder in (tmp_path / "whole", out))
    assert first.keys() == second.keys() and any(bool(value.any()) for name, value in first.items() if "lora_B" in name)
    assert all(bool((value == second[name]).all()) for name, value in first.items())
    assert adapters.read_record(out / "adapter")["prune"] == SPEC
    picture = str(tmp_path / "images" / "1.png")
    asked = ["run", where[1], picture, "w10 w11", "--device", "cpu", "--max-new-tokens", 2, "--prune"]
    assert call(*asked, SPEC, "--adapter", out / "adapter").code == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--prune fopruu:keep=9", 2, "did you mean 'fopru'"),
        ("--prune h2o", 2, "--prune h2o acts on the cache alone, which a training step does not fill"),
        ("--prune resize:keep=9", 2, "--prune resize:keep=9 scales the picture, and no token of it leaves"),
        ("--prune fopru:keep=9 --rank 0", 2, "--rank 0 is below 1; the smallest is --rank 1"),
        ("--prune fopru:keep=9 --alpha 0", 2, "--alpha 0.0 is not above 0"),
        ("--prune fopru:keep=9 --dropout 1", 2, "--dropout 1.0 is no share in [0, 1)"),
        ("--prune fopru:keep=9 --data none.json", 2, "--data none.json is no file"),
        ("--prune fopru:keep=9 --dtype float16", 1, "--dtype float16 cannot hold small gradients; load the model with"),
        ("--prune fopru:keep=9 --resume", 1, "holds no run to go on with"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_weights_are_read(
    call: Any, where: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, code: int, message: str
) -> None:
    monkeypatch.setattr("foveate.inference.loading._weights", lambda *_: pytest.fail("weights were read"))
    result = call("train", "finetune", *where, "--out", tmp_path / "run", *options.split())
    assert (result.code, result.out) == (code, "") and message in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"image": "1.png",\n "conversations": [}\n]', "Expecting value: line 3 column 20"),
        ('[{"image": "1.png"}, 7]', "entry 1 of {file} is int, no object with conversations"),
        (SAID.format("../model/config.json"), "entry 0: picture '../model/config.json' leaves the folder"),
        (SAID.format("gone.png"), "no entry of {file} can be trained on; left out: 1 with a missing picture"),
    ],
)
def test_data_that_cannot_be_used_is_named_before_weights_are_read(
    call: Any, where: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    monkeypatch.setattr("foveate.inference.loading._weights", lambda *_: pytest.fail("weights were read"))
    file = tmp_path / "data.json"
    file.write_text(content)
    result = call("train", "finetune", *where, "--out", tmp_path / "run", "--prune", SPEC)
    assert (result.code, result.out) == (1, "") and message.replace("{file}", str(file)) in result.err


def test_without_peft_it_says_what_to_install(
    call: Any, where: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    result = call("train", "finetune", *where, "--out", tmp_path / "run", "--prune", SPEC)
    assert result.code == 2 and "adapters need peft; install foveate[train]" in result.err


def test_mini_has_settings_of_its_own(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def finetune(base: Any, rows: Any, out: str, settings: Any, **options: Any) -> str:
        seen.update(rows=rows, settings=settings)
        return out

    monkeypatch.setattr("foveate.train.finetune.finetune", finetune)
    options = ("--out", tmp_path / "run", "--prune", SPEC, "--device", "cpu", "--checkpointing")
    assert call("train", "finetune", *options).code == 0
    settings = seen["settings"]
    assert (settings.rank, settings.alpha, settings.dropout, settings.bf16) == (128, 256.0, 0.0, False)
    assert settings.checkpointing and settings.prune == SPEC
    assert seen["rows"].pixels and len(seen["rows"]) == settings.steps * settings.batch
