"""Rows of a batch: what is asked, read from JSONL or Parquet; a row with a fault carries it along."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.core import FoveateError, short
from foveate.paths import Given, checked

JSONL, PARQUET = (".jsonl", ".ndjson"), (".parquet",)
LONGEST = 100_000_000
"""Bytes of a line, pictures in base64 included."""

_AT_ONCE = 256  # rows of a Parquet file that are in memory
Picture = str | bytes
Id = str | int


@dataclass(frozen=True)
class Row:
    """One question about one or more pictures.

    Attributes:
        number: from 1, of the line or row in its file.
        id: what its answer is told by; the number of its line where it has none of its own that can be read.
        pictures: paths, relative to the file's folder, or the bytes of picture files.
        fault: why it cannot be asked; None where it can.
    """

    number: int
    id: Id
    pictures: tuple[Picture, ...] = ()
    question: str = ""
    fault: str | None = None


def check_file(path: Given) -> Path:
    """A file of rows.

    Raises:
        FoveateError: it is not there, of no known kind, or Parquet without pyarrow.
    """
    path = checked(path)
    kind = path.suffix.lower()
    if kind not in (*JSONL, *PARQUET):
        raise FoveateError(f"{path} ends in {path.suffix or 'nothing'!r}; rows are read from .jsonl and .parquet")
    if not path.is_file():
        raise FoveateError(f"{path} is no file; give rows of id, image (or images) and question")
    if kind in PARQUET:
        pyarrow_parquet()
    return path


@dataclass(frozen=True)
class Window:
    """Rows of a file that are read and answered together, wherever that is.

    Attributes:
        offset: bytes of the file before the first of them; 0 in Parquet.
        numbers: of the rows, rising.
    """

    offset: int
    numbers: tuple[int, ...]


def rows_of(path: Path, window: Window | None = None) -> Iterator[Row]:
    """The rows of a file, in its order: all of them, or those of a window."""
    if window is None:
        yield from (row for _, row in _placed(path))
        return
    wanted, last = set(window.numbers), window.numbers[-1]
    for _, row in _placed(path, window.offset, window.numbers[0]):
        if row.number in wanted:
            yield row
        if row.number == last:
            return


def windows(path: Path, done: Container[Id], size: int) -> Iterator[Window]:
    """The rows whose ids are not done, so many at a time."""
    offset, numbers = 0, list[int]()
    for place, row in _placed(path):
        if row.id in done:
            continue
        offset = offset if numbers else place
        numbers.append(row.number)
        if len(numbers) == size:
            yield Window(offset, tuple(numbers))
            numbers = []
    if numbers:
        yield Window(offset, tuple(numbers))


def _placed(path: Path, offset: int = 0, first: int = 1) -> Iterator[tuple[int, Row]]:
    """Rows from one on, each with the bytes before it.

    Args:
        offset: bytes before the first row that is wanted.
        first: its number.
    """
    values = _parquet(path, first - 1) if path.suffix.lower() in PARQUET else _lines(path, offset)
    for number, (place, value) in enumerate(values, first):
        try:
            if isinstance(value, FoveateError):
                raise value
            yield place, _row(number, value)
        except FoveateError as error:
            name: Any = value.get("id") if isinstance(value, dict) else None
            yield place, Row(number, name if _is_id(name) else f"line {number}", fault=str(error))


def check_ids(path: Path) -> int:
    """The number of rows, once every one is known to have an id of its own.

    Raises:
        FoveateError: two rows have the same id, or there is no row.
    """
    first: dict[Id, int] = {}
    for row in rows_of(path):
        if row.id in first:
            raise FoveateError(
                f"rows {first[row.id]} and {row.number} of {path} have the same id {short(repr(row.id))}; give each "
                "its own, since answers are told by it"
            )
        first[row.id] = row.number
    if not first:
        raise FoveateError(f"{path} holds no row")
    return len(first)


def _lines(path: Path, offset: int) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        file.seek(offset)
        while line := file.readline(LONGEST + 1):
            place, offset = offset, offset + len(line)
            if len(line) > LONGEST:
                raise FoveateError(f"a line of {path} has more than {LONGEST / 1e6:.0f} MB")
            if not line.strip():
                continue
            try:
                value: Any = json.loads(line)
            except (ValueError, RecursionError) as error:
                value = FoveateError(f"no JSON: {short(str(error), 200)}")
            yield place, value


def _parquet(path: Path, skip: int) -> Iterator[tuple[int, Any]]:
    try:
        with pyarrow_parquet().ParquetFile(path) as file:
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            group = 0
            while group < len(sizes) and sizes[group] <= skip:  # whole groups before the first row are not read
                skip -= sizes[group]
                group += 1
            for batch in file.iter_batches(_AT_ONCE, row_groups=range(group, len(sizes))):
                yield from ((0, row) for row in batch.slice(skip).to_pylist())
                skip = max(0, skip - len(batch))
    except (OSError, ValueError) as error:
        raise FoveateError(f"{path} cannot be read as Parquet: {short(str(error), 200)}") from error


def pyarrow_parquet() -> Any:
    """pyarrow's module for Parquet.

    Raises:
        FoveateError: it is not installed.
    """
    try:
        import pyarrow.parquet as module
    except ImportError as error:
        raise FoveateError("Parquet needs pyarrow; install foveate[scale], or give .jsonl") from error
    return module


def _row(number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise FoveateError('a row is an object: {"id": ..., "image": ..., "question": ...}')
    if not _is_id(value.get("id")):
        raise FoveateError(f"id={short(repr(value.get('id')))} is neither a text nor a whole number")
    question = value.get("question")
    if not isinstance(question, str) or not question.strip():
        raise FoveateError(f"question={short(repr(question))} is no text that asks something")
    given = value.get("images") if value.get("images") is not None else value.get("image")
    several = given if isinstance(given, list) else [given]
    pictures = tuple(_picture(one) for one in several)
    if not pictures:
        raise FoveateError("images is empty; give at least one picture")
    return Row(number, value["id"], pictures, question)


def _is_id(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _picture(value: Any) -> Picture:
    """A path, bytes, or the pair of both that data sets hold."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) or (isinstance(value, str) and value):
        return value
    raise FoveateError(f"image={short(repr(value))} is no path; give one, or a list of them as images")
