"""Curves over what is kept, and the papers' figures beside ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.core import FoveateError
from foveate.cost import estimate, sweep
from foveate.cost.published import published
from foveate.methods.fopru import FoPru
from foveate.methods.h2o import H2O
from foveate.methods.lvpruning import LVPruning
from foveate.methods.pyramiddrop import PyramidDrop


def test_lvpruning_in_steps_of_a_twentieth() -> None:
    """(rho, rho - 0.2, rho - 0.4): the last stage keeps something from 0.45 on."""
    points = sweep("llava-1.5-7b", LVPruning(), text=30, convention="weights")
    assert [share for share, _, _ in points] == [round(0.45 + 0.05 * step, 2) for step in range(12)]
    methods = {share: method for share, method, _ in points}
    assert methods[0.6] == LVPruning(keep=(0.6, 0.4, 0.2))
    totals = {share: cost.first_token.flops for share, _, cost in points}
    assert totals[0.5] == estimate("llava-1.5-7b", 576, 30, "lvpruning", convention="weights").first_token.flops
    assert list(totals.values()) == sorted(totals.values())


def test_other_methods_keep_the_share_itself() -> None:
    points = sweep("llava-1.5-7b", FoPru(keep=0.25))
    assert [cost.visual[0] for _, _, cost in points] == [max(1, round(576 * step / 20)) for step in range(1, 21)]
    last = sweep("llava-1.5-7b", PyramidDrop())[-1]
    assert last[1] == PyramidDrop(keep=(1.0, 0.5, 0.25))


def test_methods_without_a_budget_are_refused() -> None:
    with pytest.raises(FoveateError, match="H2O has no keep to sweep"):
        sweep("llava-1.5-7b", H2O())


def test_published_cells() -> None:
    cells = {(cell.row, cell.figure): cell for cell in published()}
    assert len(cells) == 9 * 4 + 5
    # The unpruned rows are the simulator's own, but for the operations that were divided by the bits.
    plain = [cell for cell in cells.values() if cell.row.startswith("LLaVA-1.5,")]
    assert [cell.figure for cell in plain if not cell.agrees] == ["TFLOPs", "TFLOPs"]
    # What contradicts itself: a pruned row's 4-bit time is a quarter of its 16-bit time.
    cell = cells["PruMerge+, 144 + 60 tokens, int4", "ms"]
    assert (cell.published, round(cell.computed, 2), cell.agrees) == (2.5, 4.46, False)
    own = cells["image-text interaction, 127 + 60 tokens, fp16", "GB moved"]
    assert (own.published, round(own.computed, 1), own.agrees) == (13.2, 15.2, False)
    assert cells["LLaVA-1.5-7B", "TFLOPs"].agrees and cells["decision modules", "TFLOPs"].agrees
    for rho in (0.6, 0.5, 0.45):
        cell = cells[f"rho = {rho}", "TFLOPs"]
        assert cell.computed == pytest.approx(cell.published, rel=0.003)


def test_the_page_shows_every_cell_that_differs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cost.md").read_text(encoding="utf-8")
    for cell in published():
        line = f"| {cell.row} | {cell.figure} | {cell.published:.4g} | {cell.computed:.4g} |"
        assert (line in page) is not cell.agrees, line


@pytest.mark.parametrize(
    ("tokens", "tera", "milliseconds", "stored"), [(114, "2.3", "9.7", "0.8"), (120, "2.3", "9.7", "0.8")]
)
def test_the_tokens_that_fit_the_inconsistent_row(tokens: int, tera: str, milliseconds: str, stored: str) -> None:
    prefill = estimate("llava-1.5-7b", tokens, 60).prefill
    found = (prefill.flops / 1e12, prefill.seconds * 1e3, prefill.stored_activation_bytes / 1e9)
    assert [f"{value:.1f}" for value in found] == [tera, milliseconds, stored]
