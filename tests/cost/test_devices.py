"""Devices: the roofline, launches, the fit, and names."""

from __future__ import annotations

import dataclasses

import pytest

from foveate.core import FoveateError
from foveate.cost import HARDWARE, Hardware, Precision, fitted, hardware, hardware_of, precision

A100 = HARDWARE["a100-40gb"]


def test_the_slower_of_computing_and_moving_decides() -> None:
    half, byte = precision("fp16"), precision("int8")
    assert A100.seconds(312e12, 1, half) == 1.0
    assert A100.seconds(1, 1555e9, half) == 1.0
    assert A100.seconds(624e12, 1, byte) == A100.seconds(624e12, 1, precision("int4")) == 1.0
    assert A100.seconds(19.5e12, 1, precision("fp32")) == 1.0
    # One wide operand keeps an operator off the 8-bit units.
    assert A100.seconds(312e12, 1, precision("w4a16kv8")) == 1.0


def test_launches_are_a_floor() -> None:
    device = dataclasses.replace(A100, efficiency=0.5, launch=1e-3)
    assert device.launched(1.0, 10) == 2.0
    assert device.launched(0.001, 10) == 0.01
    assert A100.launched(1.0, 10) is None


def test_a_fit_finds_what_made_the_runs() -> None:
    true = dataclasses.replace(A100, efficiency=0.4, launch=5e-6)
    runs = [(launches, ideal, true.launched(ideal, launches)) for launches, ideal in ((2000, 1e-4), (2000, 1.0))]
    found = fitted(A100, [(count, ideal, measured or 0.0) for count, ideal, measured in runs])
    assert found.efficiency == pytest.approx(0.4)
    assert found.launch == pytest.approx(5e-6)
    assert dataclasses.replace(found, efficiency=None, launch=None) == A100


@pytest.mark.parametrize("runs", [[], [(1, 1.0, 1.0)], [(1, 1.0, 1.0), (1, 1.0, 0.0)]])
def test_too_few_runs_are_refused(runs: list[tuple[int, float, float]]) -> None:
    with pytest.raises(FoveateError, match=f"{len(runs)} runs fit no efficiency"):
        fitted(A100, runs)


@pytest.mark.parametrize(
    ("driver", "row"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 3090 Ti", "3090"),
        ("NVIDIA L4", None),
    ],
)
def test_what_drivers_call_them(driver: str, row: str | None) -> None:
    found = hardware_of(driver)
    assert (found and found.name) == row


def test_names_of_precisions() -> None:
    assert precision("bfloat16") == precision("BF16") == Precision("bf16", 16, 16, 16)
    assert precision("w4a16kv8") == Precision("w4a16kv8", 4, 16, 8)
    assert precision(Precision("mine", 8, 8, 16)).widest == 16
    assert hardware(A100) is A100
    assert hardware("H200") is HARDWARE["h200"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fp16": 0.0}, "Hardware.fp16=0.0 is no rate; it must be above 0"),
        ({"bandwidth": float("inf")}, "Hardware.bandwidth=inf is no rate"),
        ({"launch": 1e-6}, "are fitted together; give both or neither"),
    ],
)
def test_impossible_devices(change: dict[str, float], message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        Hardware(**{**vars(A100), **change})
    assert message in str(caught.value)
