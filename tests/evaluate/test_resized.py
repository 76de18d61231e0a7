"""Pictures scaled down as a rival of methods that prune: in every kind of evaluation, in `run`, and in `bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny, tiny_processors
from PIL import Image

from foveate.cli import run
from foveate.core import FoveateError
from foveate.evaluate import folder_rows
from foveate.evaluate.bench import Setting, measure
from foveate.evaluate.bench_model import random_inputs, random_model
from foveate.evaluate.folder_run import answer_folder, sizes_of
from foveate.evaluate.local_task import Folder, read
from foveate.evaluate.looks import Shown, looks
from foveate.evaluate.scenes_task import evaluate, parse_rivals
from foveate.evaluate.times import answer_times
from foveate.evaluate.unpruned import unpruned_budget
from foveate.inference.answers import answer, encode
from foveate.inference.loading import Loaded
from foveate.inference.pictures import load_image, upright_size
from foveate.inference.resizing import Scaler
from foveate.methods.resize import Resize

HALF = "resize:keep=0.6"


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded("tiny", tiny.model("qwen2.5-vl"), tiny_processors.PROCESSORS["qwen2.5-vl"]())


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Three questions about two pictures, the second of which lies on its side."""
    folder = tmp_path_factory.mktemp("task")
    Image.effect_noise((44, 30), 60).convert("RGB").save(folder / "a.png")
    turned, exif = Image.effect_noise((60, 24), 90).convert("RGB"), Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "b.jpg", exif=exif)
    lines = [
        {"image": "a.png", "question": "w7 w8", "answers": ["w3"], "type": "exact"},
        {"image": "b.jpg", "question": "w9", "answers": ["w4"], "type": "exact"},
        {"image": "b.jpg", "question": "w7 w9 w8", "answers": ["w4"], "type": "exact"},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read(folder)


def test_scenes(loaded: Loaded) -> None:
    """Costs are those that a trace counts."""
    rows = evaluate(loaded.model, loaded.processor, [HALF, "random:keep=0.6"], samples=3, batch=1)
    none, small, random = rows
    whole = none.tokens[0]
    scaler = Scaler(loaded.model, loaded.processor, Resize(keep=0.6))
    left = scaler.tokens(scaler.size((336, 336)))
    assert left < whole and left <= round(0.6 * whole)
    assert small.tokens == [left] * 3 and small.equivalent == [left] * 3
    assert [sum(map(len, row.scores.values())) for row in rows] == [3, 3, 3]
    assert 0 < small.prefill_flops < random.prefill_flops, "the encoder sees less too"
    assert small.unpruned_flops == random.unpruned_flops and small.unpruned_bytes == random.unpruned_bytes
    assert 0 < small.kv_bytes < small.unpruned_bytes
    layers = len(loaded.model.model.language_model.layers)
    assert small.to_dict()["layers"] == [left] * layers and none.to_dict()["layers"] == [whole] * layers


def test_a_folder(loaded: Loaded, task: Folder, tmp_path: Path) -> None:
    assert sizes_of(task) == ((44, 30), (24, 60))
    model, processor = loaded.model, loaded.processor
    everyone, beside, missing = folder_rows.with_baselines(model, processor, parse_rivals(["fopru:keep=0.6"]), task)
    assert beside == {"fopru:keep=0.6": ["random:keep=0.6", "uniform:keep=0.6", "pool:keep=0.6", HALF]}
    assert missing == {}
    some = {name: everyone[name] for name in ("none", HALF)}
    options: dict[str, Any] = {"name": "tiny", "batch": 2, "max_new_tokens": 3}
    lines = answer_folder(model, processor, task, some, out=tmp_path / "run", **options)
    scaler = Scaler(model, processor, Resize(keep=0.6))
    pictures = [scaler.scaled(load_image(task.path / question.image)) for question in task.questions]
    words = [question.prompt for question in task.questions]
    small = [line for line in lines if line.rival == HALF]
    assert [text for line in small for text in line.answers] == [
        answer(model, processor, [picture], [text], max_new_tokens=3)[0]
        for picture, text in zip(pictures, words, strict=True)
    ]
    assert [count for line in small for count in line.tokens] == [scaler.tokens(one.size) for one in pictures]
    single = [encode(model, processor, [[one]], [text]) for one, text in zip(pictures, words, strict=True)]
    costs = [unpruned_budget(model, inputs, 1) for inputs in single]
    layers = len(model.model.language_model.layers)
    assert all(line.layers == [sum(line.tokens) / len(line.tokens)] * layers for line in small)
    assert sum(line.flops[0] for line in small) == pytest.approx(sum(cost.prefill_flops for cost in costs))
    assert sum(line.bytes[0] for line in small) == sum(cost.kv_bytes for cost in costs)
    rows = folder_rows.rows(lines, task, batch=2, beside=beside)
    assert [row["method"] for row in rows] == ["none", HALF]
    assert 0 < rows[1]["prefill_flops_share"] < 1 and 0 < rows[1]["kv_bytes_share"] < 1


def test_a_folder_with_a_picture_that_cannot_be_so_small(loaded: Loaded, task: Folder, tmp_path: Path) -> None:
    """Said before any answer; as a baseline it is left out, with the reason."""
    model, processor = loaded.model, loaded.processor
    rivals = parse_rivals(["resize:keep=1"])
    with pytest.raises(FoveateError, match="resize:keep=1 allows 1 tokens of a picture of 44 x 30 pixels"):
        answer_folder(model, processor, task, rivals, name="tiny", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    missing = folder_rows.with_baselines(model, processor, parse_rivals(["fopru:keep=1"]), task)[2]
    assert missing.keys() == {"resize:keep=1"}


def test_the_size_of_a_picture_that_lies_on_its_side(task: Folder) -> None:
    for name in ("a.png", "b.jpg"):
        assert upright_size(task.path / name) == load_image(task.path / name).size


def test_run_says_what_a_smaller_picture_saves(loaded: Loaded) -> None:
    pictures = [Image.effect_noise(size, 90).convert("RGB") for size in ((44, 30), (30, 44))]
    report, trace = run._answer(loaded, pictures, "w7", (Resize(keep=0.6),), 3, None)
    assert trace is None and report["prune"] == HALF and report["choosing_ms"] is None
    scaler = Scaler(loaded.model, loaded.processor, Resize(keep=0.6))
    first = scaler.size((44, 30))
    assert report["images"][0]["size"] == [*first]
    before, after = scaler.tokens((44, 30)), scaler.tokens(first)
    assert report["images"][0]["tokens"] == {"before": before, "stages": [after], "after": after}
    assert report["tokens"]["before"] == 2 * before
    for name in ("prefill_flops", "kv_bytes"):
        assert 0 < report[name]["after"] < report[name]["before"]
    small = [scaler.scaled(picture) for picture in pictures]
    plain = run._answer(loaded, small, "w7", (), 3, None)[0]
    assert report["answer"] == plain["answer"]


def test_bench_times_the_smaller_picture() -> None:
    """Of 32 x 32 tokens a quarter is 16 x 16."""
    model = random_model("qwen2.5-vl-3b", layers=2, seed=1, dtype=torch.float32)
    given = random_inputs(model, text=6, keep=0.25)
    assert given["image_grid_thw"].tolist() == [[1, 32, 32]] and given["pixel_values"].shape[0] == 32 * 32
    rivals = [[Resize(keep=0.25)]]
    plain, small = measure(
        model,
        random_inputs(model, text=6),
        rivals,
        Setting(1, 1, 0),
        hardware="h200",
        smaller=lambda method: random_inputs(model, text=6, keep=method.keep),
    )
    assert (plain.tokens, small.tokens) == (1024, 256)
    assert (small.prune, small.choosing_ms) == ("resize:keep=0.25", None)
    assert small.kv_bytes * (1024 + 6) == plain.kv_bytes * (256 + 6)
    assert small.predicted is not None and plain.predicted is not None
    assert small.predicted.fused_ms < plain.predicted.fused_ms


def test_times_and_pictures_of_a_report(loaded: Loaded) -> None:
    """The answer is the one about the smaller picture, which the timed prompts are about too."""
    model, processor, picture = loaded.model, loaded.processor, Image.effect_noise((44, 30), 90).convert("RGB")
    rivals = parse_rivals([HALF])
    scaler = Scaler(model, processor, Resize(keep=0.6))
    small = scaler.scaled(picture)
    (found,) = looks(model, processor, [Shown(picture, "w7 w8", "w3")], rivals, max_new_tokens=3)
    counts = {"before": scaler.tokens((44, 30)), "after": scaler.tokens(small.size)}
    assert found["rivals"][HALF] == {
        "answer": answer(model, processor, [small], ["w7 w8"], max_new_tokens=3)[0],
        "stages": [],
        "scaled": {"size": [*small.size], **counts},
    }
    assert "scaled" not in found["rivals"]["none"]
    lengths = []
    watch = model.model.language_model.register_forward_pre_hook(
        lambda module, given, named: lengths.append(named["inputs_embeds"].shape[1]), with_kwargs=True
    )
    times = answer_times(model, processor, [(picture, "w7 w8")], rivals, max_new_tokens=1)
    watch.remove()
    assert all(0 < one["first_token_ms"] <= one["whole_ms"] for one in times.values())
    asked = [encode(model, processor, [[one]], ["w7 w8"])["input_ids"].shape[1] for one in (picture, small)]
    assert set(lengths) == {*asked} and asked[0] - asked[1] == counts["before"] - counts["after"] > 0
