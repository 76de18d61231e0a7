"""What pruning costs and saves on this CPU: each figure beside the target it is held to, rivals interleaved in one run.

python benchmarks/cpu.py [--quick] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava
from written import write_figures

import foveate
from foveate.choosing.record import Stopwatch
from foveate.ops.scores import attention_sums
from foveate.runtime.encoder import probe as probes
from foveate.runtime.seams import CACHE

Row = dict[str, Any]


def interleaved(rivals: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each rival, one after the other in every round; the first round warms up and is dropped."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, run in rivals.items():
            milliseconds = run()
            if turn:
                times[name].append(milliseconds)
    return times


def clock(run: Callable[[], Any], now: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """`run` as a function that returns its milliseconds by the clock `now`."""

    def timed() -> float:
        start = now()
        run()
        return (now() - start) * 1e3

    return timed


def row(name: str, value: float, target: str, met: bool | None, **more: Any) -> Row:
    """One line of the table; `met` is None where nothing is promised."""
    return {"figure": name, "value": value, "target": target, "met": met, **more}


def quartiles(times: list[float]) -> dict[str, float]:
    """Median and inter-quartile range."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_ms": middle, "q1_ms": low, "q3_ms": high}


def llava(vision: CLIPVisionConfig, text: LlamaConfig) -> Llava:
    """A LLaVA of this shape with random weights."""
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=text.vocab_size - 1)
    return Llava(config).eval()


def prompt(model: Any, words: int = 60) -> dict[str, torch.Tensor]:
    """One picture and `words` text tokens."""
    vision, token = model.config.vision_config, model.config.image_token_id
    visual = (vision.image_size // vision.patch_size) ** 2
    text = torch.randint(5, 60, (1, words))
    ids = torch.cat([text[:, : words // 2], torch.full((1, visual), token), text[:, words // 2 :]], dim=1)
    pixels = torch.rand(1, 3, vision.image_size, vision.image_size)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def observing(rounds: int) -> list[Row]:
    """FoPru's observing and choosing beside a CLIP-L/336 encoder."""
    vision = CLIPVisionConfig(
        image_size=336, patch_size=14, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
        num_attention_heads=16,
    )  # fmt: skip
    text = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=99)
    model, spent = llava(vision, text), []
    inputs = prompt(model)
    stock = probes.Watch.read_attention

    def timed(*arguments: Any, **options: Any) -> None:
        with Stopwatch(torch.device("cpu")) as watch:
            stock(*arguments, **options)
        spent.append(watch())

    handle = foveate.prune(model, foveate.FoPru(keep=0.25))

    def pruned() -> float:
        with handle as trace:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
        spent.append(spent.pop() + trace.milliseconds)
        return spent[-1]

    encoder = clock(lambda: model.model.get_image_features(inputs["pixel_values"]))
    probes.Watch.read_attention = timed  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            times = interleaved({"encoder": encoder, "observing and choosing": pruned}, rounds)
    finally:
        probes.Watch.read_attention = stock  # type: ignore[method-assign]
    whole, extra = (statistics.median(times[name]) for name in times)
    detail = {name: quartiles(values) for name, values in times.items()}
    return [
        row("FoPru observing + choosing / CLIP-L encoder", extra / whole, "<= 1 %", extra <= 0.01 * whole, **detail)
    ]


def long_encoder(patches: int) -> list[Row]:
    """Column sums of a long encoder's attention: the memory that they take beside their queries and keys.

    The process's high-water mark only rises, so this comes before anything that takes more.
    """
    queries, keys = (torch.randn(1, 16, patches, 64) for _ in range(2))
    attention_sums(queries[:, :, :64], keys[:, :, :64], 0.125)  # threads and buffers of the libraries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    attention_sums(queries, keys, 0.125)
    seconds = time.perf_counter() - start
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6
    name = f"attention sums, {patches} patches x 16 heads"
    return [
        row(f"{name}: extra MB", extra, "< 200", extra < 200),
        row(f"{name}: seconds", seconds, "reported", None),
    ]


def native_length(rounds: int) -> list[Row]:
    """The decoder of `mini` on 144 kept tokens beside the same decoder given 144 visual tokens."""
    model = AutoModelForImageTextToText.from_pretrained(foveate.MINI, dtype=torch.float32).eval()
    inputs = prompt(model, words=10)
    decoder, spans, starts = model.model.language_model, [], []
    before = decoder.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    after = decoder.register_forward_hook(lambda *_: spans.append((time.perf_counter() - starts.pop()) * 1e3))
    embeddings = torch.randn(1, 144 + 10, model.config.text_config.hidden_size)

    def first_token() -> None:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)

    def decoder_span(run: Callable[[], Any]) -> float:
        run()
        return spans.pop()

    handle = foveate.prune(model, foveate.FoPru(keep=144))

    def pruned() -> None:
        with handle:
            first_token()

    with torch.no_grad():
        prefill = interleaved(
            {
                "144 kept": lambda: decoder_span(pruned),
                "144 native": lambda: decoder_span(lambda: decoder(inputs_embeds=embeddings, use_cache=True)),
            },
            rounds,
        )
        whole = interleaved({"pruned": clock(pruned), "unpruned": clock(first_token)}, rounds)
    before.remove()
    after.remove()
    ratio = statistics.median(prefill["144 kept"]) / statistics.median(prefill["144 native"])
    first = statistics.median(whole["unpruned"]) / statistics.median(whole["pruned"])
    return [
        row(
            "mini: decoder prefill, 144 kept / 144 native", ratio, "<= 1.05", ratio <= 1.05,
            **{name: quartiles(values) for name, values in prefill.items()},
        ),
        row(
            "mini: first token, unpruned / FoPru keep=144", first, "reported", None,
            **{name: quartiles(values) for name, values in whole.items()},
        ),
    ]  # fmt: skip


def wide() -> Any:
    """A LLaVA of 32 layers of width 512, 576 visual tokens, and next to no vision encoder."""
    vision = CLIPVisionConfig(
        image_size=336, patch_size=14, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    text = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=32, num_attention_heads=8, vocab_size=99
    )
    return llava(vision, text)


class DecoderSpan:
    """Milliseconds that a model's decoder takes within generate() of one token."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        self.model, self.inputs, self.start, self.spent = model, inputs, 0.0, 0.0
        decoder = model.model.language_model
        decoder.register_forward_pre_hook(lambda *_: setattr(self, "start", time.perf_counter()))
        decoder.register_forward_hook(lambda *_: setattr(self, "spent", (time.perf_counter() - self.start) * 1e3))

    def of(self, spec: str | None) -> Callable[[], float]:
        """The span under a pruning spec; None is unpruned."""

        def run() -> float:
            with foveate.prune(self.model, spec) if spec else nullcontext():
                self.model.generate(**self.inputs, max_new_tokens=1, do_sample=False)
            return self.spent

        return run


def layers_alone(decoder: Any, length: int, count: int) -> Callable[[], float]:
    """The first `count` decoder layers on `length` tokens, in a plain loop with a cache."""
    hidden = torch.randn(1, length, decoder.config.hidden_size)
    rotary = decoder.rotary_emb(hidden, torch.arange(length)[None])

    def run() -> None:
        cache, states = transformers.DynamicCache(), hidden
        for layer in decoder.layers[:count]:
            states = layer(states, attention_mask=None, position_embeddings=rotary, **{CACHE: cache})

    return clock(run)


def inside(rounds: int) -> list[Row]:
    """FastV and the cache methods on 32 layers of width 512 with 576 visual tokens."""
    model = wide()
    inputs, decoder = prompt(model), model.model.language_model
    text, span = inputs["input_ids"].shape[1] - 576, DecoderSpan(model, inputs)
    rivals = {
        "unpruned": span.of(None),
        "fastv keep=144 after 2": span.of("fastv:layer=2,keep=144"),
        "2 layers at full length": layers_alone(decoder, 576 + text, 2),
        "30 layers at 144": layers_alone(decoder, 144 + text, 30),
        "fastv keep=1.0": span.of("fastv:layer=2,keep=1.0"),
        "h2o, all budget": span.of("h2o:heavy=0.5,recent=0.5"),
        "snapkv": span.of("snapkv:capacity=0.25"),
    }
    idle_pair = {"unpruned, beside hooks": rivals["unpruned"], "fastv keep=1.0": rivals.pop("fastv keep=1.0")}
    with torch.no_grad():
        times = interleaved(rivals, rounds) | interleaved(idle_pair, 2 * rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    whole, pruned = median["unpruned"], median["fastv keep=144 after 2"]
    fastv = pruned / (median["2 layers at full length"] + median["30 layers at 144"])
    idle = median["fastv keep=1.0"] / median["unpruned, beside hooks"]
    detail = {name: quartiles(values) for name, values in times.items()}
    return [
        row("FastV keep=144 after 2 of 32 / its layers natively", fastv, "<= 1.08", fastv <= 1.08, **detail),
        row("hooks at keep=1.0 / unpruned", idle, "<= 1.02", idle <= 1.02),
        row("unpruned / FastV keep=144, decoder prefill", whole / pruned, "reported", None),
        row("H2O: column sums in every layer / unpruned", median["h2o, all budget"] / whole, "reported", None),
        row("SnapKV: window scores in every layer / unpruned", median["snapkv"] / whole, "reported", None),
    ]


def show(rows: Sequence[Row]) -> None:
    """Print the figures as one table."""
    table = Table("figure", "measured", "target", "met")
    for one in rows:
        met = "-" if one["met"] is None else "yes" if one["met"] else "NO"
        value = f"{one['value']:.2%}" if "%" in one["target"] else f"{one['value']:.3f}"
        table.add_row(one["figure"], value, one["target"], met)
    Console(width=130).print(table)


def main() -> None:
    """Run everything, print one table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it runs")
    parser.add_argument("--out", type=Path, default=None, help="write the figures to this JSON file")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    load, (many, few) = os.getloadavg()[0], (3, 2) if options.quick else (50, 12)
    rows = long_encoder(2048 if options.quick else 16384) + observing(few) + native_length(many) + inside(few)
    show(rows)
    write_figures(options.out, load, rows=rows)


if __name__ == "__main__":
    main()
