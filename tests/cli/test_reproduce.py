"""`foveate reproduce`: cells that are computed and measured, what is said to be missing, and runs that go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.evaluate import scenes_task
from foveate.reproduce import tables


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """POPE and TextVQA with two questions each; the answers are nonsense, as the model's are."""
    for name, kind, count in (("pope", "pope", 1), ("textvqa", "vqa", 4)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        Image.effect_noise((40, 40), 70).convert("RGB").save(folder / "a.png")
        ask = {"image": "a.png", "question": "is it ?", "answers": ["yes"] * count, "type": kind, "group": "random"}
        lines = [ask, {**ask, "answers": ["no"] * count, "group": "popular"}]
        (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "data"


def cells(text: str, column: str) -> dict[str, str]:
    """How each row's cell of a column came about, by the row; from a file that was written."""
    return {row["row"]: row["how"] for row in json.loads(text)["rows"] if row["column"] == column}


def test_every_table_is_listed(call: Any) -> None:
    listed = call("reproduce")
    assert listed.code == 0
    assert [line.split()[0] for line in listed.out.splitlines()[1:]] == list(tables.names())


@pytest.mark.parametrize("name", tables.names())
def test_a_dry_run_needs_nothing(call: Any, name: str) -> None:
    result = call("reproduce", name, "--dry-run")
    assert (result.code, result.err) == (0, "")
    last = result.out.splitlines()[-1]
    assert "hours of one a100-40gb by the cost model" in last or last == "Nothing to run: every cell is computed."


def test_a_dry_run_names_what_is_trained_and_asked(call: Any) -> None:
    lines = call("reproduce", "lvpruning-table1", "--dry-run", "--samples", 100, "--data", ".").out.splitlines()
    assert lines[1].startswith("foveate train lvpruning --out runs/lvpruning --model llava-hf/llava-1.5-7b-hf")
    assert "--tasks ./vqav2" in lines[2] and "from=runs/lvpruning/lvpruning" in lines[2]
    assert "# 100 questions, " in lines[2]
    given = ("--weights", "lvpruning=modules", "--model", "folder")
    lines = call("reproduce", "lvpruning-table1", "--dry-run", *given).out.splitlines()
    assert (
        "--model folder" in lines[1] and "from=modules" in lines[1] and not any("train" in line for line in lines[1:-1])
    )


def test_a_dry_run_tunes_what_a_row_was_tuned_to(call: Any) -> None:
    lines = call("reproduce", "interaction-table3", "--dry-run", "--data", ".").out.splitlines()
    tune = next(line for line in lines if line.startswith("foveate train finetune"))
    assert "--prune image_text_interaction --model llava-hf/llava-1.5-7b-hf --dtype bfloat16 --data" in tune
    assert any("--adapter runs/image_text_interaction/adapter --tasks" in line for line in lines)


def test_cells_say_what_is_missing(call: Any) -> None:
    """Without data and weights what arithmetic gives is there, and of all else what to provide."""
    text = call("reproduce", "lvpruning-table2").out
    assert "LLaVA-1.5-7B: llava-hf/llava-1.5-7b-hf" in text
    assert "give --weights lvpruning=FOLDER, which foveate train lvpruning makes; give --data: no DATA/pope/" in text
    judged = call("reproduce", "interaction-table5").out
    assert "the paper quotes it" in judged
    assert "give --adapter crossget=FOLDER, which foveate train finetune --prune crossget makes" in judged
    computed = call("reproduce", "lvpruning-fig4").out
    assert computed.count("computed") == 4 and "8.381" in computed


def test_data_that_is_there_is_measured_and_gone_on_with(
    call: Any, folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    options = ("reproduce", "interaction-table2", "--model", folder, "--data", data, "--device", "cpu", "--out", out)
    result = call(*options)
    assert result.code == 0, result.err
    text = (out / "interaction-table2.json").read_text()
    assert set(cells(text, "POPE").values()) == set(cells(text, "TextVQA tokens").values()) == {"measured"}
    assert all("no " in how and "mme/questions.jsonl" in how for how in cells(text, "MME").values())
    stored = json.loads(text)["rows"]
    tokens = {row["row"]: row["here"] for row in stored if row["column"] == "POPE tokens"}
    assert tokens["Visual"] == tokens["Visual + Text"], "the cache's budget takes no visual token"
    assert "already holds a run" in call(*options).err
    answers = out / "llava-1.5-7b" / "pope" / "answers.jsonl"
    answers.write_text(answers.read_text()[:-20])  # a kill
    again = call(*options, "--resume")
    assert again.code == 0 and (out / "interaction-table2.json").read_text().count("measured") == text.count("measured")


def test_scenes_show_the_shape_of_any_table(
    call: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables share a folder: what one has measured the next has too, and a row cut short is measured anew."""
    out = tmp_path / "out"
    options = ("--model", folder, "--tasks", "scenes", "--samples", 2, "--device", "cpu", "--out", out)
    assert call("reproduce", "fopru-fig6", *options).code == 0
    stored = json.loads((out / "fopru-fig6.json").read_text())["rows"]
    assert len(stored) == 21
    base, best = stored[7], stored[11]
    assert base["row"] == "LLaVA-1.6-7B base" and base["share"] in (1.0, None) and base["tokens"] > best["tokens"]
    assert base["paper_share"] == 1 and best["paper"]["MMMU"] == pytest.approx(106.35)
    rows = out / "scenes" / "rows.jsonl"
    whole = rows.read_text()
    rows.write_text(whole[:-30])
    monkeypatch.setattr("foveate.reproduce.shape.scenes_task.evaluate", lambda *_, **__: pytest.fail("asked again"))
    shared = call("reproduce", "fopru-fig7", *options, "--resume")
    assert shared.code == 0 and "paper, of unpruned" in shared.out
    monkeypatch.undo()
    again = call("reproduce", "fopru-fig6", *options, "--resume")
    assert again.code == 0 and rows.read_text() == whole
    refused = call("reproduce", "fopru-fig7", *options[:-4], "--seed", 5, *options[-4:], "--resume")
    assert refused.code == 1 and "was begun with" in refused.err


def test_a_tuned_row_is_a_share_of_the_model_before_tuning(
    call: Any, folder: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.5 and 0.6 of 0.8, though the tuned model reaches 0.7 without pruning."""
    spec, tuned, out = "image_text_interaction", tmp_path / "tuned", tmp_path / "out"
    record = json.loads((shutil.copytree(adapter, tuned) / "foveate.json").read_text())
    (tuned / "foveate.json").write_text(json.dumps({**record, "prune": spec}))
    monkeypatch.setattr(
        "foveate.reproduce.shape._answers",
        lambda loaded, rivals, asked, given, progress: {
            "none": {"accuracy": 0.7 if given else 0.8},
            spec: {"accuracy": 0.6 if given else 0.5},
        },
    )
    options = ("--model", folder, "--tasks", "scenes", "--device", "cpu", "--out", out, "--adapter", f"{spec}={tuned}")
    assert call("reproduce", "interaction-table3", *options).code == 0
    stored = json.loads((out / "interaction-table3.json").read_text())["rows"]
    assert {row["row"]: row["share"] for row in stored} == {"Training-Free": 0.625, "Fine-tuning": pytest.approx(0.75)}


def test_times_are_taken_in_turn(call: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every row, against the unpruned one; nothing is asserted of how long anything took."""
    monkeypatch.setattr("foveate.reproduce.speeds.ANSWER", 2)
    options = ("--model", folder, "--tasks", "scenes", "--samples", 1, "--device", "cpu")
    result = call("reproduce", "fopru-table5", *options)
    assert result.code == 0 and "TTFT x" in result.out
    assert "TTFT x" not in call("reproduce", "fopru-table5", *options, "--no-times").out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("fopru-table7",), "unknown table 'fopru-table7'"),
        (("fopru-table2", "--tasks", "pope"), "--tasks pope is not known here"),
        (("fopru-table2", "--tasks", "scenes"), "write --model mini"),
        (("fopru-table1", "--model", "mini"), "stands for none of LLaVA-NeXT-8B, LLaVA-1.6-7B, LLaVA-1.6-13B"),
        (("fopru-table1", "--model", "LLaVA-9=mini"), "fopru-table1 has no model 'LLaVA-9'"),
        (("fopru-table2", "--data", "nowhere"), "--data nowhere is no folder"),
        (("fopru-table2", "--resume"), "--resume goes on with the run in --out"),
        (("fopru-table2", "--samples", "0"), "--samples 0 measures nothing"),
        (("lvpruning-table1", "--weights", "fopru=x"), "--weights: the table needs none of 'fopru'"),
        (("lvpruning-table1", "--weights", "x"), "write --weights NAME=FOLDER"),
        (("interaction-table3", "--adapter", "fopru=x"), "--adapter: the table needs none of 'fopru'"),
        (("interaction-table3", "--adapter", "image_text_interaction=x"), "x holds no foveate.json; give the folder"),
        (("fopru-table2", "--dry-run", "--hardware", "abacus"), "abacus"),
    ],
)
def test_wrong_usage_is_refused_before_a_model_is_loaded(
    call: Any, options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.inference.loading.load", lambda *_, **__: pytest.fail("loaded"))
    result = call("reproduce", *options)
    assert result.code == 2 and message in result.err


def test_scenes_are_asked_as_eval_asks_them(call: Any, folder: Path, tmp_path: Path) -> None:
    from foveate.inference.loading import load

    loaded = load(str(folder), device="cpu")
    (expected,) = [
        row.to_dict()
        for row in scenes_task.evaluate(loaded.model, loaded.processor, ["pool:keep=0.25,space=encoded"], samples=3)
        if row.method != "none"
    ]
    out = tmp_path / "out"
    options = ("--model", folder, "--tasks", "scenes", "--samples", 3, "--device", "cpu", "--out", out)
    assert call("reproduce", "fopru-table3", *options).code == 0
    rows = {row["row"]: row for row in json.loads((out / "fopru-table3.json").read_text())["rows"]}
    found = rows["w/o Significance"]
    assert {name: found[name] for name in ("accuracy", "tokens", "prefill_flops_share")} == {
        name: expected[name] for name in ("accuracy", "tokens", "prefill_flops_share")
    }
