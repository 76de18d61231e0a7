"""Questions about scenes as rows: the same number asks the same, the tower computes each picture once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny

from foveate.core import FoveateError
from foveate.scenes import generator, mini
from foveate.train.losses import IGNORED
from foveate.train.scene_questions import SceneQuestions


@pytest.fixture(scope="module")
def base() -> Any:
    return mini.build(config=mini.llava_config(width=16, layers=2)).eval()


def test_rows_ask_about_the_pictures_that_they_show(base: Any) -> None:
    rows = SceneQuestions(base, mini.processor(), 200, pool=32, seed=3)
    assert len(rows) == 200
    scenes = generator.generate(32, seed=3 * 1_000_003)
    for number in (0, 5, 37, 199):
        row = rows[number]
        assert (row.ids == mini.IMAGE).sum() == mini.TOKENS and row.features is not None
        said = mini.tokenizer().decode(row.ids[row.ids != mini.IMAGE])
        answer = mini.tokenizer().decode(row.labels[row.labels != IGNORED])
        assert said.startswith("<bos> USER") and said.endswith(f"ASSISTANT {answer}") and answer.endswith("<eos>")
        with torch.no_grad():
            pixels = mini.normalise(scenes.pixels[number % 32][None])
            expected = base.get_image_features(pixels, return_dict=True).pooler_output[0]
        torch.testing.assert_close(row.features[0], expected, atol=1e-4, rtol=1e-3)
        assert row.wanted is not None and row.wanted.shape == (1, mini.TOKENS)
        patches = scenes.patches()[number % 32]
        objects, asked = patches.any(dim=0), row.wanted[0] > 0
        if any(word in said for word in ("how many", "describe")):
            assert torch.equal(row.wanted[0], objects.to(torch.int8)), "all objects, and nothing distracts"
        elif "no <eos>" in said:
            assert not row.wanted.any(), "what is not there is nowhere"
        else:
            assert any(torch.equal(asked, one) for one in patches)
            assert torch.equal(row.wanted[0] < 0, objects & ~asked), "the other objects distract"
        assert row.even is not None and row.even.shape == (1, 2)
        assert bool(row.even.any()) == (row.kind in ("count", "describe"))
        if "how many" in said:
            assert answer == f"{scenes.count[number % 32]} <eos>"


def test_the_same_number_is_the_same_row(base: Any) -> None:
    first, again = (SceneQuestions(base, mini.processor(), 100, pool=32) for _ in range(2))
    assert torch.equal(first[7].ids, again[7].ids)
    assert torch.equal(first[7].features, again[7].features)  # type: ignore[arg-type]
    assert first.fingerprint() == again.fingerprint() != SceneQuestions(base, mini.processor(), 100).fingerprint()
    asked = {tuple(first[number].ids[mini.TOKENS :].tolist()) for number in range(0, 96, 32)}
    assert len(asked) > 1, "one picture is asked about in several ways"


def test_each_picture_is_encoded_once(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    stock = base.get_image_features
    monkeypatch.setattr(base, "get_image_features", lambda *given, **more: calls.append(1) or stock(*given, **more))
    rows = SceneQuestions(base, mini.processor(), 64, pool=32)
    for number in (0, 31, 32, 63):
        rows[number]
    assert len(calls) == 1


def test_what_cannot_be_drawn_is_refused(base: Any) -> None:
    with pytest.raises(FoveateError, match="samples=0 is below 1"):
        SceneQuestions(base, None, 0)
    with pytest.raises(FoveateError, match="336 x 336 pixels, the model sees 24 x 24"):
        SceneQuestions(tiny.model(), None, 5)


def test_what_is_held_out_shows_other_pictures(base: Any) -> None:
    trained, held_out = (SceneQuestions(base, mini.processor(), 40, split=split) for split in ("train", "test"))
    assert not torch.equal(trained[3].features, held_out[3].features)  # type: ignore[arg-type]
    assert trained.fingerprint() != held_out.fingerprint()


def test_kinds_are_asked_as_often_as_the_mix_says(base: Any) -> None:
    rows = SceneQuestions(base, mini.processor(), 64, pool=32, mix={"count": 1.0, "describe": 0.0})
    assert {rows[number].kind for number in range(0, 64, 7)} == {"count"}
