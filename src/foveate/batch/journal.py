"""The answers of a batch on disk: a line each, written whole, and which ids have theirs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foveate.batch.rows import JSONL, PARQUET, Id, pyarrow_parquet
from foveate.core import FoveateError, short
from foveate.paths import Given, file_target
from foveate.runs import append_line, check_run, drop_torn, run_folder, whole_file

RUN = ".run"
"""What follows the output's name in that of the folder that holds its settings and its lock."""


def check_output(path: Given, resume: bool) -> Path:
    """Where answers go.

    Raises:
        FoveateError: no such file can be written, it is there and `resume` is False, or there is nothing to resume.
    """
    path = file_target(path, (*JSONL, *PARQUET))
    if path.suffix.lower() in PARQUET:
        pyarrow_parquet()
    if path.exists() and not resume:
        raise FoveateError(f"{path} is there already; go on with it by resume=True, or give another name")
    check_run(_folder(path), resume)
    return path


class Journal:
    """The lines of one output, held by this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = path if path.suffix.lower() in JSONL else _folder(path) / "rows.jsonl"
        self.done: set[Id] = set()
        if self.lines.exists():
            drop_torn(self.lines)
            self.done = {row["id"] for row in self.rows()}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every answer so far.

        Raises:
            FoveateError: a line is damaged; its number is named.
        """
        with self.lines.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise self._damaged(number, str(error)) from error
                if not isinstance(row, dict) or not isinstance(row.get("id"), str | int):
                    raise self._damaged(number, "no row with an id")
                yield row

    def _damaged(self, number: int, why: str) -> FoveateError:
        return FoveateError(
            f"line {number} of {self.lines} is damaged ({short(why, 120)}); take it out and go on with --resume, which "
            "answers its row again"
        )

    def add(self, answers: Iterable[dict[str, Any]]) -> int:
        """Write some answers, all of them or none, but for those that are there; how many were not."""
        made = [one for one in answers if one["id"] not in self.done]
        if not made:
            return 0
        append_line(self.lines, "\n".join(json.dumps(one, ensure_ascii=False) for one in made))
        self.done.update(one["id"] for one in made)
        return len(made)

    def finish(self) -> None:
        """Turn the lines into what was asked for, once every row has its answer."""
        if self.path == self.lines:
            return
        import pyarrow

        names = ("id", "answer", "error", "tokens_before", "tokens_after", "ms")
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for row in self.rows():
            tokens = row.get("tokens") or {}
            row = {**row, "tokens_before": tokens.get("before"), "tokens_after": tokens.get("after")}
            for name, column in columns.items():
                column.append(row.get(name))
        if not all(isinstance(one, int) for one in columns["id"]):
            columns["id"] = [str(one) for one in columns["id"]]
        with whole_file(self.path) as temporary:
            pyarrow_parquet().write_table(pyarrow.table(columns), temporary)


@contextmanager
def journal(path: Path, settings: dict[str, Any], resume: bool) -> Iterator[Journal]:
    """The answers of a run that begins or goes on, for this process alone.

    Args:
        path: as `check_output` gives it.
        settings: what must be equal for a run to go on.

    Raises:
        FoveateError: another process writes there, or the run was begun with other settings.
    """
    with run_folder(_folder(path), settings, resume):
        yield Journal(path)


def _folder(path: Path) -> Path:
    return path.with_name(path.name + RUN)
