"""A family whose pictures and videos have an encoder each: what is read in which, and what only pictures can have."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import tiny
from models.untouched import untouched
from PIL import Image
from torch import Tensor

from foveate.calibrate import calibrate
from foveate.core import FoveateError
from foveate.methods.fopru import FoPru
from foveate.methods.image_text_interaction import ImageTextInteraction
from foveate.runtime.encoder.observe import observe
from foveate.spec import parse

PATCHES = 16  # of a frame, each 4 x 4


def two_towers() -> Any:
    return tiny.model("video-llava")


def generate(model: Any, given: dict[str, Tensor]) -> Tensor:
    out = model.generate(**given, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits)


def llava(model: Any) -> Any:
    """LLaVA-1.5 of the same weights, which sees pictures as this family does."""
    made = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=model.config.vision_config,
            text_config=model.config.text_config,
            image_token_id=tiny.IMAGE,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )
    weights = {
        name.replace("image_tower", "vision_tower"): value
        for name, value in model.state_dict().items()
        if "video_tower" not in name
    }
    made.load_state_dict(weights)
    made.generation_config = model.generation_config
    return made.eval()


@pytest.mark.parametrize("method", ["tome:keep=0.5", "evocut", "visionzip:keep=0.5", "fopru:keep=0.5"])
def test_pictures_are_pruned_as_those_of_llava(method: str) -> None:
    """Inside the encoder, where tokens merge with its CLS at hand, and behind it."""
    model = two_towers()
    given = tiny.inputs(model, "3i4", "2i1i5", "6")
    twin = llava(model)
    with untouched(model), tiny.prune(model, parse(method)) as trace:
        found = generate(model, given)
    with tiny.prune(twin, parse(method)) as wanted:
        expected = generate(twin, given)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert len(trace.images) == 3
    for image, other in zip(trace.images, wanted.images, strict=True):
        assert torch.equal(image.kept, other.kept)
        assert image.after < PATCHES
    assert trace.latest.budget == wanted.latest.budget


def test_what_is_read_of_a_video_is_read_in_its_own_encoder() -> None:
    model = two_towers()
    given = tiny.inputs(model, "3v4", "2v1v5")
    method = FoPru(keep=0.25, budget="image")
    with tiny.prune(model, method) as trace:
        generate(model, given)
    alone = two_towers()
    alone.model.image_tower = copy.deepcopy(alone.model.video_tower)  # so that frames can be observed as pictures
    frames = given["pixel_values_videos"].flatten(0, 1)
    block = observe(alone, frames, method.needs)["read"]
    assert block.received is not None and block.given is not None
    by_video = {name: getattr(block, name).view(3, 3 * PATCHES) for name in ("received", "given")}
    significance = significance_of(by_video["given"], by_video["received"])
    for image, scores in zip(trace.images, significance, strict=True):
        assert image.original == 3 * PATCHES
        assert image.kept.tolist() == sorted(scores.argsort(descending=True)[:12].tolist())


def significance_of(given: Tensor, received: Tensor) -> Tensor:
    """FoPru's: of both sums, the one that is spread more over a video's tokens."""
    return torch.where((given.std(dim=1) > received.std(dim=1))[:, None], given, received)


def test_the_cls_of_each_frame_stays() -> None:
    model = two_towers()
    given = tiny.inputs(model, "3v4")
    with tiny.prune(model, FoPru(keep=1)) as trace:
        generate(model, given)
    kept = trace.latest.index[0].tolist()
    cls = [3, 3 + 17, 3 + 34]
    text = {0, 1, 2, *range(54, 59)}
    assert set(cls) < set(kept)
    (patch,) = set(kept) - text - set(cls)
    place = patch - 3
    assert trace.images[0].kept.tolist() == [place - place // 17 - 1]


@pytest.mark.parametrize("names", [("pixel_values_images",), ("pixel_values_images", "pixel_values")])
@pytest.mark.parametrize("direct", [True, False])
def test_pixels_by_the_name_that_the_processor_gives_them(names: tuple[str, ...], direct: bool) -> None:
    """The first name has the pixels, the other one None, as a caller hands over all of its arguments."""
    model = two_towers()
    given = tiny.inputs(model, "3i4", "2i1i5")
    others: dict[str, Any] = {name: value for name, value in given.items() if name != "pixel_values"}
    answers = []
    for one in (("pixel_values",), names, names[::-1]):
        values = {**others, **dict.fromkeys(one), one[0]: given["pixel_values"]}
        with torch.no_grad(), tiny.prune(model, FoPru(keep=0.5)) as trace:
            answers.append(model(**values).logits if direct else generate(model, values))
        assert [image.after for image in trace.images] == [8, 8, 8]
    assert torch.equal(answers[1], answers[0])
    assert torch.equal(answers[2], answers[0])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "tome:keep=0.5",
            (
                "videos of video-llava have an encoder of their own, and tome:keep=0.5 acts inside that of pictures; "
                "use a method that acts behind it"
            ),
        ),
        (
            "cdpruner",
            (
                "videos of video-llava have an encoder of their own, which clip= does not belong to; use a method that "
                "needs no CLIP"
            ),
        ),
    ],
)
@pytest.mark.parametrize("direct", [True, False])
def test_videos_where_a_method_relies_on_the_encoder_of_pictures(method: str, message: str, direct: bool) -> None:
    model = two_towers()
    given = tiny.inputs(model, "3v4")
    seen: list[int] = []
    hook = model.model.video_tower.register_forward_hook(lambda *_: seen.append(1))
    with untouched(model), tiny.prune(model, parse(method)), pytest.raises(FoveateError) as error:
        model(**given) if direct else generate(model, given)
    hook.remove()
    assert str(error.value) == message
    assert not seen, "refused before anything is encoded"


def test_a_strategy_that_hands_over_the_cls_of_pictures() -> None:
    model = tiny.model("video-llava", vision_feature_select_strategy="full")
    with pytest.raises(FoveateError, match="vision_feature_select_strategy='full' on clip_vision_model"):
        tiny.prune(model, parse("fastv"))


def test_calibration_with_a_processor_of_the_old_name() -> None:
    model = two_towers()
    pixels = tiny.inputs(model, "1i1i1i")["pixel_values"]
    coming = iter(pixels.split(1))
    processor = SimpleNamespace(image_processor=lambda one, return_tensors: {"pixel_values_images": next(coming)})
    pictures = [Image.new("RGB", (8, 8)) for _ in range(3)]
    fitted = calibrate(model, ImageTextInteraction(where=2), pictures, 0.5, processor=processor)
    assert fitted == calibrate(model, ImageTextInteraction(where=2), pixels.split(1), 0.5)
