"""Pages before the encoder: how much of them repeats, what that saves, and how many answers stay right.

python benchmarks/pages.py [--quick] [--out FILE.json]

Shares are of A4 pages of 756 x 1064 pixels in tokens of 28 x 28. Seconds are those of the shape of Qwen2.5-VL-3B with
random weights, 8 encoder and 8 decoder blocks, rivals interleaved. Answers are those of mini to questions about stamps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from written import write_figures

import foveate
from foveate.evaluate.scenes_task import Paper, evaluate
from foveate.inference.loading import load
from foveate.ops.prediction import unpredicted
from foveate.scenes import generator, pages

WIDTH, HEIGHT, TOKEN = 756, 1064, 28
GRID = (HEIGHT // TOKEN, WIDTH // TOKEN)
GREYS = (0, 1, 4, 16)
WORDS = 32  # of the prompt
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
QUALITIES = (None, 95, 75)


# ---------------------------------------------------------------------------------------------------------------------
# shares


def tokens_of(picture: Image.Image) -> Tensor:
    """(1, N, values) of a picture, as a method sees its 8-bit greys."""
    down, across = picture.height // TOKEN, picture.width // TOKEN
    greys = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(down, TOKEN, across, TOKEN * 3)
    return (greys.transpose(1, 2).reshape(1, down * across, -1) * 257.0) / 65536


def shares(seeds: int) -> list[dict[str, Any]]:
    """Of each kind of page and quality: tokens kept at each threshold, and how many equal an earlier one."""
    found = []
    for kind in pages.KINDS:
        for quality in QUALITIES:
            drawn = [pages.page(WIDTH, HEIGHT, seed=seed, kind=kind) for seed in range(seeds)]
            seen = [tokens_of(one if quality is None else pages.through_jpeg(one, quality)) for one in drawn]
            kept = {
                grey: statistics.fmean(float(unpredicted(one, GRID, grey / 255).float().mean()) for one in seen)
                for grey in GREYS
            }
            repeats = statistics.fmean(1 - one[0].unique(dim=0).shape[0] / one.shape[1] for one in seen)
            found.append({"kind": kind, "jpeg": quality, "kept": kept, "duplicates": repeats})
    return found


def scattered(values: int) -> Tensor:
    """(1, 4096, values): noise, and seven tokens in ten of one colour, wherever they fall."""
    generator_ = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (1, 4096, values), generator=generator_).float() * 257 / 65536
    tokens[:, torch.rand(4096, generator=generator_) < 0.7] = 0.5
    return tokens


def comparing() -> list[dict[str, Any]]:
    """Milliseconds of one core's own time for 4,096 tokens, the least of some runs."""
    torch.set_num_threads(1)
    found = []
    side = 64 * TOKEN
    drawn = {kind: pages.page(side, side, seed=0, kind=kind) for kind in ("letter", "table")}
    given: dict[str, Tensor] = {f"scattered {values}": scattered(values) for values in (12, 588, 2352)}
    given |= {kind: tokens_of(page) for kind, page in drawn.items()}
    given |= {f"{kind}, JPEG 75": tokens_of(pages.through_jpeg(page, 75)) for kind, page in drawn.items()}
    given["photograph"] = tokens_of(photograph(side, side))
    for name, tokens in given.items():
        for grey in (0, 4):
            times = []
            for _ in range(15):
                start = time.thread_time()
                unpredicted(tokens, (64, 64), grey / 255)
                times.append((time.thread_time() - start) * 1e3)
            row = {"tokens": name, "values": tokens.shape[2], "greys": grey, "ms": min(times)}
            found.append({**row, "median_ms": statistics.median(times)})
            print(json.dumps(found[-1]), flush=True)
    torch.set_num_threads(os.cpu_count() or 1)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# seconds


def model_of(blocks: int = 8) -> Any:
    """The shape of Qwen2.5-VL-3B with fewer blocks and a smaller vocabulary, random weights."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = dict(
        depth=blocks, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048, patch_size=14,
        window_size=112, fullatt_block_indexes=[blocks // 2 - 1, blocks - 1],
    )  # fmt: skip
    text = dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=blocks, num_attention_heads=16,
        num_key_value_heads=2, vocab_size=32_000, rope_parameters=rope,
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=31_000, video_token_id=31_001, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    made = Qwen2_5_VLForConditionalGeneration(config).eval()
    made.generation_config.eos_token_id = None
    return made


def prompt(model: Any, picture: Image.Image) -> dict[str, Tensor]:
    """What the processor of Qwen2.5-VL makes of a picture between some words."""
    greys = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(HEIGHT, WIDTH, 3).permute(2, 0, 1)
    pixels = (greys / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    side = TOKEN // 2
    squares = pixels.view(3, GRID[0], 2, side, GRID[1], 2, side).permute(1, 4, 2, 5, 0, 3, 6)
    rows = squares[..., None, :, :].expand(*squares.shape[:5], 2, side, side).reshape(4 * GRID[0] * GRID[1], -1)
    words = torch.arange(100, 100 + WORDS // 2)
    token = model.config.image_token_id
    ids = torch.cat([words, torch.full((GRID[0] * GRID[1],), token), words])[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == token).long(),
        "pixel_values": rows,
        "image_grid_thw": torch.tensor([[1, 2 * GRID[0], 2 * GRID[1]]]),
    }


def photograph(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A soft photo enlarged, with the noise of a sensor: no token repeats."""
    scene = generator.generate(1, seed=5, split="test").image(0).resize((width, height), Image.Resampling.BICUBIC)
    greys = torch.frombuffer(bytearray(scene.tobytes()), dtype=torch.uint8).float()
    noise = torch.randn(greys.shape, generator=torch.Generator().manual_seed(0)) * 2
    data = (greys + noise).round().clamp(0, 255).to(torch.uint8)
    return Image.frombytes("RGB", scene.size, data.numpy().tobytes())


class Seconds:
    """Seconds of one first token: the whole, those of the encoder's blocks, and what the process itself worked."""

    def __init__(self, model: Any) -> None:
        self.model, self.encoder = model, 0.0
        model.model.visual.register_forward_pre_hook(self._begin)
        model.model.visual.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._at = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.encoder = time.perf_counter() - self._at

    def of(self, run: Callable[[], Any]) -> tuple[float, float, float]:
        """(whole, encoder, worked); other work on the machine lengthens the last one least."""
        start, worked = time.perf_counter(), time.process_time()
        run()
        return time.perf_counter() - start, self.encoder, time.process_time() - worked


def seconds(rounds: int, pictures: list[str]) -> list[dict[str, Any]]:
    """First tokens with and without, in turns: of each picture; words alone warm up."""
    model = model_of()
    words = torch.arange(100, 100 + WORDS)[None]
    model.generate(input_ids=words, attention_mask=torch.ones_like(words), max_new_tokens=1, do_sample=False)
    watch, handle = Seconds(model), foveate.prune(model, "pixelprune")
    found = []
    for kind in pictures:
        picture = photograph() if kind == "photograph" else pages.page(WIDTH, HEIGHT, seed=0, kind=kind)  # type: ignore[arg-type]
        given, plain, pruned, choosing = prompt(model, picture), [], [], []
        answer = lambda given=given: model.generate(**given, max_new_tokens=1, do_sample=False)  # noqa: E731
        for _ in range(rounds):
            plain.append(watch.of(answer))
            with handle as trace:
                pruned.append(watch.of(answer))
            choosing.append(trace.milliseconds / 1e3)
        whole, encoder, worked = (statistics.median(one[place] for one in plain) for place in range(3))
        short, short_encoder, short_worked = (statistics.median(one[place] for one in pruned) for place in range(3))
        (image,) = trace.images
        found.append(
            {
                "picture": kind,
                "tokens": image.original,
                "kept": image.encoded / image.original,
                "encoder_s": [encoder, short_encoder],
                "first_token_s": [whole, short],
                "first_token_worked_s": [worked, short_worked],
                "faster": statistics.median(one[0] / two[0] for one, two in zip(plain, pruned, strict=True)),
                "less_work": statistics.median(one[2] / two[2] for one, two in zip(plain, pruned, strict=True)),
                "choosing_ms": statistics.median(choosing) * 1e3,
                "choosing_share": statistics.median(one / two[0] for one, two in zip(choosing, pruned, strict=True)),
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# answers


def answers(samples: int) -> list[dict[str, Any]]:
    """What mini answers about stamps on pages, unpruned and at each threshold."""
    loaded = load("mini", device="cpu")
    rivals = [f"pixelprune:threshold={grey / 255}" if grey else "pixelprune" for grey in GREYS]
    found = []
    for quality in QUALITIES:
        rows = evaluate(loaded.model, loaded.processor, rivals, samples=samples, on=Paper(quality))
        for name, row in zip(("none", *map(str, GREYS)), rows, strict=True):
            found.append({"jpeg": quality, "greys": name, **row.to_dict()})
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pages, rounds and questions")
    parser.add_argument("--parts", default="shares,comparing,seconds,answers", help="some of these, comma-separated")
    parser.add_argument("--rounds", type=int, default=5, help="of seconds")
    parser.add_argument("--pictures", default=",".join((*pages.KINDS, "photograph")), help="of seconds")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    parts = given.parts.split(",")
    torch.set_num_threads(os.cpu_count() or 1)
    load, found = os.getloadavg()[0], dict[str, Any]()
    if "shares" in parts:
        found["shares"] = shares(2 if given.quick else 8)
        for row in found["shares"]:
            print(json.dumps(row), flush=True)
    if "comparing" in parts:
        found["comparing"] = comparing()
    if "seconds" in parts:
        with torch.no_grad():
            found["seconds"] = seconds(given.rounds, given.pictures.split(","))
    if "answers" in parts:
        found["answers"] = answers(50 if given.quick else 300)
    write_figures(given.out, load, **found)


if __name__ == "__main__":
    main()
