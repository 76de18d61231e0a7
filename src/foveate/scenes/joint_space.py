"""Trains the text tower and the projections of `clip/` against mini's frozen vision tower: patches and texts meet."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel, LlavaForConditionalGeneration

from foveate.checkpoints import check_names
from foveate.core import FoveateError
from foveate.scenes import mini, vocabulary
from foveate.scenes.generator import Scenes, generate
from foveate.scenes.targets import BACKGROUND, CORNER, Targets, objects_first, targets

FORMS: tuple[str, ...] = (
    "{name}",
    "a {name}",
    "a {color} {name}",
    "the {name}",
    "is there a {name} ?",
    "what color is behind the {name} ?",
    "what number is on the {name} ?",
)
"""How a text speaks of an object."""

READ = -2  # the hidden state that mini's projector reads
PATCHES = 192  # patches of each picture that texts are compared with in training

Report = Callable[[dict[str, Any]], None]


def train_clip_text(
    model: LlavaForConditionalGeneration | str | Path,
    out: str | Path,
    *,
    max_seconds: float,
    pictures: int = 1024,
    steps: int = 3000,
    batch: int = 16,
    rate: float = 2e-3,
    seed: int = 0,
    progress: Report | None = None,
) -> Path:
    """Train and save a `CLIPModel` around the vision tower of `model`, whose weights stay as they are.

    `image_clip` of a patch is `visual_projection(post_layernorm(hidden_states[-2]))`, `text_clip` the projected state
    at the text's end. Two losses: a text against every patch of the batch (its object's patches are to score above all
    others), and a text against every picture's CLS vector. The tower is frozen, so it looks at each picture once.

    Args:
        model: a `mini` or its folder.
        out: the folder to write.
        max_seconds: stop after this many seconds, at most half of which go into looking at pictures.
        pictures: how many pictures to look at.
        steps: at most this many steps; the learning rate falls to zero over them, or over the time if that is shorter.
        batch: pictures per step, each with a text about every object.
        rate: peak learning rate.
        seed: of weights, pictures and texts.
        progress: called every 20 steps with step, seconds, pictures and losses.

    Raises:
        FoveateError: `max_seconds`, `pictures` or `steps` leaves nothing to do.
    """
    if max_seconds <= 0 or steps < 1 or pictures < 1:
        raise FoveateError(
            f"max_seconds={max_seconds}, steps={steps}, pictures={pictures} leave nothing to train; all must be above 0"
        )
    if not isinstance(model, LlavaForConditionalGeneration):
        check_names(model, f"model={str(model)!r}")
        model = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32, use_safetensors=True)
    clip = mini.build_clip(model, seed).float().train()
    begin = time.monotonic()
    bank = _look(clip, pictures, batch, seed, begin + max_seconds / 2)
    _train(clip, bank, steps, rate, seed, begin, max_seconds, progress or (lambda line: None))
    return mini.save_clip(clip, out)


@dataclass(frozen=True)
class TowerStates:
    """What the frozen tower made of one batch of pictures: K patches each, those of objects first.

    Attributes:
        scenes: the pictures, without their pixels.
        wanted: (B, K) what the patches show.
        patches: (B, K, E) states that the projector reads, normed.
        pooled: (B, E) states of CLS after the last block, normed.
    """

    scenes: Scenes
    wanted: Targets
    patches: Tensor
    pooled: Tensor


def _look(clip: CLIPModel, pictures: int, batch: int, seed: int, until: float) -> list[TowerStates]:
    bank: list[TowerStates] = []
    for number in range(-(-pictures // batch)):
        if bank and time.monotonic() > until:
            break
        scenes = generate(batch, seed=(seed * 1_000_003 + number) % 2**31)
        patches, pooled = states(clip, scenes.pixels)
        wanted = targets(scenes)
        places = objects_first(wanted, PATCHES, torch.Generator().manual_seed(number))
        patches = patches.gather(1, places[..., None].expand(-1, -1, patches.shape[-1]))
        scenes = dataclasses.replace(scenes, pixels=scenes.pixels[:, :, :0, :0])
        bank.append(TowerStates(scenes, wanted.at(places), patches, pooled))
    return bank


def _train(
    clip: CLIPModel,
    bank: list[TowerStates],
    steps: int,
    rate: float,
    seed: int,
    begin: float,
    max_seconds: float,
    report: Report,
) -> None:
    sides = (clip.text_model, clip.text_projection, clip.visual_projection)
    trained = [clip.logit_scale, *(parameter for side in sides for parameter in side.parameters())]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.monotonic()
    for step in range(steps):
        done = max(step / steps, (time.monotonic() - started) / (begin + max_seconds - started))
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 50) * (1 - done)
        draw = random.Random(f"{seed} {step}")
        losses = _losses(clip, bank[draw.randrange(len(bank))], draw)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values(), torch.zeros(())).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if (step + 1) % 20 == 0:
            values = {name: round(loss.item(), 4) for name, loss in losses.items()}
            seconds = round(time.monotonic() - begin, 1)
            report({"step": step + 1, "seconds": seconds, "pictures": sum(len(seen.pooled) for seen in bank), **values})


def texts(scenes: Scenes, draw: random.Random) -> tuple[list[str], Tensor]:
    """One text about every object of every picture, and which it is about: (M, 2) rows and places."""
    colors = tuple(vocabulary.COLORS)
    about = (scenes.names >= 0).nonzero()
    written = [
        draw.choice(FORMS).format(
            name=vocabulary.NAMES[scenes.names[row, place]], color=colors[scenes.colors[row, place]]
        )
        for row, place in about.tolist()
    ]
    return written, about


@torch.no_grad()
def states(clip: CLIPModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Normed states of uint8 pictures before projection: of the patches (B, N, E), of CLS (B, E)."""
    seen = clip.vision_model(pixel_values=mini.normalise(pixels).to(clip.dtype), output_hidden_states=True)
    return clip.vision_model.post_layernorm(seen.hidden_states[READ][:, 1:]), seen.pooler_output


def project(clip: CLIPModel, patches: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors in the joint space of states that `states` gave: of patches (B, N, C), of CLS (B, C)."""
    joint = clip.visual_projection
    return functional.normalize(joint(patches), dim=-1), functional.normalize(joint(pooled), dim=-1)


def text_vectors(clip: CLIPModel, written: list[str]) -> Tensor:
    """Unit vectors (M, C) of texts in the joint space."""
    inputs = mini.clip_tokenizer()(written, padding=True, return_tensors="pt").to(clip.device)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pooled = clip.text_model(input_ids=ids, attention_mask=mask).pooler_output
    return functional.normalize(clip.text_projection(pooled), dim=-1)


def _losses(clip: CLIPModel, seen: TowerStates, draw: random.Random) -> dict[str, Tensor]:
    written, about = texts(seen.scenes, draw)
    patches, pictures = project(clip, seen.patches, seen.pooled)
    vectors = text_vectors(clip, written)
    scale = clip.logit_scale.exp().clamp(max=100)
    return {
        "patch": _patch_loss(scale * vectors @ patches.flatten(0, 1).T, seen.scenes, seen.wanted, about),
        "picture": 0.2 * _picture_loss(scale * vectors @ pictures.T, seen.scenes, about),
    }


def _patch_loss(scores: Tensor, scenes: Scenes, wanted: Targets, about: Tensor) -> Tensor:
    """Scores (M, B * K) of texts and patches: minus the log of the share that falls on patches of a text's name.

    Another picture may show the same thing: its patches are neither wanted nor held against the text.
    """
    names = scenes.names[about[:, 0], about[:, 1]]  # (M,)
    same = wanted.name.flatten() == names[:, None]  # (M, B * K)
    row = torch.arange(len(scenes), device=scores.device).repeat_interleave(wanted.name.shape[1])
    own = same & (row == about[:, :1])
    unread = (wanted.owner == CORNER).flatten() | (same & ~own)
    total = scores.masked_fill(unread, float("-inf")).logsumexp(dim=1)
    # The mean over an object's patches, not their sum: each of them has to score, not the best one alone.
    each = (scores * own).sum(dim=1) / own.sum(dim=1).clamp(min=1)
    return (total - each - own.sum(dim=1).clamp(min=1).log())[own.any(dim=1)].mean()


def _picture_loss(scores: Tensor, scenes: Scenes, about: Tensor) -> Tensor:
    """Scores (M, B) of texts and pictures: cross-entropy of the text's picture, others that show its name left out."""
    names = scenes.names[about[:, 0], about[:, 1]]
    shows = (scenes.names[None] == names[:, None, None]).any(dim=-1)  # (M, B)
    shows[torch.arange(len(about)), about[:, 0]] = False
    return functional.cross_entropy(scores.masked_fill(shows, float("-inf")), about[:, 0])


@torch.no_grad()
def relevance_exam(clip: CLIPModel, pictures: int, *, seed: int, batch: int = 8) -> dict[str, float]:
    """How well texts find their object's patches among the 576 of their picture, on the split "test".

    Returns:
        "best": how often the best patch lies on the object; "recall": the share of an object's patches among as many
        best ones; "margin": mean score of object minus mean score of background, both cosines.
    """
    best, recall, margin = [], [], []
    for start in range(0, pictures, batch):
        scenes = generate(min(batch, pictures - start), seed=seed + start, split="test")
        written, about = texts(scenes, random.Random(seed + start))
        patches, _ = project(clip, *states(clip, scenes.pixels))
        vectors, wanted = text_vectors(clip, written), targets(scenes)
        for vector, (row, place) in zip(vectors, about.tolist(), strict=True):
            scores, own = patches[row] @ vector, wanted.owner[row] == place
            order = scores.argsort(descending=True)
            best.append(own[order[0]].item())
            recall.append(own[order[: int(own.sum())]].float().mean().item())
            margin.append((scores[own].mean() - scores[wanted.owner[row] == BACKGROUND].mean()).item())
    means = {"best": best, "recall": recall, "margin": margin}
    return {name: sum(values) / len(values) for name, values in means.items()}
