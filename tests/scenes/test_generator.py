"""Pictures show what their table says, where it says; splits never meet; the same seed shows the same scenes."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.core import FoveateError
from foveate.scenes import generator
from foveate.scenes.generator import Scenes, demo, generate, held_out
from foveate.scenes.vocabulary import COLORS, NAMES

ASSETS = Path(generator.__file__).parent / "assets"
FIELDS = ("pixels", "count", "names", "colors", "digits", "boxes")


@pytest.fixture(scope="module")
def scenes():
    return generate(24, seed=7)


def objects(scenes):
    """(picture, place) of every object."""
    return [(row, place) for row in range(len(scenes)) for place in range(scenes.count[row])]


def shape(box):
    """Centre and radius of the disc in a box, worked out from the box's sides alone."""
    x0, y0, x1, y1 = box
    assert x1 - x0 == y1 - y0
    # The tag reaches about 0.7 r + 15 to the right of the centre and the disc r to its left.
    radius = min(range(20, 40), key=lambda r: abs(r + 0.7 * r + 15 - (x1 - x0)))
    return x0 + radius, y0 + radius, radius


def handmade(*boxes):
    """Scenes with given boxes and nothing else to look at."""
    rows = torch.full((1, 7, 4), -1)
    rows[0, : len(boxes)] = torch.tensor(boxes)
    table = torch.where(rows[..., 0] >= 0, 0, -1)
    return Scenes(torch.zeros(1, 3, 336, 336, dtype=torch.uint8), (table >= 0).sum(1), table, table, table, rows)


# ---------------------------------------------------------------------------------------------------------------------
# the table


def test_shapes_types_and_ranges(scenes):
    assert len(scenes) == 24
    assert (scenes.pixels.shape, scenes.pixels.dtype) == ((24, 3, 336, 336), torch.uint8)
    assert scenes.boxes.shape == (24, 7, 4)
    there = torch.arange(7) < scenes.count[:, None]
    assert scenes.count.min() >= 1 and scenes.count.max() <= 7
    for field, most in (("names", 47), ("colors", 7), ("digits", 9)):
        values = getattr(scenes, field)
        assert (values.shape, values.dtype) == ((24, 7), torch.int64)
        assert values[there].min() >= 0 and values[there].max() <= most
        assert (values[~there] == -1).all()
    assert (scenes.boxes[~there] == -1).all()


def test_everything_occurs_about_equally_often():
    for split in ("train", "test"):
        table = generator._draw_table(7000, split, torch.Generator().manual_seed(0))
        counts = torch.bincount((table["names"] >= 0).sum(1), minlength=8)[1:]
        assert counts.min() > 850 and counts.max() < 1150  # 1000 expected of each, standard deviation 29
        for field, choices in (("names", 48), ("colors", 8), ("digits", 10)):
            counts = torch.bincount(table[field][table[field] >= 0], minlength=choices) * choices / (4 * 7000)
            assert counts.min() > 0.8 and counts.max() < 1.2, (split, field)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), split=st.sampled_from(["train", "test"]))
def test_names_are_distinct_boxes_apart_and_in_reading_order(seed, split):
    scenes = generate(2, seed=seed, split=split)
    for row in range(2):
        count = scenes.count[row]
        assert len(set(scenes.names[row, :count].tolist())) == count
        boxes = scenes.boxes[row, :count].tolist()
        assert all(0 <= x0 < x1 <= 336 and 0 <= y0 < y1 <= 336 for x0, y0, x1, y1 in boxes)
        for one, other in itertools.combinations(boxes, 2):
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        centres = [((y0 + y1) / 2 // 84, (x0 + x1) / 2) for x0, y0, x1, y1 in boxes]
        assert centres == sorted(centres)


# ---------------------------------------------------------------------------------------------------------------------
# the picture, compared with the table by means that the generator does not use


def test_what_is_painted_fills_the_boxes_exactly(monkeypatch, scenes):
    monkeypatch.setattr(generator, "_paint", lambda *arguments: None)
    bare = generate(24, seed=7)
    changed = (bare.pixels != scenes.pixels).any(1)  # (B, 336, 336)
    for row, place in objects(scenes):
        x0, y0, x1, y1 = scenes.boxes[row, place].tolist()
        ys, xs = changed[row, y0:y1, x0:x1].nonzero().unbind(1)
        assert (xs.min(), ys.min(), xs.max(), ys.max()) == (0, 0, x1 - x0 - 1, y1 - y0 - 1)
        changed[row, y0:y1, x0:x1] = False
    assert not changed.any()


def test_disc_has_its_colour(scenes):
    palette = torch.tensor(list(COLORS.values()), dtype=torch.uint8)
    for row, place in objects(scenes):
        x0, y0, x1, y1 = scenes.boxes[row, place].tolist()
        crop = scenes.pixels[row, :, y0:y1, x0:x1].flatten(1).T
        votes = (crop[:, None] == palette).all(-1).sum(0)  # pixels of exactly each colour
        assert votes.argmax() == scenes.colors[row, place]
        assert votes.max() > 300


def test_disc_is_round(scenes):
    palette = list(COLORS.values())
    for row, place in objects(scenes):
        x, y, radius = shape(scenes.boxes[row, place].tolist())
        color = list(palette[scenes.colors[row, place]])
        reach = int(radius * 0.69)  # on the diagonal, just inside the rim
        assert scenes.pixels[row, :, y - reach, x - reach].tolist() == color
        outside = int(radius * 0.8)
        assert scenes.pixels[row, :, y - outside, x - outside].tolist() != color


def test_tag_shows_the_digit(scenes):
    with Image.open(ASSETS / "digits.png") as sheet:
        glyphs = {
            (font, digit): torch.frombuffer(
                bytearray(sheet.crop((digit * 28, font * 28, digit * 28 + 28, font * 28 + 28)).tobytes()),
                dtype=torch.uint8,
            ).view(28, 28)
            for font in range(3)
            for digit in range(10)
        }
    fonts = set()
    for row, place in objects(scenes):
        _, _, x1, y1 = scenes.boxes[row, place].tolist()
        tag = scenes.pixels[row, :, y1 - 30 : y1, x1 - 30 : x1]
        assert (tag[:, 0] == 255).all() and (tag[:, -1] == 255).all()
        assert (tag[:, :, 0] == 255).all() and (tag[:, :, -1] == 255).all()
        [(font, digit)] = [key for key, glyph in glyphs.items() if (255 - glyph == tag[:, 1:-1, 1:-1]).all()]
        assert digit == scenes.digits[row, place]
        fonts.add(font)
    assert fonts == {0, 1, 2}


def test_disc_shows_the_named_pictogram(scenes):
    with Image.open(ASSETS / "sprites.png") as sheet:
        sprites = [sheet.crop((x, y, x + 72, y + 72)) for y in range(0, 432, 72) for x in range(0, 576, 72)]
    for row, place in objects(scenes)[::3]:
        x, y, radius = shape(scenes.boxes[row, place].tolist())
        color = list(COLORS.values())[scenes.colors[row, place]]
        half = round(0.75 * radius)
        window = (x - half, y - half, x + radius // 5, y + half)  # the left part, which the tag leaves free
        shown = scenes.image(row).crop(window)
        distances = []
        for sprite in sprites:
            expected = Image.new("RGB", (336, 336), color)
            small = sprite.resize((2 * half, 2 * half), Image.Resampling.BILINEAR)
            expected.paste(small, (x - half, y - half), small)
            difference = zip(shown.tobytes(), expected.crop(window).tobytes(), strict=True)
            distances.append(sum(abs(one - other) for one, other in difference))
        assert distances.index(min(distances)) == scenes.names[row, place], NAMES[scenes.names[row, place]]


def test_image_is_the_pixels(scenes):
    image = scenes.image(3)
    assert (image.mode, image.size) == ("RGB", (336, 336))
    for x, y in ((0, 0), (335, 0), (17, 200), (335, 335)):
        assert image.getpixel((x, y)) == tuple(scenes.pixels[3, :, y, x].tolist())


def test_backgrounds_differ(scenes):
    corners = {tuple(scenes.pixels[row, :, ::48, ::48].flatten().tolist()) for row in range(len(scenes))}
    assert len(corners) == len(scenes)


# ---------------------------------------------------------------------------------------------------------------------
# patches


def test_patches_of_a_box_worked_by_hand():
    scenes = handmade((13, 14, 28, 29))  # columns 13..27 touch patches 0 and 1, rows 14..28 patches 1 and 2
    patches = scenes.patches()
    assert (patches.shape, patches.dtype) == ((1, 7, 576), torch.bool)
    assert patches[0, 0].nonzero().flatten().tolist() == [24, 25, 48, 49]
    assert not patches[0, 1:].any()
    assert scenes.patches(patch=28)[0, 0].nonzero().flatten().tolist() == [0, 12]
    assert scenes.patches(patch=336).shape == (1, 7, 1)


@settings(max_examples=30, deadline=None)
@given(
    x=st.integers(0, 300),
    y=st.integers(0, 300),
    side=st.integers(1, 36),
    patch=st.sampled_from([7, 14, 16, 24, 28, 48]),
)
def test_patches_equal_a_painted_mask(x, y, side, patch):
    mask = torch.zeros(336, 336)
    mask[y : y + side, x : x + side] = 1
    pooled = torch.nn.functional.max_pool2d(mask[None, None], patch)[0, 0].flatten().bool()
    assert torch.equal(handmade((x, y, x + side, y + side)).patches(patch)[0, 0], pooled)


# ---------------------------------------------------------------------------------------------------------------------
# seeds and splits


def test_same_seed_same_batch():
    one, other = generate(3, seed=11), generate(3, seed=11)
    assert all(torch.equal(getattr(one, field), getattr(other, field)) for field in FIELDS)
    state = torch.get_rng_state()
    generate(1, seed=11)
    assert torch.equal(state, torch.get_rng_state())  # the caller's random numbers are left alone


def test_other_seed_other_batch():
    assert not torch.equal(generate(3, seed=11).pixels, generate(3, seed=12).pixels)
    assert not torch.equal(generate(3, seed=11).names, generate(3, seed=11, split="test").names)


@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.sampled_from(["train", "test"])), unique=True, min_size=2))
def test_streams_never_meet(pairs):
    streams = {generator._stream(seed, split) for seed, split in pairs}
    assert len(streams) == len(pairs)
    assert all(0 <= stream < 2**32 for stream in streams)  # all that torch's CPU generator reads of a seed


def test_held_out_combinations_are_a_tenth_and_evenly_spread():
    name, color, digit = torch.meshgrid(torch.arange(48), torch.arange(8), torch.arange(10), indexing="ij")
    mask = held_out(name, color, digit)
    assert mask.sum() == 384
    assert (mask.sum(dim=2) == 1).all()  # one digit for each name and colour
    assert mask.sum(dim=(0, 1)).min() >= 30  # each digit about 38 times
    assert bool(held_out(0, 0, 0)) and bool(held_out(1, 1, 0)) and not bool(held_out(1, 1, 1))  # 7 + 3 = 10


@pytest.mark.parametrize("split", ["train", "test"])
def test_splits_share_no_combination(split):
    scenes = generate(8, seed=4, split=split)
    drawn = {key: getattr(scenes, key) for key in ("names", "colors", "digits")}
    for table in (drawn, generator._draw_table(5000, split, torch.Generator().manual_seed(1))):
        there = table["names"] >= 0
        assert (held_out(table["names"], table["colors"], table["digits"])[there] == (split == "test")).all()


def test_demo_is_stable():
    scenes = demo()
    things = [
        (NAMES[name], list(COLORS)[color], digit)
        for name, color, digit in zip(*(getattr(scenes, key)[0].tolist() for key in FIELDS[2:5]), strict=True)
        if name >= 0
    ]
    assert things == [
        ("whale", "yellow", 6),
        ("turtle", "white", 0),
        ("ball", "orange", 3),
        ("dog", "blue", 4),
        ("penguin", "red", 9),
        ("train", "blue", 7),
    ]
    assert all(bool(held_out(NAMES.index(name), list(COLORS).index(color), digit)) for name, color, digit in things)
    with Image.open(Path(__file__).parents[2] / "examples" / "scene.png") as shipped:
        drawn = scenes.image(0)
        difference = [abs(one - other) for one, other in zip(shipped.tobytes(), drawn.tobytes(), strict=True)]
    assert max(difference) <= 2  # interpolation may round otherwise on other machines


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_shows_the_same_scenes():
    here, there = generate(16, seed=5), generate(16, seed=5, device="cuda")
    assert there.pixels.device.type == "cuda"
    assert all(torch.equal(getattr(here, field), getattr(there, field).cpu()) for field in FIELDS[1:])
    assert torch.equal(here.patches(), there.patches().cpu())
    assert (here.pixels.int() - there.pixels.cpu().int()).abs().max() <= 2


# ---------------------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, r"batch=0 is no number of pictures; the smallest is batch=1"),
        ({"batch": -3}, r"batch=-3 .* batch=1"),
        ({"batch": True}, r"batch=True"),
        ({"batch": 2.0}, r"batch=2\.0"),
        ({"seed": -1}, r"seed=-1 .* nearest is seed=0"),
        ({"seed": 2**31}, r"seed=2147483648 .* nearest is seed=2147483647"),
        ({"seed": 1.5}, r"seed=1\.5"),
        ({"split": "tset"}, r"unknown split 'tset'; did you mean 'test'\?.*train"),
        ({"split": None}, r"unknown split None"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(FoveateError, match=message):
        generate(**{"batch": 1, "seed": 0, "split": "train"} | arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_named():
    with pytest.raises(FoveateError, match=r"device='cuda', but torch sees no CUDA device; use device='cpu'"):
        generate(1, seed=0, device="cuda")


@pytest.mark.parametrize(("patch", "nearest"), [(13, 12), (0, 1), (337, 336), (-5, 1), (14.0, 14), (True, 1)])
def test_patch_that_does_not_divide_is_named(patch, nearest):
    with pytest.raises(
        FoveateError, match=rf"patch={patch} does not divide 336 pixels; the nearest that does is {nearest}$"
    ):
        handmade((0, 0, 60, 60)).patches(patch)
