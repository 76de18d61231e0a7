"""`foveate run`: answers, figures, drawings, and everything that is refused before work starts."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path
from typing import Any

import pytest
from models import tiny
from PIL import Image

from foveate.inference.pictures import load_image
from foveate.scenes import generator
from foveate.scenes.questions import questions

QUESTION = "w7 w8 w9"
KEYS = {
    "answer", "model", "prune", "question", "images", "tokens", "prefill_flops", "kv_bytes",
    "choosing_ms", "first_token_ms", "per_token_ms", "timed_runs", "device", "dtype",
}  # fmt: skip


@pytest.fixture
def ask(call: Any, folder: Path, picture: Path) -> Any:
    """Run the tiny model on one picture, with the given options."""
    return lambda *options: call("run", folder, picture, QUESTION, "--device", "cpu", "--max-new-tokens", 4, *options)


def test_the_answer_comes_first_then_what_it_took(ask: Any) -> None:
    result = ask("--prune", "fopru:keep=0.25")
    assert (result.code, result.err) == (0, "")
    answer, empty, *lines = result.out.splitlines()
    figures = dict(line.split("  ", 1) for line in lines)
    assert len(answer.split()) == 4
    assert empty == ""
    assert figures["prune"].strip() == "fopru:keep=0.25"
    assert figures["tokens"].strip() == f"{tiny.TOKENS} -> {tiny.TOKENS // 4}"
    assert list(figures)[2:] == ["prefill flops", "kv bytes", "choosing ms", "first token ms", "per token ms"]
    assert all(float(figures[name]) > 0 for name in list(figures)[4:])


def test_json_is_one_object_with_the_same_names(ask: Any) -> None:
    result = ask("--prune", "random:keep=4", "--json")
    report = json.loads(result.out)
    assert result.out.count("\n") == 1
    assert report.keys() == KEYS
    assert report["tokens"] == {"before": tiny.TOKENS, "stages": [4], "after": 4}
    assert report["images"][0]["tokens"] == report["tokens"]
    assert len(report["images"][0]["kept"]) == 4
    assert report["prune"] == "random:keep=4"
    for name in ("prefill_flops", "kv_bytes"):
        assert 0 < report[name]["after"] < report[name]["before"]
    assert (report["dtype"], report["device"], report["timed_runs"]) == ("float32", "cpu", 3)
    assert report["answer"] == ask("--prune", "random:keep=4").out.splitlines()[0]


@pytest.mark.parametrize(
    ("spec", "told", "stages"),
    [
        ("fopru:keep=0.5+fastv:layer=2,keep=0.25", "72 -> 36 -> 18", [36, 18]),
        ("pyramiddrop:layers=1/2/3,keep=18/9/4", "72 -> 36 -> 18 -> 8", [36, 18, 8]),
        ("h2o", "72", []),
    ],
)
def test_the_tokens_after_each_stage_are_told(
    call: Any, folder: Path, picture: Path, spec: str, told: str, stages: list[int]
) -> None:
    """Of both pictures together; on the cache no visual token leaves while the prompt is read."""
    asked = ("run", folder, picture, picture, QUESTION, "--max-new-tokens", 2, "--prune", spec)
    assert dict(line.split("  ", 1) for line in call(*asked).out.splitlines()[2:])["tokens"].strip() == told
    report = json.loads(call(*asked, "--json").out)
    assert report["tokens"] == {"before": 72, "stages": stages, "after": stages[-1] if stages else 72}
    for image in report["images"]:
        assert image["tokens"]["stages"] == [left // 2 for left in stages]
        assert len(image["kept"]) == image["tokens"]["after"]


@pytest.mark.parametrize("options", [(), ("--prune", "none")])
def test_without_pruning_before_is_after(ask: Any, options: tuple[str, ...]) -> None:
    report = json.loads(ask("--json", *options).out)
    assert report.keys() == KEYS
    assert report["tokens"] == {"before": tiny.TOKENS, "stages": [], "after": tiny.TOKENS}
    assert report["prefill_flops"]["before"] == report["prefill_flops"]["after"]
    assert (report["prune"], report["choosing_ms"]) == (None, None)
    pruned = json.loads(ask("--json", "--prune", "random:keep=4").out)
    assert ask(*options).out.splitlines()[3].split() == ["tokens", str(tiny.TOKENS)]
    for name in ("tokens", "prefill_flops", "kv_bytes"):
        assert report[name]["before"] == pruned[name]["before"]


def test_a_drawing_per_picture(call: Any, folder: Path, picture: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "kept.png"
    options = ("--prune", "random:keep=9", "--draw", drawn, "--max-new-tokens", 2, "--device", "cpu")
    assert call("run", folder, picture, QUESTION, *options).code == 0
    first, original = load_image(drawn), load_image(picture)
    patches = [(x, y, x + 8, y + 8) for x in range(0, 48, 8) for y in range(0, 48, 8)]
    assert sum(first.crop(patch).tobytes() == original.crop(patch).tobytes() for patch in patches) == 9
    report = json.loads(call("run", folder, picture, picture, QUESTION, *options, "--json").out)
    assert [image["drawn"] for image in report["images"]] == [str(tmp_path / f"kept-{n}.png") for n in (1, 2)]
    assert [image["path"] for image in report["images"]] == [str(picture)] * 2
    assert report["tokens"] == {"before": 2 * tiny.TOKENS, "stages": [18], "after": 18}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept-1.png", "kept-2.png", "kept.png", "picture.png"]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_drawing_that_cannot_be_written_leaves_the_answer(
    as_json: bool, ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Image.Image, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = ask("--prune", "random:keep=4")
    monkeypatch.setattr(Image.Image, "save", full)
    target = tmp_path / "kept.png"
    result = ask("--prune", "random:keep=4", "--draw", target, *(["--json"] if as_json else []))
    assert result.code == 1
    assert result.err.endswith(f"foveate: {target} cannot be written: No space left on device\n")
    if as_json:
        report = json.loads(result.out)
        assert report["answer"] == before.out.splitlines()[0] and "drawn" not in report["images"][0]
    else:
        assert result.out.splitlines()[0] == before.out.splitlines()[0] and "drawn" not in result.out
    assert not [file for file in tmp_path.iterdir() if file.name.startswith((".part-", "kept"))]


def test_the_drawing_shows_what_the_model_saw(call: Any, folder: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.effect_noise((96, 48), 90).convert("RGB").save(wide)
    options = ("--prune", "random:keep=9", "--draw", tmp_path / "kept.png", "--max-new-tokens", 1)
    assert call("run", folder, wide, QUESTION, *options).code == 0
    assert load_image(tmp_path / "kept.png").size == (48, 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prune", "foopru"], "unknown method 'foopru'; did you mean 'fopru'?"),
        (["--prune", "fopru:keeep=3"], "fopru has no field 'keeep'; did you mean 'keep'?"),
        (["--prune", "fopru:keep=0"], "keep=0 is below 1 token"),
        (["--prune", "fopru", "--prune", "pool"], "run takes one --prune, not 2; join stages with +"),
        (["--prune", "@nowhere.json"], "nowhere.json cannot be read as JSON"),
        (["--draw", "kept.png"], "--draw shows which patches are kept; say with --prune which method keeps them"),
        (["--prune", "fopru", "--draw", "kept.gif"], "kept.gif ends in '.gif'; the choices are .png, .jpg,"),
        (["--prune", "fopru", "--draw", "no/where.png"], "there is no folder no"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 leaves no answer; the smallest is 1"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--device", "cuda:99"], "torch sees"),
        (["--prune", "h2o", "--compile"], "compiled decoding needs a static cache"),
        (["--dtype", "int8"], "unknown dtype 'int8'; Choices: auto, bfloat16, float16, float32."),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_work(ask: Any, options: list[str], message: str) -> None:
    result = ask(*options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_wrong_pictures_and_questions_are_refused(call: Any, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    assert "text.png is no picture that can be decoded" in call("run", "mini", tmp_path / "text.png", "w7").err
    result = call("run", "mini", picture, tmp_path / "gone.png", "w7")
    assert (result.code, result.err) == (
        2,
        f"foveate: {tmp_path / 'gone.png'} is no file; give the path of a picture\n",
    )
    result = call("run", "mini", picture, " ")
    assert (result.code, result.err) == (2, "foveate: QUESTION is empty; ask at least one word\n")
    result = call("run", "mini", picture, "what \udcff ?")  # a byte that is no UTF-8, as a shell hands it over
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("foveate: QUESTION holds half a character, U+DCFF at place 5")


def test_marks_of_the_model_are_no_question(call: Any, folder: Path, picture: Path) -> None:
    for options in ((), ("--prune", "fopru")):
        result = call("run", folder, picture, "w7 </s> w8", *options)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith("foveate: the question of prompt 0 holds '</s>', which this model reads as a mark")


def test_what_leaves_the_context_is_refused(call: Any, folder: Path, picture: Path) -> None:
    """12 pictures of 36 tokens, 3 words and 2 marks of the template: 437 of 512 positions, and 76 for an answer."""
    for options in ((), ("--prune", "fopru")):
        asked = ("run", folder, *[picture] * 12, QUESTION, *options, "--max-new-tokens")
        result = call(*asked, 77)
        assert (result.code, result.out) == (1, "")
        assert result.err == (
            "foveate: max_new_tokens=77 leaves the decoder's context: the prompt takes 437 of its 512 positions; the "
            "most is max_new_tokens=76\n"
        )
        result = call("run", folder, *[picture] * 15, QUESTION, *options)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith("foveate: the prompt takes 545 positions, but the context of this decoder has 512")


def test_a_budget_that_the_picture_cannot_meet_is_a_failure(ask: Any) -> None:
    result = ask("--prune", "random:keep=37")
    assert (result.code, result.out) == (1, "")
    assert result.err == "foveate: keep=37 asks for 37 tokens but the image has 36 tokens; the most is keep=36\n"


@pytest.mark.slow
def test_mini_answers(call: Any, tmp_path: Path) -> None:
    generator.demo().image(0).save(tmp_path / "scene.png")
    asked = next(one for one in questions(generator.demo(), 0, random.Random(0)) if one.kind == "color")
    report = json.loads(call("run", "mini", tmp_path / "scene.png", asked.text, "--prune", "fopru", "--json").out)
    assert report["answer"].split()[0] == asked.answer
    assert report["tokens"] == {"before": 576, "stages": [144], "after": 144}


def test_a_tuned_model_answers_under_its_spec(ask: Any, folder: Path, adapter: Path) -> None:
    asked = ask("--adapter", adapter, "--prune", "fopru:keep=9", "--json")
    assert asked.code == 0 and json.loads(asked.out)["model"] == f"{folder} with {adapter}"
    refused = ask("--adapter", adapter, "--prune", "fopru:keep=4")
    assert refused.code == 2 and "was tuned under fopru:keep=9, not fopru:keep=4" in refused.err
    assert ask("--adapter", adapter, "--prune", "fopru:keep=4", "--any-spec").code == 0
    assert ask("--adapter", adapter).code == 0, "it may run unpruned"
