"""The papers' numbers: tables agree with each other, with the means that the papers give, and with their text."""

from __future__ import annotations

import dataclasses
import statistics

import pytest

from foveate import spec
from foveate.core import FoveateError
from foveate.cost import PRESETS
from foveate.cost.published import published
from foveate.evaluate.scoring import RULES
from foveate.reproduce import tables
from foveate.reproduce.cells import COST, CURVE, TIMES, computed
from foveate.reproduce.tables import LOST, NONE, NOTHING, OTHER, TOKENS, Table

OF_DATA = ("accuracy", "f1", "score", "tokens", "all_tokens", "judge")
MISPRINTED = {"LLaVA-1.6-13B 50 % rank": (64.03, 60.06)}  # its seven figures make the first; Table 4 prints the second


def values(name: str, label: str) -> dict[str, object]:
    table = tables.table(name)
    (row,) = (row for row in table.rows if row.label == label)
    return dict(zip([column.title for column in table.columns], row.values, strict=True))


def test_all_tables_and_figures_are_there() -> None:
    wanted = [f"fopru-table{number}" for number in range(1, 6)] + [f"fopru-fig{number}" for number in (5, 6, 7)]
    wanted += [f"lvpruning-table{number}" for number in range(1, 5)]
    wanted += [f"lvpruning-fig{number}" for number in range(3, 7)]
    wanted += [f"interaction-table{number}" for number in range(1, 7)]
    wanted += [f"interaction-fig{number}" for number in (1, 3, 6)]
    assert list(tables.names()) == wanted
    with pytest.raises(FoveateError, match=r"unknown table 'fopru-table9'; did you mean 'fopru-table"):
        tables.table("fopru-table9")


@pytest.mark.parametrize("table", [*map(tables.table, tables.names())], ids=tables.names())
def test_a_table_can_be_run(table: Table) -> None:
    """Every spec can be parsed, every model and data set is known, and no row stands twice."""
    assert len({row.label for row in table.rows}) == len(table.rows)
    for column in table.columns:
        assert column.measure in (OF_DATA if column.data else COST + TIMES + CURVE)
        assert column.data is None or column.data in tables.benchmarks()
    for row in table.rows:
        assert row.prune == OTHER or row.model in tables.checkpoints()
        for text in (row.prune, row.scaled, *(row.by_data or {}).values()):
            if text not in ("", NONE, OTHER, TOKENS):
                spec.parse_stages(text)
        assert all(value not in ("", None) for value in row.values)


def test_models_and_data_are_known_to_the_rest() -> None:
    for model in tables.checkpoints().values():
        assert model.preset in PRESETS and bool(model.hub) != bool(model.tuned)
        assert not model.base or model.base in tables.checkpoints()
    for data in tables.benchmarks().values():
        assert data.kind in RULES if data.kind else data.judge


def test_means_of_table_4_of_fopru() -> None:
    table = tables.table("fopru-table4")
    assert len(table.means) == 21
    for row in table.rows:
        mean = statistics.fmean(float(value) for value in row.values)
        made, printed = MISPRINTED.get(row.label, (table.means[row.label],) * 2)
        assert table.means[row.label] == printed
        assert mean == pytest.approx(made, abs=0.0051)


def test_speedups_of_table_2_of_fopru() -> None:
    """Each is the unpruned time over the row's, as far as the printed milliseconds tell."""
    whole = values("fopru-table2", "100 %")
    for row in tables.table("fopru-table2").rows[1:]:
        mine = values("fopru-table2", row.label)
        for time, ratio in (("TTFT ms", "TTFT x"), ("TPOT ms", "TPOT x")):
            half = 0.5 if time == "TTFT ms" else 0.005
            low, high = (
                (float(str(whole[time])) + sign * half) / (float(str(mine[time])) - sign * half) for sign in (-1, 1)
            )
            assert low - 0.005 <= float(str(mine[ratio])) <= high + 0.005, (row.label, ratio)


def test_figures_are_those_of_the_tables() -> None:
    assert values("fopru-fig6", "LLaVA-1.6-7B 50 % rank")["MMMU"] == pytest.approx(100 * 37.33 / 35.10, abs=0.005)
    assert values("fopru-fig6", "LLaVA-1.6-7B base")["MMMU"] == 100
    assert values("fopru-fig5", "LLaVA-1.6-13B 25 %")["Ocrbench"] == 46.30
    assert values("fopru-fig7", "LLaVA-1.6-13B 25 %")["Ocrbench"] == 41.30
    assert values("fopru-table1", "LLaVA-NeXT-8B 50 %")["SQA"] == 79.39
    assert values("fopru-table1", "LLaVA-NeXT-8B 50 %")["TTFT ms"] == LOST


@pytest.mark.parametrize(
    ("rho", "differences"),
    [
        ("0.6", (-0.4, -0.5, 1.2, -0.4, 0, 0.8, 0.4, 0.2, -0.3, -0.9, 2.5, 2.2)),
        ("0.5", (-1.2, -1.3, 1.3, -0.7, -0.2, 0.3, 0.1, -0.1, -0.4, -2.0, 0.1, 0.5)),
        ("0.45", (LOST, -2.7, 0.8, -0.8, -0.7, 0.1, 0, -0.2, -0.9, -2.0, -4.7, -0.3)),
    ],
)
def test_differences_of_lvpruning_are_those_that_it_prints(rho: str, differences: tuple[object, ...]) -> None:
    """Tables 1 and 2 print each figure with its difference, which Figure 3 draws."""
    assert tuple(values("lvpruning-fig3", f"rho = {rho}").values()) == differences


def test_lvpruning_prints_its_row_twice() -> None:
    """Rounded to the digits of Table 1, Table 3 has the same figures, and Table 4 those of Table 2."""
    first, third = values("lvpruning-table1", "rho = 0.5"), values("lvpruning-table3", "rho = 0.5")
    assert {name: round(float(str(value)), 1) for name, value in third.items() if name != "TFLOPs"} == {
        name: value for name, value in first.items() if name != "TFLOPs"
    }
    assert first["TFLOPs"] == third["TFLOPs"]
    assert values("lvpruning-table2", "rho = 0.5") == values("lvpruning-table4", "rho = 0.5")
    for rho, less in (("0.6", 52.6), ("0.5", 62.1), ("0.45", 66.7)):  # section 5.1 and the abstract
        left = float(str(values("lvpruning-table1", f"rho = {rho}")["TFLOPs"]))
        assert 100 * (1 - left / 8.38) == pytest.approx(less, abs=0.06)


def test_tables_3_and_5_of_interaction_share_rows() -> None:
    assert values("interaction-table3", "Training-Free") == values("interaction-table5", "training-free Ours")
    assert values("interaction-table3", "Fine-tuning") == values("interaction-table5", "fine-tuned Ours")
    assert (
        values("interaction-table2", "Visual + Text")["MME"]
        == values("interaction-table5", "training-free Ours")["MME"]
    )
    quarters = [row for row in tables.table("interaction-table6").rows if row.label.startswith("Ours")]
    sixteen = [float(value) for value in quarters[0].values]
    for row, factor in zip(quarters, (1, 2, 4), strict=True):
        assert all(
            abs(float(v) * factor - s) <= 0.05 * (factor + 1) + 0.2 for v, s in zip(row.values, sixteen, strict=True)
        )


def test_computed_cells_are_those_of_the_cost_model() -> None:
    """`foveate cost --published` has the same figures, printed and computed."""
    expected = [(cell.published, cell.computed) for cell in published()]
    found = []
    for name in ("interaction-table6", "lvpruning-table1", "lvpruning-fig6"):
        table = tables.table(name)
        for row in table.rows:
            for column, value in zip(table.columns, row.values, strict=True):
                if column.measure in COST and not isinstance(value, str):
                    found.append((round(float(value), 2), computed(table, row, column)))
    assert {(round(value, 2), here) for value, here in expected} == set(found)


def test_a_quoted_row_is_not_computed() -> None:
    table = tables.table("lvpruning-table3")
    with pytest.raises(FoveateError, match="the paper quotes it"):
        computed(table, table.rows[0], table.columns[0])
    assert {row.values[1] for row in table.rows if row.label.startswith("Instruct")} == {NOTHING}
    assert dataclasses.is_dataclass(table)
