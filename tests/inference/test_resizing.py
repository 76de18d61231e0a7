"""Pictures scaled down before the processor: how far, what the processor then makes of them, and who may not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny, tiny_processors
from PIL import Image
from references import documented

import foveate
from foveate.core import FoveateError
from foveate.families import FAMILIES, family_of
from foveate.inference.answers import encode, greedy
from foveate.inference.resizing import Scaler, check_runnable, counting, scaled_size, scaling
from foveate.methods.fopru import FoPru
from foveate.methods.random import Random
from foveate.methods.resize import Resize
from foveate.spec import parse_stages

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # stock GLM-4V

NATIVE = [family.name for family in FAMILIES if family.described(family.towers[0]).packed]
# lighton-ocr's processor is not among the tiny ones; mistral3's needs torchvision.
TRIED = [name for name in NATIVE if name in tiny_processors.PROCESSORS]
SIZES = [(40, 40), (48, 24), (17, 60), (33, 21), (9, 70), (8, 8), (5, 13)]
each_native = pytest.mark.parametrize("family", TRIED)


def noise(width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(width * 100 + height)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator).byte().numpy())


def placeholders(model: Any, processor: Any, picture: Image.Image) -> int:
    """What the processor really makes."""
    ids = encode(model, processor, [[picture]], ["w7"])["input_ids"]
    return int((ids == family_of(model).image_token_id(model.config)).sum())


@pytest.fixture(scope="module")
def made() -> Any:
    """Models and processors by family, each built once."""
    known: dict[str, Any] = {}

    def of(family: str) -> tuple[Any, Any]:
        if family not in known:
            known[family] = tiny.model(family), tiny_processors.PROCESSORS[family]()
        return known[family]

    return of


def test_most_native_families_are_tried() -> None:
    assert set(NATIVE) - set(TRIED) == {"mistral3", "lighton-ocr"}


def test_the_documentation_says_which_they_are() -> None:
    assert [family.name for family in FAMILIES if documented.served("resize", family.name)] == NATIVE


@each_native
def test_what_is_said_of_a_size_is_what_is_made_of_it(family: str, made: Any) -> None:
    model, processor = made(family)
    count = counting(processor)
    for size in SIZES:
        assert count(size) == placeholders(model, processor, noise(*size)), size


@each_native
def test_the_largest_picture_of_the_same_proportions(family: str, made: Any) -> None:
    """No larger one of the same proportions would have fitted, by what the processor makes of each."""
    model, processor = made(family)
    whole = noise(44, 30)
    original = placeholders(model, processor, whole)
    sides = {side: scaled_size(whole.size, side) for side in range(44, 0, -1)}
    counts = {side: placeholders(model, processor, whole.resize(size)) for side, size in sides.items()}
    least = min(counts.values())
    assert least < original, "or nothing is tried"
    for budget in range(least, original + 1):
        wanted = next(side for side in sides if counts[side] <= budget)
        assert Scaler(model, processor, Resize(keep=budget)).size(whole.size) == sides[wanted]
    smaller = foveate.scale_down(model, processor, whole, keep=least)
    assert placeholders(model, processor, smaller) == least
    # A share is taken of the tokens that the whole picture has.
    budget = max(least / original, 0.8)
    assert Scaler(model, processor, Resize(keep=budget)).size(whole.size) == Scaler(
        model, processor, Resize(keep=round(budget * original))
    ).size(whole.size)


@each_native
def test_the_model_answers_as_to_a_picture_that_its_user_scaled(family: str, made: Any) -> None:
    model, processor = made(family)
    pictures, asked = [noise(44, 30), noise(30, 44)], ["w7 w8", "w9"]
    scaler = Scaler(model, processor, Resize(keep=0.7))
    inputs = scaler.encode([[picture] for picture in pictures], asked)
    by_hand = [picture.resize(scaler.size(picture.size), Image.Resampling.BICUBIC) for picture in pictures]
    assert all(hand.size != whole.size for hand, whole in zip(by_hand, pictures, strict=True)), "or nothing is tried"
    expected = encode(model, processor, [[picture] for picture in by_hand], asked)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert torch.equal(greedy(model, inputs, max_new_tokens=3), greedy(model, expected, max_new_tokens=3))


def test_a_picture_that_fits_is_left_alone(made: Any) -> None:
    picture = noise(44, 30)
    assert foveate.scale_down(*made("qwen2.5-vl"), picture, keep=1.0) is picture


def test_pixtrals_pictures_are_counted_by_their_longest_edge() -> None:
    """At most 1,540 pixels long, 28 to a token, rounded up: 3,080 x 700 is seen as 1,540 x 350."""
    pictures = SimpleNamespace(size={"longest_edge": 1540}, patch_size={"height": 14, "width": 14})
    count = counting(SimpleNamespace(image_processor=pictures, patch_size=14, spatial_merge_size=2))
    assert count((1540, 28)) == 55
    assert count((3080, 700)) == 55 * 13
    assert count((29, 57)) == 2 * 3
    plain = counting(SimpleNamespace(image_processor=pictures, patch_size=14))
    assert plain((29, 57)) == 3 * 5


def test_pixtrals_own_processor_agrees() -> None:
    pytest.importorskip("torchvision")
    model, processor = tiny.model("mistral3"), tiny_processors.WITH_TORCHVISION["mistral3"]()
    count = counting(processor)
    for size in SIZES:
        assert count(size) == placeholders(model, processor, noise(*size)), size


@pytest.mark.parametrize(("whole", "side", "size"), [((100, 50), 51, (51, 26)), ((7, 300), 10, (1, 10))])
def test_proportions_are_kept_to_a_pixel(whole: tuple[int, int], side: int, size: tuple[int, int]) -> None:
    assert scaled_size(whole, side) == size


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("family", [family.name for family in FAMILIES if family.name not in NATIVE])
def test_a_processor_that_scales_small_pictures_up_is_refused(family: str) -> None:
    model = tiny.model(family)
    with pytest.raises(FoveateError) as error:
        foveate.scale_down(model, None, noise(40, 30))
    assert f"the processor of {family} makes as many tokens of a small one" in str(error.value)


@pytest.mark.parametrize(
    ("size", "keep", "message"),
    [
        ((44, 30), 1, "resize:keep=1 allows 1 tokens of a picture of 44 x 30 pixels, and the processor makes"),
        ((44, 30), 999, "keep=999 asks for 999 tokens but the image has"),
        ((4000, 5), 0.5, "the processor takes no picture as narrow as 4000 x 5 pixels; crop it"),
    ],
)
def test_a_budget_that_no_size_reaches(made: Any, size: tuple[int, int], keep: Any, message: str) -> None:
    with pytest.raises(FoveateError) as error:
        foveate.scale_down(*made("qwen2.5-vl"), Image.new("RGB", size), keep=keep)
    assert message in str(error.value)


def test_the_nearest_budget_is_one_that_works(made: Any) -> None:
    model, processor = made("qwen2.5-vl")
    with pytest.raises(FoveateError) as error:
        check_runnable(model, processor, [Resize(keep=1)], [(44, 30)])
    nearest = int(str(error.value).rpartition("keep=")[2])
    check_runnable(model, processor, [Resize(keep=nearest)], [(44, 30)])


def test_a_processor_that_says_nothing_of_sizes(made: Any) -> None:
    model, _ = made("qwen2.5-vl")
    with pytest.raises(FoveateError, match="SimpleNamespace does not say how many tokens it makes of a picture"):
        Scaler(model, SimpleNamespace(image_processor=SimpleNamespace(size={})), Resize())


def test_a_processor_that_makes_other_numbers_than_it_says(made: Any) -> None:
    model, processor = made("qwen2.5-vl")
    scaler = Scaler(model, processor, Resize(keep=0.7))
    size = scaler.size((44, 30))
    scaler._count = lambda of: 5 if of == size else 9
    with pytest.raises(FoveateError, match=r"the processor made \[\d+\] visual tokens of .* and says \[5\] of their"):
        scaler.encode([[noise(44, 30)]], ["w7"])


def test_it_stands_alone() -> None:
    assert scaling([Resize(keep=9)]) == Resize(keep=9)
    assert scaling([FoPru(), Random()]) is None and scaling([]) is None
    for spec in ("resize+fopru", "fopru+resize"):
        with pytest.raises(FoveateError, match=r"joins stages to one that scales .* give resize:keep=0.25 alone"):
            scaling(parse_stages(spec))


def test_prune_comes_too_late(made: Any) -> None:
    with pytest.raises(FoveateError) as error:
        foveate.prune(made("qwen2.5-vl")[0], "resize:keep=0.25")
    assert "prune() is given what the processor has made; foveate eval, run and bench scale it" in str(error.value)
