"""What reproducing a table takes: the commands that do it by hand, and the hours of a GPU by the cost model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from foveate.core import FoveateError
from foveate.cost.estimates import Cost, estimate
from foveate.reproduce.cells import TIMES
from foveate.reproduce.tables import NONE, Checkpoint, Row, Table, benchmarks, checkpoints, slug


@dataclass(frozen=True)
class Job:
    """One command and the hours that it takes.

    Attributes:
        questions: that it asks of every method, 0 where it asks none.
        hours: None where nothing is known.
        bounded: of some methods, whose counts depend on the picture, the unpruned model's hours are counted.
    """

    command: str
    questions: int = 0
    hours: float | None = None
    bounded: bool = False


@dataclass(frozen=True)
class Places:
    """Where things are, as a command says it.

    Attributes:
        data: the folder of data sets.
        models: the papers' models by their names there; others are taken from the hub.
        adapters: by the spec that they were tuned under, and `weights` by method: what is missing is trained first.
        samples: questions of each data set at most; None is all.
    """

    data: str
    models: Mapping[str, str]
    adapters: Mapping[str, str]
    weights: Mapping[str, str]
    samples: int | None = None

    def model(self, name: str) -> list[str]:
        """The options for one of the papers' models, with its adapter."""
        one = checkpoints()[name]
        base = one.base or name
        found = ["--model", self.models.get(base) or self.models.get("") or checkpoints()[base].hub]
        return [*found, "--adapter", self.adapters.get(one.tuned, f"runs/{one.tuned}/adapter")] if one.tuned else found


def jobs(table: Table, places: Places, hardware: str) -> list[Job]:
    """The commands, those that train what a table needs first.

    Args:
        hardware: a row of the cost model's devices.

    Raises:
        FoveateError: an unknown device.
    """
    made: list[Job] = []
    for row in table.rows:
        made += [job for job in _training(row, places) if job not in made]
    for name in dict.fromkeys(row.model for row in table.rows if row.runs):
        rows = [row for row in table.rows if row.runs and row.model == name]
        sets = dict.fromkeys(one.data for one in table.columns if one.data is not None)
        made += [_asking(name, rows, one, places, hardware) for one in sets]
        if any(column.measure in TIMES for column in table.columns):
            specs = [flag for spec in _specs(rows, None, places) for flag in ("--prune", spec)]
            made.append(Job(shlex.join(["foveate", "bench", places.model(name)[1], *specs])))
    return made


def with_weights(row: Row, spec: str, weights: Mapping[str, str]) -> str:
    """The spec with where its trained weights are."""
    if not row.weights:
        return spec
    return f"{spec}{',' if ':' in spec else ':'}from={weights.get(row.weights, f'runs/{row.weights}/{row.weights}')}"


def _training(row: Row, places: Places) -> list[Job]:
    """What trains the weights or the adapter of a row where it has none."""
    found: list[Job] = []
    if not row.runs:
        return found
    one = checkpoints()[row.model]
    model = [*places.model(one.base or row.model)[:2], "--dtype", "bfloat16"]  # most are stored in float16
    rest = [*model, "--data", "llava_v1_5_mix665k.json", "--images", "images"]
    if row.weights and row.weights not in places.weights:
        found.append(Job(shlex.join(["foveate", "train", row.weights, "--out", f"runs/{row.weights}", *rest])))
    if one.tuned and one.tuned not in places.adapters:
        out = ["--out", f"runs/{one.tuned}", "--prune", one.tuned]
        found.append(Job(shlex.join(["foveate", "train", "finetune", *out, *rest])))
    return found


def _specs(rows: list[Row], data: str | None, places: Places) -> list[str]:
    pruned = [row for row in rows if row.prune != NONE]
    return list(dict.fromkeys(with_weights(row, row.spec(data), places.weights) for row in pruned))


def _asking(name: str, rows: list[Row], data: str, places: Places, hardware: str) -> Job:
    """One data set's questions for all rows of a model, which is asked unpruned too."""
    one, model = benchmarks()[data], checkpoints()[name]
    questions = min(one.questions, places.samples or one.questions)
    seconds, bounded = 0.0, False
    for spec in dict.fromkeys([NONE, *(row.spec(data) for row in rows)]):
        cost = _cost(model, None if spec == NONE else spec, one.answer, hardware)
        if cost is None:  # its counts depend on the picture
            bounded, cost = True, _cost(model, None, one.answer, hardware)
        assert cost is not None
        seconds += questions * cost.total.seconds
    options = [flag for spec in _specs(rows, data, places) for flag in ("--prune", spec)]
    command = ["foveate", "eval", *places.model(name), "--tasks", f"{places.data}/{data}"]
    return Job(
        shlex.join([*command, "--out", f"runs/{slug(name)}/{data}", *options]), questions, seconds / 3600, bounded
    )


def _cost(model: Checkpoint, spec: str | None, answer: int, hardware: str) -> Cost | None:
    try:
        return estimate(model.preset, model.visual, methods=spec, answer=answer, hardware=hardware)
    except FoveateError:
        if spec is None:
            raise
        return None
