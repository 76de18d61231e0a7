"""What the commands do with a model and its own processor, on every family whose processor can be built here."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from models import tiny, tiny_processors
from models.untouched import untouched
from PIL import Image

import foveate
from foveate.core import FoveateError
from foveate.evaluate.analysis import analyze
from foveate.evaluate.check import check
from foveate.families import family_of
from foveate.inference.answers import encode, greedy

# numpy's word on how stock GLM-4V reads a tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
each_processor = pytest.mark.parametrize("name", tiny_processors.PROCESSORS)


def picture(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


@each_processor
def test_the_contract_holds(name: str) -> None:
    model, processor = tiny.model(name, blocks=6), tiny_processors.PROCESSORS[name]()
    found = check(model, encode(model, processor, [[picture(44, 33)]], ["w7 w8"]))
    assert [outcome.name for outcome in found.outcomes if not outcome.passed] == []
    assert any("tome" in outcome.name for outcome in found.outcomes)


@each_processor
@pytest.mark.parametrize(
    "spec", ["tome:keep=0.6", "dynamicvit:from=random,keep=0.8/0.6/0.5", "fopru:keep=0.5", "fastv:layer=2,keep=0.3"]
)
def test_answers_about_pictures_of_different_sizes(spec: str, name: str) -> None:
    """A padded batch gives each row what it gets alone."""
    model, processor = tiny.model(name, blocks=6), tiny_processors.PROCESSORS[name]()
    pictures, questions = [[picture(44, 33)], [picture(20, 41), picture(33, 33)]], ["w7 w8 w9", "w10"]
    try:
        with untouched(model), foveate.prune(model, spec) as trace:
            together = greedy(model, encode(model, processor, pictures, questions), max_new_tokens=4)
            kept = [image.kept.tolist() for image in trace.images]
            alone = [
                greedy(model, encode(model, processor, [mine], [question]), max_new_tokens=4)
                for mine, question in zip(pictures, questions, strict=True)
            ]
            single = [image.kept.tolist() for call in trace.history[1:] for image in call.images]
    except FoveateError as error:
        if name != "llava-onevision" or "interpolated between patches" not in str(error):
            raise
        pytest.skip(f"refused: {error}")
    assert kept == single
    for row, one in enumerate(alone):
        assert torch.equal(together[row, -4:], one[0, -4:])
    assert all(image.after < image.original for image in trace.history[0].images)


@each_processor
def test_attention_is_measured(name: str) -> None:
    model, processor = tiny.model(name, blocks=6), tiny_processors.PROCESSORS[name]()
    with untouched(model):
        found = analyze(model, processor, [picture(44, 33), picture(20, 41)], ["w7 w8", "w9"])
    assert (found.blocks, found.read) == (6, family_of(model).read_block(model))
    for one in found.inputs:
        assert one.tokens["visual"] > 0 and one.tokens["after"] > 0
        for curve, holding in zip(one.curves, one.holding, strict=True):
            assert curve[0] == pytest.approx(0.0, abs=1e-6) and curve[100] == pytest.approx(1.0, abs=1e-6)
            assert all(later >= earlier - 1e-6 for earlier, later in pairwise(curve))
            assert 0.0 < holding <= 0.85
