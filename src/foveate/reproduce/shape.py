"""Runs a table's rows on drawn scenes with one small model: its shape without its data, what is kept as shares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from foveate.core import FoveateError, Method
from foveate.evaluate import scenes_task
from foveate.evaluate.scenes_task import NONE, parse_rivals
from foveate.reproduce import speeds
from foveate.reproduce.asked import Asked, Progress, Tell
from foveate.reproduce.cells import CURVE, TIMES, relative
from foveate.reproduce.folders import curve
from foveate.reproduce.hours import with_weights
from foveate.reproduce.loaded import load_for
from foveate.reproduce.tables import NONE as UNPRUNED
from foveate.reproduce.tables import OTHER, TOKENS, Row, Table, slug
from foveate.runs import append_line, drop_torn, run_folder

ROWS = "rows.jsonl"
SAMPLES = 500
_AT_ONCE = 6  # rivals asked before their rows are written down; the unpruned model is asked along each time
_PICTURES = 8  # whose curves of similarity are looked at


def run(table: Table, asked: Asked, tell: Tell, progress: Progress) -> list[dict[str, Any]]:
    """One row for each of the table: what the paper prints and what scenes gave, figures that JSON can hold.

    `paper_share` is the mean over its data sets of the paper's figure as a share of its unpruned row's, and `share` the
    same of the scenes, of rows with an adapter too a share of the model without it where that is asked; `why` says what
    a row without figures needs.

    Args:
        tell: told what cannot run.

    Raises:
        FoveateError: the model cannot be loaded, or a run as `run_folder` has it.
    """
    found: dict[str, dict[str, Any]] = {}
    why: dict[str, str] = {}
    groups: dict[str, list[Row]] = {}
    for row in table.rows:
        if row.runs:
            groups.setdefault(asked.adapter(row.model) or "", []).append(row)
    whole: float | None = None
    for rows in (groups[adapter] for adapter in sorted(groups)):  # the model without an adapter comes first
        ready, specs = _ready(table, rows, asked, why)
        if ready:
            made, unpruned = _measured(table, ready, specs, asked, tell, progress)
            whole = unpruned if whole is None else whole
            found |= {label: {**row, "share": _share(row, whole)} for label, row in made.items()}
    return [_row(table, row, found, why) for row in table.rows]


def total(table: Table, asked: Asked) -> int:
    """Answers that a run gives at most; one that goes on gives fewer."""
    specs = {(asked.adapter(row.model), row.scaled or row.prune) for row in table.rows if row.runs}
    rivals = len(specs)
    return (rivals + rivals // _AT_ONCE + 1) * (asked.samples or SAMPLES)


def _ready(table: Table, rows: Sequence[Row], asked: Asked, why: dict[str, str]) -> tuple[list[Row], dict[str, str]]:
    """The rows that have all they need, and the spec of each by its label; why the others do not."""
    source = asked.source(rows[0].model)
    weights = {row.weights: source for row in rows if row.weights and _ships(source, row.weights)} | {**asked.weights}
    ready, specs = [], {}
    for row in rows:
        reason = Asked(adapters=asked.adapters, weights=weights).lacks(row)
        if reason is None:
            specs[row.label] = with_weights(row, row.scaled or row.prune, weights)
            ready.append(row)
        else:
            why[row.label] = reason
    return ready, specs


def _ships(source: str, method: str) -> bool:
    """Whether a model brings a method's trained weights along."""
    from foveate.inference.loading import find

    return (Path(find(source)) / method).is_dir()


def _share(row: Mapping[str, Any], whole: float) -> float | None:
    return row["accuracy"] / whole if whole and "accuracy" in row else None


def _measured(
    table: Table, rows: Sequence[Row], specs: Mapping[str, str], asked: Asked, tell: Tell, progress: Progress
) -> tuple[dict[str, dict[str, Any]], float]:
    """What each row gave, by its label, and the accuracy of the unpruned model."""
    from foveate.prune import check_prunable

    loaded = load_for(asked, rows[0].model)
    rivals = parse_rivals(list(specs.values()))
    refused = {}
    for spec, stages in [*rivals.items()]:
        try:
            if stages:
                check_prunable(loaded.model, list(stages), processor=loaded.processor)
        except FoveateError as error:
            refused[spec] = str(error)
            del rivals[spec]
            tell(f"{spec}: {error}")
    figures = _answers(loaded, rivals, asked, asked.adapter(rows[0].model), progress)
    times, similarity = _beside(table, loaded, rivals, asked)
    made: dict[str, dict[str, Any]] = {}
    for row in rows:
        spec = list(parse_rivals([specs[row.label]]))[-1]
        if spec in refused:
            made[row.label] = {"spec": spec, "why": refused[spec]}
            continue
        told: dict[str, Any] = {"spec": spec, **figures[spec]}
        for column in table.columns:
            if column.measure in TIMES:
                told[column.title] = speeds.figure(times, spec, column.measure)
            elif column.measure in CURVE:
                told[column.title] = similarity.get(column.measure)
        made[row.label] = told
    return made, figures[NONE]["accuracy"]


def _answers(
    loaded: Any, rivals: Mapping[str, Sequence[Method]], asked: Asked, adapter: str | None, progress: Progress
) -> dict[str, dict[str, Any]]:
    """The rows of every rival, a few at a time, each of them written down; what is there is not measured again."""
    samples = asked.samples or SAMPLES
    scenes_task.check(samples=samples, batch=asked.batch, seed=asked.seed)
    identity = _identity(loaded, asked, samples)
    name = "scenes" if adapter is None else f"scenes-{slug(adapter)}"
    folder = None if asked.out is None else asked.out / name
    resume = asked.resume and folder is not None and (folder / "run.json").exists()
    held: AbstractContextManager[Any] = nullcontext() if folder is None else run_folder(folder, identity, resume)
    with held:
        file = None if folder is None else folder / ROWS
        found = _written(file)
        progress(samples * sum(spec in found for spec in rivals))
        missing = [spec for spec in rivals if spec not in found and spec != NONE]
        groups = [missing[start : start + _AT_ONCE] for start in range(0, len(missing), _AT_ONCE)]
        if NONE not in found and not groups:
            groups = [[]]
        for group in groups:
            given = [rivals[spec] for spec in group]
            options: dict[str, Any] = {
                "samples": samples,
                "batch": asked.batch,
                "seed": asked.seed,
                "progress": progress,
            }
            for row in scenes_task.evaluate(loaded.model, loaded.processor, given, **options):
                told = row.to_dict()
                if told["method"] not in found and file is not None:
                    append_line(file, json.dumps(told))
                found.setdefault(told["method"], told)
    return found


def _identity(loaded: Any, asked: Asked, samples: int) -> dict[str, Any]:
    """What a row depends on besides its spec: tables that are written to one folder share their rows."""
    import torch
    import transformers

    from foveate.checkpoints import fingerprint

    return {
        "model": loaded.name,
        "weights": fingerprint(loaded.model),
        "dtype": str(loaded.model.dtype),
        "device": loaded.model.device.type,
        "data": scenes_task.digest(samples, seed=asked.seed),
        "batch": asked.batch,
        "samples": samples,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _written(file: Path | None) -> dict[str, dict[str, Any]]:
    if file is None or not file.exists():
        return {}
    drop_torn(file)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {row["method"]: row for row in rows}


def _beside(
    table: Table, loaded: Any, rivals: Mapping[str, Sequence[Method]], asked: Asked
) -> tuple[dict[str, speeds.Speed], dict[str, float]]:
    """Times and curves, where the table has any."""
    wanted = {column.measure for column in table.columns} - set(() if asked.times else TIMES)
    if not wanted.intersection(TIMES + CURVE):
        return {}, {}
    drawn = list(scenes_task.draw_samples(_PICTURES, seed=asked.seed))
    times, similarity = dict[str, speeds.Speed](), dict[str, float]()
    if wanted.intersection(TIMES):
        times = speeds.measure(loaded, drawn[0].image, drawn[0].question, rivals)
    if wanted.intersection(CURVE):
        similarity = curve(loaded, [one.image for one in drawn], [one.question for one in drawn])
    return times, similarity


def _row(table: Table, row: Row, found: Mapping[str, dict[str, Any]], why: Mapping[str, str]) -> dict[str, Any]:
    paper = {column.title: value for column, value in zip(table.columns, row.values, strict=True)}
    given = {"row": row.label, "paper": paper, "paper_share": 1.0 if row.prune == UNPRUNED else relative(table, row)}
    if row.label in found:
        return {**given, **found[row.label]}
    said = {OTHER: "the paper quotes it", TOKENS: "computed alone"}
    return {**given, "spec": None, "why": said.get(row.prune) or why.get(row.label)}
