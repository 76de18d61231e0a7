"""Runs a table on local data: every model that is there asks every folder that is there for all its rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foveate.core import FoveateError, Method
from foveate.evaluate import folder_rows, local_task
from foveate.evaluate.folder_run import answer_folder, asks
from foveate.evaluate.local_task import Folder
from foveate.evaluate.scenes_task import NONE, parse_rivals
from foveate.inference.pictures import load_image
from foveate.reproduce import speeds
from foveate.reproduce.asked import Asked, Progress, Tell
from foveate.reproduce.cells import COST, CURVE, TIMES, Cell, computed, lacking, of_rows
from foveate.reproduce.loaded import load_for
from foveate.reproduce.tables import OTHER, Column, Row, Table, benchmarks, slug
from foveate.runs import check_run

_LONGEST = 32  # tokens of an answer, as `foveate eval` has it
_PICTURES = 32  # whose curves of similarity are looked at


@dataclass
class Found:
    """What a model gave.

    Attributes:
        missing: why it is not there, or None.
        rows: by data set and spec, of `folder_rows.rows`.
        times: by spec.
        curve: measures of the similarity to CLS.
    """

    missing: str | None = None
    rows: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    times: dict[str, speeds.Speed] = field(default_factory=dict)
    curve: dict[str, float] = field(default_factory=dict)


def read(table: Table, asked: Asked) -> dict[str, Folder]:
    """The data sets of a table that are there, checked before any model is loaded.

    Raises:
        FoveateError: as `local_task.read`, or a run that cannot be begun or resumed.
    """
    sets = dict.fromkeys(column.data for column in table.columns if column.data is not None)
    if any(column.measure in TIMES for column in table.columns):
        sets |= {"pope": None}  # where the paper takes its times
    found = {name: local_task.read(asked.folder(name), asked.samples) for name in sets if asked.there(name)}
    if not found and asked.data is not None and any(column.measure in CURVE for column in table.columns):
        other = next((name for name in benchmarks() if asked.there(name)), None)
        found = {} if other is None else {other: local_task.read(asked.folder(other), asked.samples)}
    if found and asked.out is None:
        raise FoveateError("--data needs --out, the folder in which answers are written down")
    for name, folder in found.items():
        if folder.videos:
            raise FoveateError(f"{folder.path} holds questions about videos, and {name} asks about pictures")
    for name, model in ((name, model) for name in found for model in _models(table)):
        if not asked.resume:
            check_run(_out(asked, model, name), False)
    return found


def total(table: Table, asked: Asked, data: Mapping[str, Folder]) -> int:
    """Answers that a run gives in all, if every model is there."""
    count = 0
    for model in _models(table):
        for name, folder in data.items():
            if any(column.data == name for column in table.columns):
                count += len(_rivals(table, asked, model, name)) * len(asks(folder))
    return count


def run(table: Table, asked: Asked, data: Mapping[str, Folder], tell: Tell, progress: Progress) -> list[Cell]:
    """Every cell, in the order of rows and columns.

    Args:
        data: of `read`.
        tell: told what is missing or refused.

    Raises:
        FoveateError: as `answer_folder`.
    """
    found = {model: _of_model(table, asked, model, data, tell, progress) for model in _models(table)}
    return [cell for row in table.rows for cell in _cells(table, row, asked, found.get(row.model, Found()))]


def _models(table: Table) -> list[str]:
    return list(dict.fromkeys(row.model for row in table.rows if row.runs))


def _out(asked: Asked, model: str, data: str) -> Any:
    assert asked.out is not None
    return asked.out / slug(model) / data


def _rivals(table: Table, asked: Asked, model: str, data: str | None) -> dict[str, tuple[Method, ...]]:
    """The stages of every row of a model that has all it needs, by the row's spec; the unpruned model first."""
    rows = [row for row in table.rows if row.runs and row.model == model and asked.lacks(row) is None]
    return parse_rivals([asked.spec(row, data) for row in rows])


def _of_model(
    table: Table, asked: Asked, model: str, data: Mapping[str, Folder], tell: Tell, progress: Progress
) -> Found:
    reasons = {asked.lacks(row) for row in table.rows if row.runs and row.model == model}
    if not data or None not in reasons:
        return Found()
    try:
        loaded = load_for(asked, model)
    except FoveateError as error:
        tell(f"{model}: {error}")
        return Found(f"give --model '{model}=FOLDER': {asked.source(model)} cannot be loaded here")
    found = Found()
    for name, folder in data.items():
        if any(column.data == name for column in table.columns):
            found.rows |= _answered(table, asked, model, loaded, name, folder, progress)
    first = next(iter(data.values()))
    prompt = data.get("pope", first).questions[0]
    if asked.times and any(column.measure in TIMES for column in table.columns):
        picture = load_image(data.get("pope", first).path / prompt.image)
        found.times = speeds.measure(loaded, picture, prompt.prompt, _rivals(table, asked, model, None))
    if any(column.measure in CURVE for column in table.columns):
        pictures = [load_image(first.path / one.image) for one in first.questions[:_PICTURES]]
        found.curve = curve(loaded, pictures, [one.prompt for one in first.questions[:_PICTURES]])
    return found


def _answered(
    table: Table, asked: Asked, model: str, loaded: Any, name: str, folder: Folder, progress: Progress
) -> dict[tuple[str, str], dict[str, Any]]:
    rivals = _rivals(table, asked, model, name)
    out = _out(asked, model, name)
    lines = answer_folder(
        loaded.model,
        loaded.processor,
        folder,
        rivals,
        name=loaded.name,
        out=out,
        resume=asked.resume and (out / "run.json").exists(),
        batch=asked.batch,
        max_new_tokens=_LONGEST,
        progress=progress,
    )
    return {(name, row["method"]): row for row in folder_rows.rows(lines, folder, batch=asked.batch)}


def curve(loaded: Any, pictures: Sequence[Any], questions: Sequence[str]) -> dict[str, float]:
    """Means over pictures of the similarity to CLS: tokens in the head of its curve, and what they hold of it in %."""
    from foveate.evaluate.analysis import analyze

    ones = analyze(loaded.model, loaded.processor, pictures, questions).similarities()
    if not ones:
        return {}
    heads = [100 * sum(one.curve[: one.split]) / sum(one.curve) for one in ones]
    return {"split": statistics.fmean(one.split for one in ones), "head_share": statistics.fmean(heads)}


def _cells(table: Table, row: Row, asked: Asked, found: Found) -> Iterator[Cell]:
    for column, paper in zip(table.columns, row.values, strict=True):
        here, how = _cell(table, row, column, asked, found)
        yield Cell(row.label, column.title, paper, here, how)


def _cell(table: Table, row: Row, column: Column, asked: Asked, found: Found) -> tuple[float | None, str]:
    if column.measure in COST:
        try:
            return computed(table, row, column), "computed"
        except FoveateError as error:
            return None, str(error)
    here: float | None = None
    if row.prune != OTHER and asked.lacks(row) is None and found.missing is None:
        spec = _named(asked.spec(row, column.data))
        if column.measure in TIMES:
            here = speeds.figure(found.times, _named(asked.spec(row)), column.measure)
        elif column.measure in CURVE:
            here = found.curve.get(column.measure)
        elif column.data is not None and (column.data, spec) in found.rows:
            here = against(table, row, column, found.rows, spec)
    if here is not None:
        return here, "measured"
    missing = found.missing if row.prune == OTHER else asked.lacks(row) or found.missing
    data = column.data or "pope"
    return None, lacking(row, column, missing, str(asked.folder(data)), asked.there(data))


def _named(spec: str) -> str:
    """A spec as rows have it."""
    return list(parse_rivals([spec]))[-1]


def against(
    table: Table, row: Row, column: Column, rows: Mapping[tuple[str, str], dict[str, Any]], spec: str
) -> float | None:
    """A measured figure, as the table has it: as it is, or against the unpruned model."""
    assert column.data is not None
    value = of_rows(rows[column.data, spec], column)
    if value is None or table.relative is None:
        return value
    whole = of_rows(rows[column.data, NONE], column)
    if whole is None or (table.relative == "share" and whole == 0):
        return None
    return 100 * value / whole if table.relative == "share" else value - whole
