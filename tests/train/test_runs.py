"""A run's folder: settings that must be equal, checkpoints that were written to their end, digests of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from foveate.core import FoveateError
from foveate.train.runs import SETTINGS, begin, fingerprint, last_checkpoint


def test_a_run_goes_on_with_equal_settings_only(tmp_path: Path) -> None:
    settings = {"rate": 1e-3, "layers": (1, 2), "data": {"kind": "scenes"}}
    begin(tmp_path / "run", settings, resume=False)
    begin(tmp_path / "run", settings, resume=True)
    with pytest.raises(FoveateError, match="already holds a run; resume it, or give another folder"):
        begin(tmp_path / "run", settings, resume=False)
    with pytest.raises(FoveateError, match=r"was begun with rate=0\.001, not 0\.002; resume with the same"):
        begin(tmp_path / "run", {**settings, "rate": 2e-3}, resume=True)
    with pytest.raises(FoveateError, match="begun with data="):
        begin(tmp_path / "run", {**settings, "data": {"kind": "conversations"}}, resume=True)


def test_what_is_no_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=f"holds no {SETTINGS} to resume"):
        begin(tmp_path, {}, resume=True)
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(FoveateError, match="is damaged"):
        begin(tmp_path, {}, resume=True)


def test_a_checkpoint_that_was_cut_short_does_not_count(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, state in ((9, "{}"), (10, "{}"), (20, '{"global_'), (30, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_digest_tells_any_change(dtype: torch.dtype) -> None:
    model = nn.Linear(5, 3).to(dtype)
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        model.weight[1, 2], model.weight[2, 1] = model.weight[2, 1].clone(), model.weight[1, 2].clone()
    swapped = fingerprint(model)
    assert swapped != before, "places count"
    with torch.no_grad():
        model.weight.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[0, 0] += 1
    assert fingerprint(model) != swapped, "one bit counts"
