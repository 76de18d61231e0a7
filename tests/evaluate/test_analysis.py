"""Measures of redundancy: by hand on small tensors, and against eager attention maps of a tiny model."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny
from models.untouched import untouched
from PIL import Image
from references import reference

from foveate.core import Block, FoveateError
from foveate.evaluate.analysis import (
    Analysis,
    Input,
    Similarity,
    analyze,
    attention_curve,
    similarity,
    token_counts,
    tokens_holding,
)
from foveate.methods.image_text_interaction import ImageTextInteraction

ATTENTION = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40).filter(lambda row: sum(row) > 1e-3)


def pictures(count: int) -> list[Image.Image]:
    return [Image.effect_noise((48, 48), 90 + 20 * number).convert("RGB") for number in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# measures


def test_the_curve_by_hand() -> None:
    curve = attention_curve(torch.tensor([[0.1, 0.4, 0.2, 0.3], [1.0, 1.0, 1.0, 1.0]]))
    assert curve.shape == (2, 101)
    assert curve[0, [0, 25, 50, 75, 100]].tolist() == pytest.approx([0, 0.4, 0.7, 0.9, 1])
    assert curve[0, [10, 40, 95]].tolist() == pytest.approx([0.16, 0.4 + 0.6 * 0.3, 0.9 + 0.8 * 0.1])
    assert curve[1].tolist() == pytest.approx([percent / 100 for percent in range(101)])


def test_the_curve_where_percents_fall_between_tokens() -> None:
    curve = attention_curve(torch.tensor([[6.0, 3.0, 1.0]]))[0]
    assert curve[25].item() == pytest.approx(0.75 * 0.6)  # three quarters of the first of three tokens
    assert curve[50].item() == pytest.approx(0.6 + 0.5 * 0.3)


@settings(max_examples=50)
@given(ATTENTION)
def test_a_curve_rises_ever_more_slowly_and_stays_above_the_diagonal(row: list[float]) -> None:
    curve = attention_curve(torch.tensor([row], dtype=torch.float64))[0]
    assert (curve[0].item(), curve[-1].item()) == pytest.approx((0, 1))
    steps = curve.diff()
    assert bool((steps >= -1e-12).all()) and bool((steps.diff() <= 1e-9).all())
    assert bool((curve >= torch.linspace(0, 1, 101, dtype=torch.float64) - 1e-9).all())
    other = torch.tensor([sorted(row)], dtype=torch.float64) * 3
    torch.testing.assert_close(attention_curve(other)[0], curve)


@pytest.mark.parametrize(
    ("row", "share", "tokens"),
    [
        ([0.1, 0.4, 0.2, 0.3], 0.8, 3),  # 0.4 + 0.3 is not enough
        ([0.1, 0.4, 0.2, 0.3], 0.4, 1),
        ([0.2] * 5, 0.8, 4),  # reached exactly
        ([0.1] * 10, 0.8, 8),
        ([0.0, 7.0, 0.0], 0.8, 1),
        ([1.0], 0.8, 1),
    ],
)
def test_tokens_that_hold_a_share_by_hand(row: list[float], share: float, tokens: int) -> None:
    assert tokens_holding(torch.tensor([row]), share).tolist() == [tokens / len(row)]


@settings(max_examples=50)
@given(ATTENTION)
def test_the_holders_are_the_fewest(row: list[float]) -> None:
    count = round(tokens_holding(torch.tensor([row], dtype=torch.float64)).item() * len(row))
    highest = sorted(row, reverse=True)
    assert math.fsum(highest[:count]) >= (0.8 - 2e-6) * math.fsum(row)
    assert math.fsum(highest[: count - 1]) < 0.8 * math.fsum(row)


def test_attention_that_is_not_finite_is_refused() -> None:
    for measure in (attention_curve, tokens_holding):
        with pytest.raises(FoveateError, match="1 of 3 attention sums are NaN or infinite"):
            measure(torch.tensor([[0.2, float("nan"), 0.1]]))


def test_parts_of_a_prompt_by_hand() -> None:
    #                   start  text   picture  text picture text end
    ids = torch.tensor([1, 10, 11, 96, 96, 96, 12, 96, 96, 13, 14, 2])
    assert token_counts(ids, 96, {1, 2, 96}) == {"before": 2, "visual": 5, "after": 3, "special": 2}
    assert token_counts(ids[3:4], 96, set()) == {"before": 0, "visual": 1, "after": 0, "special": 0}


def test_a_prompt_without_picture_is_refused() -> None:
    with pytest.raises(FoveateError, match=r"the prompt of 3 tokens holds no visual token \(id 96\)"):
        token_counts(torch.tensor([1, 10, 11]), 96, {1})


@pytest.mark.parametrize(
    ("settings", "key", "count"),
    [({}, "2/24", 3), ({"alpha": 0.3}, "2/24", 1), ({"where": 1, "keep": 4}, 0, 4), ({"where": "output"}, "read", 3)],
)
def test_the_similarity_by_hand(settings: dict[str, Any], key: int | str, count: int) -> None:
    weights = torch.tensor([[0.1, 0.3, 0.1, 0.4, 0.1], [0.2] * 5])
    block = Block(hidden=weights.log()[..., None], cls=torch.ones(2, 1))
    first, flat = similarity({key: block, 3: Block()}, ImageTextInteraction(**settings))
    assert first.curve == pytest.approx((0.4, 0.3, 0.1, 0.1, 0.1))
    assert first.split == 3  # (5 - 3) * (0.4 - 0.1) is the largest
    assert first.count == count
    assert (flat.split, flat.count) == (5, settings.get("keep", 5))


# ---------------------------------------------------------------------------------------------------------------------
# a model


@pytest.mark.parametrize("tower", tiny.TOWERS)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_model_is_measured_as_its_eager_maps_say(attn: str, tower: str) -> None:
    model = tiny.model(attn=attn, tower=tower)
    processor = tiny.processor(model)
    shown, cls = pictures(2), int(tower == "clip")
    seen: list[int] = []
    with untouched(model):
        found = analyze(model, processor, shown, ["w7 w8", "w9"], names=["a", "b"], progress=seen.append)
    assert (found.read, found.blocks, seen) == (2, 4, [1, 1])
    pixels = processor.image_processor(shown, return_tensors="pt")["pixel_values"]
    maps = [one.double().mean(dim=1)[:, cls:, cls:] for one in reference.tower_attention(model, pixels)]
    for row, one in enumerate(found.inputs):
        for block, map_ in enumerate(maps):
            heads = map_[row].sum(dim=0).sort(descending=True).values.cumsum(0)
            heads /= heads[-1].clone()
            quarters = [heads[count - 1].item() for count in (9, 18, 27, 36)]  # of 36 tokens
            assert one.curves[block][25::25] == pytest.approx(quarters, abs=1e-5)
            count = next(number for number, value in enumerate(heads.tolist(), start=1) if value >= 0.8)
            assert one.holding[block] == pytest.approx(count / tiny.TOKENS)
    assert [one.name for one in found.inputs] == ["a", "b"]
    assert [one.tokens["after"] for one in found.inputs] == [3, 2]  # the question, and the template's last word
    assert [one.tokens["before"] for one in found.inputs] == [1, 1]
    assert [one.tokens["visual"] for one in found.inputs] == [tiny.TOKENS] * 2
    if not cls:
        assert found.similarities() == []
        return
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[1]  # after 1 block of 4
    scores = (hidden[:, 1:] @ hidden[:, 0, :, None])[..., 0] / 32**0.5
    for expected, got in zip(scores.softmax(dim=-1).tolist(), found.similarities(), strict=True):
        curve = sorted(expected, reverse=True)
        assert got.curve == pytest.approx(curve, rel=1e-4)
        gains = [(36 - place) * (curve[0] - curve[place - 1]) for place in range(1, 36)]
        assert got.split == got.count == 1 + gains.index(max(gains))


def test_the_methods_own_count_is_told() -> None:
    model, shown = tiny.model(), pictures(1)
    with_alpha, whole = (
        analyze(model, tiny.processor(model), shown, ["w7"], method=ImageTextInteraction(alpha=alpha, where=2))
        for alpha in (0.5, 1.0)
    )
    split = whole.similarities()[0].split
    assert with_alpha.similarities()[0].split == split
    assert with_alpha.similarities()[0].count == max(1, round(0.5 * split)) < split


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (0, {}, "0 pictures, 1 questions and 0 names were given; give at least one picture"),
        (2, {}, "2 pictures, 1 questions and 2 names"),
        (1, {"names": ["a", "b"]}, "1 pictures, 1 questions and 2 names"),
        (1, {"method": ImageTextInteraction(where=5)}, r"encoder block 4 is outside 0\.\.3"),
        (1, {"method": ImageTextInteraction(attention="received")}, "attention=received splits no similarity to CLS"),
    ],
)
def test_what_cannot_be_analyzed_is_refused(images: int, options: dict[str, Any], message: str) -> None:
    model = tiny.model()
    with untouched(model), pytest.raises(FoveateError, match=message):
        analyze(model, tiny.processor(model), pictures(images), ["w7"], **options)


# ---------------------------------------------------------------------------------------------------------------------
# means


def made(name: str, held: float, visual: int, split: int | None) -> Input:
    """An input with two blocks: in the first all tokens are alike, in the second `held` of them hold 80 %."""
    diagonal = tuple(percent / 100 for percent in range(101))
    steep = tuple(min(1.0, percent / 100 / held * 0.8) for percent in range(101))
    tokens = {"before": 2, "visual": visual, "after": 7, "special": 1}
    found = None if split is None else Similarity((0.5, 0.3, 0.2), split, 1)
    return Input(name, "why ?", (diagonal, steep), (0.8, held), tokens, found)


def test_means_and_their_json() -> None:
    analysis = Analysis(
        "clip_vision_model", 1, ImageTextInteraction(alpha=0.5), (made("a", 0.2, 10, 2), made("b", 0.4, 30, 1))
    )
    assert analysis.curve(1)[10] == pytest.approx((0.4 + 0.2) / 2)
    assert analysis.holding(1) == [0.2, 0.4]
    report = json.loads(json.dumps(analysis.to_dict()))
    assert report["tokens"] == {"before": 2, "visual": 20, "after": 7, "special": 1}
    assert report["visual_share"] == pytest.approx((0.5 + 0.75) / 2)
    assert report["similarity"] == {"split": 1.5, "count": 1}
    assert report["method"] == "image_text_interaction:alpha=0.5"
    first, second = report["attention"]
    assert (first["block"], first["top_quarter"], first["tokens_holding_80"]) == (0, 0.25, 0.8)
    assert (second["least"], second["tokens_holding_80"], second["most"]) == (0.2, 0.3, 0.4)
    assert second["top_quarter"] == pytest.approx((1 + 0.5) / 2)
    assert len(second["curve"]) == len(report["inputs"][0]["attention"][1]["curve"]) == 101
    assert report["inputs"][1]["similarity"] == {"split": 1, "count": 1, "curve": [0.5, 0.3, 0.2]}


def test_json_without_similarity() -> None:
    report = Analysis("siglip_vision_model", 0, ImageTextInteraction(), (made("a", 0.2, 10, None),)).to_dict()
    assert report["similarity"] is None
    assert report["inputs"][0]["similarity"] is None
