"""What choosing tokens costs: DivPrune beside a plain form of itself, every method before the decoder, its growth.

python benchmarks/selection.py [--device cpu|cuda] [--only divprune,fopru] [--quick] [--out FILE.json]
python benchmarks/selection.py --growth [--only divprune,fopru] [--quick] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from cpu import Row, clock, interleaved, quartiles, row
from rich.console import Console
from rich.table import Table
from torch import Tensor
from written import write_figures

from foveate import methods
from foveate.core import Block, FoveateError, Method, Signals
from foveate.ops import greedy
from foveate.ops.merging import bipartite_merge

BATCH, TOKENS, KEPT = 8, 576, 64
SIDE = 24
# Widths of a CLIP-L tower, its joint space and a 7B decoder, and a question of one piece of CLIP's text.
SIZES = {"N": TOKENS, "H": 16, "d": 64, "E": 1024, "C": 768, "D": 4096, "T": 60, "W": 77, "Q": 1}
FIELDS = {"features": "ND", "text": "TD", "image_clip": "NC", "text_clip": "QC", "word_clip": "WC"}
MASKS = {"text_mask": "T", "after_image": "T", "word_mask": "W"}
BLOCK = {
    "hidden": "NE",
    "cls": "E",
    "cls_attention": "HN",
    "received": "N",
    "given": "N",
    "received_all": "N",
    "keys": "HNd",
    "key_cls": "Hd",
    "query_cls": "Hd",
}
PROBABILITIES = {"cls_attention", "received", "given", "received_all"}
# How choosing grows: pictures of 24, 48 and 96 patches a side, features of this width, a ninth of the tokens kept.
GREEDY = ("cdpruner", "divprune", "eadp", "mmtok", "scope", "score_cover", "vispruner")
SIDES, WIDTH, SHARE = (24, 48, 96), 1024, 9


def timed(run: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """`run` as a function that returns its milliseconds, all kernels done."""
    if device.type == "cpu":
        return clock(run)

    def until_done() -> None:
        run()
        torch.cuda.synchronize(device)

    return clock(until_done)


# ---------------------------------------------------------------------------------------------------------------------
# DivPrune beside itself


def distances(features: Tensor) -> Tensor:
    """(N, D) -> (N, N)."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    return 1.0 - unit @ unit.T


def recomputed(distance: Tensor, count: int) -> Tensor:
    """The same picks, the distance to the nearest kept token computed over all kept ones in every round."""
    picks = [distance.topk(2, dim=0, largest=False).values[1].argmax()]
    while len(picks) < count:
        picks.append(distance[torch.stack(picks)].min(dim=0).values.argmax())
    return torch.stack(picks)


def recomputed_from_features(features: Tensor, count: int, first: Tensor) -> Tensor:
    """The same with no table: in every round the products of all tokens with all kept ones."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    picks = [first]
    while len(picks) < count:
        picks.append((1.0 - unit[torch.stack(picks)] @ unit.T).min(dim=0).values.argmax())
    return torch.stack(picks)


def beside_itself(device: torch.device, rounds: int) -> list[Row]:
    """N=2880, K=320, D=4096: whole, and the rounds alone on a table that is there."""
    tokens, count, width = 2880, 320, 4096
    features = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(device)
    table, own = distances(features), greedy._Cosines(features[None], count)
    stock = greedy._Cosines

    def rounds_alone() -> Tensor:
        greedy._Cosines = lambda *_: own  # type: ignore[assignment, misc]
        try:
            return greedy.farthest(features[None], count)
        finally:
            greedy._Cosines = stock  # type: ignore[misc]

    first = recomputed(table, 1)[0]
    assert torch.equal(rounds_alone()[0], recomputed(table, count)), "two forms of one choice"
    rivals = {
        "foveate": lambda: greedy.farthest(features[None], count),
        "recomputed": lambda: recomputed(distances(features), count),
        "foveate, table given": rounds_alone,
        "recomputed, table given": lambda: recomputed(table, count),
    }
    times = interleaved({name: timed(run, device) for name, run in rivals.items()}, rounds)
    # This one takes many times as long as the others together.
    slow = {"recomputed from features": timed(lambda: recomputed_from_features(features, count, first), device)}
    times |= interleaved(slow, 2)
    median = {name: statistics.median(values) for name, values in times.items()}
    detail = {name: quartiles(values) for name, values in times.items()}
    shape = f"DivPrune, N={tokens}, K={count}: recomputing the min in every round / foveate"
    ratio = median["recomputed, table given"] / median["foveate, table given"]
    plain = median["recomputed from features"] / median["foveate"]
    return [
        row(f"{shape}, the rounds alone", ratio, ">= 5", ratio >= 5, **detail),
        row(f"{shape}, from features", plain, ">= 5", plain >= 5),
        row(f"{shape}, one table of distances included", median["recomputed"] / median["foveate"], "reported", None),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# every method before the decoder


def signals(
    method: Method,
    device: torch.device,
    batch: int = BATCH,
    side: int = SIDE,
    sizes: Mapping[str, int] = SIZES,
) -> Signals:
    """Random numbers for what `method` needs, of B square pictures.

    Raises:
        LookupError: it needs what is not known here.
    """
    generator = torch.Generator().manual_seed(0)

    def random(name: str, axes: str) -> Tensor:
        value = torch.randn(batch, *(sizes[axis] for axis in axes), generator=generator)
        return (value.softmax(dim=-1) if name in PROBABILITIES else value).to(device)

    fields: dict[str, Any] = {}
    tower: dict[int | str, dict[str, Tensor]] = {}
    for need in method.needs:
        room, _, name = need.rpartition(".")
        if room.startswith("tower."):
            block = room.removeprefix("tower.")
            tower.setdefault(int(block) if block.isdigit() else block, {})[name] = random(name, BLOCK[name])
        elif need in MASKS:
            fields[need] = torch.ones(batch, sizes[MASKS[need]], dtype=torch.bool, device=device)
        else:
            fields[need] = random(need, FIELDS[need])
    return Signals(
        original=side**2,
        index=torch.arange(side**2, device=device).repeat(batch, 1),
        grid=(side, side),
        tower={name: Block(**values) for name, values in tower.items()},
        **fields,
    )


def before_the_decoder(only: list[str]) -> dict[str, Method]:
    """Every registered method, or its part, that acts between encoder and decoder, keeping 64 where it can."""
    found: dict[str, Method] = {}
    for name in only or methods.names():
        for part in methods.get(name).example().parts():
            if part.site != "input":
                continue
            try:
                part = dataclasses.replace(part, keep=KEPT)  # type: ignore[call-arg]
                part.count(TOKENS, (SIDE, SIDE))
            except (TypeError, FoveateError):
                part = methods.get(name).example()
            found[name] = part
    return found


def waits(run: Callable[[], Any]) -> int:
    """How often the host waits for the device in `run`, outside the loops of the greedy engine: within them it may not.

    Raises:
        RuntimeError: it waits there.
    """
    stock = greedy._greedy

    def strict(*arguments: Any) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return stock(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("warn")

    greedy._greedy = strict
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        greedy._greedy = stock
    return sum("synchroniz" in str(one.message) for one in caught)


def each_method(device: torch.device, rounds: int, only: list[str]) -> list[Row]:
    """Milliseconds of select() at B=8, N=576; on a GPU also how often the host waits."""
    rows = []
    for name, method in before_the_decoder(only).items():
        try:
            shown = signals(method, device)
        except LookupError as error:
            print(f"{name}: needs {error}, which is not made here")
            continue

        def select(method: Method = method, shown: Signals = shown) -> Any:
            return method.select(dataclasses.replace(shown, memory={}))

        times = interleaved({name: timed(select, device)}, rounds)[name]
        median = statistics.median(times)
        more: dict[str, Any] = {name: quartiles(times)}
        if device.type == "cuda":
            more["host_waits"] = waits(select)
        target = "<= 3 ms" if device.type == "cuda" else "reported"
        met = median <= 3.0 if device.type == "cuda" else None
        rows.append(row(f"{method}, B={BATCH}, N={TOKENS}: ms", median, target, met, **more))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# how choosing grows with the number of tokens


def choosing(name: str, side: int) -> Callable[[], Any]:
    """What is measured: the choice of one picture's tokens, or one of ToMe's merges of a quarter of them."""
    tokens, device = side**2, torch.device("cpu")
    if name == "tome":
        generator = torch.Generator().manual_seed(0)
        patches, keys = (torch.randn(1, tokens, width, generator=generator) for width in (WIDTH, SIZES["d"]))
        size = torch.ones(1, tokens)
        return lambda: bipartite_merge(patches, keys, size, tokens // 4)
    method: Any = dataclasses.replace(methods.get(name).example(), keep=tokens // SHARE)
    shown = signals(method, device, 1, side, {**SIZES, "N": tokens, "D": WIDTH})
    return lambda: method.select(dataclasses.replace(shown, memory={}))


def high_water() -> float:
    """MB of memory that this process has held at most since the mark was last put down (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def alone(name: str, side: int, rounds: int, answer: Any) -> None:
    """Milliseconds of process time and MB beside what is given, of choosing in a process of its own."""
    torch.set_num_threads(1)
    with torch.no_grad():
        choosing(name, SIDES[0])()  # libraries' buffers
        run, times = choosing(name, side), []
        Path("/proc/self/clear_refs").write_text("5")  # the mark comes down to what is held now
        before = high_water()
        for _ in range(rounds):
            start = time.process_time()
            run()
            times.append((time.process_time() - start) * 1e3)
    answer.put((times, high_water() - before))


def growth(rounds: int, only: list[str]) -> list[Row]:
    """Process time and memory of every method that picks tokens one after the other, as pictures grow.

    Sizes take turns, so that other work on the machine slows all of them. Nothing is computed in this process before it
    is forked, so that no thread is lost.
    """
    rows, context = [], multiprocessing.get_context("fork")
    for name in only or [*GREEDY, "tome"]:
        times: dict[int, list[float]] = {side: [] for side in SIDES}
        extra = dict.fromkeys(SIDES, 0.0)
        for _ in range(rounds):
            for side in SIDES:
                answer: Any = context.SimpleQueue()
                worker = context.Process(target=alone, args=(name, side, 1 if side == SIDES[-1] else 5, answer))
                worker.start()
                worker.join()
                if worker.exitcode:
                    raise RuntimeError(f"{name} at {side**2} tokens ended with {worker.exitcode}")
                found, extra[side] = answer.get()
                times[side] += found
        median = {side: statistics.median(found) for side, found in times.items()}
        detail = {f"{side**2} tokens": {"median_ms": median[side], "extra_mb": extra[side]} for side in SIDES}
        few, many, most = (median[side] for side in SIDES)
        shape = f"{name}, N={SIDES[0] ** 2} to {SIDES[1] ** 2}: times the process time"
        rows.append(row(shape, many / few, "<= 17", many <= 17 * few, **detail))
        rows.append(row(f"{name}, N={SIDES[-1] ** 2}: seconds", most / 1e3, "<= 4", most <= 4e3))
        rows.append(row(f"{name}, N={SIDES[-1] ** 2}: MB", extra[SIDES[-1]], "<= 1500", extra[SIDES[-1]] <= 1500))
    return rows


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run everything, print one table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="names of methods, by comma; all by default")
    parser.add_argument("--growth", action="store_true", help="how choosing grows with the tokens, on one CPU thread")
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it runs")
    parser.add_argument("--out", type=Path, default=None, help="write the figures to this JSON file")
    options = parser.parse_args()
    device = torch.device(options.device)
    only = [name for name in options.only.split(",") if name]
    load, (many, few) = os.getloadavg()[0], (3, 2) if options.quick else (20, 7)
    if options.growth:
        torch.set_num_threads(1)
        rows = growth(1 if options.quick else 3, only)
    else:
        with torch.no_grad():
            rows = [] if only and "divprune" not in only else beside_itself(device, few)
            rows += each_method(device, many if device.type == "cuda" else few, only)
    table = Table("figure", "measured", "target", "met", "host waits")
    for one in rows:
        met = "-" if one["met"] is None else "yes" if one["met"] else "NO"
        table.add_row(one["figure"], f"{one['value']:.2f}", one["target"], met, str(one.get("host_waits", "-")))
    Console(width=150).print(table)
    on = {"device": str(device), "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None}
    write_figures(options.out, load, **on, rows=rows)


if __name__ == "__main__":
    main()
