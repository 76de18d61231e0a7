"""The page in a browser: it loads, asks, answers, slides, shows patches and reports, by hand and by keyboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate import prune
from foveate.inference.answers import answer
from foveate.inference.loading import Loaded
from foveate.inference.pictures import save_image
from foveate.scenes import generator
from foveate.trace import Trace

QUESTION = "how many objects ?"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True}


def asked(mini: Loaded, spec: str | None, picture: Any = None) -> tuple[str, Trace | None]:
    """What `generate()` answers by itself, about the picture that the page begins with."""
    picture = generator.demo().image(0) if picture is None else picture
    if spec is None:
        return answer(mini.model, mini.processor, [picture], [QUESTION])[0], None
    with prune(mini.model, spec, processor=mini.processor) as trace:
        return answer(mini.model, mini.processor, [picture], [QUESTION])[0], trace


def test_it_asks_and_answers_and_says_what_was_saved(visit: Any, mini: Loaded) -> None:
    seen = visit()
    seen.ask()
    assert seen.answers() == [asked(mini, None)[0], asked(mini, "fopru:keep=0.25")[0]]
    rows = [line.split("\t") for line in seen.text("measured").splitlines()]
    assert rows[0] == ["measured here", "unpruned", "pruned"] and rows[1] == ["visual tokens", "576", "144"]
    assert [row[0] for row in rows[2:]] == ["tokens of the prompt", "first token", "whole answer", "keys and values"]
    assert int(rows[2][1]) - int(rows[2][2]) == 432
    assert "fopru:keep=0.25" in seen.text("predicted")
    assert "144 of 576" in seen.text("stage")


def test_the_slider_changes_prediction_and_answer(visit: Any) -> None:
    seen = visit()
    seen.ask()
    number = seen.page.locator("#share input[type=number]")
    number.fill("50")
    number.press("Enter")
    seen.await_text("predicted", "fopru:keep=0.5")
    seen.page.locator("#go").click()
    seen.await_text("measured", "288")
    seen.await_text("stage", "288 of 576")


def test_a_patch_says_its_score_and_rank(visit: Any, mini: Loaded) -> None:
    seen = visit()
    seen.ask()
    image = seen.page.locator("#look img")
    image.scroll_into_view_if_needed()
    seen.page.wait_for_function("document.querySelector('#look img').naturalWidth > 0")
    box = image.bounding_box()
    assert box is not None
    side = min(box["width"], box["height"])  # the picture is a square in the middle of its box
    left, top = (box["width"] - side) / 2, (box["height"] - side) / 2
    row, column = 13, 7
    image.click(position={"x": left + side * (column - 0.5) / 24, "y": top + side * (row - 0.5) / 24})
    seen.await_text("fate", f"Patch {row}, {column}")
    trace = asked(mini, "fopru:keep=0.25")[1]
    assert trace is not None
    stage, token = trace.images[0].stages[0], (row - 1) * 24 + column - 1
    assert stage.scores is not None
    rank = stage.scores.argsort(descending=True, stable=True).tolist().index(token) + 1
    became = "kept" if token in stage.kept.tolist() else "dropped"
    told = f"fopru:keep=0.25: {became}, score {stage.scores[token].item():.4g}, rank {rank} of 576"
    assert told in seen.text("fate")
    assert (rank <= 144) == (became == "kept")


def test_every_stage_can_be_looked_at(visit: Any) -> None:
    seen = visit()
    seen.page.locator("#method input").fill("pyramiddrop")
    seen.page.locator("#method input").press("Enter")
    seen.ask()
    radios = seen.page.locator("#stage label")
    assert radios.count() == 4  # the picture, and after each of three stages
    shown = set()
    for number in range(4):
        radios.nth(number).click()
        seen.page.wait_for_timeout(1500)
        shown.add(seen.page.locator("#look img").get_attribute("src"))
    assert len(shown) == 4


def test_the_keyboard_is_enough(visit: Any, mini: Loaded) -> None:
    seen = visit()
    seen.page.locator("#question textarea").focus()
    seen.page.keyboard.press("Enter")
    seen.await_look()
    assert seen.answers()[0] == asked(mini, None)[0]
    order = []
    for _ in range(60):
        seen.page.keyboard.press("Tab")
        order.append(seen.page.evaluate("document.activeElement.closest('[id]')?.id ?? ''"))
    places = [next((n for n, at in enumerate(order) if name in at), None) for name in ("go", "row", "column")]
    assert None not in places
    seen.page.locator("#row input").focus()
    seen.page.keyboard.type("2")
    seen.page.locator("#column input").focus()
    seen.page.keyboard.type("3")
    seen.page.keyboard.press("Enter")
    seen.await_text("fate", "rank")


def test_a_wrong_file_is_told_in_words(visit: Any, tmp_path: Path) -> None:
    seen = visit()
    file = tmp_path / "letter.png"
    file.write_text("no picture")
    seen.page.locator("#picture button[aria-label='Remove Image']").click()
    seen.page.locator("#picture input[type=file]").set_input_files(str(file))
    seen.page.get_by_text("letter.png is no picture that can be decoded; PNG, JPEG").wait_for(timeout=60_000)
    seen.page.locator("#go").click()
    seen.page.get_by_text("there is no picture yet").wait_for(timeout=60_000)


def test_a_picture_of_ones_own(visit: Any, mini: Loaded, tmp_path: Path) -> None:
    picture = generator.generate(1, seed=3, split="test").image(0)
    save_image(picture, tmp_path / "own.png")
    seen = visit()
    seen.page.locator("#picture button[aria-label='Remove Image']").click()
    seen.page.locator("#picture input[type=file]").set_input_files(str(tmp_path / "own.png"))
    # A preview of the browser's own stands there until the file has arrived.
    seen.page.wait_for_function("document.querySelector('#picture img')?.src.includes('/file=')")
    seen.ask()
    assert seen.answers() == [asked(mini, spec, picture)[0] for spec in (None, "fopru:keep=0.25")]


def test_a_report_is_drawn(visit: Any, tmp_path: Path) -> None:
    row = {"accuracy": 0.5, "equivalent_tokens": 144.0}
    rows = [{"method": "none", **row, "equivalent_tokens": 576.0}, {"method": "fopru:keep=144", **row}]
    about = {"command": "foveate eval", "model": "mini", "task": "scenes", "samples": 5, "seed": 0, "rows": rows}
    (tmp_path / "rows.json").write_text(json.dumps(about))
    (tmp_path / "other.json").write_text("[]")
    seen = visit()
    seen.page.get_by_role("tab", name="Accuracy").click()
    choose = seen.page.locator("#report input[type=file]")
    choose.set_input_files(str(tmp_path / "rows.json"))
    seen.await_text("rows", "fopru:keep=144")
    assert "50.0%" in seen.text("rows")
    seen.page.locator("#plot canvas, #plot svg").first.wait_for()


def test_a_file_that_is_no_report(visit: Any, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    seen = visit()
    seen.page.get_by_role("tab", name="Accuracy").click()
    seen.page.locator("#report input[type=file]").set_input_files(str(tmp_path / "other.json"))
    seen.page.get_by_text("other.json is no file of foveate eval --json").wait_for(timeout=60_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_by_day_and_night(visit: Any, scheme: str) -> None:
    seen = visit(color_scheme=scheme, **PHONE)
    seen.ask()
    assert seen.page.evaluate("document.scrollingElement.scrollWidth") <= PHONE["viewport"]["width"]  # type: ignore[index]
    red = seen.page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0])")
    assert (red > 200) == (scheme == "light")
