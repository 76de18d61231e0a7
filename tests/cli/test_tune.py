"""`foveate tune`: a file that --prune takes, with its evidence, for scenes and for a folder; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.evaluate import results
from foveate.spec import parse_stages


@pytest.fixture
def tune(call: Any, folder: Path, tmp_path: Path) -> Any:
    fixed = ("--model", folder, "--device", "cpu", "--out", tmp_path / "best.json")
    return lambda *options: call("tune", *fixed, *options)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """27 questions about three pictures."""
    place = tmp_path / "task"
    place.mkdir()
    for number in range(3):
        Image.effect_noise((24, 24), 40 + 30 * number).convert("RGB").save(place / f"{number}.png")
    rows = [
        {"image": f"{number % 3}.png", "question": f"w{3 + number % 7} ?", "answers": ["w5"], "type": "anls"}
        for number in range(27)
    ]
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_scenes_make_a_file_that_prune_takes(tune: Any, call: Any, folder: Path, tmp_path: Path) -> None:
    specs = ("--prune", "fopru:keep=0.5", "--prune", "random:keep=0.5")
    result = tune("--task", "scenes", "--samples", 16, "--max-drop", 50, "--seed", 3, *specs)
    assert result.code == 0
    stored = json.loads((tmp_path / "best.json").read_text())
    (stage,) = parse_stages(f"@{tmp_path / 'best.json'}")
    assert stored["prune"] in {row["spec"] for row in stored["rows"]} and stage.keep < 0.5  # type: ignore[attr-defined]
    chosen = next(row for row in stored["rows"] if row["spec"] == stored["prune"])
    assert chosen["fresh"]["mean"] >= -0.5 and chosen["questions"] == 16
    assert stored["prune"] in result.err and stored["command"].startswith("foveate")
    rows = tmp_path / "rows.json"
    asked = ("--model", folder, "--tasks", "scenes", "--device", "cpu", "--timed", 0, "--samples", 16, "--seed", 7)
    again = call("eval", *asked, "--prune", f"@{tmp_path / 'best.json'}", "--json", rows)
    assert again.code == 0 and stored["prune"] in results.rows_of(results.read(rows))


def test_a_folder_is_shared_out_and_a_search_goes_on(tune: Any, questions: Path, tmp_path: Path) -> None:
    options = ("--task", questions, "--max-drop", 90, "--prune", "uniform:keep=0.5", "--max-new-tokens", 2)
    assert tune(*options).code == 0
    found = json.loads((tmp_path / "best.json").read_text())
    written = sorted((tmp_path / "best.json.run").rglob("answers.jsonl"))
    assert max(row["questions"] for row in found["rows"]) == 18
    again = tune(*options)
    assert again.code == 2 and "holds a search already; go on with it by --resume" in again.err
    written[-1].write_bytes(b"")  # as a kill leaves it
    before = {file: file.read_bytes() for file in written[:-1]}
    assert tune(*options, "--resume").code == 0
    assert {file: file.read_bytes() for file in written[:-1]} == before
    rest = {
        name: value for name, value in json.loads((tmp_path / "best.json").read_text()).items() if name != "command"
    }
    assert rest == {name: value for name, value in found.items() if name != "command"}


def test_a_tuned_model_is_searched_where_any_spec_may_prune_it(tune: Any, adapter: Path, tmp_path: Path) -> None:
    given = ("--task", "scenes", "--samples", 16, "--max-drop", 50, "--prune", "fopru:keep=0.5", "--adapter", adapter)
    refused = tune(*given)
    assert refused.code == 2 and "was tuned under fopru:keep=9, and a search prunes it by others" in refused.err
    assert tune(*given, "--any-spec").code == 0
    assert json.loads((tmp_path / "best.json").read_text())["adapter"] == str(adapter)


@pytest.mark.parametrize(
    "command",
    [
        ("tune", "--model", "no", "--task", "scenes", "--out", "best.json"),
        ("reproduce", "fopru-table2", "--model", "no", "--tasks", "scenes"),
        ("bench", "no"),
    ],
)
def test_what_one_process_does_is_not_begun_by_several(
    call: Any, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = call(*command)
    assert result.code == 2
    assert f"foveate {command[0]} works in one process, and 2 were started; start it without torchrun" in result.err


def test_nothing_within_the_drop_is_said_and_nothing_written(tune: Any, tmp_path: Path) -> None:
    result = tune("--task", "scenes", "--samples", 16, "--max-cost", 0.001, "--prune", "random:keep=0.5")
    assert result.code == 1 and "no spec that was tried holds within 1 points" in result.err
    assert not (tmp_path / "best.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "scenes", "--max-drop", -1), "--max-drop -1 is no number of points from 0 to 100"),
        (("--task", "scenes", "--max-cost", 2), "--max-cost 2 is no share of the unpruned prefill"),
        (("--task", "scenes", "--samples", 4), "4 questions are too few to tune by; the fewest is 16"),
        (("--task", "scenes", "--resume"), "--resume is of a folder of questions"),
        (("--task", "scenes", "--prune", "fopruu:keep=4"), "unknown method 'fopruu'"),
        (("--task", "scenes", "--prune", "pixelprune"), "pixelprune has no budget to tune"),
        (("--task", "sceness"), "sceness"),
        ((), "Missing option '--task'"),
    ],
)
def test_refusals_before_a_model_is_loaded(tune: Any, options: tuple[Any, ...], message: str) -> None:
    result = tune(*options)
    assert result.code == 2 and message in result.err
