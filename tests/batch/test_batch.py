"""`foveate batch`: each row answered once, as by itself; kills, faults and Parquet change nothing of that."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny
from PIL import Image

import foveate
from foveate.batch.journal import Journal
from foveate.batch.rows import check_ids, rows_of, windows
from foveate.cli import main
from foveate.core import FoveateError
from foveate.inference.answers import answer
from foveate.runs import hold

SPEC = "fopru:keep=9"
ROWS = 23


@pytest.fixture
def asked(tmp_path: Path) -> list[dict[str, Any]]:
    """Rows of one or two words about noise, the picture of each in a folder of their own."""
    (tmp_path / "pictures").mkdir()
    rows = []
    for number in range(ROWS):
        name = f"pictures/{number}.png"
        Image.effect_noise((24, 24), 20 + 5 * number).convert("RGB").save(tmp_path / name)
        rows.append({"id": f"r{number}", "image": name, "question": "w7 w8 w9"[: 2 + 3 * (number % 3)]})
    return rows


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> dict[Any, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def batch(source: Path, target: Path, folder: Path, *more: object) -> int:
    options = ["--prune", SPEC, "--batch", "4", "--max-new-tokens", "3", "--device", "cpu"]
    return main(["batch", str(source), str(target), "--model", str(folder), *options, *map(str, more)])


def alone(asked: list[dict[str, Any]], root: Path) -> dict[str, str]:
    """The answer to each row by itself."""
    model = tiny.model()
    processor = tiny.processor(model)
    with foveate.prune(model, SPEC):
        return {
            row["id"]: answer(
                model, processor, [Image.open(root / row["image"]).convert("RGB")], [row["question"]], max_new_tokens=3
            )[0]
            for row in asked
        }


def test_every_row_is_answered_as_by_itself(asked: list[dict[str, Any]], tmp_path: Path, folder: Path) -> None:
    source = write(tmp_path / "in.jsonl", asked)
    assert batch(source, tmp_path / "out.jsonl", folder) == 0
    rows = read(tmp_path / "out.jsonl")
    assert {name: row["answer"] for name, row in rows.items()} == alone(asked, tmp_path)
    assert all(row["tokens"] == {"before": tiny.TOKENS, "after": 9} and row["ms"] > 0 for row in rows.values())


def test_a_fault_stays_in_its_row(asked: list[dict[str, Any]], tmp_path: Path, folder: Path) -> None:
    (tmp_path / "pictures" / "3.png").write_bytes(b"no picture")
    faulty: list[Any] = [
        *asked,
        "{torn",
        {"id": "a", "image": "pictures/none.png", "question": "w7"},
        {"id": "b", "image": "pictures/1.png", "question": " "},
        {"id": "c", "question": "w7"},
        {"id": "d", "images": [], "question": "w7"},
        {"id": "e", "image": "pictures/1.png", "question": "w7 " * 600},
        {"image": "pictures/1.png", "question": "w7"},
        {"id": "f", "images": ["pictures/1.png", "pictures/2.png"], "question": "w7"},
    ]
    assert batch(write(tmp_path / "in.jsonl", faulty), tmp_path / "out.jsonl", folder) == 0
    rows = read(tmp_path / "out.jsonl")
    assert len(rows) == len(faulty)
    errors = {name: row["error"] for name, row in rows.items() if "error" in row}
    wanted = {
        "r3": "no picture that can be decoded",
        "line 24": "no JSON",
        "a": "is no file",
        "b": "no text that asks something",
        "c": "image=None is no path",
        "d": "give at least one picture",
        "e": "the context of this decoder has 512",
        "line 30": "id=None is neither a text nor a whole number",
    }
    assert errors.keys() == wanted.keys()
    assert all(text in errors[name] for name, text in wanted.items())
    good = alone([row for row in asked if row["id"] != "r3"], tmp_path)
    assert {name: rows[name]["answer"] for name in good} == good
    assert rows["f"]["tokens"] == {"before": 2 * tiny.TOKENS, "after": 18}


def test_a_killed_run_goes_on_where_it_was(asked: list[dict[str, Any]], tmp_path: Path, folder: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", asked), tmp_path / "out.jsonl"
    options = ["--model", str(folder), "--prune", SPEC, "--batch", "1", "--max-new-tokens", "3", "--device", "cpu"]
    command = [sys.executable, "-m", "foveate", "batch", str(source), str(target), *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as run:
        while not (target.exists() and target.read_bytes().count(b"\n") >= 3):
            assert run.poll() is None
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    before = target.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    assert kept.count(b"\n") < ROWS
    with target.open("ab") as file:
        file.write(b'{"id": "r22", "ans')  # what a kill in the middle of a line leaves
    assert batch(source, target, folder, "--resume", "--batch", "1") == 0
    assert target.read_bytes().startswith(kept)
    assert {name: row["answer"] for name, row in read(target).items()} == alone(asked, tmp_path)
    assert batch(source, target, folder, "--resume", "--batch", "1") == 0  # nothing is left to do
    assert len(read(target)) == ROWS


def test_a_run_is_held_to_its_settings(
    asked: list[dict[str, Any]], tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = write(tmp_path / "in.jsonl", asked[:2]), tmp_path / "out.jsonl"

    def refused(*more: object) -> str:
        capsys.readouterr()
        assert batch(source, target, folder, *more) in (1, 2)
        return capsys.readouterr().err

    assert "holds no run to go on with" in refused("--resume")
    assert batch(source, target, folder) == 0
    assert "go on with it by --resume" in refused()
    assert "--max-new-tokens 3, not --max-new-tokens 5" in refused("--resume", "--max-new-tokens", 5)
    write(source, asked[:3])
    assert "was begun with rows=" in refused("--resume")
    with hold(str(target) + ".run"):
        assert "another run is at work" in refused("--resume")


def test_the_same_id_twice_is_refused_before_anything_runs(tmp_path: Path) -> None:
    row = {"id": 7, "image": "a.png", "question": "w7"}
    with pytest.raises(FoveateError, match=r"rows 1 and 3 of .* have the same id 7"):
        check_ids(write(tmp_path / "in.jsonl", [row, {**row, "id": "7"}, row]))
    with pytest.raises(FoveateError, match="holds no row"):
        check_ids(write(tmp_path / "in.jsonl", []))


def test_parquet_in_and_out(asked: list[dict[str, Any]], tmp_path: Path, folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pictures = [{"bytes": (tmp_path / row["image"]).read_bytes(), "path": None} for row in asked]
    columns = {
        "id": [row["id"] for row in asked],
        "image": pictures,
        "question": [row["question"] for row in asked],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    assert batch(tmp_path / "in.parquet", tmp_path / "out.parquet", folder) == 0
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert {row["id"]: row["answer"] for row in rows} == alone(asked, tmp_path)
    assert {(row["error"], row["tokens_before"], row["tokens_after"]) for row in rows} == {(None, tiny.TOKENS, 9)}


@pytest.mark.parametrize("damage", [b'{"id": "r1", "ans', b"[]", b'{"answer": "yes"}'])
def test_a_damaged_line_between_others_is_named(
    asked: list[dict[str, Any]], tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], damage: bytes
) -> None:
    source, target = write(tmp_path / "in.jsonl", asked[:6]), tmp_path / "out.jsonl"
    assert batch(source, target, folder) == 0
    lines = target.read_bytes().splitlines()
    lost = json.loads(lines[2])["id"]
    target.write_bytes(b"\n".join([*lines[:2], damage, *lines[3:]]) + b"\n")
    assert batch(source, target, folder, "--resume") == 1
    assert f"line 3 of {target} is damaged" in capsys.readouterr().err
    target.write_bytes(b"\n".join([*lines[:2], *lines[3:]]) + b"\n")
    assert batch(source, target, folder, "--resume") == 0  # as the message says
    assert {row["id"] for row in read(target).values()} == {row["id"] for row in asked[:6]}
    assert list(read(target))[-1] == lost


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 7), st.booleans())
def test_windows_are_the_rows_that_are_not_done(
    tmp_path_factory: pytest.TempPathFactory, done: list[bool], size: int, as_parquet: bool
) -> None:
    """Read by themselves, somewhere in the file, they are the rows that they are in the whole of it."""
    rows = [{"id": number, "image": "a.png", "question": "w" * (number % 5)} for number in range(len(done))]
    path = tmp_path_factory.mktemp("windows") / ("in.parquet" if as_parquet else "in.jsonl")
    if as_parquet:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=6)
    else:
        path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    left = {number for number, one in enumerate(done) if not one}
    found = list(windows(path, set(range(len(done))) - left, size))
    assert all(len(one.numbers) == size for one in found[:-1])
    assert [row for one in found for row in rows_of(path, one)] == [row for row in rows_of(path) if row.id in left]


def test_options_of_ray_without_it(
    asked: list[dict[str, Any]], tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", asked[:2])
    assert batch(source, tmp_path / "out.jsonl", folder, "--workers", 2) == 2
    assert "--workers belongs to --ray" in capsys.readouterr().err
    assert batch(source, tmp_path / "out.jsonl", folder, "--ray", "local", "--workers", 0) == 2
    assert "--workers 0 leaves nobody to answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--engine", "vlm"), "unknown engine 'vlm'; choices: vllm"),
        (("--route", "in-tree"), "--route belongs to --engine vllm; leave it out, or add that"),
        (("--max-new-token", "3"), "--max-new-token is no option of batch; with --engine vllm"),
    ],
)
def test_options_of_an_engine_without_it(
    tmp_path: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path, *more) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("in.txt", "out.jsonl"), "rows are read from .jsonl and .parquet"),
        (("none.jsonl", "out.jsonl"), "is no file"),
        (("in.jsonl", "out.csv"), "ends in '.csv'"),
        (("in.jsonl", "none/out.jsonl"), "there is no folder"),
    ],
)
def test_files_that_cannot_be(
    tmp_path: Path, names: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in.jsonl", [{"id": 1, "image": "a.png", "question": "w7"}])
    assert batch(tmp_path / names[0], tmp_path / names[1], tmp_path) in (1, 2)
    assert message in capsys.readouterr().err


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_any_bytes_are_rows_or_faults(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("any") / "in.jsonl"
    path.write_bytes(b"\n".join(lines))
    rows = list(rows_of(path))
    assert len(rows) == sum(bool(line.strip()) for line in b"\n".join(lines).split(b"\n"))
    assert all(row.fault or row.question for row in rows)


@given(st.integers(0, 200), st.integers(0, 5))
def test_only_what_is_torn_is_cut_off(tmp_path_factory: pytest.TempPathFactory, torn: int, whole: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "out.jsonl"
    lines = b"".join(json.dumps({"id": number, "answer": "x" * 40_000}).encode() + b"\n" for number in range(whole))
    path.write_bytes(lines + (b'{"id": ' + b" " * torn if torn else b""))
    assert Journal(path).done == set(range(whole))
    assert path.read_bytes() == lines
