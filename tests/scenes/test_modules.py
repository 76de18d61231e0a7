"""The modules of learned methods that ship beside `mini`: small, fit for it, and aware of where objects are."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, LlavaForConditionalGeneration

import foveate
from foveate.modules import dynamicvit, lvpruning
from foveate.runtime.encoder.observe import observe
from foveate.scenes import mini
from foveate.scenes.generator import generate


def test_they_fit_the_model_and_add_little_to_its_folder() -> None:
    config = AutoConfig.from_pretrained(mini.FOLDER)
    lvpruning.load("mini").check(config)
    dynamicvit.load("mini").check(config.vision_config)
    assert (mini.FOLDER / "dynamicvit" / "model.safetensors").stat().st_size < 2_000_000


def test_dynamicvit_keeps_objects_of_pictures_that_it_never_saw() -> None:
    """Of pairs of a patch with and one without an object, the first scores above the second in most."""
    model = LlavaForConditionalGeneration.from_pretrained(foveate.MINI, dtype=torch.float32)
    scenes = generate(4, seed=5, split="test")
    predictors = dynamicvit.load("mini")
    depth = predictors.config.layers[0] - 1
    hidden = observe(model, mini.normalise(scenes.pixels), [f"tower.{depth}.hidden"])[depth].hidden
    assert hidden is not None
    scores = predictors(0, hidden)
    keeping = scores[..., 0] - scores[..., 1]
    for row, boxes in zip(keeping, scenes.patches(), strict=True):
        there = boxes.any(dim=0)
        above = (row[there][:, None] > row[~there][None]).float().mean().item()
        assert above == pytest.approx(1.0, abs=0.15)
