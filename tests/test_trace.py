"""What a trace records and says of each call, and how numbers are written."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core import (
    FoveateError,
)
from foveate.trace import Budget, Call, ImageRecord, StageRecord, Trace, readable

# ---------------------------------------------------------------------------------------------------------------------
# Budget, Call, Trace


FULL = Budget(tokens=(576.0, 576.0), prefill_flops=8.0e12, kv_bytes=2_000_000)
SHORT = Budget(tokens=(576.0, 144.0), prefill_flops=2.0e12, kv_bytes=500_000)


def image(row: int, *after: int, original: int = 6) -> ImageRecord:
    """An image whose stages keep the first tokens."""
    stages = []
    before = original
    for left in after:
        stages.append(StageRecord("random:keep=1", "input", None, before, left, torch.arange(left)))
        before = left
    return ImageRecord(row, original, (2, original // 2), tuple(stages))


def call(*images: ImageRecord, **changes: Any) -> Call:
    settings: dict[str, Any] = dict(
        prompt_length=20,
        length=16,
        text=14.0,
        index=torch.arange(16)[None],
        budget=SHORT,
        unpruned=FULL,
        kv_lengths=(16, 16),
        stopwatch=lambda: 1.234,
    )
    return Call(images=images or (image(0, 2),), **(settings | changes))


def test_a_budget_averages_over_the_layers() -> None:
    assert SHORT.equivalent_tokens == 360.0
    assert Budget((), 0.0, 0).equivalent_tokens == 0.0
    assert SHORT.to_dict() == {
        "tokens": [576.0, 144.0],
        "equivalent_tokens": 360.0,
        "prefill_flops": 2.0e12,
        "kv_bytes": 500_000,
    }


def test_what_is_left_of_an_image_is_what_the_last_stage_left() -> None:
    record = image(0, 4, 2)
    assert record.after == 2
    assert record.kept.tolist() == [0, 1]
    assert record.extra is None
    assert image(0).after == 6


def test_a_call_goes_through_json() -> None:
    stored = json.loads(json.dumps(call(image(0, 4, 2), image(1, 3)).to_dict()))
    stage = {"method": "random:keep=1", "site": "input", "layer": None}
    assert stored == {
        "images": [
            {
                "row": 0,
                "original": 6,
                "grid": [2, 3],
                "encoder_tokens": 6,
                "stages": [
                    {**stage, "before": 6, "after": 4, "kept": [0, 1, 2, 3]},
                    {**stage, "before": 4, "after": 2, "kept": [0, 1]},
                ],
            },
            {
                "row": 1,
                "original": 6,
                "grid": [2, 3],
                "encoder_tokens": 6,
                "stages": [{**stage, "before": 6, "after": 3, "kept": [0, 1, 2]}],
            },
        ],
        "prompt_length": 20,
        "length": 16,
        "text": 14.0,
        "kv_lengths": [16, 16],
        "budget": SHORT.to_dict(),
        "unpruned": FULL.to_dict(),
        "milliseconds": 1.234,
        "notes": [],
    }


COST = "prefill 8 TFLOPs -> 2 TFLOPs (25%) | KV 2 MB -> 500 kB | choosing 1.23 ms"


@pytest.mark.parametrize(
    ("images", "tokens"),
    [
        ([image(0, 2)], "6 -> 2 tokens"),
        ([image(0, 4, 2)], "6 -> 4 -> 2 tokens"),
        ([image(0, 2), image(1, 2)], "6 -> 2 tokens in each of 2 images"),
        ([image(0, 2), image(1, 3), image(1, 4, original=8)], "6 -> 2; 6 -> 3; 8 -> 4 tokens"),
    ],
)
def test_what_a_call_says(images: list[ImageRecord], tokens: str) -> None:
    assert str(call(*images)) == f"{tokens} | {COST}"


def test_a_call_without_a_known_cost_gives_no_share() -> None:
    assert "(" not in str(call(unpruned=replace(FULL, prefill_flops=0.0)))


def test_a_trace_is_read_like_its_latest_call() -> None:
    trace = Trace()
    trace.add(call(image(0, 4)))
    trace.add(call(image(0, 2)))
    assert len(trace.history) == 2
    assert trace.latest is trace.history[1]
    for name in ("images", "prompt_length", "length", "text", "index", "budget", "unpruned", "kv_lengths", "kv_bytes"):
        assert getattr(trace, name) is getattr(trace.history[1], name)
    assert trace.kv_bytes == 500_000
    assert trace.milliseconds == 1.234
    assert trace.to_dict() == trace.latest.to_dict()
    assert str(trace) == str(trace.latest)
    assert repr(trace) == f"<Trace of 2 calls: 6 -> 2 tokens | {COST}>"


def test_choosing_is_timed_when_it_is_read() -> None:
    readings = []
    trace = Trace()
    trace.add(call(stopwatch=lambda: readings.append(1) or 2.0))
    assert readings == []
    assert trace.milliseconds == 2.0
    assert readings == [1]


def test_an_empty_trace_says_why() -> None:
    trace = Trace()
    for read in (lambda: trace.latest, lambda: trace.budget, lambda: trace.to_dict):
        with pytest.raises(FoveateError) as error:
            read()
        assert str(error.value) == (
            "nothing has been pruned yet: the trace fills when the model sees a prompt with an image"
        )
    assert str(trace) == "nothing pruned yet"
    assert repr(trace) == "<Trace of 0 calls: nothing pruned yet>"


def test_a_trace_has_no_other_attributes() -> None:
    trace = Trace()
    for name in ("flops", "stopwatchs", "_private", "__length_hint__"):
        with pytest.raises(AttributeError, match=f"^Trace has no attribute '{name}'$"):
            getattr(trace, name)


def test_a_trace_can_be_copied() -> None:
    trace = Trace()
    trace.add(call(stopwatch=float))
    assert copy.copy(trace).history == trace.history
    assert pickle.loads(pickle.dumps(trace)).to_dict() == trace.to_dict()  # noqa: S301 - written one line above


def test_a_long_trace_forgets_its_oldest_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Trace.history_limit == 1000
    monkeypatch.setattr(Trace, "history_limit", 3)
    trace = Trace()
    calls = [call(text=float(number)) for number in range(5)]
    for one in calls:
        trace.add(one)
    assert [one.text for one in trace.history] == [2.0, 3.0, 4.0]


# ---------------------------------------------------------------------------------------------------------------------
# words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8.453e12, "8.45 TFLOPs"),
        (0, "0 FLOPs"),
        (1, "1 FLOPs"),
        (0.5, "0.5 FLOPs"),
        (999, "999 FLOPs"),
        (999.6, "1 kFLOPs"),
        (1000, "1 kFLOPs"),
        (999_499, "999 kFLOPs"),
        (999_999, "1 MFLOPs"),
        (-2_500_000, "-2.5 MFLOPs"),
        (1.234e9, "1.23 GFLOPs"),
        (12_345e12, "12.3 PFLOPs"),
    ],
)
def test_readable(value: float, text: str) -> None:
    assert readable(value, "FLOPs") == text


@given(st.floats(1e-3, 1e17))
def test_a_readable_number_has_no_exponent_and_three_digits(value: float) -> None:
    number, unit = readable(value, "B").split()
    assert "e" not in number
    scale = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}[unit]
    assert math.isclose(float(number) * scale, value, rel_tol=0.0051)
    assert float(number) < 1000
