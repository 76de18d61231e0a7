"""What is written down of pictures and times: tokens at their places, scores beside them, every rival timed."""

from __future__ import annotations

import base64
import io
import itertools
import json
from typing import Any

import pytest
from models import tiny
from PIL import Image

from foveate import prune
from foveate.core import FoveateError
from foveate.evaluate.looks import LONGEST_SIDE, Shown, looks
from foveate.evaluate.scenes_task import parse_rivals
from foveate.evaluate.times import ROUNDS, answer_times
from foveate.inference.answers import encode, greedy

QUESTION = "what is here ?"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


def picture(side: int = 40) -> Image.Image:
    return Image.effect_noise((side, side), 80).convert("RGB")


def test_kept_tokens_are_those_of_the_trace(model: Any) -> None:
    image, processor = picture(2 * LONGEST_SIDE), tiny.processor(model)
    rivals = parse_rivals(["fopru:keep=9", "random:keep=4", "prumerge", "fastv:layer=3,keep=4"])
    (found,) = looks(model, processor, [Shown(image, QUESTION, "x")], rivals, max_new_tokens=2)
    assert json.loads(json.dumps(found)) == found
    assert found["grid"] == [*tiny.GRID] and (found["question"], found["right"]) == (QUESTION, "x")
    assert Image.open(io.BytesIO(base64.b64decode(found["png"]))).size == (LONGEST_SIDE, LONGEST_SIDE)
    assert found["rivals"]["none"]["stages"] == []
    inputs = encode(model, processor, [[image]], [QUESTION])
    for spec, stages in rivals.items():
        if not stages:
            continue
        with prune(model, [*stages]) as trace:
            greedy(model, inputs, max_new_tokens=2)
        (record,) = trace.images
        (stage,) = found["rivals"][spec]["stages"]
        assert (stage["before"], stage["after"]) == (tiny.TOKENS, record.after)
        drawn = record.kept if record.extra is None else record.kept[~record.extra]
        assert stage["kept"] == drawn.tolist()
    assert found["rivals"][[*rivals][-1]]["stages"][0]["layer"] == 3


@pytest.mark.parametrize("spec", ["fopru:keep=9", "fastervlm:keep=9", "fastv:layer=2,keep=9", "hired:keep=9"])
def test_the_best_scores_are_those_of_what_stays(model: Any, spec: str) -> None:
    shown = [Shown(picture(), QUESTION, "x")]
    (found,) = looks(model, tiny.processor(model), shown, parse_rivals([spec]), max_new_tokens=1)
    (stage,) = next(one["stages"] for name, one in found["rivals"].items() if name != "none")
    scores = stage["scores"]
    assert len(scores) == tiny.TOKENS and len(set(scores)) > 20
    kept = set(stage["kept"])
    assert min(scores[place] for place in kept) >= max(score for place, score in enumerate(scores) if place not in kept)


def test_later_stages_score_what_is_left(model: Any) -> None:
    shown, rivals = [Shown(picture(), QUESTION, "x")], parse_rivals(["pyramiddrop:layers=1/2/3,keep=16/9/4"])
    (found,) = looks(model, tiny.processor(model), shown, rivals, max_new_tokens=1)
    stages = found["rivals"][[*rivals][1]]["stages"]
    for earlier, later in itertools.pairwise(stages):
        scored = [place for place, score in enumerate(later["scores"]) if score is not None]
        assert scored == earlier["kept"]


def test_every_rival_is_timed(model: Any) -> None:
    rivals, told = parse_rivals(["random:keep=4"]), list[int]()
    prompts = [(picture(), QUESTION), (picture(30), "is it ?")]
    processor = tiny.processor(model)
    times = answer_times(model, processor, prompts, rivals, max_new_tokens=3, progress=told.append)
    assert times.keys() == rivals.keys()
    assert sum(told) == (1 + ROUNDS * 2) * 2
    assert all(0 < one["first_token_ms"] < one["whole_ms"] for one in times.values())
    with pytest.raises(FoveateError, match="no prompt was given"):
        answer_times(model, processor, [], rivals, max_new_tokens=3)
