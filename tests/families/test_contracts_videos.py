"""What methods must hold to on videos of every family, and where videos are refused."""

from __future__ import annotations

import dataclasses
import importlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from models import tiny, tiny_calls, tiny_families, tiny_parts, tiny_processors
from models.untouched import untouched
from references import agreement, family_reference
from references.contract import SAMPLES, check_agreement, each_attention, each_served, generate, model_of, served

from foveate import methods
from foveate.core import FoveateError
from foveate.families.rows import FAMILIES
from foveate.runtime.seams import CACHE


@each_attention
@each_served([*SAMPLES[:1], "divprune", "fastv", "pyramiddrop"], tiny_families.with_videos())
def test_videos_equal_the_reference(name: str, family: str, attn: str, asked: Any) -> None:
    model = model_of(family, attn)
    method = served(model, name)
    given = tiny.inputs(model, "3v4", "2v1v5", "6")
    unpruned = generate(model, given)
    everything = agreement.keeping_all(method)
    assert everything is not None
    with tiny.prune(model, everything):
        same = generate(model, given)
    torch.testing.assert_close(torch.stack(same.logits), torch.stack(unpruned.logits), atol=1e-5, rtol=0)
    seen = asked(method)
    with untouched(model), tiny.prune(model, method) as trace:
        out = generate(model, given)
        direct = model(**given).logits
    assert direct.shape[1] == given["input_ids"].shape[1]
    check_agreement(model, given, out, trace.history[:1], seen[: len(seen) // 2])
    pictures = [one for row in range(3) for one in family_reference.pictures(model, given.alone(row))]
    assert [image.original for image in trace.images] == [one.visual.numel() for one in pictures]


@each_served(["fopru", "fastv"], tiny_families.with_videos())
def test_a_video_in_the_turn_after_a_picture(name: str, family: str, asked: Any) -> None:
    model = model_of(family)
    method = served(model, name)
    first, second = tiny.inputs(model, "3i4", "6"), tiny.inputs(model, "2v3", "1v2", seed=1)
    seen = asked(method)
    with tiny.prune(model, method) as trace:
        out = generate(model, first, max_new_tokens=3)
        given, whole = first.continued(out.sequences, second)
        out = generate(model, given, **{CACHE: getattr(out, CACHE)})
    check_agreement(model, whole, out, trace.history, seen)


FRAMES = tuple(family.name for family in FAMILIES if family.frames)


def video_in_words(family: str, frames: int) -> tuple[Any, str]:
    """What the stock processor of a family writes for a video, and a tokenizer that knows its tokens."""
    module = importlib.import_module(f"transformers.models.{family}.processing_{family}")
    if family == "internvl":
        processor = tiny_processors.PROCESSORS[family]()
        return processor.tokenizer, processor.replace_video_token({"pixel_values_videos": [torch.zeros(frames, 1)]}, 0)
    marks = ("<fake_token_around_image>", "<global-img>")
    names = dict(image_seq_len=16, image_token="<image>", fake_image_token=marks[0], global_image_token=marks[1])
    told = SimpleNamespace(fps=1, timestamps=list(range(frames)), duration=frames)
    with mock.patch.object(module, "num2words", str):
        text = module.SmolVLMProcessor.replace_video_token(
            SimpleNamespace(**names), {"pixel_values": torch.zeros(1, frames, 1), "video_metadata": [told]}, 0
        )
    return tiny_processors.tokenizer(more=marks), text


@pytest.mark.parametrize("family", FRAMES)
@pytest.mark.parametrize("name", ["fopru", "divprune", "fastv", "pyramiddrop", "tome"])
def test_frames_that_are_handed_over_as_pictures(name: str, family: str, asked: Any) -> None:
    """Text stands between them, so each is pruned as the same picture alone is."""
    model = model_of(family)
    method = served(model, name)
    pictures = tiny.inputs(model, "1i1i1i").pictures[0]
    frames = [dataclasses.replace(one, tokens=9, pixels=one.pixels[:1]) for one in pictures]
    frames = frames if family == "internvl" else pictures
    tokenizer, text = video_in_words(family, len(frames))
    ids = tokenizer(f"w7 w8 {text}\nw9", return_tensors="pt")["input_ids"]
    given = tiny_calls.call(model, ids, torch.ones_like(ids), [frames])
    seen = asked(method)
    with untouched(model), tiny.prune(model, method) as trace:
        out = generate(model, given)
        if "tower" not in {part.site for part in method.parts()}:
            check_agreement(model, given, out, trace.history[:1], seen)
        together = trace.images
        assert [image.original for image in together] == [9 if family == "internvl" else 16] * 3
        if {part.site for part in method.parts()} == {"layer"}:
            return  # chosen by the text as well
        for frame, image in zip(frames, together, strict=True):
            alone = torch.cat([ids[:, :1], ids[ids == tiny_parts.IMAGE][None, : frame.tokens], ids[:, -1:]], dim=1)
            generate(model, tiny_calls.call(model, alone, torch.ones_like(alone), [[frame]]))
            assert torch.equal(image.kept, trace.images[0].kept)


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("internvl", "internvl takes the frames of a video as pictures; pass them as pixel_values"),
        ("gemma3", "videos of gemma3 cannot be pruned; pictures can"),
    ],
)
def test_videos_where_they_are_not_described(family: str, told: str) -> None:
    model = model_of(family)
    given = tiny.inputs(model, "1i")
    with tiny.prune(model, methods.get("fastv")()), pytest.raises(FoveateError) as error:
        generate(model, {**given, "pixel_values_videos": given["pixel_values"]})
    assert str(error.value) == told


def test_pictures_beside_sounds() -> None:
    model = model_of("gemma4")
    given = tiny.inputs(model, "1i")
    with tiny.prune(model, methods.get("random")()), pytest.raises(FoveateError) as error:
        generate(model, {**given, "input_features": torch.zeros(1, 4, 8)})
    assert str(error.value) == "pictures beside sounds in one call cannot be pruned; give them in separate turns"


def test_pictures_and_videos_in_one_call() -> None:
    model = model_of("qwen2-vl")
    given = tiny.inputs(model, "1i1v")
    with tiny.prune(model, methods.get("fastv")()), pytest.raises(FoveateError) as error:
        generate(model, given)
    assert str(error.value) == "pictures and videos in one call cannot be pruned; give them in separate turns"
