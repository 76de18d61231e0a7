"""The task "scenes": the same balanced questions for every rival, and figures that come from traces."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from models import tiny
from models.tiny_processors import PROCESSORS

from foveate.core import FoveateError
from foveate.evaluate import TASKS, scenes_task, task_names
from foveate.evaluate.oracle import covered
from foveate.evaluate.scenes_task import Row, Sample, check, draw_samples, evaluate, parse_rivals, wilson
from foveate.methods.random import Random
from foveate.scenes.questions import KINDS


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    return [row.to_dict() for row in rows]


def key(sample: Sample) -> tuple[Any, ...]:
    return sample.image.tobytes(), sample.kind, sample.question, sample.answer, sample.boxes


def test_the_same_seed_asks_the_same() -> None:
    first = [key(sample) for sample in draw_samples(20, seed=1)]
    assert first == [key(sample) for sample in draw_samples(20, seed=1)]
    assert not set(first) & {key(sample) for sample in draw_samples(20, seed=2)}


def test_a_longer_draw_begins_like_a_shorter_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes_task, "_CHUNK", 10)
    longer = list(draw_samples(25, seed=0))
    assert len(longer) == 25
    assert [key(sample) for sample in longer[:20]] == [key(sample) for sample in draw_samples(20, seed=0)]
    assert len({sample.image.tobytes() for sample in longer}) == 25


def test_questions_are_balanced() -> None:
    samples = list(draw_samples(50, seed=3))
    assert Counter(sample.kind for sample in samples) == dict.fromkeys(KINDS, 10)
    assert Counter(sample.answer for sample in samples if sample.kind == "existence") == {"yes": 5, "no": 5}


def test_boxes_are_of_the_object_asked_about_else_of_all() -> None:
    for sample in draw_samples(50, seed=4):
        objects = {"count": int, "describe": lambda words: len(words.split()) // 3}.get(sample.kind)
        if objects is not None:
            assert len(sample.boxes) == objects(sample.answer)
        elif sample.answer != "no":
            assert len(sample.boxes) == 1
        assert all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, y0, x1, y1 in sample.boxes)


def test_the_unpruned_model_comes_first_and_twins_once() -> None:
    named = parse_rivals(["random:keep=4", None, Random(keep=4), "none", [Random(keep=8), Random(keep=2)], ()])
    assert list(named) == ["none", "random:keep=4", "random:keep=8+random:keep=2"]
    assert named["none"] == ()


def test_every_rival_answers_the_same_questions(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    greedy = scenes_task.greedy

    def noted(model: Any, inputs: Any, **options: Any) -> Any:
        asked.append((inputs["input_ids"].tolist(), inputs["pixel_values"].sum().item()))
        return greedy(model, inputs, **options)

    monkeypatch.setattr(scenes_task, "greedy", noted)
    progress: list[int] = []
    rows = evaluate(
        model, words(model), ["random:keep=4", "uniform:keep=9"], samples=7, batch=3, progress=progress.append
    )
    assert [row.method for row in rows] == ["none", "random:keep=4", "uniform:keep=9"]
    assert asked == [batch for batch, group in itertools.groupby(asked) for _ in rows]
    assert sum(len(ids) for ids, _ in asked) == sum(progress) == 3 * 7


def test_a_rival_inside_the_encoder_gets_an_encoding_of_its_own() -> None:
    model = tiny.model(blocks=6)
    rivals = ["random:keep=4", "image_text_interaction", "uniform:keep=9"]
    together = figures(evaluate(model, words(model), rivals, samples=5, batch=3))
    alone = [figures(evaluate(model, words(model), [rival], samples=5, batch=3))[1] for rival in rivals]
    assert together[1:] == alone


def words(model: Any) -> Any:
    """A processor of the tiny model, which reads every unknown word as one and the same."""
    return tiny.processor(model)


def test_figures_come_from_the_traces(model: Any) -> None:
    none, kept, ceiling = figures(
        evaluate(model, words(model), ["random:keep=4"], samples=10, batch=4, ceiling=True, seed=1)
    )
    assert none["tokens"] == tiny.TOKENS
    assert kept["tokens"] == 4
    assert (none["prefill_flops_share"], none["kv_bytes_share"]) == (1.0, 1.0)
    assert kept["kv_bytes_share"] < ceiling["kv_bytes_share"] < 1
    assert kept["prefill_flops_share"] < ceiling["prefill_flops_share"] < 1
    counts = [int(covered(sample.boxes, tiny.GRID).sum()) for sample in draw_samples(10, seed=1)]
    assert ceiling["tokens"] == pytest.approx(sum(counts) / 10)
    assert ceiling["method"] == "ceiling (tokens of the object asked about)"
    assert none["samples"] == 10


def test_evaluation_repeats_itself(model: Any) -> None:
    once = figures(evaluate(model, words(model), ["random:keep=4"], samples=5, batch=2, seed=5))
    assert once == figures(evaluate(model, words(model), ["random:keep=4"], samples=5, batch=2, seed=5))


def test_accuracy_is_the_mean_score() -> None:
    row = Row("none")
    row.scores["color"] = [1.0, 0.0]
    row.scores["describe"] = [0.5, 0.5]
    figures = row.to_dict()
    assert (figures["accuracy"], figures["color"], figures["describe"], figures["count"]) == (0.5, 0.5, 0.5, None)


def test_wilson_by_hand() -> None:
    # 8 of 10 with z = 1.96: middle 0.9921, spread 0.2965, scale 1.3842.
    low, high = wilson(0.8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(1.0, 50)[1] == 1.0
    assert wilson(0.0, 50)[0] == 0.0
    assert wilson(0.0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples=0 measures nothing; the smallest is samples=1"),
        ({"samples": True}, "samples=True measures nothing"),
        ({"batch": -3}, "batch=-3 measures nothing; the smallest is batch=1"),
        ({"seed": -1}, "seed=-1 is outside 0..9999; the nearest is 0"),
        ({"seed": 10_000}, "the nearest is 9999"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        check(**{"samples": 1, "batch": 1, "seed": 0, **settings})


def test_rivals_are_checked_before_anything_is_answered() -> None:
    with pytest.raises(FoveateError, match="unknown method 'randm'; did you mean 'random'"):
        evaluate(None, None, ["randm"], samples=1)
    with pytest.raises(FoveateError, match="samples=0"):
        evaluate(None, None, [], samples=0)


def test_tasks() -> None:
    assert task_names(["scenes, scenes", "scenes"]) == TASKS
    with pytest.raises(FoveateError, match="unknown task 'scene'; did you mean 'scenes'"):
        task_names(["scene"])
    with pytest.raises(FoveateError, match=r"no task was given; Choices: scenes\."):
        task_names([" , "])


def test_a_rival_that_does_not_fit_the_pictures_is_left_out() -> None:
    tiled, processor = tiny.model("llava-next", blocks=2), PROCESSORS["llava-next"]()
    specs, told = ["pool:keep=4", "uniform:keep=4"], dict[str, str]()
    asked: dict[str, Any] = {"samples": 2, "batch": 2}
    rows = evaluate(tiled, processor, specs, leave_out=lambda spec, why: not told.update({spec: why}), **asked)
    assert [row.method for row in rows] == ["none", "uniform:keep=4"]
    assert "its tokens come from several tiles" in told["pool:keep=4"] and len(told) == 1
    with pytest.raises(FoveateError, match="its tokens come from several tiles"):
        evaluate(tiled, processor, specs[:1], **asked)
