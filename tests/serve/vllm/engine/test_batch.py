"""`foveate batch --engine vllm`, here and on Ray Data's own processor: the answers of transformers, each once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from references.vllm_answers import MINI, QUESTIONS
from references.vllm_ties import near

from foveate.cli import main
from foveate.evaluate.scenes_task import draw_samples

SAMPLES = list(draw_samples(QUESTIONS, seed=3))
ROUNDS = 3
"""Of all questions, so that most are open when the first are answered."""
USUAL = ["--model", "mini", "--prune", MINI[0], "--max-new-tokens", "24", "--dtype", "float32", "--engine", "vllm"]
ENGINE = ["--enforce-eager", "--max-model-len", "1024", "--num-gpu-blocks-override", "256"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of scenes."""
    root = tmp_path_factory.mktemp("batch")
    for number, sample in enumerate(SAMPLES):
        sample.image.save(root / f"{number}.png")
    return root


def write(path: Path, rounds: int) -> Path:
    """A file of questions about the scenes, each so many times, and of two rows that cannot be answered."""
    asked = [
        {"id": f"{number}/{again}", "image": f"{number}.png", "question": sample.question}
        for again in range(rounds)
        for number, sample in enumerate(SAMPLES)
    ]
    asked.insert(3, {"id": "none", "image": "none.png", "question": "what is it ?"})
    asked.insert(5, {"id": "long", "image": "0.png", "question": "what is it ? " * 300})
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    return path


def check(path: Path, rounds: int, expected: list[dict[str, Any]]) -> None:
    """Every row is there once, with the reference's answer, or its fault."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    made = {row["id"]: row for row in lines}
    assert len(lines) == len(made) == rounds * len(SAMPLES) + 2
    assert "none.png is no file" in made["none"]["error"]
    assert "maximum context length is 1024 tokens" in made["long"]["error"]
    for again in range(rounds):
        for number, right in enumerate(expected):
            row = made[f"{number}/{again}"]
            assert row["tokens"] == {"before": 576, "after": 64} and row["ms"] > 0
            if row["answer"] != right["text"]:
                assert row["answer"] in [other["text"] for other in near(right["spec"], number)]


def test_an_engine_of_this_process(scenes: Path, reference: Callable[[str], Any]) -> None:
    source, target = write(scenes / "in.jsonl", 1), scenes / "out.jsonl"
    assert main(["batch", str(source), str(target), *USUAL, *ENGINE]) == 0
    check(target, 1, reference("mini")[MINI[0]])
    kept = target.read_text().splitlines()[: len(SAMPLES) // 2]
    target.write_text("\n".join(kept) + "\n")
    assert main(["batch", str(source), str(target), *USUAL, *ENGINE, "--resume"]) == 0
    assert target.read_text().splitlines()[: len(kept)] == kept
    check(target, 1, reference("mini")[MINI[0]])


def test_an_engine_that_is_killed_on_ray(scenes: Path, reference: Callable[[str], Any]) -> None:
    """It starts again, and what it had is asked again; nothing is lost, and nothing comes twice."""
    source, target = write(scenes / "many.jsonl", ROUNDS), scenes / "ray.jsonl"
    command = [sys.executable, "-m", "foveate", "batch", str(source), str(target), *USUAL, *ENGINE, "--batch", "2"]
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    with subprocess.Popen([*command, "--ray", "local"], env=environment) as run:
        while not (target.exists() and target.stat().st_size):
            assert run.poll() is None, "it ended before it had an answer"
            time.sleep(0.1)
        (engine,) = engines_of(run.pid)
        engine.send_signal(signal.SIGKILL)
        assert len(target.read_text().splitlines()) < ROUNDS * len(SAMPLES)
        assert run.wait(600) == 0
    check(target, ROUNDS, reference("mini")[MINI[0]])


def engines_of(process: int) -> list[psutil.Process]:
    """Ray's actors below a process that hold an engine."""
    found = []
    for one in psutil.Process(process).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            found += [one] if "vLLMEngineStage" in " ".join(one.cmdline()) else []
    return found


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max-modl-len", "8"), "vLLM: unrecognized arguments: --max-modl-len 8"),
        (("--max-model-len", "many"), "--max-model-len"),
        (("--device", "cpu"), "--device cpu belongs to batches without an engine"),
        (("--hf-overrides", '{"foveate": "none"}'), "give one of them"),
    ],
)
def test_options_that_cannot_be(
    scenes: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = write(scenes / "in.jsonl", 1), scenes / "refused.jsonl"
    assert main(["batch", str(source), str(target), *USUAL, *more]) == 2
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_a_cluster_without_room_is_told() -> None:
    from foveate.batch.on_ray_vllm import room_of
    from foveate.core import FoveateError

    assert room_of({"CPU": 2.0}, 1, None) == (1, {"placement_group_config": {"bundles": [{"CPU": 0.5}]}})
    assert room_of({"CPU": 64.0, "GPU": 8.0}, 2, None) == (4, {})
    with pytest.raises(FoveateError, match=r"8 GPUs, room for 4 engines of 2 devices each, not workers=5"):
        room_of({"CPU": 64.0, "GPU": 8.0}, 2, 5)
    with pytest.raises(FoveateError, match=r"2 cores and no GPU, room for 2 engines"):
        room_of({"CPU": 2.0}, 1, 3)
