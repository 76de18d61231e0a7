"""A picture, and a way to call the command line as a shell would."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from foveate.cli import main


@dataclass(frozen=True)
class Result:
    """What a call of the command left."""

    code: int
    out: str
    err: str


Call = Callable[..., Result]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.delenv("FOVEATE_DEBUG", raising=False)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.effect_noise((48, 48), 90).convert("RGB").save(path)
    return path


@pytest.fixture(scope="session")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model, tuned under fopru:keep=9."""
    from peft import LoraConfig

    from foveate.inference import adapters
    from foveate.inference.loading import load

    shape = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    path = tmp_path_factory.mktemp("tuned") / "adapter"
    model = adapters.with_adapters(load(str(folder), device="cpu").model, shape)
    adapters.write(model, path, spec="fopru:keep=9", name="tiny")
    return path


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with one question."""
    path = tmp_path / "task"
    path.mkdir()
    Image.effect_noise((48, 48), 90).convert("RGB").save(path / "1.png")
    line = {"image": "1.png", "question": "w10 w11", "answers": ["w12"], "type": "exact"}
    (path / "questions.jsonl").write_text(json.dumps(line) + "\n")
    return path


@pytest.fixture
def instructions(tmp_path: Path) -> tuple[Path, Path]:
    """LLaVA's JSON of six entries, one of them without its picture, and the folder of the pictures."""
    images = tmp_path / "images"
    images.mkdir()
    entries = []
    for number in range(6):
        Image.effect_noise((30, 30), 90).convert("RGB").save(images / f"{number}.png")
        said = [{"from": "human", "value": "<image>\nw10 w11"}, {"from": "gpt", "value": f"w{30 + number}"}]
        entries.append({"image": f"{number}.png" if number else "gone.png", "conversations": said})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path / "data.json", images
