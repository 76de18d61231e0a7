"""Exit codes, one line per error, and a front door that opens without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import foveate
from foveate import cli
from foveate.core import FoveateError

IMPOSSIBLE = {
    "n" * 300: "the most is 255",
    "~no-such-user": "there is no user 'no-such-user' here; write the folder out",
}


@pytest.mark.parametrize(("name", "message"), IMPOSSIBLE.items(), ids=["long", "user"])
@pytest.mark.parametrize(
    "command",
    [
        "run X {picture} what",
        "run mini X what",
        "run mini {picture} what --prune lvpruning:from=X",
        "run mini {picture} what --prune @X",
        "run mini {picture} what --prune random:keep=4 --draw X/a.png",
        "check X",
        "cost X",
        "cost mini --sweep keep --prune random:keep=4 --plot X/a.png",
        "bench X",
        "bench mini --json X/a.json",
        "eval --model mini --tasks scenes --json X/a.json",
        "analyze mini X",
        "analyze mini {picture} --out X",
        "analyze mini {picture} --json X/a.json",
        "demo --out X",
        "train mini --out X",
        "train mini --out {folder} --start X",
        "train lvpruning --steps 1 --out X",
        "train lvpruning --out {folder} --data X --images {folder}",
        "train lvpruning --out {folder} --data {file} --images X",
    ],
)
def test_no_path_is_too_strange_for_words(
    call: Any, picture: Path, tmp_path: Path, command: str, name: str, message: str
) -> None:
    (tmp_path / "data.json").write_text("[]")
    known = {"{picture}": picture, "{folder}": tmp_path / "run", "{file}": tmp_path / "data.json"}
    words = [str(known.get(word, word)).replace("X", name) for word in command.split()]
    result = call(*words)
    assert (result.out, message in result.err) == ("", True), result.err
    assert result.code == (1 if "--images X" in command else 2), result.err  # these are read with the data
    assert len(result.err) < 400


def test_a_file_is_no_folder_for_a_run(call: Any, picture: Path) -> None:
    for command in ("train mini --out", "train lvpruning --steps 1 --out", "demo --out", "analyze mini --out"):
        result = call(*command.split(), picture)
        assert (result.code, result.err) == (2, f"foveate: {picture} is a file; give a folder\n")


@pytest.mark.parametrize("long", ["x" * 150_000, "x " * 75_000], ids=["one word", "many"])
def test_no_message_repeats_150_kilobytes(call: Any, picture: Path, long: str) -> None:
    every = "eval --model mini --tasks scenes --every L"
    for command in ("run mini {} what --device L", "run mini {} what --prune L", "cost L", "L", every):
        result = call(*(word.replace("L", long).replace("{}", str(picture)) for word in command.split()))
        assert result.code == 2, command
        assert result.err.startswith("foveate: ") and len(result.err) < 5000, command


def test_help_names_every_command(call: Any) -> None:
    result = call("--help")
    assert result.code == 0
    for command in ("run", "eval", "cost", "bench", "demo", "methods", "models", "train"):
        assert f"\n  {command} " in result.out
    assert call().out == result.out


@pytest.mark.parametrize(
    "command", ["run", "eval", "cost", "bench", "demo", "methods", "models", "train", "train mini"]
)
def test_every_command_explains_itself(call: Any, command: str) -> None:
    result = call(*command.split(), "-h")
    assert (result.code, result.err) == (0, "")
    assert f"Usage: foveate {command}" in result.out


def test_version(call: Any) -> None:
    assert call("--version").out == f"{foveate.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "No such command 'rum'"),
        (["run"], "Missing argument 'MODEL'"),
        (["run", "mini", "only two"], "Missing argument 'IMAGE...'"),
        (["run", "--sharpen"], "No such option"),
        (["eval", "--tasks", "scenes"], "Missing option '--model'"),
        (["eval", "--model", "mini"], "Missing option '--tasks'"),
        (["eval", "--model", "mini", "--tasks", "scenes", "--samples", "few"], "Invalid value for '--samples'"),
        (["train"], "Missing command"),
        (["train", "mini"], "Missing option '--out'"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(call: Any, arguments: list[str], message: str) -> None:
    result = call(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("foveate: ")
    assert message in result.err
    assert result.err.count("\n") == 1


def failing(error: BaseException) -> Any:
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (FoveateError("keep=0 is\nbelow 1"), 1, "foveate: keep=0 is below 1\n"),
        (RuntimeError("out of memory"), 1, "foveate: RuntimeError: out of memory (--debug shows where)\n"),
        (KeyError(), 1, "foveate: KeyError (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, "foveate: interrupted\n"),
    ],
)
def test_failures_while_working(
    call: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    monkeypatch.setattr("foveate.methods.names", failing(error))
    result = call("methods")
    assert (result.code, result.out, result.err) == (code, "", message)


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_the_traceback(call: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr("foveate.methods.names", failing(FoveateError("broken")))
    if how == "environment":
        monkeypatch.setenv("FOVEATE_DEBUG", "1")
    result = call(*(["--debug"] if how == "option" else []), "methods")
    assert result.code == 1
    assert "Traceback (most recent call last)" in result.err
    assert result.err.endswith("foveate: broken\n")
    monkeypatch.setenv("FOVEATE_DEBUG", "0")
    assert call("methods").err == "foveate: broken\n"


def test_the_app_runs_under_typer_alone() -> None:
    result = CliRunner().invoke(cli.app, ["models", "--json"], obj={"debug": False})
    assert result.exit_code == 0
    assert '"llava-1.5"' in result.stdout


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(foveate.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "foveate", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": source, **environment},
    )


def test_as_a_process() -> None:
    done = shell("run", "mini", "nowhere.png", "is there a dog ?")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "foveate: nowhere.png is no file; give the path of a picture\n"


def test_a_full_disk_behind_the_output() -> None:
    """A pipe that is no pipe: every write to this device fails as on a full disk."""
    command = [sys.executable, "-m", "foveate", "methods"]
    with open("/dev/full", "w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (run.returncode, run.stderr) == (1, "foveate: the output cannot be written: No space left on device\n")


def test_the_front_door_opens_without_torch() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'PIL'}"
    code = f"import sys, foveate.cli; foveate.cli.main(['--help']); print(sorted({heavy} & set(sys.modules)))"
    source = str(Path(foveate.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": source},
    )
    assert done.stdout.endswith("[]\n")
