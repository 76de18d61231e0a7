"""Measuring answers: what is counted as what, taking turns, predictions, warnings and the tables."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import tiny
from outside import loaded

from foveate.core import FoveateError
from foveate.cost import HARDWARE, PRESETS, ModelShape, estimate
from foveate.evaluate import bench
from foveate.evaluate.bench import Prediction, Result, Run, Setting, Spread, fit, measure, run_once, warnings
from foveate.evaluate.bench_model import random_clip, random_inputs, random_model, scaled
from foveate.methods.fastv import FastV
from foveate.methods.fopru import FoPru
from foveate.methods.h2o import H2O
from foveate.methods.pyramiddrop import PyramidDrop
from foveate.methods.random import Random
from foveate.methods.uniform import Uniform
from foveate.report.bench_tables import at_ratios, columns, paper_rows, rows
from foveate.report.tables import plain
from foveate.runtime.seams import CACHE

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


class Clock:
    """Seconds that pass only when a moment is noted."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = iter(seconds)

    def perf_counter(self) -> float:
        return next(self.seconds)


def test_moments_of_an_answer(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called at 10.0, first token at 10.5, then after 0.1 and 0.3, done 0.1 later."""
    monkeypatch.setattr(bench, "time", Clock(10.0, 10.5, 10.6, 10.9, 11.0))
    run = run_once(model, tiny.inputs(model, "2i3", "4i1"), 3)
    assert run.first_token_ms == pytest.approx(500)
    assert run.per_token_ms == pytest.approx(200)  # the mean of 100 and 300
    assert run.end_to_end_ms == pytest.approx(1000)
    assert (run.choosing_ms, run.peak_bytes) == (None, None)


def test_an_answer_of_one_token_has_no_gap(model: Any) -> None:
    assert run_once(model, tiny.inputs(model, "2i3"), 1).per_token_ms is None


def test_an_answer_goes_past_its_end() -> None:
    model = tiny.model()
    inputs = tiny.inputs(model, "2i3")
    first = bench.greedy(model, inputs, max_new_tokens=1)[0, -1]
    model.generation_config.eos_token_id = int(first)
    assert run_once(model, inputs, 4).per_token_ms is not None


def test_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_rivals_take_turns_behind_a_round_that_does_not_count(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[bool] = []
    times = iter([99.0, 99.0, 10.0, 5.0, 30.0, 7.0, 20.0, 6.0])

    def timed(model: Any, inputs: Any, answer: int, trace: Any) -> Run:
        order.append(trace is not None)
        if trace is not None:
            real(model, inputs, answer, trace)
        taken = next(times)
        return Run(taken, 1.0, 2 * taken, None if trace is None else 0.5)

    real, done = run_once, []
    monkeypatch.setattr(bench, "run_once", timed)
    plain, pruned = measure(
        model, tiny.inputs(model, "3i4", "5i2"), [[FoPru(keep=0.25)]], Setting(4, 3), progress=done.append
    )
    assert order == [False, True] * 4
    assert sum(done) == 8
    assert plain.first_token_ms == Spread(20.0, 15.0, 25.0)
    assert pruned.end_to_end_ms.median == 12.0
    assert pruned.choosing_ms == Spread(0.5, 0.5, 0.5)
    assert (plain.choosing_ms, plain.prune, pruned.prune) == (None, None, "fopru:keep=0.25")
    # 2 prompts of 4 tokens in 40 ms.
    assert plain.tokens_per_second == 200.0
    assert (plain.tokens, pruned.tokens) == (tiny.TOKENS, tiny.TOKENS / 4)
    # 4 layers, keys and values of 2 heads of width 8 in 4 bytes, 2 rows of 36 (9) + 7 entries.
    assert (plain.kv_bytes, pruned.kv_bytes) == (4 * 2 * 16 * 4 * 2 * 43, 4 * 2 * 16 * 4 * 2 * 16)


def test_kv_bytes_are_those_of_the_cache(model: Any) -> None:
    inputs = tiny.inputs(model, "3i4", "3i4")
    (plain,) = measure(model, inputs, [], Setting(1, 1, 0))
    output = bench.greedy(model, inputs, max_new_tokens=1, return_dict_in_generate=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in getattr(output, CACHE).layers)
    assert plain.kv_bytes == held


def test_predictions_are_the_estimates(model: Any) -> None:
    inputs = tiny.inputs(model, "3i4", "3i4")
    rivals = [[FoPru(keep=0.25)], [FastV(layer=1, keep=9)]]
    for name in ("cpu", "h200"):
        results = measure(model, inputs, rivals, Setting(3, 1, 0), hardware=name)
        for result, stages in zip(results, [None, *rivals], strict=True):
            cost = estimate(model.config, 36, 7, stages, batch=2, answer=3, hardware=name, dtype="fp32")
            first, steps = cost.first_token, cost.decode
            wanted = [first.fused_seconds, steps.fused_seconds]
            if name == "h200":
                wanted = [first.launched_seconds or 0.0, steps.launched_seconds or 0.0]
            assert result.predicted is not None
            assert result.predicted.first_token_ms == pytest.approx(wanted[0] * 1e3)
            assert result.predicted.per_token_ms == pytest.approx(wanted[1] * 1e3 / 2)
    assert measure(model, inputs, [], Setting(1, 1, 0))[0].predicted is None


def test_what_cannot_be_planned_is_not_predicted(model: Any) -> None:
    from foveate.methods.prumerge import PruMerge

    results = measure(model, tiny.inputs(model, "3i4"), [[PruMerge()]], Setting(1, 1, 0), hardware="cpu")
    assert [result.predicted is None for result in results] == [False, True]


def test_a_method_that_cannot_run_is_refused_before_anything_runs(model: Any) -> None:
    def never(count: int) -> None:
        raise AssertionError("an answer has run")

    with pytest.raises(FoveateError, match="keep=99 asks for 99 tokens but the image has 36"):
        measure(model, tiny.inputs(model, "3i4"), [[FoPru(keep=99)]], progress=never)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 0}, "answer=0 is below 1; the smallest is answer=1"),
        ({"repeats": 0}, "repeats=0 is below 1"),
        ({"warmup": -1}, "warmup=-1 is below 0"),
    ],
)
def test_settings_that_measure_nothing(change: dict[str, int], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        Setting(**change)


# ---------------------------------------------------------------------------------------------------------------------
# What is said about the results


def result(prune: str | None, first: float, whole: float, choosing: float | None = None, **more: Any) -> Result:
    spread = Spread(first, first, first)
    made = dict(
        prune=prune, tokens=9.0, first_token_ms=spread, per_token_ms=Spread(2.0, 1.0, 4.0),
        end_to_end_ms=Spread(whole, whole, whole), peak_bytes=None, kv_bytes=10**6, tokens_per_second=5.0, runs=3,
        choosing_ms=None if choosing is None else Spread(choosing, choosing, choosing),
    )  # fmt: skip
    return Result(**{**made, **more})


def test_a_warning_where_choosing_costs_more_than_it_saves() -> None:
    found = warnings([result(None, 20.0, 100.0), result("slow", 25.0, 104.0, 6.0), result("fast", 15.0, 95.0, 6.0)])
    assert len(found) == 1
    assert found[0].startswith("slow costs more than it saves: answers take 104.0 ms, unpruned 100.0; choosing is 6.00")


def test_a_fit_of_first_tokens() -> None:
    """Launches of 2000 x 5 us bind the first, the roofline's 50 ms at half its speed the second."""
    results = [
        result(None, 10.0, 50.0, predicted=Prediction(0.0, None, fused_ms=1.0, launches=2000)),
        result("a", 100.0, 50.0, predicted=Prediction(0.0, None, fused_ms=50.0, launches=2000)),
        result("b", 1.0, 50.0),
    ]
    found = fit(results, "cpu")
    assert found is not None and found.efficiency is not None and found.launch is not None
    assert (found.efficiency, found.launch) == (pytest.approx(0.5), pytest.approx(5e-6))
    assert found.bandwidth == HARDWARE["cpu"].bandwidth
    assert fit(results[:1], "cpu") is None


def test_the_table_leaves_out_columns_that_hold_nothing() -> None:
    results = [result(None, 20.0, 100.0), result("fopru", 10.0, 50.0, 0.5)]
    table = plain(columns(results), rows(results)).splitlines()
    assert table[0].split("  ")[0] == "method"
    assert "predicted" not in table[0] and "peak GB" not in table[0]
    assert "2.00x" in table[2] and "2 (1-4)" in table[2]


def test_the_layout_of_the_paper() -> None:
    """Ratio by ratio, both methods; speed-ups against the first row."""
    results = [result(None, 40.0, 0.0, peak_bytes=2 * 10**9)]
    results += [result("a", first, 0.0) for first in (32.0, 20.0, 10.0)]
    results += [result("b", first, 0.0) for first in (80.0, 40.0, 16.0)]
    found = paper_rows(results, ["a", "b"])
    assert [(row["ratio"], row["method"], row["ttft"], row["ttft_speedup"]) for row in found] == [
        ("100%", "-", 40.0, None),
        ("75%", "a", 32.0, 1.25),
        ("75%", "b", 80.0, 0.5),
        ("50%", "a", 20.0, 2.0),
        ("50%", "b", 40.0, 1.0),
        ("25%", "a", 10.0, 4.0),
        ("25%", "b", 16.0, 2.5),
    ]
    assert [row["gpu"] for row in found[:2]] == [2.0, None]
    assert found[1]["tpot_speedup"] == 1.0


def test_ratios_of_a_method() -> None:
    assert at_ratios([Random(keep=9, seed=3)]) == [(Random(keep=share, seed=3),) for share in (0.75, 0.5, 0.25)]
    for stages, message in (([FoPru(), FoPru()], "2 stages"), ([H2O()], "H2O keeps no"), ([PyramidDrop()], "Pyramid")):
        with pytest.raises(FoveateError, match=message):
            at_ratios(stages)


# ---------------------------------------------------------------------------------------------------------------------
# Random weights


def test_a_preset_with_random_weights_has_its_shape() -> None:
    model = random_model("mini", dtype=torch.float32)
    assert ModelShape.from_config(model.config) == scaled("mini", None)
    short = random_model("mini", layers=2, dtype=torch.bfloat16)
    assert ModelShape.from_config(short.config) == scaled("mini", 2)
    assert (scaled("mini", 2).decoder.layers, scaled("mini", 2).tower.reads) == (2, 1)
    assert short.dtype == torch.bfloat16 and torch.get_default_dtype() == torch.float32
    assert scaled("llava-1.5-7b", 4).decoder.width == 4096


def small(preset: str, side: int, **tower: Any) -> Any:
    """A preset's family at a size that runs at once, under any name."""
    made = PRESETS[preset]
    decoder = dataclasses.replace(
        made.decoder, layers=3, width=64, ffn=96, heads=4, kv_heads=2, head_width=16, vocabulary=200
    )
    reads = 2 if made.tower.reads else None
    sizes = {"layers": 3, "width": 32, "ffn": 48, "heads": 4, "tokens": side**2, "reads": reads, **tower}
    encoder = dataclasses.replace(made.tower, **sizes)
    merge = made.projector.merge
    inner = encoder.width * merge
    pair = ((inner, inner if merge > 1 and encoder.own_size else 64), (inner if encoder.own_size else 64, 64))
    linears = pair * (len(made.projector.linears) // 2)
    projector = dataclasses.replace(made.projector, linears=linears, tokens=side**2 // merge)
    return lambda name=preset: ModelShape(decoder, encoder, projector, name)


SMALL = {
    "mini": small("mini", 6),
    "llava-next-8b": small("llava-next-8b", 4),
    "qwen2.5-vl-3b": small("qwen2.5-vl-3b", 32, wide=(1,)),
    "qwen3-vl-8b": small("qwen3-vl-8b", 32, layers=4),
    "internvl3-8b": small("internvl3-8b", 8),
}


@pytest.mark.parametrize("preset", SMALL)
def test_every_family_of_presets_runs(preset: str) -> None:
    """Built from its shape, it has that shape; unpruned and pruned answers are measured and predicted."""
    sizes = SMALL[preset]()
    model = random_model(sizes, dtype=torch.float32)
    read = ModelShape.from_config(model.config)
    assert (read.decoder, read.projector.linears) == (sizes.decoder, sizes.projector.linears)
    assert dataclasses.replace(read.tower, tokens=sizes.tower.tokens) == sizes.tower
    inputs = random_inputs(model, text=8, batch=2)
    plain, pruned = measure(model, inputs, [[Uniform(keep=0.25)]], Setting(2, 1, 0), hardware="h200")
    assert pruned.tokens == plain.tokens / 4
    assert pruned.kv_bytes < plain.kv_bytes
    assert plain.predicted is not None and pruned.predicted is not None
    assert plain.predicted.fused_ms > pruned.predicted.fused_ms


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_described_to_transformers_as_they_are(preset: str) -> None:
    """The model is built without memory, so that its configuration can be read back."""
    model = random_model(preset, device="meta")
    read, sizes = ModelShape.from_config(model.config), PRESETS[preset]
    assert (read.decoder, read.tower, read.projector) == (sizes.decoder, sizes.tower, sizes.projector)


def test_prompts_for_random_weights() -> None:
    model = random_model("mini", layers=2, dtype=torch.float32)
    inputs = random_inputs(model, text=7, batch=2)
    assert inputs["input_ids"].shape == (2, 583)
    image = inputs["input_ids"] == model.config.image_token_id
    assert image[:, 3:579].all() and int(image.sum()) == 2 * 576
    assert inputs["pixel_values"].shape == (2, 3, 336, 336)


def test_methods_that_need_clip_run_on_random_weights() -> None:
    from foveate.methods.cdpruner import CDPruner

    model = random_model("mini", layers=2, dtype=torch.float32)
    options = {"clip": random_clip(model), "question": "what color is behind the dog ?"}
    results = measure(model, random_inputs(model, text=4), [[CDPruner(keep=64)]], Setting(1, 1, 0), options=options)
    assert results[1].tokens == 64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_model(SMALL["mini"]("own")), "'own' cannot be built with random weights; names begin with"),
        (lambda: scaled("minni", None), "'minni' is no preset and no folder; did you mean 'mini'?"),
        (lambda: scaled("mini", 1), "layers=1 leaves no block to prune between; the smallest is 2"),
        (lambda: random_inputs(None, text=0), "text=0 is below 1"),
        (lambda: random_inputs(None, batch=0), "batch=0 is below 1"),
    ],
)
def test_refused(call: Any, message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        call()
    assert message in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# benchmarks/gpu.py


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield loaded("benchmarks/gpu.py")
    for name in ("gpu", "cpu"):
        sys.modules.pop(name, None)


def test_the_gpu_benchmark_runs_end_to_end(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = [{"figure": "fopru alone", "value": 1.0, "target": "reported", "met": None}]
    monkeypatch.setattr(gpu, "choosing", lambda size, device: alone)
    file = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--tiny", "--out", str(file)])
    stored = json.loads(file.read_text())
    assert stored["tiny"] is True
    figures = {row["figure"] for row in stored["rows"]}
    assert {"tower, batch 1", "prefill of 64 + 60 tokens, batch 2", "fopru alone"} <= figures
    assert stored["answers"].keys() == {"batch 1", "batch 2", "paper: mini"}
    assert [row["prune"] for row in stored["answers"]["batch 1"]] == [
        None,
        *gpu.TINY.rivals[:1],
        "fastv:keep=0.25,layer=1",
    ]
    assert [row["ratio"] for row in stored["answers"]["paper: mini"]] == ["100%", "75%", "50%", "25%"]
    said = capsys.readouterr().out
    for heading in ("eager passes", "reading attention", "choosing alone", "in the layout of FoPru's Table 1"):
        assert heading in said


@pytest.mark.slow
def test_the_gpu_benchmark_calls_the_one_of_selection(gpu: ModuleType) -> None:
    found = gpu.choosing(gpu.TINY, torch.device("cpu"))
    assert [row["figure"].split(":")[0] for row in found] == ["fopru", "uniform"]


def test_the_gpu_benchmark_says_where_there_is_no_gpu(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    gpu.main([])
    assert capsys.readouterr().out.startswith("there is no CUDA device here")
