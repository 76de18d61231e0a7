"""What the page says without its looks: patches, figures, choices and reports, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from foveate.core import FoveateError
from foveate.inference.loading import Loaded
from foveate.page import choices, figures, measurements
from foveate.page.seen import WHOLE, Seen, seen
from foveate.trace import Budget, Call, ImageRecord, StageRecord


def stage(name: str, before: int, kept: list[int], scores: list[float] | None = None) -> StageRecord:
    told = None if scores is None else torch.tensor(scores)
    return StageRecord(name, "input", None, before, len(kept), torch.tensor(kept), scores=told)


def found(*stages: StageRecord, grid: tuple[int, int] | None = (2, 3)) -> Seen:
    budget = Budget((6.0,), 1e9, 600)
    record = ImageRecord(0, 6, grid, stages)
    call = Call((record,), 10, 7, 4.0, torch.zeros(1, 7), budget, budget, (7,))
    return seen(Image.new("RGB", (30, 20), "white"), call, 4, "a", None)


TWO = (stage("a", 6, [0, 2, 4, 5], [5.0, 1.0, 3.0, 1.0, 3.0, 9.0]), stage("b", 4, [2, 5]))


def test_a_patch_is_followed_to_where_it_is_dropped() -> None:
    shown = found(*TWO)
    assert shown.names() == [WHOLE, "1. a: 4 of 6", "2. b: 2 of 4"]
    together = "by no score of its own that the method tells"
    assert shown.fate(1, 3) == ["a: kept, score 3, rank 3 of 6", f"b: kept, {together}"]
    assert shown.fate(2, 2) == ["a: kept, score 3, rank 4 of 6", f"b: dropped, {together}"]
    assert shown.fate(2, 1) == ["a: dropped, score 1, rank 6 of 6"]
    assert shown.picture.size == (540, 360)  # 30 x 20, eighteen times as large
    assert shown.patch_at(539, 359) == (2, 3) and shown.patch_at(0, 0) == (1, 1) and shown.patch_at(180, 179) == (1, 2)


def test_each_stage_greys_what_has_left_by_then() -> None:
    shown = found(*TWO)

    def white(name: str) -> list[int]:
        picture = shown.drawn(name)
        places = [(180 * (token % 3) + 90, 180 * (token // 3) + 90) for token in range(6)]
        return [token for token, place in enumerate(places) if picture.getpixel(place) == (255, 255, 255)]

    assert [white(name) for name in shown.names()] == [[0, 1, 2, 3, 4, 5], [0, 2, 4, 5], [2, 5]]
    assert shown.drawn(WHOLE, (1, 2)).getpixel((180, 0)) == (255, 0, 102)


def test_a_patch_that_is_not_there_is_refused() -> None:
    with pytest.raises(FoveateError, match="no patch 3, 1; this picture has 2 rows of 3"):
        found(*TWO).fate(3, 1)
    with pytest.raises(FoveateError, match="no single raster"):
        found(*TWO, grid=None).fate(1, 1)


def test_methods_with_a_budget_are_offered(mini: Loaded) -> None:
    names = choices.budgeted(mini)
    assert {"fopru", "divprune", "fastv", "pyramiddrop", "tome", "cdpruner"} <= set(names)
    assert not {"lvpruning", "crossget", "h2o", "snapkv"} & set(names)  # learned, or no tokens but cache entries
    assert choices.spec_at("fopru", 25) == "fopru:keep=0.25"
    keep = choices.spec_at("pyramiddrop", 80)
    assert keep.startswith("pyramiddrop:keep=0.8/")
    for name in names:
        choices.spec_at(name, 50)


def test_a_prediction_is_that_of_the_cost_model(mini: Loaded) -> None:
    from foveate.cost import estimate, shape

    shown = found(*TWO)
    told = figures.predicted(mini.model, shown, "random:keep=0.5", "h100")
    whole, pruned = (
        estimate(shape(mini.model.config), 6, 4, one, answer=64, hardware="h100", dtype="fp32")
        for one in (None, "random:keep=0.5")
    )
    saved = f"{1 - pruned.kv_bytes / whole.kv_bytes:.0%}"
    assert next(line for line in told.splitlines() if line.startswith("| keys")).endswith(f"| {saved} |")
    assert figures.predicted(mini.model, shown, "random:keep=7", "h100").startswith("No prediction: ")


def rows(path: Path, *made: dict[str, Any]) -> Path:
    about = {"command": "foveate eval", "model": "mini", "task": "scenes", "samples": 5, "seed": 0}
    path.write_text(json.dumps({**about, "rows": list(made)}))
    return path


def test_a_report_in_order(tmp_path: Path) -> None:
    file = rows(
        tmp_path / "rows.json",
        {"method": "none", "accuracy": 0.9, "equivalent_tokens": 576.0},
        {"method": "fopru:keep=144", "accuracy": 0.8, "equivalent_tokens": 144.0},
        {"method": "fopru:keep=64", "accuracy": 0.7, "equivalent_tokens": 64.0},
        {"method": "random:keep=64", "accuracy": 0.3, "equivalent_tokens": 64.0},
        {"method": "snapkv", "accuracy": None, "equivalent_tokens": 64.0},
    )
    made = measurements.points(file)
    assert [(one.method, one.tokens) for one in made] == [
        ("fopru", 64.0),
        ("fopru", 144.0),
        ("none", 576.0),
        ("random", 64.0),
    ]
    assert measurements.first_shown(made) == ["none", "fopru", "random"]
    assert measurements.table(made, ["random"]).splitlines()[2:] == ["| `random:keep=64` | 64 | 30.0% |"]
