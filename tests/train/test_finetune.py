"""Tuning while tokens are pruned: the adapter learns, the model stays, and a killed run goes on as if it had not."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny, tiny_processors
from models.untouched import untouched
from PIL import Image
from safetensors.torch import load_file

from foveate.checkpoints import fingerprint
from foveate.core import FoveateError
from foveate.inference import adapters
from foveate.inference.loading import load
from foveate.prune import prune
from foveate.train.conversations import Conversations, collate
from foveate.train.finetune import Settings, finetune, targets
from foveate.train.scene_questions import SceneQuestions

pytestmark = pytest.mark.slow
SPEC = "fopru:keep=16"


def tuned(out: Path, **options: Any) -> Path:
    loaded = load("mini", device="cpu")
    before = fingerprint(loaded.model)
    rows = SceneQuestions(loaded.model, loaded.processor, 8, pool=4, pixels=True)
    changes = {name: options.pop(name) for name in [*options] if name not in ("resume", "max_seconds")}
    given: dict[str, Any] = {"prune": SPEC, "batch": 2, "steps": 2, "rank": 4, "rate": 1e-2, "save_steps": 1}
    folder = finetune(loaded.model, rows, out, Settings(**{**given, "bf16": False, **changes}), name="mini", **options)
    assert fingerprint(loaded.model) == before, "the model has no adapter afterwards, and its own weights"
    return folder


def test_an_adapter_is_pruned_by_its_own_spec(tmp_path: Path) -> None:
    folder = tuned(tmp_path / "run")
    weights = load_file(folder / adapters.WEIGHTS)
    assert any(bool(value.any()) for name, value in weights.items() if "lora_B" in name), "it has learned"
    assert adapters.read_record(folder) == {"prune": SPEC, "model": "mini", "model_type": "llava"}
    plain = load("mini", device="cpu")
    assert any("multi_modal_projector" in name for name in targets(plain.model))
    assert not any("vision" in name or "lm_head" in name for name in targets(plain.model))
    before = fingerprint(plain.model)
    loaded = adapters.attach(plain, folder)
    assert fingerprint(loaded.model) != before
    prune(loaded.model, SPEC).discard()
    with pytest.raises(FoveateError, match="was tuned under fopru:keep=16, not fopru:keep=32"):
        prune(loaded.model, "fopru:keep=32")
    prune(adapters.attach(load("mini", device="cpu"), folder, any_spec=True).model, "fopru:keep=32").discard()


def test_a_run_goes_on_and_is_refused_with_other_settings(tmp_path: Path) -> None:
    whole = load_file(tuned(tmp_path / "whole") / adapters.WEIGHTS)
    out = tmp_path / "cut"
    tuned(out, max_seconds=0.001)
    with pytest.raises(FoveateError, match="already holds a run"):
        tuned(out)
    with pytest.raises(FoveateError, match="was begun with"):
        tuned(out, resume=True, prune="fopru:keep=32")
    again = load_file(tuned(out, resume=True) / adapters.WEIGHTS)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_blocks_computed_again_learn_the_same(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [
            load_file(tuned(tmp_path / str(on), checkpointing=on, dropout=0.0) / adapters.WEIGHTS) for on in (0, 1)
        ]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=2e-3, rtol=0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy on how stock GLM-4V reads
@pytest.mark.parametrize("name", ["llava-next", "qwen2.5-vl", "gemma3", "internvl", "idefics3"])
def test_every_family_learns_what_it_loses(name: str, tmp_path: Path) -> None:
    """The first step's loss is that of the pruned answers, averaged over the step; then the adapter is another one."""
    said = [{"from": "human", "value": "<image>\nw10 w11"}, {"from": "gpt", "value": "w30 w31"}]
    for number, size in enumerate([(60, 40), (30, 62)]):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / f"{number}.png")
    entries = [{"image": f"{number}.png", "conversations": said[:1] + said[1:] * (number + 1)} for number in range(2)]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    model = tiny.model(name)
    rows = Conversations(tmp_path / "data.json", tmp_path, tiny_processors.PROCESSORS[name](), tiny.IMAGE)
    with torch.no_grad(), prune(model, "uniform:keep=0.5") as trace:
        pruned = model(**collate([rows[0], rows[1]], pad=0)).loss
    kept = sum(image.after for image in trace.images) / sum(image.original for image in trace.images)
    lines: list[dict[str, Any]] = []
    settings = Settings(
        prune="uniform:keep=0.5", batch=2, micro=1, rank=2, rate=1e-2, warmup=0.0, log_steps=1, bf16=False
    )
    with untouched(model):
        folder = finetune(model, rows, tmp_path / "run", settings, report=lines.append)
    assert lines[0]["loss"] == pytest.approx(float(pruned), abs=1e-4) and lines[0]["kept"] == pytest.approx(kept)
    assert any(bool(value.any()) for key, value in load_file(folder / adapters.WEIGHTS).items() if "lora_B" in key)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"holds no foveate\.json"):
        adapters.read_record(tmp_path)
