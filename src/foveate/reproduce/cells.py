"""Cells of a table: what the paper prints, what stands beside it here, or what is missing for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveate.core import FoveateError
from foveate.cost.estimates import Cost, estimate
from foveate.reproduce.tables import LOST, NONE, OTHER, TOKENS, Column, Row, Table, Value, benchmarks, checkpoints

COST = ("tflops", "choosing_tflops", "prefill_tflops", "prefill_ms", "moved_gb", "stored_gb")
TIMES = ("first_token_ms", "first_token_speedup", "per_token_ms", "per_token_speedup", "gpu_gb")
CURVE = ("split", "head_share")
"""Measures that arithmetic gives; that a clock or a device gives; that the encoder's curve of similarity gives."""


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        row, column: their titles.
        paper: what it prints; "-" where that is nothing, "?" where it is not known.
        here: the figure beside it, or None.
        how: "computed", "measured", or why there is none.
    """

    row: str
    column: str
    paper: Value
    here: float | None
    how: str

    @property
    def difference(self) -> float | None:
        """Here less the paper's, where both are numbers."""
        return None if self.here is None or isinstance(self.paper, str) else self.here - self.paper


def computed(table: Table, row: Row, column: Column) -> float:
    """A cell that arithmetic gives, of the paper's model.

    Raises:
        FoveateError: the row quotes another model, or its method's counts depend on the picture.
    """
    if row.prune == OTHER:
        raise FoveateError("the paper quotes it")
    model = checkpoints()[row.model]
    methods = None if row.prune in (NONE, TOKENS) else row.prune
    visual = row.visual or model.visual
    cost = estimate(model.preset, visual, table.text, methods, dtype=row.dtype, convention=table.convention)
    return _figure(cost, column.measure)


def _figure(cost: Cost, measure: str) -> float:
    if measure == "tflops":
        return cost.first_token.flops / 1e12
    if measure == "choosing_tflops":
        return cost.choosing.flops / 1e12
    if measure == "prefill_tflops":
        return cost.prefill.flops / 1e12
    if measure == "prefill_ms":
        return cost.prefill.seconds * 1e3
    return (cost.prefill.bytes_moved if measure == "moved_gb" else cost.prefill.stored_activation_bytes) / 1e9


def of_rows(row: dict[str, Any], column: Column) -> float | None:
    """A cell that a run on a folder gives; None where its questions do not give this measure.

    Args:
        row: of `folder_rows.rows`.
    """
    if column.measure == "tokens":
        return float(row["tokens"])
    if column.measure == "accuracy" and not column.group:
        return 100 * float(row["accuracy"])
    kind, name = ("pope", "f1") if column.measure == "f1" else ("mme", "score")
    found = row["measures"].get(kind, {}).get(f"{column.group}/{name}" if column.group else name)
    return None if found is None else float(found) * (100 if name == "f1" else 1)


def lacking(row: Row, column: Column, missing_model: str | None, folder: str, there: bool) -> str:
    """Why a cell of data, times or curves has no figure: what to provide.

    Args:
        missing_model: what is said of the row's model where it is not there, else None.
        folder: where the column's data set is looked for, and `there` whether it is.
    """
    if row.prune == OTHER:
        return "the paper quotes it"
    data = benchmarks()[column.data] if column.data is not None else None
    no_data = f"give --data: no {folder}/questions.jsonl with {data.title}" if data is not None and not there else None
    if missing_model is not None or no_data is not None:
        return "; ".join(reason for reason in (missing_model, no_data) if reason is not None)
    if column.measure == "judge":
        assert data is not None
        return f"{data.judge} judges {data.title}: its key and its script are needed; none is asked here"
    if column.measure == "all_tokens":
        return "the text's tokens are not counted in a run"
    if column.measure in TIMES:
        return (
            "a GPU tells it"
            if column.measure == "gpu_gb"
            else "no time was taken: give --data with a folder to take a prompt from"
        )
    if column.measure in CURVE:
        return "give --data with a folder to take pictures from"
    return f"{folder} holds no questions of the type that gives {column.measure}"


def relative(table: Table, row: Row) -> float | None:
    """The mean over data sets of what the paper prints as a share of its unpruned row; None where a number lacks."""
    base = table.unpruned(row)
    if base is None:
        return None
    shares = []
    for column, value, whole in zip(table.columns, row.values, base.values, strict=True):
        if column.data is None or column.measure in ("tokens", "all_tokens"):
            continue
        if not isinstance(value, str) and not isinstance(whole, str) and whole > 0:
            shares.append(value / whole)
    return sum(shares) / len(shares) if shares else None


def is_known(value: Value) -> bool:
    """Whether there is anything to print beside a figure."""
    return value != LOST
