"""The papers' numbers as data: tables of rows that are run, columns that say how, and what each cell prints."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from foveate.core import FoveateError, did_you_mean

FOLDER = Path(__file__).parent / "papers"
PAPERS = ("fopru", "lvpruning", "interaction")

NOTHING, LOST = "-", "?"
"""Texts of cells: the paper leaves it empty; the source that the data was read from does not have it."""

NONE, OTHER, TOKENS = "none", "other", "tokens"
"""In place of a spec: the unpruned model, a model that the paper only quotes, so many tokens from wherever."""

Value: TypeAlias = float | str
Convention: TypeAlias = Literal["roofline", "weights"]


@dataclass(frozen=True)
class Column:
    """How the cells below a title come about.

    Attributes:
        measure: accuracy, f1 (in percent), score, tokens, all_tokens, judge; first_token_ms, first_token_speedup,
            per_token_ms, per_token_speedup, gpu_gb; tflops, choosing_tflops, prefill_tflops, prefill_ms, moved_gb,
            stored_gb; split, head_share.
        data: what it is measured on, by its name in `benchmarks.toml`; None where that does not matter.
        group: of the data, or "" for all of it.
    """

    title: str
    measure: str
    data: str | None = None
    group: str = ""


@dataclass(frozen=True)
class Row:
    """One method on one model.

    Attributes:
        model: by its name in the paper.
        prune: a spec, or one of `NONE`, `OTHER` and `TOKENS`.
        values: what the paper prints, a number or a text, for each column.
        weights: the method whose trained weights it needs, or "".
        scaled: the spec for a smaller model, where depths are those of a share of its blocks; else `prune`.
        by_data: specs that a data set has of its own.
        visual, dtype: of a row that is computed alone.
    """

    label: str
    model: str
    prune: str
    values: tuple[Value, ...]
    weights: str = ""
    scaled: str = ""
    by_data: Mapping[str, str] | None = None
    visual: int | None = None
    dtype: str = "fp16"

    @property
    def runs(self) -> bool:
        """Whether it is something that this library can do, given what it needs."""
        return self.prune not in (OTHER, TOKENS)

    def spec(self, data: str | None = None) -> str:
        """What is pruned by on a data set."""
        return (self.by_data or {}).get(data or "", self.prune)


@dataclass(frozen=True)
class Table:
    """A table, or a figure as one.

    Attributes:
        source: its number in the paper.
        about, note: what it compares; what is to be known of its numbers, or "".
        text, convention: of the operations it counts.
        means: by row the mean that the paper prints, where it does.
        relative: cells are the "share" of the unpruned row's or the "difference" from it; None is as they are.
    """

    name: str
    paper: str
    url: str
    source: str
    about: str
    note: str
    text: int
    convention: Convention
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    means: Mapping[str, float]
    relative: Literal["share", "difference"] | None = None

    def unpruned(self, row: Row) -> Row | None:
        """The unpruned row of the same model, or None."""
        return next((one for one in self.rows if one.prune == NONE and one.model == row.model), None)


@dataclass(frozen=True)
class Checkpoint:
    """A model of the papers.

    Attributes:
        hub: where it is found; "" for one that is tuned.
        base, tuned: the model that it is tuned from and the spec by which it is pruned meanwhile, or "".
        preset, visual: of the cost model, and visual tokens of a picture.
    """

    name: str
    hub: str
    base: str
    tuned: str
    preset: str
    visual: int


@dataclass(frozen=True)
class Benchmark:
    """A data set of the papers.

    Attributes:
        name: of the folder that holds it.
        kind: of its questions, as `questions.jsonl` has it; "" where nobody but a judge can score them.
        judge: who scores it, or "".
        questions, answer: of the split, and tokens of an answer at most.
    """

    name: str
    title: str
    kind: str
    judge: str
    questions: int
    answer: int


def names() -> tuple[str, ...]:
    """The name of every table and figure, in the papers' order."""
    return tuple(stored["name"] for paper in PAPERS for stored in _stored(paper)["table"])


@cache
def table(name: str) -> Table:
    """A table or figure by its name.

    Raises:
        FoveateError: there is none of this name.
    """
    for paper in PAPERS:
        whole = _stored(paper)
        for stored in whole["table"]:
            if stored["name"] == name:
                return _table(stored, whole)
    raise FoveateError(f"unknown table {name!r}; {did_you_mean(name, names())}")


@cache
def checkpoints() -> Mapping[str, Checkpoint]:
    """The papers' models by the names that they have there."""
    return {
        name: Checkpoint(
            name, one.get("hub", ""), one.get("base", ""), one.get("tuned", ""), one["preset"], one["visual"]
        )
        for name, one in _stored("benchmarks")["model"].items()
    }


@cache
def benchmarks() -> Mapping[str, Benchmark]:
    """The papers' data sets by name."""
    return {
        name: Benchmark(name, one["title"], one.get("type", ""), one.get("judge", ""), one["questions"], one["answer"])
        for name, one in _stored("benchmarks")["data"].items()
    }


def slug(name: str) -> str:
    """A name of the papers as that of a folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()


@cache
def _stored(file: str) -> dict[str, Any]:
    return tomllib.loads((FOLDER / f"{file}.toml").read_text(encoding="utf-8"))


def _table(stored: Mapping[str, Any], whole: Mapping[str, Any]) -> Table:
    columns = tuple(Column(title, **whole["column"][title]) for title in stored["columns"])
    sources = [table(name) for name in stored.get("from", ())]
    given = stored["rows"]
    if given == "from":
        given = [_as_stored(row) for row in sources[0].rows]
    rows = tuple(_row(one, stored, columns, sources) for one in given)
    return Table(
        name=stored["name"],
        paper=whole["paper"],
        url=whole["url"],
        source=stored["source"],
        about=stored["about"],
        note=stored.get("note", ""),
        text=whole.get("text", 60),
        convention=whole.get("convention", "roofline"),
        columns=columns,
        rows=rows,
        means={one["label"]: one["mean"] for one in given if "mean" in one},
        relative=stored.get("as"),
    )


def _as_stored(row: Row) -> dict[str, Any]:
    taken = ("label", "model", "prune", "weights", "scaled", "by_data")
    return {name: getattr(row, name) for name in taken if getattr(row, name)}


def _row(stored: Mapping[str, Any], of: Mapping[str, Any], columns: tuple[Column, ...], sources: list[Table]) -> Row:
    model, prune = stored.get("model", of.get("model", "")), stored["prune"]
    values: tuple[Value, ...] = tuple(stored.get("values", ()))
    if not values:
        known = stored.get("known", {})
        found = [known.get(column.title, _found(column, model, prune, sources, of.get("as"))) for column in columns]
        values = tuple(found)
    if len(values) != len(columns):
        raise FoveateError(f"{of['name']}: {stored['label']} has {len(values)} cells for {len(columns)} columns")
    kept = ("weights", "scaled", "by_data", "visual", "dtype")
    return Row(stored["label"], model, prune, values, **{name: stored[name] for name in kept if name in stored})


def _found(column: Column, model: str, prune: str, sources: list[Table], relative: str | None) -> Value:
    """A cell that another table prints, or what it comes to against the unpruned row there."""
    for source in sources:
        titles = [one.title for one in source.columns]
        row = next((one for one in source.rows if (one.model, one.prune) == (model, prune)), None)
        if column.title not in titles or row is None:
            continue
        place = titles.index(column.title)
        value, base = row.values[place], source.unpruned(row)
        if value == LOST or relative is None:
            if value == LOST:
                continue
            return value
        whole = base.values[place] if base is not None else LOST
        if isinstance(value, str) or isinstance(whole, str):
            return LOST
        return round(100 * value / whole, 2) if relative == "share" else round(value - whole, 2)
    return LOST
