"""What a user gives to reproduce a table: models, adapters, trained weights, data, and where a run is written down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.core import FoveateError, did_you_mean, short
from foveate.evaluate.local_task import FILE
from foveate.reproduce.hours import with_weights
from foveate.reproduce.tables import Row, Table, checkpoints

Tell = Callable[[str], None]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Asked:
    """How a table is to be run.

    Attributes:
        models: where the papers' models are, by their names there; the key "" is every one without an adapter.
        adapters: folders of adapters by the spec that they were tuned under.
        weights: folders of trained weights by method.
        data: the folder that holds the data sets' folders; None is none of them.
        samples: questions of each data set, the first ones; None is all.
        out, resume: the folder of the run, and whether to go on with the one in it.
        times: take times, where the table has some.
        place: how models are loaded: device, dtype and whether code of others may run.
    """

    models: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    data: Path | None = None
    samples: int | None = None
    batch: int = 16
    seed: int = 0
    out: Path | None = None
    resume: bool = False
    times: bool = True
    place: Mapping[str, Any] = field(default_factory=dict)

    def source(self, name: str) -> str:
        """The folder or hub id of one of the papers' models, without its adapter."""
        base = checkpoints()[checkpoints()[name].base or name]
        return self.models.get(name) or self.models.get("") or self.models.get(base.name) or base.hub

    def adapter(self, name: str) -> str | None:
        """The folder of the adapter of one of the papers' models, or None."""
        return self.adapters.get(checkpoints()[name].tuned)

    def folder(self, data: str) -> Path:
        """Where a data set is looked for."""
        return (self.data or Path("DATA")) / data

    def there(self, data: str | None) -> bool:
        """Whether a data set is there."""
        return data is not None and self.data is not None and (self.folder(data) / FILE).is_file()

    def lacks(self, row: Row) -> str | None:
        """What a row needs besides its model and data and was not given, or None."""
        tuned = checkpoints()[row.model].tuned if row.model else ""
        if tuned and tuned not in self.adapters:
            return f"give --adapter {tuned}=FOLDER, which foveate train finetune --prune {tuned} makes"
        if row.weights and row.weights not in self.weights:
            return f"give --weights {row.weights}=FOLDER, which foveate train {row.weights} makes"
        return None

    def spec(self, row: Row, data: str | None = None) -> str:
        """What a row is pruned by on a data set."""
        return with_weights(row, row.spec(data), self.weights)


def models_of(given: Iterable[str], table: Table, *, shape: bool) -> dict[str, str]:
    """What --model says: MODEL for all of a table, or NAME=MODEL for one.

    Args:
        shape: any model may stand in for all of them.

    Raises:
        FoveateError: a name that the table does not have, or one model for several.
    """
    own = list(dict.fromkeys(row.model for row in table.rows if row.runs and not checkpoints()[row.model].tuned))
    found: dict[str, str] = {}
    for text in given:
        name, equals, model = text.partition("=")
        if not equals:
            name, model = "", text
            if not shape and len(own) > 1:
                raise FoveateError(
                    f"--model {short(text)} stands for none of {', '.join(own)}; write --model {own[0]!r}={short(text)}"
                )
        elif name not in own:
            raise FoveateError(f"--model: {table.name} has no model {short(repr(name))}; {did_you_mean(name, own)}")
        found[name] = model
    return found


def pairs(option: str, given: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """NAME=FOLDER of --weights or --adapter.

    Raises:
        FoveateError: no such pair, or a name that the table does not need.
    """
    found, choices = {}, list(dict.fromkeys(known))
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            raise FoveateError(f"{option} {short(text)} is no pair; write {option} NAME=FOLDER")
        if name not in choices:
            raise FoveateError(f"{option}: the table needs none of {short(repr(name))}; {did_you_mean(name, choices)}")
        found[name] = folder
    return found
