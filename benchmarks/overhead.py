"""What pruning adds to the work of this machine's processor, which other programs' work does not count to.

python benchmarks/overhead.py [--parts mini reading] [--rounds N] [--quick] [--out FILE.json]
python benchmarks/overhead.py --large [--quick] [--out FILE.json]

The second measures large pictures: the first token of a Qwen2-VL of 4,096 patches in bfloat16, and the memory that h2o
takes on 7,744 visual tokens.

Milliseconds are process time of one thread; rivals take turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from cpu import Row, clock, interleaved, llava, prompt, quartiles, row, show
from selection import high_water
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from written import write_figures

import foveate
from foveate.runtime.attention import _register
from foveate.runtime.encoder.watch import Watch

ANSWER = 24  # tokens
KEPT = 144
QUARTER = "h2o:heavy=0.125,recent=0.125"


spent = partial(clock, now=time.process_time)


class Ticks:
    """A streamer that notes the process's time at each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note a token; the prompt comes first and does not count."""
        if value.ndim == 1:
            self.times.append(time.process_time())

    def end(self) -> None:
        """Nothing is held back."""


def answered(model: Any, inputs: Any, spec: str | None, per_token: dict[str, list[float]]) -> Callable[[], float]:
    """Milliseconds to the first token; those of each further one go to `per_token`."""

    def run() -> float:
        ticks = Ticks()
        with foveate.prune(model, spec) if spec else nullcontext():
            start = time.process_time()
            model.generate(**inputs, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, streamer=ticks)
        gaps = [(after - before) * 1e3 for before, after in zip(ticks.times, ticks.times[1:], strict=False)]
        per_token.setdefault(spec or "unpruned", []).append(statistics.median(gaps))
        return (ticks.times[0] - start) * 1e3

    return run


def native(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    """The encoder, and a prompt of 144 visual tokens in place of all."""
    visual = model.config.image_token_id
    place = (inputs["input_ids"][0] == visual).nonzero()[:, 0]
    ids = torch.cat([inputs["input_ids"][:, : place[KEPT]], inputs["input_ids"][:, place[-1] + 1 :]], dim=1)

    def run() -> None:
        features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
        embeddings = model.get_input_embeddings()(ids)
        embeddings[ids == visual] = features[:KEPT]
        mask = torch.ones_like(ids)
        model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=1, do_sample=False)

    return run


def on_mini(rounds: int) -> list[Row]:
    """`prune()`, the first token and each further one, on `mini`."""
    model = AutoModelForImageTextToText.from_pretrained(foveate.MINI, dtype=torch.float32).eval()
    inputs, per_token = prompt(model, words=10), dict[str, list[float]]()

    def cycle() -> None:
        foveate.prune(model, f"fopru:keep={KEPT}").start().stop()

    def first() -> None:
        with foveate.prune(model, f"fopru:keep={KEPT}"):
            model.generate(**inputs, max_new_tokens=1, do_sample=False)

    specs = [None, "h2o", QUARTER, "snapkv"]
    prompts = interleaved({str(spec or "unpruned"): answered(model, inputs, spec, per_token) for spec in specs}, rounds)
    both = interleaved({"144 kept": spent(first), "144 native": spent(native(model, inputs))}, 2 * rounds)
    cycles = interleaved({"prune, start, stop": spent(cycle)}, 50 * rounds)
    times = prompts | both | cycles
    median = {name: statistics.median(values) for name, values in times.items()}
    tokens = {name: statistics.median(values[1:]) for name, values in per_token.items()}
    ratio = median["144 kept"] / median["144 native"]
    own = median["prune, start, stop"]
    detail = {name: quartiles(values) for name, values in times.items()}
    rows = [
        row("mini: prune() + start() + stop(), ms", own, "<= 1", own <= 1.0, **detail),
        row("mini: first token, fopru:keep=144 / 144 native", ratio, "<= 1.1", ratio <= 1.1),
    ]
    for spec, prefill, each in (("h2o", 1.6, 1.1), (QUARTER, 1.6, 0.9), ("snapkv", 1.1, 1.0)):
        whole, token = median[spec] / median["unpruned"], tokens[spec] / tokens["unpruned"]
        rows.append(row(f"mini: first token, {spec} / unpruned", whole, f"<= {prefill}", whole <= prefill))
        rows.append(row(f"mini: per token, {spec} / unpruned", token, f"<= {each}", token <= each))
    return rows


def reading(patches: int, dtype: torch.dtype, rounds: int) -> Row:
    """What a block takes longer while its attention is summed, beside a CLIP-L encoder of 24 such blocks."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = CLIPVisionConfig(**sizes, attn_implementation="sdpa")
    block = CLIPEncoderLayer(config).eval().to(dtype)
    hidden = torch.randn(1, patches, 1024, dtype=dtype)
    queries, keys, values = torch.randn(3, 1, 16, patches, 64, dtype=dtype).unbind()
    watch = Watch(block, block.self_attn, {"received", "given", "received_all"}, 0)
    _register()

    def watched() -> None:
        watch.install()
        block(hidden, attention_mask=None)
        watch.remove()
        watch.take()

    rivals = {
        "one block": spent(lambda: block(hidden, attention_mask=None)),
        "watched": spent(watched),
        "its attention alone": spent(lambda: scaled_dot_product_attention(queries, keys, values)),
    }
    times = interleaved(rivals, rounds)
    whole, seen, _ = (statistics.median(values) for values in times.values())
    share = (seen / whole - 1) / 24
    name = f"attention sums / CLIP-L encoder, {patches} patches, {str(dtype).removeprefix('torch.')}"
    return row(name, share, "<= 2 %", share <= 0.02, **{one: quartiles(values) for one, values in times.items()})


# ---------------------------------------------------------------------------------------------------------------------
# large pictures


def qwen() -> Any:
    """A Qwen2-VL of random weights in bfloat16: 8 blocks of width 640, then 8 layers of width 1,024."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 1000, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {"depth": 8, "embed_dim": 640, "hidden_size": 1024, "num_heads": 10, "patch_size": 14}
    ids = {"image_token_id": 999, "video_token_id": 998, "vision_start_token_id": 997, "vision_end_token_id": 996}
    torch.manual_seed(0)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    return Qwen2VLForConditionalGeneration(config).eval().to(torch.bfloat16)


def qwen_prompt(model: Any, side: int, words: int = 60) -> dict[str, Tensor]:
    """A picture of `side` x `side` patches and `words` text tokens."""
    visual, config = side**2 // 4, model.config
    text, token = torch.randint(5, 250, (1, words)), config.image_token_id
    ends = [torch.tensor([[one]]) for one in (config.vision_start_token_id, config.vision_end_token_id)]
    picture = torch.cat([ends[0], torch.full((1, visual), token), ends[1]], dim=1)
    ids = torch.cat([text[:, : words // 2], picture, text[:, words // 2 :]], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == token).int(),
        "pixel_values": torch.randn(side**2, 3 * 2 * 14 * 14).to(model.dtype),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


def large_encoder(side: int, rounds: int) -> list[Row]:
    """The first token of that model under FoPru, which reads the encoder's attention, and under CDPruner."""
    model = qwen()
    inputs = qwen_prompt(model, side)
    specs = {"unpruned": None, "fopru:keep=0.25": "fopru:keep=0.25", "cdpruner": "cdpruner:keep=0.25,space=decoder"}

    def first(spec: str | None) -> Callable[[], Any]:
        def run() -> None:
            with foveate.prune(model, spec) if spec else nullcontext():
                model.generate(**inputs, max_new_tokens=1, do_sample=False)

        return run

    times = interleaved({name: spent(first(spec)) for name, spec in specs.items()}, rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    detail = {name: quartiles(values) for name, values in times.items()}
    rows = []
    for name in list(specs)[1:]:
        faster = median["unpruned"] / median[name]
        shape = f"Qwen2-VL of {side**2} patches, bfloat16: first token, unpruned / {name}"
        rows.append(row(shape, faster, "> 1", faster > 1, **detail))
    return rows


def taken(spec: str | None, side: int, answer: Any) -> None:
    """MB beside the model and the prompt that a first token takes, in a process of its own."""
    torch.set_num_threads(1)
    patch = 14
    vision = CLIPVisionConfig(
        image_size=side * patch, patch_size=patch, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=1,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, vocab_size=99,
        max_position_embeddings=16384,
    )  # fmt: skip
    with torch.no_grad():
        model = llava(vision, text)
        inputs = prompt(model)
        with foveate.prune(model, spec) if spec else nullcontext():
            Path("/proc/self/clear_refs").write_text("5")  # the mark comes down to what is held now
            before = high_water()
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        answer.put(high_water() - before)


def memory(side: int) -> list[Row]:
    """What h2o takes beside what the unpruned model does."""
    context, found = multiprocessing.get_context("fork"), {}
    for spec in (None, "h2o"):
        answer: Any = context.SimpleQueue()
        worker = context.Process(target=taken, args=(spec, side, answer))
        worker.start()
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"{spec or 'unpruned'} ended with {worker.exitcode}")
        found[spec or "unpruned"] = answer.get()
    more = found["h2o"] - found["unpruned"]
    return [row(f"h2o on {side**2} visual tokens: MB more than unpruned", more, "<= 200", more <= 200, **found)]


def main() -> None:
    """Run everything, print one table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it runs")
    parts = ["mini", "reading"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="which of these are measured")
    parser.add_argument("--rounds", type=int, default=None, help="of each rival, in turns")
    parser.add_argument("--large", action="store_true", help="large pictures, which take minutes")
    parser.add_argument("--out", type=Path, default=None, help="write the figures to this JSON file")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    many, few = (2, 2) if options.quick else (8, 3)
    many = options.rounds or many
    load, rows = os.getloadavg()[0], list[Row]()
    if options.large:
        rows = memory(24 if options.quick else 88)
        with torch.no_grad():
            rows += large_encoder(16 if options.quick else 64, few)
    with torch.no_grad():
        parts = [] if options.large else options.parts
        rows = on_mini(many) if "mini" in parts else rows
        for patches in () if "reading" not in parts else (576,) if options.quick else (576, 2304, 4096):
            rows += [reading(patches, dtype, many) for dtype in (torch.float32, torch.bfloat16)]
    show(rows)
    write_figures(options.out, load, rows=rows)


if __name__ == "__main__":
    main()
