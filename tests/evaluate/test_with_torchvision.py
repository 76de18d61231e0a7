"""The processors of users who have torchvision: they read pictures through it, and videos, which nothing else can."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny, tiny_processors
from models.untouched import untouched
from PIL import Image

import foveate
from foveate.evaluate.check import check
from foveate.inference.answers import encode, greedy

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # numpy, on stock GLM-4V
]

# What stands for a video in the text of a prompt.
HOLDERS = {
    "llava-onevision": "<video>",
    "llava-next-video": "<video>",
    "video-llava": "<video>",
    "qwen2-vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen2.5-vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen3-vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen3-vl-moe": "<|vision_start|><|video_pad|><|vision_end|>",
    "internvl": "<video>",
}
each_family_with_videos = pytest.mark.parametrize("name", HOLDERS)


@pytest.fixture(autouse=True)
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_processors, "backend", "torchvision")


def processor(name: str) -> Any:
    return tiny_processors.WITH_TORCHVISION[name]()


def picture(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


def clip(frames: int, seed: int = 0) -> Any:
    """(T, H, W, C) frames of noise."""
    return np.random.default_rng(seed).integers(0, 256, (frames, 24, 32, 3), dtype=np.uint8)


def videos(name: str, *prompts: tuple[str, Any]) -> Any:
    """What a processor makes of questions, each about a video."""
    texts = [f"w3 {HOLDERS[name]} {words} w4" for words, _ in prompts]
    settings = dict(padding=True, return_tensors="pt", do_sample_frames=False)
    return processor(name)(text=texts, videos=[[video] for _, video in prompts], **settings)


@pytest.mark.parametrize("name", tiny_processors.WITH_TORCHVISION)
def test_the_contract_holds_on_pictures(name: str) -> None:
    model = tiny.model(name, blocks=6)
    made = processor(name)
    assert "Pil" not in type(made.image_processor).__name__ or name in ("llava-1.5", "vipllava")
    found = check(model, encode(model, made, [[picture(44, 33)]], ["w7 w8"]))
    assert [outcome for outcome in found.outcomes if not outcome.passed] == []


@each_family_with_videos
def test_the_contract_holds_on_videos(name: str) -> None:
    model = tiny.model(name, blocks=6)
    found = check(model, videos(name, ("w7 w8", clip(4))))
    assert [outcome for outcome in found.outcomes if not outcome.passed] == []
    assert found.tokens


@each_family_with_videos
@pytest.mark.parametrize("spec", ["fopru:keep=0.5", "fastv:layer=2,keep=0.3", "h2o"])
def test_videos_of_different_lengths_in_one_batch(spec: str, name: str) -> None:
    """A padded batch gives each row what it gets alone."""
    model = tiny.model(name, blocks=6)
    prompts = [("w7 w8 w9", clip(4)), ("w10", clip(2 if "qwen" in name else 4, seed=1))]
    with untouched(model), torch.no_grad(), foveate.prune(model, spec) as trace:
        together = greedy(model, videos(name, *prompts), max_new_tokens=4)
        kept = [image.kept.tolist() for image in trace.images]
        alone = [greedy(model, videos(name, prompt), max_new_tokens=4) for prompt in prompts]
        single = [image.kept.tolist() for call in trace.history[1:] for image in call.images]
    assert kept == single
    for row, one in enumerate(alone):
        assert torch.equal(together[row, -4:], one[0, -4:])
    if spec != "h2o":
        assert all(image.after < image.original for image in trace.history[0].images)
