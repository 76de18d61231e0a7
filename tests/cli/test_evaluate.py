"""`foveate eval`: the table, its file, and settings that are refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import tiny
from PIL import Image

from foveate import methods
from foveate.core import FoveateError
from foveate.evaluate.catalogue import at, describe


@pytest.fixture
def evaluate(call: Any, folder: Path) -> Any:
    fixed = ("--model", folder, "--tasks", "scenes", "--device", "cpu", "--timed", 0)
    return lambda *options: call("eval", *fixed, *options)


def test_the_unpruned_row_comes_first(evaluate: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    options = ("--samples", 5, "--batch", 2, "--seed", 3, "--json", file, "--ceiling")
    result = evaluate("--prune", "random:keep=4", "--prune", "pool", *options)
    assert (result.code, result.err) == (0, "")
    header, *lines = result.out.splitlines()
    assert header.split()[:2] == ["method", "all"]
    assert [line.split()[0] for line in lines] == ["none", "random:keep=4", "pool:keep=0.25", "ceiling"]
    stored = json.loads(file.read_text())
    assert {key: stored[key] for key in ("task", "samples", "seed")} == {"task": "scenes", "samples": 5, "seed": 3}
    assert [row["tokens"] for row in stored["rows"]][:3] == [tiny.TOKENS, 4, tiny.TOKENS // 4]
    assert stored["rows"][0].keys() == {
        "method", "accuracy", "interval", "existence", "color", "digit", "count", "describe",
        "tokens", "equivalent_tokens", "layers", "prefill_flops_share", "kv_bytes_share", "samples",
    }  # fmt: skip


def test_objects_can_be_stamped_on_pages(evaluate: Any, tmp_path: Path) -> None:
    """The file says of which pictures its rows are, so that rows of others are not put into it."""
    files = [tmp_path / name for name in ("photos.json", "pages.json", "jpeg.json")]
    for file, options in zip(files, ((), ("--pages",), ("--pages", "--jpeg", 75)), strict=True):
        result = evaluate("--prune", "pixelprune", "--samples", 2, "--json", file, *options)
        assert (result.code, result.err) == (0, "")
    stored = [json.loads(file.read_text()) for file in files]
    assert len({one["data"] for one in stored}) == 3
    photos, pages, _ = (one["rows"][1] for one in stored)
    assert photos["method"] == "pixelprune" and pages["tokens"] < photos["tokens"] <= tiny.TOKENS
    refused = evaluate("--jpeg", 75)
    assert refused.code == 2 and "--jpeg 75 is about pages; give --pages with it" in refused.err


def test_every_method_is_asked_at_every_budget(evaluate: Any, tmp_path: Path) -> None:
    """Those that cannot reach one, or miss something, are named with the reason; those on the cache are left out."""
    file = tmp_path / "rows.json"
    result = evaluate("--every", "9/40", "--samples", 2, "--json", file)
    assert result.code == 0
    stored = json.loads(file.read_text())
    assert stored["every"] == [9, 40] and stored["command"].startswith("foveate")
    reached = {row["method"] for row in stored["rows"]}
    assert {"fopru:keep=9", "divprune:keep=9", "pyramiddrop:keep=9/9/9"} <= reached
    why = {entry["method"]: entry for entry in stored["unreached"] if 9 in entry["keep"]}
    assert "give clip=" in why["cdpruner"]["why"] and why["cdpruner"]["keep"] == [9]
    assert any(entry["method"] == "fopru" and entry["keep"] == [40] for entry in stored["unreached"])
    missing = {entry["method"] for entry in stored["unreached"]} | {row.partition(":")[0] for row in reached}
    on_the_cache = {name for name in methods.names() if describe(name)["site"] == "cache"}
    assert missing == {*methods.names(), "none"} - on_the_cache
    assert all(row["tokens"] == 9 for row in stored["rows"] if row["method"] != "none")


def test_rows_are_put_into_a_file(call: Any, evaluate: Any, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert evaluate("--samples", 3, "--seed", 2, "--prune", "random:keep=4", "--json", file).code == 0
    before = json.loads(file.read_text())
    assert len(before["data"]) == 64
    more = ("eval", "--append", file, "--device", "cpu")
    result = call(*more, "--prune", "uniform:keep=9")
    assert (result.code, result.err) == (0, "")
    assert [line.split()[0] for line in result.out.splitlines()[1:]] == ["none", "uniform:keep=9"]
    after = json.loads(file.read_text())
    assert after["rows"][:2] == before["rows"] and after["rows"][2]["tokens"] == 9 and len(after["rows"]) == 3
    assert {name: after[name] for name in ("model", "task", "samples", "seed", "data")} == {
        name: before[name] for name in ("model", "task", "samples", "seed", "data")
    }
    after["rows"][2]["accuracy"] = 2.0
    file.write_text(json.dumps(after))
    said = call(*more, "--prune", "uniform:keep=9").err
    # A long path is broken where the line ends.
    assert f"{file}: the row of uniform:keep=9 gave way to this one".replace(" ", "") in "".join(said.split())
    assert json.loads(file.read_text())["rows"][2]["accuracy"] <= 1


def test_of_every_method_only_what_is_missing_is_measured(call: Any, evaluate: Any, tmp_path: Path) -> None:
    """The file has rows of all methods but two, and says of one that it cannot be reached, which is not so."""
    file = tmp_path / "rows.json"
    assert evaluate("--samples", 1, "--json", file).code == 0
    stored = json.loads(file.read_text())
    names = [name for name in methods.names() if describe(name)["site"] != "cache" and name not in ("fopru", "pool")]
    there = []
    for name in names:
        try:
            there.append({**stored["rows"][0], "method": str(at(name, 9, tiny.TOKENS))})
        except FoveateError:
            continue
    unreached = [{"method": "pool", "keep": [9], "why": "it was another version"}]
    file.write_text(json.dumps({**stored, "rows": [*stored["rows"], *there], "every": [9], "unreached": unreached}))
    result = call("eval", "--append", file, "--every", "9", "--device", "cpu", "--timed", 0)
    assert [line.split()[0] for line in result.out.splitlines()[1:]] == ["none", "fopru:keep=9", "pool:keep=9"]
    found = json.loads(file.read_text())
    assert [row["method"] for row in found["rows"][len(there) + 1 :]] == ["fopru:keep=9", "pool:keep=9"]
    assert "cdpruner" in {entry["method"] for entry in found["unreached"]}
    assert "pool" not in {entry["method"] for entry in found["unreached"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--append", "{file}"], "--append adds rows, and no --prune, --every or --ceiling asks for one"),
        (["--append", "{file}", "--seed", "4", "--prune", "pool"], "was measured with seed=0, not 4"),
        (["--append", "{file}", "--model", "other", "--prune", "pool"], "was measured with model='no', not 'other'"),
        (["--append", "{file}", "--every", "9"], "holds no column of 9 tokens"),
        (["--append", "{file}", "--prune", "pool"], "its questions were drawn by another version"),
        (["--append", "{file}", "--json", "{file}", "--prune", "pool"], "give one of them"),
        (["--append", "gone.json", "--prune", "pool"], "gone.json cannot be read"),
        (["--tasks", "scenes"], "Missing option '--model'; such as --model mini"),
        (["--model", "mini"], "Missing option '--tasks'; such as --tasks scenes"),
    ],
)
def test_rows_that_do_not_belong_are_refused_before_a_model_is_loaded(
    call: Any, tmp_path: Path, options: list[str], message: str
) -> None:
    file = tmp_path / "rows.json"
    head = {"command": "", "model": "no", "task": "scenes", "samples": 1, "seed": 0, "data": "older"}
    file.write_text(json.dumps({**head, "rows": [{"method": "none"}]}))
    result = call("eval", *[option.format(file=file) for option in options])
    assert (result.code, result.out) == (2, "")
    assert message in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "samples=0 measures nothing; the smallest is samples=1"),
        (["--batch", "0"], "batch=0 measures nothing"),
        (["--seed", "-1"], "seed=-1 is outside"),
        (["--prune", "fopru:keep=1.5"], "keep=1.5 is no share in (0, 1]"),
        (["--every", "64,32"], "--every '64,32' is no list of token counts; write 144/64/32/16"),
        (["--tasks", "scene"], "unknown task 'scene'; did you mean 'scenes'?"),
        (["--json", "rows.csv"], "rows.csv ends in '.csv'; the choices are .json"),
        (["--json", "no/where.json"], "there is no folder no"),
    ],
)
def test_wrong_settings_are_refused_before_work(evaluate: Any, options: list[str], message: str) -> None:
    result = evaluate(*options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


@pytest.mark.slow
def test_mini_beats_chance(call: Any) -> None:
    result = call("eval", "--model", "mini", "--tasks", "scenes", "--samples", 5, "--dtype", "float32")
    assert result.code == 0
    assert float(result.out.splitlines()[1].split()[1].rstrip("%")) >= 60


# ---------------------------------------------------------------------------------------------------------------------
# a folder of questions


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Two questions about one picture."""
    task = tmp_path / "task"
    task.mkdir()
    Image.effect_noise((40, 40), 60).convert("RGB").save(task / "a.png")
    lines = [
        {"image": "a.png", "question": "is it ?", "answers": ["yes"], "type": "pope"},
        {"image": "a.png", "question": "which ?", "answers": ["B"], "type": "circular", "options": ["u", "v"]},
    ]
    (task / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return task


def test_a_folder_is_evaluated_with_the_baselines(call: Any, folder: Path, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = call("eval", "--model", folder, "--tasks", questions, "--prune", "fopru:keep=4", "--out", out)
    assert result.code == 0
    assert result.err.startswith("resize:keep=4: - (resize:keep=4 scales the picture down, and the processor")
    rivals = ["none", "fopru:keep=4", "random:keep=4", "uniform:keep=4", "pool:keep=4"]
    assert [line.split()[0] for line in result.out.splitlines()[1:]] == rivals
    stored = json.loads((out / "rows.json").read_text())
    assert [row["method"] for row in stored["rows"]] == rivals
    assert stored["rows"][1]["against"].keys() == {"none", "random:keep=4", "uniform:keep=4", "pool:keep=4"}
    assert stored["questions"] == stored["rows"][0]["questions"] == 2
    text = (out / "rows.md").read_text()
    assert "## pope" in text and "## circular" in text and "| fopru:keep=4 |" in text and "yes_ratio" in text
    assert len((out / "answers.jsonl").read_text().splitlines()) == 5, "one batch of each"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Missing option '--out'; a folder of questions needs both"),
        (["--out", "{out}", "--seed", "3"], "--seed is of --tasks scenes"),
        (["--out", "{out}", "--every", "9"], "--every is of --tasks scenes"),
        (["--out", "{out}", "--samples", "0"], "--samples 0 measures nothing"),
        (["--out", "{out}", "--max-new-tokens", "0"], "--max-new-tokens 0 measures nothing"),
        (["--out", "{out}", "--prune", "fopru:keep=1.5"], "keep=1.5 is no share in (0, 1]"),
        (["--out", "{out}", "--resume"], "holds no run to go on with"),
    ],
)
def test_wrong_settings_of_a_folder_are_refused(
    call: Any, questions: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    written = [option.format(out=tmp_path / "run") for option in options]
    result = call("eval", "--model", "no", "--tasks", questions, *written)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_bad_lines_are_named_before_a_model_is_loaded(call: Any, questions: Path, tmp_path: Path) -> None:
    with (questions / "questions.jsonl").open("a") as file:
        file.write('{"image": "gone.png", "question": "?", "answers": ["a"], "type": "exact"}\n{\n')
    result = call("eval", "--model", "no", "--tasks", questions, "--out", tmp_path / "run")
    assert result.code == 2
    assert "line 3: there is no picture 'gone.png'" in result.err and "line 4: it is no JSON" in result.err
    assert not (tmp_path / "run").exists()


def test_videos_are_refused_before_weights_are_read(
    call: Any, folder: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.evaluate.local_task.check_torchvision", lambda: None)
    monkeypatch.setattr("foveate.inference.loading._weights", lambda *given: pytest.fail("weights were read"))
    line = {"video": "clip", "fps": 2, "question": "is it ?", "answers": ["yes"], "type": "pope"}
    given = ("eval", "--tasks", questions, "--out", tmp_path / "run", "--model", folder)
    result = call(*given, "--frames", 2)
    assert result.code == 2 and "frames and fps are of videos, and these questions are about pictures" in result.err
    (questions / "clip").mkdir()
    (questions / "a.png").rename(questions / "clip" / "1.png")
    (questions / "questions.jsonl").write_text(json.dumps(line))
    for options, message in (
        ((), "LlavaProcessor reads no videos; ask about pictures"),
        (("--frames", 2, "--fps", 1), "frames=2 and fps=1 both say how many frames are shown"),
        (("--pictures", 1), "--pictures 1 are of pictures, and these questions are about videos"),
    ):
        result = call(*given, *options)
        assert result.code == 2 and message in result.err
    assert not (tmp_path / "run").exists()


def test_options_of_a_folder_are_refused_with_scenes(call: Any) -> None:
    result = call("eval", "--model", "no", "--tasks", "scenes", "--frames", 4)
    assert "--frames is of a folder of questions" in result.err
    result = call("eval", "--model", "no", "--tasks", "scenes", "--out", "runs")
    assert (result.code, result.out) == (2, "")
    assert "--out is of a folder of questions; --tasks names one" in result.err
    result = call("eval", "--model", "no", "--tasks", "no/pope", "--out", "runs")
    assert "--out is of a folder of questions" in result.err
    result = call("eval", "--model", "no", "--tasks", "no/pope")
    assert "A folder with questions.jsonl is a task too, and there is none of this name" in " ".join(result.err.split())


def test_a_tuned_model_is_asked_under_its_spec(
    call: Any, evaluate: Any, adapter: Path, task: Path, tmp_path: Path
) -> None:
    """Refused under another before a model is loaded, unless the user says so; the rows say which model they are of."""
    sizes = ("--samples", 2, "--prune", "fopru:keep=9")
    plain, tuned = tmp_path / "plain.json", tmp_path / "tuned.json"
    for file, options in ((plain, ()), (tuned, ("--adapter", adapter))):
        result = evaluate(*sizes, *options, "--json", file)
        assert (result.code, result.err) == (0, "")
    assert json.loads(tuned.read_text())["adapter"] == str(adapter) and "adapter" not in json.loads(plain.read_text())
    refused = call("eval", "--append", plain, "--adapter", adapter, "--prune", "fopru:keep=9")
    assert refused.code == 2 and f"was measured with adapter=None, not {str(adapter)!r}" in refused.err
    other = ("--model", "nowhere", "--adapter", adapter, "--prune", "none", "--prune", "fopru:keep=4")
    for tasks in (("scenes",), (task, "--out", tmp_path / "run")):
        refused = call("eval", *other, "--tasks", *tasks)
        assert refused.code == 2 and "was tuned under fopru:keep=9, not fopru:keep=4" in refused.err
        assert "(--any-spec)" in refused.err
    added = call("eval", "--append", tuned, "--any-spec", "--prune", "fopru:keep=4", "--device", "cpu", "--timed", 0)
    assert (added.code, added.err) == (0, "")
    assert [row["method"] for row in json.loads(tuned.read_text())["rows"]][1:] == ["fopru:keep=9", "fopru:keep=4"]
    for wrong, said in (("--any-spec",), "none was given (--adapter)"), (("--adapter", tmp_path), "no foveate.json"):
        refused = evaluate(*wrong)
        assert refused.code == 2 and said in refused.err


def test_a_tuned_model_answers_a_folder(call: Any, folder: Path, adapter: Path, task: Path, tmp_path: Path) -> None:
    """Baselines are other specs: they are named with the reason."""
    out = tmp_path / "run"
    given = ("--model", folder, "--device", "cpu", "--timed", 0, "--max-new-tokens", 2, "--tasks", task, "--out", out)
    result = call("eval", *given, "--adapter", adapter, "--prune", "fopru:keep=9")
    for baseline in ("random", "uniform", "pool", "resize"):
        assert f"{baseline}:keep=9: - (" in result.err
    assert "random:keep=9: - (the model's adapter was tuned under fopru:keep=9" in result.err and result.code == 0
    rows = json.loads((out / "rows.json").read_text())
    assert rows["model"] == f"{folder} with {adapter}"
    assert [row["method"] for row in rows["rows"]] == ["none", "fopru:keep=9"]
    again = call("eval", *given, "--prune", "fopru:keep=9", "--resume")
    assert again.code != 0 and "was begun with" in again.err
