"""What pruning costs and saves on a GPU: prefills beside their predictions, choosing, and whole answers with rivals.

python benchmarks/gpu.py [--device cuda] [--tiny] [--out FILE.json]

It takes less than 8 minutes on an H200 and writes benchmarks/results/gpu-<date>.json. `--tiny` takes small shapes and
few rounds, to see on any device that it runs; its figures say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from cpu import Row, clock, interleaved, quartiles, row

from foveate.cost import HARDWARE, Hardware, estimate, fitted, hardware_of
from foveate.evaluate.bench import Setting, measure, warnings
from foveate.evaluate.bench_model import random_inputs, random_model
from foveate.ops.scores import attention_sums
from foveate.report.bench_tables import PAPER_COLUMNS, at_ratios, columns, paper_rows, rows
from foveate.report.tables import Column, plain
from foveate.runs import write_text
from foveate.spec import parse_stages

HERE = Path(__file__).parent
RIVALS = ("fopru:keep=0.25", "divprune:keep=64", "visionzip:keep=64", "fastv:layer=2,keep=0.25", "pyramiddrop")


@dataclasses.dataclass(frozen=True)
class Size:
    """What is run: the shapes of the targets, or something small."""

    preset: str = "llava-1.5-7b"
    layers: int | None = None
    rounds: int = 12
    visual: tuple[int, ...] = (576, 288, 144, 64)
    batches: tuple[int, ...] = (1, 8)
    patches: int = 16384
    answer: int = 32
    repeats: int = 5
    rivals: tuple[str, ...] = RIVALS
    only: str = ""  # methods that are timed alone; all by default
    other: str | None = "llava-next-8b"  # a model of FoPru's Table 1, with five tiles per picture


TINY = Size(
    "mini", 2, 2, (64, 16), (1, 2), 256, 2, 1, ("fopru:keep=0.25", "fastv:layer=1,keep=0.25"), "fopru,uniform", None
)


def milliseconds(run: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """`run` as a function that returns its milliseconds: between device events, or by the clock."""
    if device.type != "cuda":
        return clock(run)

    def timed() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end))

    return timed


def prefills(model: Any, size: Size, known: Hardware) -> tuple[list[Row], Hardware]:
    """Eager passes of tower and decoder over prompts of several lengths, each beside its prediction."""
    device, config = model.device, model.config
    runs, stages = {}, {}
    for batch in size.batches:
        cost = estimate(config, batch=batch, hardware=known, dtype="bf16")
        pixels = random_inputs(model, batch=batch)["pixel_values"]
        runs[f"tower, batch {batch}"] = milliseconds(lambda pixels=pixels: model.model.vision_tower(pixels), device)
        stages[f"tower, batch {batch}"] = cost.tower
        for visual in size.visual:
            name = f"prefill of {visual} + 60 tokens, batch {batch}"
            runs[name] = milliseconds(decoder_pass(model, visual + 60, batch), device)
            stages[name] = estimate(config, visual, 60, batch=batch, hardware=known, dtype="bf16").prefill
    with torch.inference_mode():
        times = interleaved(runs, size.rounds)
    measured = {name: quartiles(values) for name, values in times.items()}
    decoder = [name for name in runs if name.startswith("prefill")]
    again = fitted(
        known,
        [(stages[name].launches, stages[name].fused_seconds, measured[name]["median_ms"] / 1e3) for name in decoder],
    )
    found = []
    for name, figures in measured.items():
        expected = stages[name].launched_seconds
        refit = again.launched(stages[name].fused_seconds, stages[name].launches)
        error = None if expected is None else expected * 1e3 / figures["median_ms"] - 1
        met = None if error is None or name not in decoder else abs(error) <= 0.15
        more = {"predicted_ms": None if expected is None else expected * 1e3, "refitted_ms": (refit or 0.0) * 1e3}
        target = "within 15 % of the prediction" if name in decoder else "reported"
        found.append(row(name, figures["median_ms"], target, met, error=error, **more, **figures))
    return found, again


def decoder_pass(model: Any, length: int, batch: int) -> Callable[[], Any]:
    """One pass of decoder and output head over `length` embeddings, with a cache."""
    width = model.config.text_config.hidden_size
    embeddings = torch.randn(batch, length, width, device=model.device, dtype=model.dtype)
    decoder, head = model.model.language_model, model.lm_head
    return lambda: head(decoder(inputs_embeds=embeddings, use_cache=True).last_hidden_state[:, -1:])


def reading(size: Size, device: torch.device) -> list[Row]:
    """Column sums of one block's attention: their time at CLIP-L's size, their memory at a long one."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    queries, keys = (torch.randn(1, 16, 577, 64, device=device, dtype=dtype) for _ in range(2))

    def sums() -> None:
        attention_sums(queries, keys, 0.125, skip=1)

    times = interleaved({"eager": milliseconds(sums, device), **captured(sums, device)}, 4 * size.rounds)
    name = "attention sums, 577 tokens x 16 heads"
    found = []
    for way, values in times.items():
        figures = quartiles(values)
        met = figures["median_ms"] < 0.3 if device.type == "cuda" else None
        found.append(row(f"{name}, {way}", figures["median_ms"], "< 0.3 ms", met, **figures))
    queries, keys = (torch.randn(1, 16, size.patches, 64, device=device, dtype=dtype) for _ in range(2))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    figures = quartiles(interleaved({"long": milliseconds(sums_of(queries, keys), device)}, 3)["long"])
    found.append(row(f"attention sums, {size.patches} patches x 16 heads", figures["median_ms"], "reported", None))
    if device.type == "cuda":
        extra = (torch.cuda.max_memory_allocated(device) - before) / 1e6
        found.append(row(f"extra MB at {size.patches} patches", extra, "< 200 MB", extra < 200))
    return found


def sums_of(queries: torch.Tensor, keys: torch.Tensor) -> Callable[[], Any]:
    """The column sums of one map."""
    return lambda: attention_sums(queries, keys, 0.125)


def captured(run: Callable[[], None], device: torch.device) -> dict[str, Callable[[], float]]:
    """`run` as a CUDA graph, where there is a device for one: what it costs once nothing is launched from Python."""
    if device.type != "cuda":
        return {}
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return {"CUDA graph": milliseconds(graph.replay, device)}


def choosing(size: Size, device: torch.device) -> list[Row]:
    """Every method that acts before the decoder, by itself."""
    file = HERE / "selection.py"
    if not file.exists():
        return []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "selection.json"
        options = [*(["--only", size.only, "--quick"] if size.only else []), "--out", str(out)]
        done = subprocess.run(
            [sys.executable, str(file), "--device", device.type, *options], capture_output=True, text=True
        )
        if done.returncode != 0 or not out.exists():
            reason = (done.stderr.strip() or "no figures").splitlines()[-1]
            return [{**row(f"selection.py did not run: {reason}", 0.0, "-", False), "value": None}]
        found: list[Row] = json.loads(out.read_text())["rows"]
        return found


def answers(model: Any, size: Size, known: Hardware) -> dict[str, Any]:
    """Whole answers, unpruned and with rivals, at each batch; and the paper's table for batch 1."""
    setting = Setting(answer=size.answer, repeats=size.repeats)
    rivals = [parse_stages(spec) for spec in size.rivals]
    stored: dict[str, Any] = {}
    for batch in size.batches:
        results = measure(model, random_inputs(model, batch=batch), rivals, setting, hardware=known)
        heading(f"answers of {size.answer} tokens, batch {batch}")
        print(plain(columns(results), rows(results)))
        print(*(f"warning: {line}" for line in warnings(results)), sep="\n")
        stored[f"batch {batch}"] = [result.to_dict() for result in results]
    stored[f"paper: {size.preset}"] = in_ratios(model, size.preset, size, ("fopru", "fastv")[: 2 if size.other else 1])
    return stored


def in_ratios(model: Any, preset: str, size: Size, names: Sequence[str]) -> list[dict[str, Any]]:
    """FoPru's Tables 1 and 2: each method at 75, 50 and 25 %, one prompt at a time."""
    setting = Setting(answer=size.answer, repeats=size.repeats)
    ratios = [stages for name in names for stages in at_ratios(parse_stages(f"{name}:keep=0.5"))]
    found = paper_rows(measure(model, random_inputs(model), ratios, setting), names)
    heading(f"{preset}, in the layout of FoPru's Table 1")
    print(plain(PAPER_COLUMNS, found))
    return found


def show(title: str, found: Sequence[Row]) -> None:
    """Print one section."""
    heading(title)
    made = [
        Column("figure", "figure", left=True),
        Column("value", "measured", lambda value: f"{value:.4g}"),
        Column("predicted_ms", "predicted", lambda value: f"{value:.4g}"),
        Column("refitted_ms", "refitted", lambda value: f"{value:.4g}"),
        Column("error", "error", lambda value: f"{value:+.0%}"),
        Column("target", "target", left=True),
        Column("met", "met", lambda met: "yes" if met else "NO", left=True),
    ]
    print(plain([column for column in made if any(one.get(column.key) is not None for one in found)], found))


def heading(text: str) -> None:
    """Print what comes."""
    print(f"\n== {text}", flush=True)


def run(size: Size, device: torch.device) -> dict[str, Any]:
    """Everything, printed as it comes."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    known = (hardware_of(name) if cuda else None) or HARDWARE["cpu"]
    print(f"{name}, predictions for {known.name}; torch {torch.__version__}, transformers {transformers.__version__}")
    model = random_model(
        size.preset, layers=size.layers, device=device, dtype=torch.bfloat16 if cuda else torch.float32
    )
    eager, again = prefills(model, size, known)
    show(f"{size.preset}: eager passes, milliseconds", eager)
    assert again.efficiency is not None and again.launch is not None
    print(f"fitted to these prefills: efficiency {again.efficiency:.3g}, {again.launch * 1e6:.3g} us a launch")
    read = reading(size, device)
    show("reading attention", read)
    chosen = choosing(size, device)
    show("choosing alone", chosen) if chosen else heading("choosing alone: benchmarks/selection.py is not there")
    answered = answers(model, size, known)
    if size.other is not None:
        del model
        model = random_model(size.other, device=device)
        answered[f"paper: {size.other}"] = in_ratios(model, size.other, size, ("fopru",))
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "preset": size.preset,
        "layers": size.layers,
        "fit": {"efficiency": again.efficiency, "launch_us": again.launch * 1e6},
        "rows": eager + read + chosen,
        "answers": answered,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything, print its tables, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu together with --tiny")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few rounds, to see that it runs")
    parser.add_argument("--out", type=Path, default=None, help="where the figures go")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here; --device cpu --tiny shows that the program runs")
        return
    transformers.utils.logging.set_verbosity_error()
    start, today = time.perf_counter(), datetime.datetime.now(datetime.UTC).date().isoformat()
    result = {"date": today, "tiny": options.tiny, **run(TINY if options.tiny else Size(), device)}
    result["seconds"] = time.perf_counter() - start
    target = options.out or (None if options.tiny else HERE / "results" / f"gpu-{today}.json")
    print(f"\n{result['seconds']:.0f} s" + (f", figures in {target}" if target else ""))
    if target is not None:
        write_text(target, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
