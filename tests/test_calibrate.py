"""Fitting a method's free number to a model's pictures: what it finds is what pruning then keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny
from models.untouched import untouched
from PIL import Image
from torch import Tensor

import foveate
from foveate import FoPru, FoveateError, ImageTextInteraction
from foveate.core import Block, Signals
from foveate.runtime.encoder.observe import signals_of


@cache
def model() -> Any:
    return tiny.model()


@cache
def pixels(count: int = 6) -> Tensor:
    """Pictures with edges of their own, so that their curves split at different places."""
    generator = torch.Generator().manual_seed(3)
    made = torch.randn(count, 3, tiny.IMAGE_SIDE, tiny.IMAGE_SIDE, generator=generator)
    for number in range(count):
        made[number, :, : 3 * number + 1] *= 0.1
    return made


@torch.no_grad()
def splits(where: int) -> list[int]:
    """Equation 3 by hand on each picture's hidden states after `where` blocks."""
    tower = model().model.vision_tower
    found = []
    for one in pixels():
        hidden = tower.pre_layrnorm(tower.embeddings(one[None]))
        for block in tower.encoder.layers[:where]:
            hidden = block(hidden, None)
        cls, patches = hidden[0, 0].double().numpy(), hidden[0, 1:].double().numpy()
        weights = numpy.exp(patches @ cls / numpy.sqrt(32))
        curve = numpy.sort(weights / weights.sum())[::-1]
        values = [(36 - i) * (curve[0] - curve[i - 1]) for i in range(1, 36)]
        found.append(1 + int(numpy.argmax(values)))
    return found


def average(alpha: float, of: Sequence[int]) -> float:
    """Tokens per picture as the class documents them."""
    return sum(min(36, max(1, round(alpha * split))) for split in of) / len(of)


def kept(method: Any, batch: Tensor) -> float:
    """Tokens per picture that pruning with a method keeps."""
    prompts = tiny.inputs(model(), *["2i3"] * batch.shape[0])
    with foveate.prune(model(), method) as trace, torch.no_grad():
        model()(**{**prompts, "pixel_values": batch})
    return sum(image.after for image in trace.images) / batch.shape[0]


def test_the_pictures_split_at_different_places() -> None:
    assert len(set(splits(1))) > 2


@pytest.mark.parametrize("where", [1, 2])
@pytest.mark.parametrize("target", [1, 3, 4, 9, 17, 30, 35, 36, 0.1, 0.25, 0.5, 1.0])
def test_no_other_alpha_comes_nearer(target: Any, where: int) -> None:
    """Every alpha is tried that changes any picture's count."""
    method = ImageTextInteraction(where=where, visual_only=True)
    found = foveate.calibrate(model(), method, pixels(), target)
    assert isinstance(found, ImageTextInteraction)
    of = splits(where)
    wanted = target * 36 if isinstance(target, float) else target
    steps = sorted({(count + 0.5) / split for split in of for count in range(36)})
    middles = [(low + high) / 2 for low, high in zip([0.0, *steps], [*steps, 2 * steps[-1]], strict=True)]
    best = min(abs(average(alpha, of) - wanted) for alpha in middles)
    assert abs(average(found.alpha, of) - wanted) == pytest.approx(best)
    assert kept(found, pixels()) == pytest.approx(average(found.alpha, of)), "and that is what pruning keeps"


@settings(max_examples=8)
@given(st.integers(1, 36))
def test_a_higher_target_never_keeps_less(target: int) -> None:
    method = ImageTextInteraction(where=1)
    of = splits(1)
    here = foveate.calibrate(model(), method, pixels(), target)
    there = foveate.calibrate(model(), method, pixels(), min(36, target + 1))
    assert average(here.alpha, of) <= average(there.alpha, of)


def test_everything_but_alpha_stays() -> None:
    method = ImageTextInteraction(where=2, heavy=0.3, recent=4, alpha=7.0)
    found = foveate.calibrate(model(), method, pixels(), 5)
    assert (found.where, found.heavy, found.recent, found.keep) == (2, 0.3, 4, None)
    assert found.alpha != 7.0
    assert foveate.spec.parse(str(found)) == found


def test_batches_are_one_set_of_pictures() -> None:
    method = ImageTextInteraction(where=1)
    whole = foveate.calibrate(model(), method, pixels(), 7)
    for batches in (
        [pixels()[:1], pixels()[1:5], pixels()[5:]],
        (one[None] for one in pixels()),
        [pixels()[:0], pixels()],
        pixels().double(),
    ):
        assert foveate.calibrate(model(), method, batches, 7) == whole


def test_the_encoders_output() -> None:
    method = ImageTextInteraction(where="output", visual_only=True)
    found = foveate.calibrate(model(), method, pixels(), 0.25)
    assert kept(found, pixels()) == pytest.approx(9, abs=1)


def test_the_model_is_left_as_it_was() -> None:
    with untouched(model()):
        foveate.calibrate(model(), ImageTextInteraction(where=1), pixels(), 5)
    broken = pixels().clone()
    broken[2] = torch.nan
    with untouched(model()), pytest.raises(FoveateError, match="NaN or infinite"):
        foveate.calibrate(model(), ImageTextInteraction(where=1), broken, 5)


def encoded_nothing(*arguments: Any) -> None:
    raise AssertionError("an encoder ran before the refusal")


@pytest.mark.parametrize(
    ("method", "images", "target", "message"),
    [
        (
            FoPru(keep=9),
            "pixels",
            9,
            "fopru:keep=9 has nothing to calibrate; image_text_interaction has its alpha, pixelprune its threshold",
        ),
        (ImageTextInteraction(where=1, keep=5), "pixels", 9, "keep=5 fixes the count, so alpha decides nothing"),
        (ImageTextInteraction(where=3), "pixels", 9, "acts after 3 encoder blocks; tokens must leave after 1 to 2"),
        (ImageTextInteraction(where=9), "pixels", 9, r"where=9 is outside 1\.\.3"),
        (ImageTextInteraction(where=1), [], 9, "calibration needs at least one picture"),
        (ImageTextInteraction(where=1), torch.zeros(0, 3, 24, 24), 9, "calibration needs at least one picture"),
        (ImageTextInteraction(where=1), torch.zeros(3, 24, 24), 9, r"shape \(3, 24, 24\); a batch of \(B, C, height"),
        (ImageTextInteraction(where=1), "picture", 9, "pictures that are no pixel values need processor="),
        (ImageTextInteraction(where=1), "mixed", 9, "1 of 2 pictures are pixel values; give one kind"),
        (ImageTextInteraction(where=1), "pixels", 0, "target=0 is below 1 token"),
        (ImageTextInteraction(where=1), "pixels", 1.5, "target=1.5"),
        (ImageTextInteraction(where=1), "pixels", True, "target"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(
    method: Any, images: Any, target: Any, message: str
) -> None:
    picture = Image.new("RGB", (24, 24))
    named = {"pixels": pixels(), "picture": [picture], "mixed": [pixels(), picture]}
    chosen = named[images] if isinstance(images, str) else images
    hook = model().model.vision_tower.register_forward_pre_hook(encoded_nothing)
    try:
        with pytest.raises(FoveateError, match=message):
            foveate.calibrate(model(), method, chosen, target)
    finally:
        hook.remove()


def test_a_target_above_all_tokens_is_refused() -> None:
    with pytest.raises(FoveateError, match="target=37 is above the 36 tokens"):
        foveate.calibrate(model(), ImageTextInteraction(where=1), pixels(), 37)


def test_an_encoder_without_cls_is_refused() -> None:
    with pytest.raises(FoveateError, match=r"needs tower\.0\.cls"):
        foveate.calibrate(tiny.model(tower="siglip"), ImageTextInteraction(where=1), pixels(), 9)


def test_a_model_that_is_being_pruned_is_refused() -> None:
    with foveate.prune(model(), FoPru(keep=9)), pytest.raises(FoveateError, match=r"is being pruned.*stop\(\)"):
        foveate.calibrate(model(), ImageTextInteraction(where=1), pixels(), 9)


def test_a_method_of_ones_own_is_fitted_with_its_own_signals() -> None:
    """Whatever has a calibrate() is given what it needs, in the places of its own prompt."""
    seen: list[Signals] = []

    class Own(FoPru):
        def calibrate(self, signals: Any, target: Any) -> Any:
            seen.extend(signals)
            return self

    own = Own(keep=9)
    assert foveate.calibrate(model(), own, [pixels()[:2], pixels()[2:3]], 9) is own
    assert [one.shape for one in seen] == [(2, 36), (1, 36)]
    assert [(one.original, one.grid) for one in seen] == [(36, (6, 6))] * 2
    block = seen[0].tower["read"]
    assert isinstance(block, Block)
    assert block.received is not None
    assert block.received.shape == (2, 36)


def test_pictures_with_the_models_own_processor() -> None:
    """PIL pictures of any size on the model that ships with the package."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from foveate.scenes.generator import demo

    mini = AutoModelForImageTextToText.from_pretrained(foveate.MINI, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(foveate.MINI)
    scene = demo().image(0)
    pictures = [scene, scene.rotate(180), scene.resize((500, 400))]
    found = foveate.calibrate(mini, ImageTextInteraction(visual_only=True), pictures, 100, processor=processor)
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is there ?"}]}]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    counts = []
    with foveate.prune(mini, found) as trace, torch.no_grad():
        for picture in pictures:
            mini(**processor(images=[picture], text=text, return_tensors="pt"))
            counts.append(trace.images[0].after)
    assert len(set(counts)) > 1
    assert sum(counts) / 3 == pytest.approx(100, abs=2)


@pytest.mark.parametrize(
    ("family", "where"),
    [
        *((name, 3) for name in ("llava-next", "llava-onevision", "internvl", "qwen2-vl", "gemma3", "mistral3")),
        # Which tiles of InternVL are one picture a prompt says; without one each stands for itself.
        *((name, "output") for name in ("llava-next", "llava-onevision", "qwen2-vl", "gemma3", "mistral3")),
    ],
)
def test_families_are_fitted_by_what_they_see_of_a_prompt(where: Any, family: str) -> None:
    """The average over tiles inside the encoder, over pictures behind it, is the one that pruning then has."""
    made = tiny.model(family, blocks=6)
    given = tiny.inputs(made, "3i4", "2i2", "1i1")
    pictures = {name: value for name, value in given.items() if "ids" not in name and name != "attention_mask"}
    method = ImageTextInteraction(where=where, attention="received", visual_only=True)
    seen: list[Signals] = []
    with tiny.prune(made, spying(method, seen)) as trace:
        made.generate(**given, max_new_tokens=1)
    read = [(signals.original, curve) for signals in seen for curve in method.similarity(signals)]
    fitted = foveate.calibrate(made, method, pictures, 0.3)
    assert isinstance(fitted, ImageTextInteraction)
    mine = [
        (batch.original, curve) for batch in signals_of(made, method, pictures) for curve in method.similarity(batch)
    ]
    assert sorted(count for count, _ in mine) == sorted(count for count, _ in read)
    for count, curve in mine:
        assert any(count == other and torch.allclose(curve, theirs, atol=1e-5) for other, theirs in read)
    with tiny.prune(made, fitted) as trace:
        made.generate(**given, max_new_tokens=1)
    kept = sum(image.after for image in trace.images) / sum(image.original for image in trace.images)
    assert abs(kept - 0.3) < 0.25


def spying(method: ImageTextInteraction, seen: list[Signals]) -> ImageTextInteraction:
    class Spy(ImageTextInteraction):
        def select(self, signals: Signals) -> Any:
            seen.append(signals)
            return super().select(signals)

    return Spy(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)})
