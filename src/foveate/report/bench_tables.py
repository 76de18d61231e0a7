"""The tables of a measurement: medians with their quartiles, and the layout in which FoPru's paper prints them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from foveate.core import FoveateError, Method
from foveate.evaluate.bench import Result, Spread
from foveate.report.tables import Column

RATIOS = (0.75, 0.5, 0.25)
"""Shares that the paper's Table 1 keeps, after the unpruned 100 %."""


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row per rival, the unpruned model's first."""
    plain = results[0]
    found = []
    for result in results:
        predicted = result.predicted
        found.append(
            {
                "prune": result.prune or "none",
                "tokens": result.tokens,
                "first": result.first_token_ms,
                "predicted_first": None if predicted is None else predicted.first_token_ms,
                "step": result.per_token_ms,
                "predicted_step": None if predicted is None else predicted.per_token_ms,
                "whole": result.end_to_end_ms,
                "speedup": plain.end_to_end_ms.median / result.end_to_end_ms.median,
                "choosing": None if result.choosing_ms is None else result.choosing_ms.median,
                "rate": result.tokens_per_second,
                "kv": result.kv_bytes / 1e6,
                "peak": None if result.peak_bytes is None else result.peak_bytes / 1e9,
            }
        )
    return found


def columns(results: Sequence[Result]) -> list[Column]:
    """The columns of `rows`; those that hold nothing are left out."""
    made = [
        Column("prune", "method", left=True),
        Column("tokens", "tokens", lambda value: f"{value:.4g}"),
        Column("first", "first token ms", _spread),
        Column("predicted_first", "predicted", _digits),
        Column("step", "per token ms", _spread),
        Column("predicted_step", "predicted", _digits),
        Column("whole", "answer ms", _spread),
        Column("speedup", "faster", lambda value: f"{value:.2f}x"),
        Column("choosing", "choosing ms", _digits),
        Column("rate", "tokens/s", _digits),
        Column("kv", "KV MB", _digits),
        Column("peak", "peak GB", lambda value: f"{value:.2f}"),
    ]
    table = rows(results)
    return [column for column in made if any(row[column.key] is not None for row in table)]


def at_ratios(stages: Sequence[Method]) -> list[tuple[Method]]:
    """One method at each of the paper's ratios.

    Raises:
        FoveateError: several stages, or a method whose budget is no single share.
    """
    if len(stages) != 1:
        raise FoveateError(f"{len(stages)} stages have no single ratio to set; give one method")
    (method,) = stages
    if not any(field.name == "keep" for field in dataclasses.fields(method)) or isinstance(
        getattr(method, "keep", None), tuple
    ):
        raise FoveateError(f"{type(method).__name__} keeps no single share of the tokens; the ratios are for keep=")
    return [(dataclasses.replace(method, keep=ratio),) for ratio in RATIOS]  # type: ignore[call-arg]


def paper_rows(results: Sequence[Result], names: Sequence[str]) -> list[dict[str, Any]]:
    """Ratio by ratio, the methods in the order of `names`, as FoPru's Tables 1 and 2 print them.

    Args:
        results: the unpruned model, then the first method at each of RATIOS, then the second, ...
        names: what each method is called.
    """
    plain, *rest = results
    found = [_paper_row("100%", "-", plain, None)]
    for place, ratio in enumerate(RATIOS):
        for number, name in enumerate(names):
            found.append(_paper_row(f"{ratio:.0%}", name, rest[number * len(RATIOS) + place], plain))
    return found


def _paper_row(ratio: str, name: str, result: Result, plain: Result | None) -> dict[str, Any]:
    def faster(field: str) -> float | None:
        mine, whole = getattr(result, field), None if plain is None else getattr(plain, field)
        return None if mine is None or whole is None else whole.median / mine.median

    return {
        "ratio": ratio,
        "method": name,
        "ttft": result.first_token_ms.median,
        "ttft_speedup": faster("first_token_ms"),
        "tpot": None if result.per_token_ms is None else result.per_token_ms.median,
        "tpot_speedup": faster("per_token_ms"),
        "gpu": None if result.peak_bytes is None else result.peak_bytes / 1e9,
    }


PAPER_COLUMNS = (
    Column("ratio", "Ratio"),
    Column("method", "Method", left=True),
    Column("ttft", "TTFT (ms)", lambda value: f"{value:.4g}"),
    Column("ttft_speedup", "Sp", lambda value: f"{value:.2f}x"),
    Column("tpot", "TPOT (ms/tok.)", lambda value: f"{value:.4g}"),
    Column("tpot_speedup", "Sp", lambda value: f"{value:.2f}x"),
    Column("gpu", "GPU (GB)", lambda value: f"{value:.2f}"),
)


def _spread(value: Spread) -> str:
    return f"{value.median:.4g} ({value.low:.4g}-{value.high:.4g})"


def _digits(value: float) -> str:
    return f"{value:.3g}"
