"""Paths that no file system takes are refused in words, by every part that takes a path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from foveate.core import FoveateError
from foveate.paths import LONGEST_NAME, checked, file_target, folder_target, read_json

IMPOSSIBLE = {
    "n" * 256: r"n{20,}\.\.\.n+ \(256 characters\) holds a name of 256 bytes; the most is 255",
    "there/" + "ä" * 128: "holds a name of 256 bytes; the most is 255",
    "a/" * 3000: r"is no path that can be used: File name too long",
    "a\0b": "the path 'a.x00b' holds a NUL character, which no path can",
    "~no-such-user/file": r"~no-such-user/file: there is no user 'no-such-user' here; write the folder out",
    "a\ud800": "holds characters that no file's name can",
}


@pytest.mark.parametrize(("path", "message"), IMPOSSIBLE.items(), ids=lambda value: repr(value)[:12])
def test_what_can_be_no_path(path: str, message: str) -> None:
    with pytest.raises(FoveateError, match=message) as caught:
        checked(path)
    assert len(str(caught.value)) < 250


def test_what_can_be_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checked("~/x") == tmp_path / "x"
    assert checked(tmp_path / ("n" * LONGEST_NAME)) == tmp_path / ("n" * LONGEST_NAME)
    assert checked("owner/name") == Path("owner/name")
    (tmp_path / "file").write_text("")
    assert checked(tmp_path / "file" / "below") == tmp_path / "file" / "below"


def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    os.symlink(tmp_path / "link", tmp_path / "link")
    with pytest.raises(FoveateError, match="is no path that can be used: Too many levels of symbolic links"):
        checked(tmp_path / "link")


def test_files_to_be_written(tmp_path: Path) -> None:
    assert file_target(tmp_path / "a.JSON", (".json",)) == tmp_path / "a.JSON"
    for path, message in {
        "a.txt": "ends in '.txt'; the choices are .json",
        "a": "ends in 'nothing'; the choices are .json",
        "no/a.json": f"cannot be written: there is no folder {tmp_path / 'no'}",
    }.items():
        with pytest.raises(FoveateError, match=message):
            file_target(tmp_path / path, (".json",))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(FoveateError, match="cannot be written: it is a folder"):
        file_target(tmp_path / "folder.json", (".json",))


def test_folders_that_take_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # a superuser is let in everywhere
    with pytest.raises(FoveateError, match=f"the folder {tmp_path} takes no files from this user"):
        file_target(tmp_path / "a.json", (".json",))
    with pytest.raises(FoveateError, match=f"the folder {tmp_path} takes no files from this user"):
        folder_target(tmp_path / "new" / "deep")


def test_folders_to_be_filled(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert folder_target(tmp_path) == tmp_path
    assert folder_target(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    for name, message in {"file": "", "file/below/x": f"{tmp_path / 'file/below/x'} cannot be made: "}.items():
        with pytest.raises(FoveateError, match=f"^{message}{tmp_path / 'file'} is a file; give a folder$"):
            folder_target(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "its brackets are nested too deep"),
        (b'{"a":' * 100_000, "its brackets are nested too deep"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe\x00", "'utf-8' codec can't decode byte"),
        (None, "No such file or directory"),
    ],
    ids=["brackets", "braces", "half", "bytes", "missing"],
)
def test_json_that_cannot_be_read(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FoveateError, match=f"@a cannot be read as a spec: .*{message}") as caught:
        read_json(tmp_path / "a.json", "@a", "a spec")
    assert len(str(caught.value)) < 300
