"""Ideal visual tokens: what a perfect encoder would give, from which the decoder learns to look things up first."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.scenes.generator import Scenes
from foveate.scenes.mini import IMAGE
from foveate.scenes.targets import Targets, best
from foveate.scenes.vocabulary import COLOR_IDS, DIGIT_IDS, NAME_IDS

SLOTS = 96
SURE = 3  # patches of each object that are always among the slots
NOISE = 0.5  # standard deviation of the noise, in root mean squares of the word embeddings


def ideal_tokens(
    words: Tensor, wanted: Targets, scenes: Scenes, draw: torch.Generator, slots: int = SLOTS, noise: float = NOISE
) -> tuple[Tensor, Tensor]:
    """Tokens (B, K, D) for K random patches of each picture, and the patches' raster indices (B, K), ascending.

    An object's token is the sum of the embeddings of its name, colour and digit, a background token that of `<image>`,
    each with noise. A picture has 576 places for at most 7 objects, so a sixth of them teaches the same at a sixth of
    the price.

    Args:
        words: (V, D) word embeddings, which receive gradients.
        wanted: what each patch shows.
        scenes: the pictures, for their objects.
        draw: random numbers, from a CPU generator.
    """
    owner = wanted.owner
    device = owner.device
    chance = torch.rand(owner.shape, generator=draw).to(device)
    slots = min(slots, owner.shape[1])
    for place in range(scenes.names.shape[1]):
        own = torch.where(owner == place, chance, -1.0)
        sure = own.topk(min(SURE, own.shape[1]), dim=1)
        chance = chance.scatter_add(1, sure.indices, (sure.values >= 0).float())
    places = best(chance, slots)  # (B, K)
    name, color, digit = (part.gather(1, places) for part in (wanted.name, wanted.color, wanted.digit))
    there = (name >= 0)[..., None]
    thing = words[NAME_IDS][name.clamp(min=0)] + words[COLOR_IDS][color.clamp(min=0)]
    thing = thing + words[DIGIT_IDS][digit.clamp(min=0)]
    level = noise * words.detach().square().mean().sqrt()
    shake = torch.randn(*places.shape, words.shape[1], generator=draw).to(device)
    return torch.where(there, thing, words[IMAGE]) + level * shake, places
