"""What a run of the Trainer goes on from: checkpoints that were written to their end, digests of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from foveate.core import FoveateError
from foveate.train.checkpoints import fingerprint, last_checkpoint, read_figures, write_figures


def test_figures_come_back_as_they_were_written(tmp_path: Path) -> None:
    figures = {"seconds": 0.1, "line": {"loss": [float(torch.tensor(0.1)), 3]}}
    write_figures(tmp_path / "checkpoint-1", figures)
    assert read_figures(tmp_path / "checkpoint-1") == figures
    with pytest.raises(FoveateError, match=r"figures\.json cannot be read as JSON"):
        read_figures(tmp_path / "checkpoint-2")


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
