"""The joint space of `clip/`: the frozen tower stays as it is, and texts learn to find their patches."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from foveate.core import FoveateError
from foveate.scenes import joint_space, mini
from foveate.scenes.generator import generate
from foveate.scenes.joint_space import project, relevance_exam, states, text_vectors, texts, train_clip_text


def test_the_tower_stays_frozen_and_the_losses_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = joint_space.generate
    monkeypatch.setattr(joint_space, "generate", lambda batch, seed: draw(batch, seed=1))
    model = mini.build(0, mini.llava_config(width=16, layers=2))
    seen: list[dict] = []
    train_clip_text(model, tmp_path, max_seconds=600, pictures=2, steps=40, batch=2, rate=3e-3, progress=seen.append)
    assert [line["step"] for line in seen] == [20, 40]
    assert seen[1]["patch"] < seen[0]["patch"]
    clip = CLIPModel.from_pretrained(tmp_path)
    for name, value in mini.tower(model).state_dict().items():
        assert torch.equal(value.to(torch.bfloat16), clip.vision_model.state_dict()[name]), name


def test_patch_vectors_are_the_projected_states_that_the_projector_reads() -> None:
    clip = mini.build_clip(mini.build(0, mini.llava_config(width=16, layers=2))).eval()
    scenes = generate(2, seed=0)
    patches, pictures = project(clip, *states(clip, scenes.pixels))
    with torch.no_grad():
        seen = clip.get_image_features(pixel_values=mini.normalise(scenes.pixels)).pooler_output
    assert patches.shape == (2, 576, 128)
    assert torch.allclose(patches.norm(dim=-1), torch.ones(2, 576), atol=1e-5)
    assert torch.allclose(pictures, seen / seen.norm(dim=-1, keepdim=True), atol=1e-5)


def test_a_text_vector_does_not_depend_on_its_neighbours() -> None:
    clip = mini.build_clip(mini.build(0, mini.llava_config(width=16, layers=2))).eval()
    with torch.no_grad():
        alone = text_vectors(clip, ["a red dog"])
        beside = text_vectors(clip, ["a red dog", "what color is behind the umbrella ?"])
    assert torch.allclose(alone[0], beside[0], atol=1e-5)


def test_there_is_one_text_about_every_object() -> None:
    scenes = generate(6, seed=2)
    written, about = texts(scenes, random.Random(0))
    assert len(written) == len(about) == int(scenes.count.sum())
    unknown = mini.clip_tokenizer()(written)["input_ids"]
    assert not any(mini.PAD in ids for ids in unknown)


def test_no_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="max_seconds=0, steps=3, pictures=1024 leave nothing to train"):
        train_clip_text(mini.FOLDER, tmp_path, max_seconds=0, steps=3)


def test_the_shipped_texts_find_their_objects() -> None:
    clip = CLIPModel.from_pretrained(mini.FOLDER / "clip", dtype=torch.float32).eval()
    found = relevance_exam(clip, 8, seed=99)
    assert found["best"] >= 0.8
    assert found["margin"] > 0
