"""What is written: files that are whole or not there, also after a power cut, and folders that hold one run."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from foveate.core import FoveateError
from foveate.paths import Given, checked, folder_target, read_json

PART = ".part-"
"""What names of files and folders begin with while they are being written."""

LOCK, SETTINGS = ".lock", "run.json"
_LAST = ".safetensors"  # a folder with weights is a folder with everything else


@contextmanager
def whole_file(path: Given) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the place of `path` once the block has ended well.

    Whatever happens, `path` holds what it held before or all that was written, also after a power cut, and nothing
    half-written stays.

    Raises:
        FoveateError: it cannot be written, such as on a full disk; the message names `path`.
    """
    path = checked(path)
    suffix = path.suffix if len(path.suffix) <= 16 else ""  # formats are told by it
    temporary = path.with_name(f"{PART}{secrets.token_hex(4)}{suffix}")
    with _named(path):
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            mode = temporary.stat().st_mode & 0o777
            yield temporary
            _settle(temporary, mode)
            os.replace(temporary, path)
            _settle_names(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Given) -> Iterator[Path]:
    """A folder to write files to; they move into `folder` once the block has ended well, weights last.

    Files of other names in `folder` stay.

    Raises:
        FoveateError: they cannot be written, such as on a full disk; the message names `folder`.
    """
    folder = make_folder(folder)
    temporary = folder / f"{PART}{secrets.token_hex(4)}"
    with _named(folder):
        try:
            temporary.mkdir()
            mode = temporary.stat().st_mode & 0o666
            yield temporary
            files = sorted(temporary.iterdir(), key=lambda file: (file.suffix == _LAST, file.name))
            for file in files:
                _settle(file, mode)
            for file in files:
                os.replace(file, folder / file.name)
            _settle_names(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """A folder that others fill at its place; where that fails, it does not stay half full.

    Raises:
        FoveateError: it cannot be written, such as on a full disk; the message names it.
    """
    try:
        with _named(folder):
            yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def make_folder(folder: Given) -> Path:
    """Make a folder, and those above it; one that is there is kept as it is.

    Raises:
        FoveateError: a file is in the way, or it cannot be made.
    """
    path = folder_target(folder)
    with _named(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_bytes(path: Given, data: bytes) -> None:
    """Write a file, all of it or nothing; FoveateError as `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Given, text: str) -> None:
    """Write a file in UTF-8, all of it or nothing; FoveateError as `whole_file`."""
    write_bytes(path, text.encode())


def write_json(path: Given, value: Any) -> None:
    """Write one JSON value, all of it or nothing; FoveateError as `whole_file`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_line(path: Path, line: str) -> None:
    """Add one line to a file, all of it or nothing.

    Raises:
        FoveateError: it cannot be written; the message names `path`.
    """
    with _named(path), path.open("ab") as file:
        end = file.seek(0, os.SEEK_END)
        try:
            file.write(line.encode() + b"\n")
            file.flush()
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def drop_torn(path: Path) -> None:
    """Cut off what follows the last end of a line: a kill can leave half of one behind `append_line`.

    Raises:
        FoveateError: it cannot be written; the message names `path`.
    """
    with _named(path), path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65_536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                file.truncate(start + found + 1)
                return
            end = start
        file.truncate(0)


@contextmanager
def hold(folder: Given) -> Iterator[Path]:
    """Keep the folder of a run to this process, and clear away what a killed one has left half-written.

    The lock goes with the process, however that ends. The folder is made if it is not there.

    Raises:
        FoveateError: another run is at work in the folder, or it cannot be made.
    """
    folder = make_folder(folder)
    with _named(folder / LOCK):
        file = (folder / LOCK).open("ab")
    with file:
        try:
            _lock(file.fileno())
        except OSError as error:
            raise FoveateError(
                f"another run is at work in {folder}; wait for its end, or give another folder"
            ) from error
        for pattern in (f"{PART}*", f"*/{PART}*"):  # models are written to folders inside
            for left in folder.glob(pattern):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield folder


@contextmanager
def run_folder(folder: Given, settings: Mapping[str, Any], resume: bool, first: bool = True) -> Iterator[Path]:
    """The folder of a run that begins or goes on, for this process alone until the block ends.

    Args:
        settings: whatever must be equal for a run to go on as if it had never stopped; JSON values.
        resume: go on with the run in `folder` instead of starting one there.
        first: False in all processes of a run but the first, which holds the folder for them.

    Raises:
        FoveateError: as `check_run` and `hold`, or the run was begun with other settings.
    """
    wanted = json.loads(json.dumps(settings))
    if first or resume:
        _check_there(folder, resume)
    with hold(folder) if first else nullcontext(checked(folder)) as path:
        if resume:
            _check_settings(path, wanted)
        elif first:
            _check_there(path, resume)  # once more, since another process may have been faster
            write_json(path / SETTINGS, wanted)
        yield path


def check_run(folder: Given, resume: bool) -> None:
    """Refuse, before any work, a folder in which a run cannot be begun, or resumed.

    Raises:
        FoveateError: `folder` holds a run and `resume` is False, it holds none or one that is at work and `resume` is
            True, or no folder can be there.
    """
    path = _check_there(folder, resume)
    if resume:
        with hold(path):
            pass


def _check_there(folder: Given, resume: bool) -> Path:
    path = folder_target(folder)
    there = (path / SETTINGS).exists()
    if there and not resume:
        raise FoveateError(f"{path} already holds a run; go on with it by resume=True, or give another folder")
    if resume and not there:
        raise FoveateError(f"{path} holds no run to go on with; start one there with resume=False")
    return path


def _check_settings(folder: Path, wanted: dict[str, Any]) -> None:
    before = read_json(folder / SETTINGS, str(folder / SETTINGS))
    if not isinstance(before, dict) or before.keys() != wanted.keys():
        raise FoveateError(
            f"{folder} holds a run of another kind, or of another version of Foveate; start in another folder"
        )
    for name, value in wanted.items():
        if before[name] != value:
            raise FoveateError(
                f"{folder} was begun with {name}={before[name]!r}, not {name}={value!r}; resume with the same "
                "settings, model and data, or start in another folder"
            )


def _lock(descriptor: int) -> None:
    """Take the lock of an open file; OSError where somebody else has it."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of writing name the file that they are about."""
    try:
        yield
    except OSError as error:
        raise FoveateError(f"{path} cannot be written: {error.strerror or error}") from error
    except Exception as error:
        # Of safetensors, which wraps what the system said; its package is not loaded for that. torch.save says nothing.
        if "inline_container" in str(error):
            raise FoveateError(f"{path} cannot be written: there may be no room left") from error
        if type(error).__name__ != "SafetensorError":
            raise
        raise FoveateError(f"{path} cannot be written: {error}") from error


def _settle(file: Path, mode: int) -> None:
    """Let the disk have all of a file, which gets the permissions of any new one."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
    file.chmod(mode)


def _settle_names(folder: Path) -> None:
    """Let the disk have the names in a folder, where a system can say so."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
