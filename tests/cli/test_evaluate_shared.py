"""`foveate eval` in several processes: the rows of one, printed and written once, and a run that fewer go on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.inference.processes import ALONE, Processes, joined

SCRIPT = """
import sys, torch
from foveate.cli import main
torch.set_num_threads(1)
split = sys.argv.index("then")
sys.exit(main(sys.argv[1:split]) or main(sys.argv[split + 1:]))
"""


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Seven questions about two pictures."""
    task = tmp_path / "task"
    task.mkdir()
    for name in ("a.png", "b.png"):
        Image.effect_noise((40, 40), 60).convert("RGB").save(task / name)
    lines = [
        {"image": f"{'ab'[number % 2]}.png", "question": f"w{number + 10} w7", "answers": ["w3"], "type": "exact"}
        for number in range(7)
    ]
    (task / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return task


def untimed(file: Path) -> dict[str, Any]:
    return {name: value for name, value in json.loads(file.read_text()).items() if name != "command"}


def test_two_processes_reach_the_rows_of_one(call: Any, folder: Path, questions: Path, tmp_path: Path) -> None:
    common = ["eval", "--model", str(folder), "--prune", "fopru:keep=4", "--batch", "2", "--timed", "0"]

    def asked(name: str) -> tuple[list[str], list[str]]:
        scenes = [*common, "--device", "cpu", "--tasks", "scenes", "--samples", "9", "--ceiling"]
        rows, out = str(tmp_path / f"{name}.json"), str(tmp_path / name)
        return [*scenes, "--json", rows], [*common, "--device", "cpu", "--tasks", str(questions), "--out", out]

    alone = [call(*arguments) for arguments in asked("one")]
    script = tmp_path / "both.py"
    script.write_text(SCRIPT)
    scenes, ours = asked("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*command, *scenes, "then", *ours], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert found.returncode == 0, found.stderr[:3000]
    assert found.stdout == "".join(result.out for result in alone)
    assert untimed(tmp_path / "two.json") == untimed(tmp_path / "one.json")
    assert untimed(tmp_path / "two" / "rows.json") == untimed(tmp_path / "one" / "rows.json")
    whole = (tmp_path / "one" / "answers.jsonl").read_text().splitlines()
    files = [tmp_path / "two" / name for name in ("answers.jsonl", "answers-1.jsonl")]
    shares = [file.read_text().splitlines() for file in files]
    assert sorted(shares[0] + shares[1]) == sorted(whole)
    assert [{json.loads(line)["batch"] for line in share} for share in shares] == [{0, 2}, {1, 3}]

    files[1].write_text("\n".join(shares[1][:3]) + '\n{"rival": "no')
    again = call(*ours, "--resume")
    assert (again.code, again.out) == (0, alone[1].out)
    shares = [file.read_text().splitlines() for file in files]
    assert sorted(shares[0] + shares[1]) == sorted(whole), "nothing was asked twice"


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    among = joined()
    assert among == ALONE and among.first and among.takes(0) and among.takes(1)
    assert (among.told(lambda: 3), among.gathered([1, 2])) == (3, [1, 2])
    second = Processes(1, 3)
    assert not second.first and [place for place in range(7) if second.takes(place)] == [1, 4]
