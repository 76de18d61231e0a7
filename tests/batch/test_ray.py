"""`foveate batch --ray`: the answers of the local run, each once, also where a worker is killed in between."""

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

pytest.importorskip("ray", reason="Ray is tested by make test-serve, in an environment of its own")
pytest.importorskip("psutil")

import psutil
from models import tiny
from PIL import Image

os.environ |= {"RAY_worker_niceness": "0"}  # else a worker waits for whatever else runs on this machine

SPEC = "fopru:keep=9"
ROWS = 480


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and a file of rows about a few pictures, one of which is damaged."""
    root = tmp_path_factory.mktemp("ray")
    tiny.save(tiny.model(), root / "model")
    for number in range(8):
        Image.effect_noise((24, 24), 20 + 5 * number).convert("RGB").save(root / f"{number}.png")
    (root / "8.png").write_bytes(b"no picture")
    rows = [
        {"id": f"r{number}", "image": f"{number % 9}.png", "question": "w7 w8 w9"[: 2 + 3 * (number % 3)]}
        for number in range(ROWS)
    ]
    (root / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def command(folder: Path, target: str, *more: str) -> list[str]:
    options = ["--model", "model", "--prune", SPEC, "--batch", "2", "--max-new-tokens", "3", "--device", "cpu"]
    return [sys.executable, "-m", "foveate", "batch", "in.jsonl", target, *options, *more]


@pytest.fixture(scope="module")
def local(folder: Path) -> Path:
    """What a run without Ray answers."""
    subprocess.run(command(folder, "local.jsonl"), cwd=folder, check=True)
    return folder / "local.jsonl"


def answers(path: Path) -> list[dict[str, Any]]:
    """The rows of a file by their ids, but for how long each took; each is there once."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == ROWS
    return sorted(({name: row[name] for name in row if name != "ms"} for row in rows), key=lambda row: row["id"])


def workers_of(process: int) -> list[Any]:
    """Ray's actors below a process that hold the model."""
    return [one for one in psutil.Process(process).children(recursive=True) if "MapWorker" in " ".join(one.cmdline())]


def test_a_killed_worker_loses_nothing_and_repeats_nothing(folder: Path, local: Path) -> None:
    target = folder / "ray.jsonl"
    options = ("--ray", "local", "--workers", "2")
    with subprocess.Popen(command(folder, "ray.jsonl", *options), cwd=folder) as run:
        while not (target.exists() and target.stat().st_size):
            assert run.poll() is None, "it ended before it had an answer"
            time.sleep(0.1)
        first = workers_of(run.pid)
        assert len(first) == 2
        os.kill(first[0].pid, signal.SIGKILL)
        assert len(target.read_text().splitlines()) < ROWS
        assert run.wait(300) == 0
    assert answers(target) == answers(local)
    assert sum("error" in row for row in answers(target)) == ROWS // 9


def test_a_run_on_ray_goes_on_where_it_stopped(folder: Path, local: Path) -> None:
    """Also one that was begun without Ray."""
    target = folder / "begun.jsonl"
    with subprocess.Popen(command(folder, target.name), cwd=folder) as run:
        while not (target.exists() and target.stat().st_size):
            assert run.poll() is None
            time.sleep(0.01)
        run.kill()
    kept = target.read_text().splitlines()
    assert 0 < len(kept) < ROWS
    subprocess.run(command(folder, target.name, "--resume", "--ray", "local"), cwd=folder, check=True)
    assert answers(target) == answers(local)
    assert target.read_text().splitlines()[: len(kept) - 1] == kept[:-1]


def test_no_cluster_is_told_in_a_line(folder: Path) -> None:
    more = ("--ray", "127.0.0.1:1")
    made = subprocess.run(command(folder, "none.jsonl", *more), cwd=folder, check=False, capture_output=True, text=True)
    assert made.returncode == 1
    assert "there is no Ray cluster at 127.0.0.1:1" in made.stderr and "Traceback" not in made.stderr
