"""Tuning while tokens are pruned: the adapter learns, the model stays, and a killed run goes on as if it had not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foveate.checkpoints import fingerprint
from foveate.core import FoveateError
from foveate.inference import adapters
from foveate.inference.loading import load
from foveate.prune import prune
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


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"holds no foveate\.json"):
        adapters.read_record(tmp_path)
