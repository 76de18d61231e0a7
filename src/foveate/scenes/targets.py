"""What every patch shows, and the losses that teach it to the encoder: dense for patches, contrastive for CLS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from foveate.scenes import vocabulary
from foveate.scenes.generator import TAG, Scenes
from foveate.scenes.mini import IMAGE, PATCH

BACKGROUND, CORNER = -1, -2
IGNORED = -100
REGIONS = 6  # to a side, of which a thinned picture may prefer some
PULLS = torch.tensor([0.0, 1.5, 3.0, 8.0, -2.0])  # towards objects, in units of the spread of chance
PULL_SHARES = (3.0, 2.0, 2.0, 3.0, 0.5)
SCALE = 16.0  # logits are dot products with word embeddings of norm below 1


@dataclass(frozen=True)
class Targets:
    """Per patch of B pictures with N patches: the words it should be read as.

    Attributes:
        owner: (B, N) int64, the place of the object that the patch shows, -1 for background, -2 for the corners of a
            box that show neither disc nor tag: no loss reads those.
        name, color, digit: (B, N) int64, index into the respective words, -1 where there is no owner.
        tag: (B, N) bool, patches whose middle lies on a digit tag.
    """

    owner: Tensor
    name: Tensor
    color: Tensor
    digit: Tensor
    tag: Tensor

    def at(self, places: Tensor) -> Targets:
        """The targets of the patches with raster indices `places` (B, K)."""
        return Targets(*(getattr(self, part.name).gather(1, places) for part in fields(self)))

    def rows(self, count: int) -> Targets:
        """Those of the first `count` pictures."""
        return Targets(*(getattr(self, part.name)[:count] for part in fields(self)))


def targets(scenes: Scenes) -> Targets:
    """The targets of every patch; a patch that two boxes touch belongs to the first object."""
    boxed = scenes.patches(PATCH)  # (B, 7, N)
    owner = boxed.int().argmax(dim=1)  # (B, N)
    boxes = scenes.boxes.gather(1, owner[..., None].expand(-1, -1, 4)).float()
    disc, tag = _shows(boxes)
    shown = (disc | tag) & boxed.any(dim=1)
    words = [
        part.gather(1, owner).masked_fill(~shown, BACKGROUND) for part in (scenes.names, scenes.colors, scenes.digits)
    ]
    corner = boxed.any(dim=1) & ~shown
    owner = owner.masked_fill(~shown, BACKGROUND).masked_fill(corner, CORNER)
    name, color, digit = words
    return Targets(owner, name, color, digit, tag & shown)


def best(score: Tensor, count: int) -> Tensor:
    """Columns (B, count), ascending, of the highest of `score` (B, N)."""
    return score.topk(count, dim=1).indices.sort(dim=1).values


def objects_first(wanted: Targets, count: int, draw: torch.Generator) -> Tensor:
    """Raster indices (B, count), ascending: random patches of objects, then of the background."""
    chance = torch.rand(wanted.owner.shape, generator=draw).to(wanted.owner.device)
    chance = chance + (wanted.owner != BACKGROUND)
    return best(chance, count)


def thinned(wanted: Targets, count: int, draw: torch.Generator) -> Tensor:
    """Raster indices (B, count), ascending: the first tokens of `preferred`."""
    return best(preferred(wanted, draw), count)


def preferred(wanted: Targets, draw: torch.Generator) -> Tensor:
    """Scores (B, N) by which some method or other might keep tokens of each picture, the highest first.

    Chance decides, pulled towards objects by as much as the row happens to draw (not at all, a little, entirely, or
    away from them), and in every other picture towards some regions.
    """
    batch, tokens = wanted.owner.shape
    chance = -torch.log(-torch.log(torch.rand(batch, tokens, generator=draw).clamp(1e-6, 1 - 1e-6)))
    pull = PULLS[torch.multinomial(torch.tensor(PULL_SHARES), batch, replacement=True, generator=draw)]
    coarse = torch.randn(batch, 1, REGIONS, REGIONS, generator=draw)
    side = math.isqrt(tokens)
    regions = 2.0 * functional.interpolate(coarse, (side, side), mode="bicubic").flatten(1)
    by_region = torch.rand(batch, 1, generator=draw) < 0.5
    chance = chance + regions * by_region
    return chance.to(wanted.owner.device) + pull[:, None].to(wanted.owner.device) * (wanted.owner != BACKGROUND)


def preferred_about(wanted: Targets, asked: Tensor, draw: torch.Generator) -> Tensor:
    """Scores (B, N) of a method that has understood which object is asked about, the highest first.

    Its tokens come first; the other objects' come by chance with the background's, or behind it in two rows of three.

    Args:
        asked: (B,) int64, the place of the object that each picture's questions are about.
    """
    chance = torch.rand(wanted.owner.shape, generator=draw)
    behind = torch.rand(len(asked), 1, generator=draw) < 2 / 3
    own = wanted.owner == asked[:, None]
    others = (wanted.owner != BACKGROUND) & ~own
    return chance.to(own.device) + 2.0 * own - 2.0 * (others & behind.to(own.device))


def staged(score: Tensor, shares: Sequence[float]) -> dict[int, Tensor]:
    """Which tokens stay before blocks 1, 2, ...: those of the highest `score` (B, N), a share of N at each.

    Returns:
        (B, K) columns, ascending, of those that stay among the tokens left until there.
    """
    left, stay = score, {}
    for block, share in enumerate(shares, start=1):
        count = min(left.shape[1], max(1, round(share * score.shape[1])))
        stay[block] = best(left, count)
        left = left.gather(1, stay[block])
    return stay


def _shows(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each patch's middle lies on the disc or on the tag of its box: boxes (B, N, 4) to two (B, N) bool."""
    number = torch.arange(boxes.shape[1], device=boxes.device)
    side = math.isqrt(boxes.shape[1])
    x, y = number % side * PATCH + PATCH / 2, number // side * PATCH + PATCH / 2
    x0, y0, x1, y1 = boxes.unbind(-1)
    # A box is 1.7 radii and half a tag wide: the disc lies in its upper left, the tag's middle on the disc's rim.
    radius = (x1 - x0 - TAG / 2) / 1.7
    disc = (x - x0 - radius) ** 2 + (y - y0 - radius) ** 2 <= (radius + 2) ** 2
    tag = (x > x1 - TAG - 2) & (x < x1 + 2) & (y > y1 - TAG - 2) & (y < y1 + 2)
    return disc, tag


def dense_loss(visual: Tensor, words: Tensor, wanted: Targets) -> dict[str, Tensor]:
    """Classify every patch against the decoder's own word embeddings, as its tied output layer would.

    Background patches are to be read as `<image>`, a word that never reaches the decoder as such.

    Args:
        visual: (B, N, D) tokens after the projector.
        words: (V, D) the decoder's word embeddings.
        wanted: what each patch shows.

    Returns:
        Mean cross-entropies: "name" (48 names or background, background weighing a quarter), "color" and "digit"
        (object patches), "tag" (the digit on the patches of its tag).
    """
    scores = SCALE * visual.float() @ words.detach().float().T  # (B, N, V)
    name = scores[..., vocabulary.NAME_IDS]
    name = torch.cat((name, scores[..., IMAGE : IMAGE + 1]), dim=-1)
    weight = torch.ones(name.shape[-1], device=name.device)
    weight[-1] = 0.25
    names = wanted.name.masked_fill(wanted.owner == BACKGROUND, len(vocabulary.NAMES))
    names = names.masked_fill(wanted.owner == CORNER, IGNORED)
    digit = scores[..., vocabulary.DIGIT_IDS]
    color = scores[..., vocabulary.COLOR_IDS]
    return {
        "name": functional.cross_entropy(name.flatten(0, 1), names.flatten(), weight, ignore_index=IGNORED),
        "color": _read(color, wanted.color, wanted.owner >= 0),
        "digit": _read(digit, wanted.digit, wanted.owner >= 0),
        "tag": _read(digit, wanted.digit, wanted.tag),
    }


def _read(scores: Tensor, wanted: Tensor, where: Tensor) -> Tensor:
    # Masked instead of gathered: shapes that depend on the pictures would be compiled anew for every batch.
    labels = wanted.masked_fill(~where, IGNORED).flatten()
    return functional.cross_entropy(scores.flatten(0, 1), labels, ignore_index=IGNORED)


def contrastive_loss(pooled: Tensor, words: Tensor, scenes: Scenes, bias: Tensor) -> Tensor:
    """Tell from a picture's CLS vector which of the 48 names it shows: a sigmoid loss over all pairs of both.

    Args:
        pooled: (B, D) CLS vectors in the space of the words.
        words: (V, D) the decoder's word embeddings.
        scenes: the pictures.
        bias: scalar, learned: most pairs do not match.

    Source: the sigmoid loss for language-image pre-training (https://arxiv.org/abs/2303.15343, eq. 1).
    """
    names = words[vocabulary.NAME_IDS].detach().float()
    scores = SCALE * pooled.float() @ names.T + bias
    shown = torch.zeros(len(scenes), len(vocabulary.NAMES) + 1, device=scores.device)
    shown.scatter_(1, scenes.names.masked_fill(scenes.names < 0, len(vocabulary.NAMES)), 1.0)
    return functional.binary_cross_entropy_with_logits(scores, shown[:, :-1])


def correct(visual: Tensor, words: Tensor, wanted: Targets) -> dict[str, float]:
    """The share of object patches (and of tag patches) whose own word outscores the other words of its kind."""
    scores = visual.float() @ words.float().T
    shares = {}
    for kind, ids in (
        ("name", vocabulary.NAME_IDS),
        ("color", vocabulary.COLOR_IDS),
        ("digit", vocabulary.DIGIT_IDS),
    ):
        guess = scores[..., ids].argmax(dim=-1)
        where = wanted.owner >= 0
        shares[kind] = (guess == getattr(wanted, kind))[where].float().mean().item()
    guess = scores[..., vocabulary.DIGIT_IDS].argmax(dim=-1)
    shares["tag"] = (guess == wanted.digit)[wanted.tag].float().mean().item()
    return shares
