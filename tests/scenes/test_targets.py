"""What every patch should be read as, against a picture of which every pixel is known."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.scenes import vocabulary
from foveate.scenes.curriculum import ideal_tokens
from foveate.scenes.generator import TAG, Scenes, generate
from foveate.scenes.mini import IMAGE
from foveate.scenes.targets import (
    BACKGROUND,
    CORNER,
    SCALE,
    contrastive_loss,
    correct,
    dense_loss,
    objects_first,
    preferred_about,
    staged,
    targets,
    thinned,
)


@pytest.fixture
def one() -> Scenes:
    """One object, a green cat with a 5, whose box covers x 28 to 98 and y 140 to 210: 5 x 5 whole patches."""
    empty = torch.full((1, 7), -1)
    names, colors, digits, boxes = empty.clone(), empty.clone(), empty.clone(), torch.full((1, 7, 4), -1)
    names[0, 0], colors[0, 0], digits[0, 0] = 1, 1, 5
    boxes[0, 0] = torch.tensor([28, 140, 98, 210])
    return Scenes(torch.zeros(1, 3, 336, 336, dtype=torch.uint8), torch.tensor([1]), names, colors, digits, boxes)


def test_discs_tags_and_corners_by_hand(one):
    wanted = targets(one)
    grid = wanted.owner[0].view(24, 24)[10:15, 2:7]
    # Radius 32.4: the disc's middle lies at (60, 172); of the four corners the lower right shows the tag.
    assert grid[0, 0] == grid[4, 0] == grid[0, 4] == CORNER
    assert grid[2, 2] == grid[4, 4] == 0
    tag = wanted.tag[0].view(24, 24)
    assert tag[13:15, 5:7].all()
    assert tag.sum() == 4
    outside = torch.ones(24, 24, dtype=torch.bool)
    outside[10:15, 2:7] = False
    assert (wanted.owner[0].view(24, 24)[outside] == BACKGROUND).all()
    shown = wanted.owner[0] == 0
    assert (
        (wanted.name[0][shown] == 1).all()
        and (wanted.color[0][shown] == 1).all()
        and (wanted.digit[0][shown] == 5).all()
    )
    assert (wanted.name[0][~shown] == -1).all()


def test_tags_lie_where_the_generator_paints_black_on_white():
    scenes = generate(16, seed=2)
    wanted = targets(scenes)
    patches = scenes.pixels.float().mean(dim=1).unfold(1, 14, 14).unfold(2, 14, 14).flatten(1, 2).flatten(2)
    bright = (patches > 250).float().mean(dim=-1)
    assert bright[wanted.tag].mean() > 0.5
    assert bright[wanted.owner == BACKGROUND].mean() < 0.1
    for row in range(16):
        owners = set(wanted.owner[row][wanted.tag[row]].tolist())
        assert owners == set(range(int(scenes.count[row])))
    assert TAG == 30


def test_dense_losses_by_hand(one):
    words = torch.eye(len(vocabulary.WORDS))
    wanted = targets(one)
    nothing = dense_loss(torch.zeros(1, 576, 91), words, wanted)
    assert nothing["name"].item() == pytest.approx(math.log(49), rel=1e-5)
    assert nothing["color"].item() == pytest.approx(math.log(8), rel=1e-5)
    assert nothing["digit"].item() == pytest.approx(math.log(10), rel=1e-5)
    assert nothing["tag"].item() == pytest.approx(math.log(10), rel=1e-5)
    visual, _ = perfect(one, words)
    right = dense_loss(visual, words, wanted)
    assert right["digit"].item() == pytest.approx(math.log(1 + 9 * math.exp(-SCALE)), abs=1e-6)
    assert max(loss.item() for loss in right.values()) < 1e-4
    assert correct(visual, words, wanted) == {"name": 1.0, "color": 1.0, "digit": 1.0, "tag": 1.0}


def perfect(scenes: Scenes, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    quiet = torch.Generator().manual_seed(0)
    visual, places = ideal_tokens(words, targets(scenes), scenes, quiet, slots=576, noise=0.0)
    return visual, places


def test_ideal_tokens_are_sums_of_words(one):
    words = torch.randn(91, 8, generator=torch.Generator().manual_seed(1))
    visual, places = perfect(one, words)
    assert places[0].tolist() == list(range(576))
    thing = sum(words[vocabulary.WORDS.index(word)] for word in ("cat", "green", "5"))
    owner = targets(one).owner[0]
    assert torch.allclose(visual[0][owner == 0], thing.expand(int((owner == 0).sum()), -1))
    assert torch.equal(visual[0][owner != 0], words[IMAGE].expand(int((owner != 0).sum()), -1))


def test_few_slots_still_show_every_object():
    scenes = generate(8, seed=3)
    wanted = targets(scenes)
    words = torch.randn(91, 8, generator=torch.Generator().manual_seed(1))
    visual, places = ideal_tokens(words, wanted, scenes, torch.Generator().manual_seed(2), slots=96)
    assert visual.shape == (8, 96, 8)
    assert (places.diff(dim=1) > 0).all()
    for row in range(8):
        assert set(range(int(scenes.count[row]))) <= set(wanted.owner[row][places[row]].tolist())


def test_objects_come_first_and_background_fills_up(one):
    wanted = targets(one)
    boxed = int((wanted.owner != BACKGROUND).sum())
    places = objects_first(wanted, boxed + 10, torch.Generator().manual_seed(0))
    at = wanted.at(places)
    assert (at.owner != BACKGROUND).sum() == boxed
    assert at.tag.sum() == wanted.tag.sum()
    assert (places.diff(dim=1) > 0).all()


def test_thinned_pictures_keep_what_some_method_might():
    scenes = generate(40, seed=5)
    wanted = targets(scenes)
    places = thinned(wanted, 48, torch.Generator().manual_seed(0))
    assert places.shape == (40, 48) and (places.diff(dim=1) > 0).all() and places.max() < 576
    shown = (wanted.owner != BACKGROUND).float()
    on_objects = shown.gather(1, places).mean(dim=1) - shown.mean(dim=1)
    assert on_objects.min() < 0.05 < 0.4 < on_objects.max()  # some pictures by chance alone, some by what they show
    again = thinned(wanted, 48, torch.Generator().manual_seed(0))
    assert torch.equal(places, again)
    assert not torch.equal(places, thinned(wanted, 48, torch.Generator().manual_seed(1)))


def test_contrastive_loss_by_hand(one):
    words = torch.eye(91)
    bias = torch.tensor(0.0)
    pooled = torch.zeros(1, 91)
    assert contrastive_loss(pooled, words, one, bias).item() == pytest.approx(math.log(2), rel=1e-6)
    pooled[0, vocabulary.WORDS.index("cat")] = 1.0
    expected = (47 * math.log(2) + math.log(1 + math.exp(-SCALE))) / 48
    assert contrastive_loss(pooled, words, one, bias).item() == pytest.approx(expected, rel=1e-5)


def test_tokens_about_the_object_asked_about_come_first():
    wanted = targets(generate(40, seed=3))
    asked = torch.zeros(40, dtype=torch.int64)
    score = preferred_about(wanted, asked, torch.Generator().manual_seed(0))
    own = wanted.owner == 0
    others = (wanted.owner != BACKGROUND) & ~own
    behind = 0
    for row in range(40):
        assert score[row][own[row]].min() > score[row][~own[row]].max()
        if others[row].any():
            behind += bool(score[row][others[row]].max() < score[row][wanted.owner[row] == BACKGROUND].min())
    assert 15 < behind < 38  # two rows of three


def test_stages_keep_the_best_of_what_is_left():
    score = torch.tensor([[0.1, 0.9, 0.4, 0.8, 0.3, 0.7]])
    stay = staged(score, (4 / 6, 2 / 6, 0.01))
    assert {block: columns.tolist() for block, columns in stay.items()} == {1: [[1, 2, 3, 5]], 2: [[0, 2]], 3: [[0]]}
    assert staged(score, (0.1, 0.5))[2].tolist() == [[0]]  # no more than are left
