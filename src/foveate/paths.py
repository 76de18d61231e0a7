"""Paths that users write, and the JSON behind them: what no file system takes is refused in words, before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from foveate.core import FoveateError, short

LONGEST_NAME = 255
"""Bytes of a name between two slashes, on every file system in common use."""

LONGEST_PATH = 400
"""Characters of a path that a message repeats: what file systems take is longer, what people write is not."""

Given: TypeAlias = str | os.PathLike[str]


def checked(given: Given) -> Path:
    """The path that a user wrote, with its `~` expanded; it need not exist.

    Raises:
        FoveateError: nothing can ever be there: a name that is too long, a NUL character, the home of an unknown user,
            a link that leads to itself, or a folder that may not be entered.
    """
    text = os.fspath(given)
    if "\0" in text:
        raise FoveateError(f"the path {short(repr(text))} holds a NUL character, which no path can; write it without")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise FoveateError(
            f"{short(text)}: there is no user {short(text.split('/')[0][1:])!r} here; write the folder out"
        ) from error
    try:
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
        if longest > LONGEST_NAME:
            raise FoveateError(f"{short(text)} holds a name of {longest} bytes; the most is {LONGEST_NAME}")
        os.stat(path)
    except UnicodeEncodeError as error:
        raise FoveateError(f"the path {short(repr(text))} holds characters that no file's name can") from error
    except (FileNotFoundError, NotADirectoryError):
        return path
    except OSError as error:
        raise FoveateError(f"{short(text)} is no path that can be used: {error.strerror}") from error
    return path


def file_target(given: Given, suffixes: Sequence[str]) -> Path:
    """A file to be written at the end of some work.

    Raises:
        FoveateError: another suffix than `suffixes`, a folder that is not there or takes no files, or a folder of this
            name.
    """
    path = checked(given)
    if path.suffix.lower() not in suffixes:
        raise FoveateError(f"{path} ends in {path.suffix or 'nothing'!r}; the choices are {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise FoveateError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise FoveateError(f"{path} cannot be written: it is a folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise FoveateError(f"{path} cannot be written: the folder {path.parent} takes no files from this user")
    return path


def folder_target(given: Given) -> Path:
    """A folder to be filled by some work; it is made when the first file is written.

    Raises:
        FoveateError: it is a file, or lies below one, or its place takes no files.
    """
    path = checked(given)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        below = "" if there == path.absolute() or there == path else f"{path} cannot be made: "
        raise FoveateError(f"{below}{there} is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise FoveateError(f"{path} cannot be written: the folder {there} takes no files from this user")
    return path


def read_json(path: Path, name: str, what: str = "JSON", most: int | None = None) -> Any:
    """The value of a JSON file that a user named.

    Args:
        name: how messages call the file.
        what: what it is to be read as, for messages.
        most: bytes that it may have; of a file without end no more are read.

    Raises:
        FoveateError: it is not there, cannot be read, has too many bytes, or is no JSON.
    """
    try:
        with path.open("rb") as file:
            content = file.read() if most is None else file.read(most + 1)
        if most is not None and len(content) > most:
            raise FoveateError(f"{name} cannot be read as {what}: it has more than {most / 1e6:g} MB")
        return json.loads(content.decode())
    except FoveateError:
        raise
    except RecursionError as error:
        raise FoveateError(f"{name} cannot be read as {what}: its brackets are nested too deep") from error
    except OSError as error:
        raise FoveateError(f"{name} cannot be read as {what}: {error.strerror or error}") from error
    except ValueError as error:
        raise FoveateError(f"{name} cannot be read as {what}: {short(str(error), 200)}") from error
