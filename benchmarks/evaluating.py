"""How many questions a second `foveate eval` asks, beside a plain loop over stock generate() at the same batch.

python benchmarks/evaluating.py [--quick] [--out FILE.json]

Seconds are process time of one thread, which other programs' work does not count to, and beside them those of the
clock; both ways take turns. Both draw the same pictures, and both answer with at most as many tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from cpu import Row, row, show
from transformers import AutoModelForImageTextToText, AutoProcessor
from written import write_figures

import foveate
from foveate.evaluate.scenes_task import LONGEST, draw_samples, evaluate

BATCH = 16
RIVALS = ("fopru:keep=64", "divprune:keep=64")


def plain(model: Any, processor: Any, samples: int, pruned: AbstractContextManager[Any]) -> list[str]:
    """Answers as anybody would write it: batches in the order of the questions, the stock processor and generate()."""
    said: list[str] = []
    asked = list(draw_samples(samples, seed=0))
    for start in range(0, samples, BATCH):
        group = asked[start : start + BATCH]
        turns = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one.question}]}] for one in group
        ]
        texts = processor.apply_chat_template(turns, add_generation_prompt=True)
        pictures = [[one.image] for one in group]
        inputs = processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
        inputs = inputs.to(model.device, dtype=model.dtype)
        with pruned, torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST)
        said += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def spent(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the processor, and of the clock."""
    start = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - start[0], time.perf_counter() - start[1]


def measured(samples: int, rounds: int) -> list[Row]:
    """Rates of both ways, and what several rivals take that share an encoding."""
    model = AutoModelForImageTextToText.from_pretrained(foveate.MINI).eval()
    processor = AutoProcessor.from_pretrained(foveate.MINI)
    handles = [foveate.prune(model, spec, processor=processor) for spec in RIVALS]
    ways: dict[str, Callable[[], Any]] = {
        "plain": partial(plain, model, processor, samples, nullcontext()),
        "eval": partial(evaluate, model, processor, (), samples=samples, batch=BATCH),
        "plain, each rival": lambda: [plain(model, processor, samples, one) for one in (nullcontext(), *handles)],
        "eval, all rivals": partial(evaluate, model, processor, RIVALS, samples=samples, batch=BATCH),
    }
    plain(model, processor, BATCH, nullcontext())
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            taken[name].append(spent(run))
    rows = []
    for kind, clock in enumerate(("processor", "clock")):
        middle = {name: statistics.median(times[kind] for times in values) for name, values in taken.items()}
        rates = {name: samples / middle[name] for name in ("plain", "eval")}
        faster = middle["plain"] / middle["eval"]
        shared = middle["eval, all rivals"] / middle["plain, each rival"]
        rows.append(row(f"questions a second of the {clock}, plain loop", rates["plain"], "", None))
        rows.append(row(f"questions a second of the {clock}, foveate eval", rates["eval"], "", None))
        rows.append(row(f"eval / plain loop, by the {clock}", faster, ">= 1", faster >= 1 if kind == 0 else None))
        text = f"time of {1 + len(RIVALS)} rivals in eval / in loops of their own, by the {clock}"
        rows.append(row(text, shared, "< 1", shared < 1 if kind == 0 else None))
    return rows


def main() -> None:
    """Run everything, print one table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few questions, to see that it runs")
    parser.add_argument("--out", type=Path, default=None, help="write the figures to this JSON file")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rows = measured(*((BATCH, 1) if options.quick else (5 * BATCH, 3)))
    show(rows)
    write_figures(options.out, load, rows=rows)


if __name__ == "__main__":
    main()
