"""A folder's questions answered by rivals: the same for all, written down whole, and gone on with after a kill."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models import tiny
from models.tiny_processors import PROCESSORS
from PIL import Image

from foveate.core import FoveateError
from foveate.evaluate import folder_rows, folder_run
from foveate.evaluate.folder_run import Answered, answer_folder, asks, read_answers
from foveate.evaluate.left_out import LeftOut
from foveate.evaluate.local_task import Folder, read
from foveate.evaluate.scenes_task import parse_rivals
from foveate.inference.answers import answer
from foveate.inference.pictures import load_image

SPECS = ("fopru:keep=4", "tome:keep=9")
TORN = '{"rival": "fopru:ke'


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Five questions about three pictures, one of them in three turns: seven prompts."""
    folder = tmp_path_factory.mktemp("task")
    for number, name in enumerate(("a", "b", "c")):
        Image.effect_noise((40, 40), 60 + 40 * number).convert("RGB").save(folder / f"{name}.png")
    lines = [
        {"image": "a.png", "question": "what is here ?", "answers": ["w3", "w4"], "type": "anls"},
        {"image": "b.png", "question": "is it ?", "answers": ["yes"], "type": "pope", "group": "random"},
        {"image": "b.png", "question": "is it ?", "answers": ["no"], "type": "pope", "group": "popular"},
        {"image": "c.png", "question": "which ?", "answers": ["B"], "type": "circular", "options": ["u", "v", "w"]},
        {"image": "c.png", "question": "what ?", "answers": ["x"], "type": "exact"},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read(folder)


def run(model: Any, task: Folder, out: Path, **settings: Any) -> list[Answered]:
    rivals = parse_rivals(SPECS)
    options = {"name": "tiny", "batch": 3, "max_new_tokens": 4, **settings}
    return answer_folder(model, tiny.processor(model), task, rivals, out=out, **options)


@pytest.fixture(scope="module")
def whole(model: Any, task: Folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Answered]]:
    """The folder of a run that was never stopped, and its answers."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, run(model, task, out)


@pytest.fixture
def copied(whole: tuple[Path, list[Answered]], tmp_path: Path) -> Path:
    return shutil.copytree(whole[0], tmp_path / "run")


def test_the_unpruned_answers_are_those_of_the_model(model: Any, task: Folder, whole: Any) -> None:
    out, lines = whole
    prompts = [ask.question for ask in asks(task)]
    assert len(prompts) == 7
    expected = [
        answer(model, tiny.processor(model), [load_image(task.path / one.image)], [one.prompt], max_new_tokens=4)[0]
        for one in prompts
    ]
    said = {
        rival: [text for line in lines if line.rival == rival for text in line.answers] for rival in ("none", *SPECS)
    }
    assert said["none"] == expected
    assert all(len(texts) == 7 for texts in said.values())
    assert said["fopru:keep=4"] != said["none"], "a rival can answer otherwise"
    tokens = {line.rival: set(line.tokens) for line in lines}
    assert tokens == {"none": {tiny.TOKENS}, "fopru:keep=4": {4}, "tome:keep=9": {9}}
    written = [json.loads(text) for text in (out / "answers.jsonl").read_text().splitlines()]
    assert sorted(written, key=str) == sorted((vars(line) for line in lines), key=str)


@pytest.mark.parametrize(("left", "torn"), [(0, ""), (1, TORN), (4, ""), (4, TORN), (8, TORN)])
def test_a_run_goes_on_without_asking_again(
    model: Any, task: Folder, whole: Any, copied: Path, monkeypatch: pytest.MonkeyPatch, left: int, torn: str
) -> None:
    file = copied / "answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 9
    file.write_text("".join(lines[:left]) + torn)
    asked: list[int] = []
    greedy = folder_run.greedy

    def counted(model: Any, inputs: Any, **options: Any) -> Any:
        asked.append(inputs["input_ids"].shape[0])
        return greedy(model, inputs, **options)

    monkeypatch.setattr(folder_run, "greedy", counted)
    told: list[int] = []
    again = run(model, task, copied, resume=True, progress=told.append)
    assert again == whole[1]
    assert len(asked) == 9 - left
    assert sum(told) == 3 * 7
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines)


@pytest.mark.parametrize("change", ["model", "data", "batch", "rivals"])
def test_a_run_of_something_else_is_refused(
    model: Any, task: Folder, copied: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    with pytest.raises(FoveateError, match="already holds a run; go on with it by resume=True"):
        run(model, task, copied)
    settings: dict[str, Any] = {"resume": True}
    if change == "model":
        model = tiny.model(seed=1)
    elif change == "data":
        task = Folder(task.path, task.questions, "other")
    elif change == "batch":
        settings["batch"] = 2
    else:
        monkeypatch.setattr(sys.modules[__name__], "SPECS", SPECS[:1])
    named = {"model": "weights", "data": "data", "batch": "batch=3, not batch=2", "rivals": "rivals"}[change]
    with pytest.raises(FoveateError, match=f"was begun with {named}"):
        run(model, task, copied, **settings)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    assert read_answers(file) == []
    line = json.dumps(vars(Answered("none", 0, ["a"], [9], [9.0], [0.0, 0.0], [0, 0])))
    file.write_text(f'{line}\n{{"rival": "none"}}\n{line}\n')
    with pytest.raises(FoveateError, match="is damaged in line 2"):
        read_answers(file)


def test_rows_by_hand(task: Folder) -> None:
    """One of five questions is circular: `none` names one letter in every turn, the rival one option."""
    said = {
        "none": [["w3x", "yes", "yes"], ["B", "B", "B"], ["no"]],
        "random:keep=4": [["", "no", "no"], ["B", "A", "C"], ["X."]],
    }
    lines = [
        Answered(rival, number, texts, [36 if rival == "none" else 4] * len(texts), [36.0, 12.0], [1.0, 4.0], [1, 2])
        for rival, batches in said.items()
        for number, texts in enumerate(batches)
    ]
    none, rival = folder_rows.rows(lines, task, batch=3)
    # anls 1 - 1/3, POPE 1 and 0, circular 0 (one turn of three), exact 0
    assert none["accuracy"] == pytest.approx((2 / 3 + 1 + 0 + 0 + 0) / 5)
    assert rival["accuracy"] == pytest.approx((0 + 0 + 1 + 1 + 1) / 5)
    assert none["measures"]["circular"] == {"accuracy": 0.0, "turns": pytest.approx(1 / 3)}
    assert rival["measures"]["pope"]["random/accuracy"] == 0 and rival["measures"]["pope"]["yes_ratio"] == 0
    assert (none["questions"], none["tokens"], rival["tokens"]) == (5, 36, 4)
    assert (rival["prefill_flops_share"], rival["kv_bytes_share"]) == (0.25, 0.5)
    assert none["against"] == {}
    against = rival["against"]["none"]
    assert (against["better"], against["worse"]) == (3, 2)
    assert against["mean"] == pytest.approx(rival["accuracy"] - none["accuracy"])


def test_baselines_stand_beside_every_rival(model: Any, task: Folder) -> None:
    rivals = parse_rivals(["fopru:keep=9", "random:keep=9", "pyramiddrop:keep=16/9/4", "h2o"])
    everyone, beside, missing = folder_rows.with_baselines(model, tiny.processor(model), rivals, task)
    assert beside["fopru:keep=9"] == ["random:keep=9", "uniform:keep=9", "pool:keep=9"]
    assert beside["random:keep=9"] == ["uniform:keep=9", "pool:keep=9"]
    assert beside["pyramiddrop:keep=16/9/4"] == ["random:keep=4", "uniform:keep=4", "pool:keep=4"]
    assert next(iter(everyone)) == "none" and missing.keys() == {"resize:keep=9", "resize:keep=4"}
    assert "makes as many tokens of a small one" in missing["resize:keep=9"]
    assert set(everyone) == {"none", *rivals, *(name for names in beside.values() for name in names)}


def test_a_baseline_that_does_not_fit_a_picture_is_left_out(task: Folder, tmp_path: Path) -> None:
    """Tokens of several tiles form no raster, which shows when a picture is encoded."""
    tiled, processor = tiny.model("llava-next", blocks=2), PROCESSORS["llava-next"]()
    everyone, beside, _ = folder_rows.with_baselines(tiled, processor, parse_rivals(["fopru:keep=4"]), task)
    assert "pool:keep=4" in beside["fopru:keep=4"]
    told: dict[str, str] = {}

    def leave_out(spec: str, why: str) -> bool:
        told[spec] = why
        return spec == "pool:keep=4"

    options: dict[str, Any] = {"name": "tiled", "batch": 3, "max_new_tokens": 2}
    lines = answer_folder(tiled, processor, task, everyone, out=tmp_path / "run", leave_out=leave_out, **options)
    assert told.keys() == {"pool:keep=4"} and "needs the whole grid of the image" in told["pool:keep=4"]
    rows = folder_rows.rows(lines, task, batch=3, beside=beside)
    assert [row["method"] for row in rows] == ["none", "fopru:keep=4", "random:keep=4", "uniform:keep=4"]
    assert rows[1]["against"].keys() == {"none", "random:keep=4", "uniform:keep=4"}
    with pytest.raises(FoveateError, match="needs the whole grid"):
        answer_folder(tiled, processor, task, parse_rivals(["pool:keep=4"]), out=tmp_path / "other", **options)


def test_the_first_process_leaves_out_what_another_does() -> None:
    told: list[str] = []
    left = LeftOut(lambda spec, why: told.append(spec) is None, {"tome": "own"})
    left.share(SimpleNamespace(gathered=lambda own: [*own, ("pool", "theirs")]))  # type: ignore[arg-type]
    assert told == ["pool"] and left.why == {"tome": "own", "pool": "theirs"}
    assert left.tried("pool", lambda: pytest.fail("it was asked")) == []


KILLED = """
import os, sys
from foveate.cli import main
from foveate.evaluate import folder_run
append, count = folder_run.append_line, [0]
def killed(path, line):
    append(path, line)
    count[0] += 1
    if count[0] == 3:
        with path.open("ab") as file:
            file.write(line.encode()[:20])
        os.kill(os.getpid(), 9)
folder_run.append_line = killed
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_command_is_resumed(task: Folder, folder: Path, tmp_path: Path) -> None:
    """In a process of its own, killed while it writes: the rows are those of a run that was never stopped."""
    options = ["eval", "--model", str(folder), "--tasks", str(task.path), "--prune", "fopru:keep=4", "--batch", "3"]
    options += ["--device", "cpu", "--max-new-tokens", "4", "--timed", "0", "--pictures", "1", "--out"]
    from foveate.cli import main

    assert main([*options, str(tmp_path / "whole")]) == 0
    command = [sys.executable, "-c", KILLED, *options, str(tmp_path / "killed")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert len((tmp_path / "killed" / "answers.jsonl").read_text().splitlines()) == 4
    assert main([*options, str(tmp_path / "killed")]) == 2
    assert main([*options, str(tmp_path / "killed"), "--resume"]) == 0
    for name in ("rows.json", "rows.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
