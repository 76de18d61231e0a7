"""How often pruning waits for the device: a few times a prefill, whatever comes in, and never for a token."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from models import tiny, tiny_calls
from outside import loaded
from torch.utils._python_dispatch import TorchDispatchMode

import foveate
from foveate import methods
from foveate.core import Selection, Signals, Site
from foveate.forms import Stepwise
from foveate.methods.uniform import Uniform
from foveate.ops.device import Steps, on_device
from foveate.ops.subsets import top_k
from foveate.spec import parse

MOST = 5


@pytest.fixture(scope="module")
def waits() -> Iterator[ModuleType]:
    yield loaded("benchmarks/waits.py")
    del sys.modules["waits"]


def test_what_counts_as_a_wait(waits: ModuleType) -> None:
    """By hand: two scalars, a list, a mask as an index and numbers put on a device; what the host has is free."""
    values = torch.arange(4)
    with waits.counted() as counted:
        host = values.cpu()
        bool((values > 1).any()), values.max().item(), values.tolist(), values[values > 1]
        torch.tensor([1], device=values.device)
        bool((host > 1).any()), host.tolist(), host[host > 1].unique(), host.nonzero()
        torch.tensor([1]), torch.arange(3).tolist()
        torch.where(values > 1, values, 0), values.gather(0, values).sort(), values[values]
    assert (counted.total, counted.others) == (0, 6)
    assert not counted.mixed
    with waits.counted() as counted:
        values + torch.arange(4)
    assert counted.mixed == {"add": 1}


def test_a_wait_belongs_to_whoever_asks_for_it(waits: ModuleType) -> None:
    scores = torch.rand(2, 5)
    with waits.counted() as counted:
        top_k(scores, 2)
    (line,) = counted.ours
    assert (counted.total, counted.others) == (1, 0)
    assert line.startswith("foveate.ops.device:") and line.endswith(" cpu")


SPECS = {
    "fopru:keep=3": 2,
    "divprune:keep=3": 2,
    "tome:keep=0.5": 2,
    "crossget:keep=0.5": 2,
    "fastv:keep=3,layer=1": 2,
    "pyramiddrop": MOST,
    "sparsevlm": MOST,
    "h2o:heavy=3,recent=3": MOST,
    "snapkv:capacity=12,window=2": MOST,
}


@pytest.mark.parametrize("rows", [("3i4",), ("3i4", "2i1i5", "1i1i1i2")], ids=["one picture", "a padded batch"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_prefill_waits_a_few_times_and_a_token_never(waits: ModuleType, spec: str, rows: tuple[str, ...]) -> None:
    model = tiny.model()
    given = tiny.inputs(model, *rows)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with foveate.prune(model, spec) as trace:
        counts = []
        for tokens in (1, 3, 6):
            with waits.counted() as counted:
                model.generate(**given, **options, max_new_tokens=tokens)
            counts.append(counted)
    assert all(call.kv_bytes < call.unpruned.kv_bytes for call in trace.history)
    assert not any(counted.mixed for counted in counts), counts[0].mixed
    assert 0 < counts[0].total <= SPECS[spec], counts[0].ours
    # What a method on the cache did wrong is asked once, when the answer is complete.
    assert counts[1].total - counts[0].total <= 1, counts[1].ours
    assert counts[2].total == counts[1].total, counts[2].ours


@pytest.mark.parametrize("rows", [("3i4",), ("3i4", "2i1i5", "1i1i1i2")], ids=["one picture", "a padded batch"])
@pytest.mark.parametrize("spec", ["fopru:keep=3", "snapkv:capacity=12,window=2"])
def test_what_chooses_at_the_prompt_alone_adds_no_operation_to_a_token(spec: str, rows: tuple[str, ...]) -> None:
    model = tiny.model()
    given = tiny.inputs(model, *rows)

    def operations(tokens: int) -> int:
        with _Operations() as counted:
            model.generate(**given, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
        return counted.number

    stock = operations(6) - operations(3)
    with foveate.prune(model, spec):
        assert operations(6) - operations(3) <= stock


class _Operations(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), options: Any = None) -> Any:
        self.number += 1
        return function(*given, **(options or {}))


# Where windows shrink, their bounds are read.
@pytest.mark.parametrize(
    ("family", "spec", "most"),
    [
        ("qwen2.5-vl", "pixelprune", 3),
        ("qwen3-vl", "pixelprune", 2),
        ("qwen2-vl", "fopru:keep=0.5", 2),
        ("qwen2-vl", "fastv:layer=1,keep=0.5", 2),
        ("qwen2-vl", "pyramiddrop", 4),
        ("qwen2-vl", "tome:keep=0.5", 2),
        ("qwen2.5-vl", "tome:keep=0.5", 3),
    ],
)
@pytest.mark.parametrize("row", ["2i3", "1i1i1i2"], ids=["one picture", "three sizes"])
def test_pictures_of_several_sizes_are_read_together(
    waits: ModuleType, family: str, spec: str, most: int, row: str
) -> None:
    model = tiny.model(family, blocks=4)
    given = tiny_calls.repeating(tiny.inputs(model, row))
    assert len(given["image_grid_thw"].unique(dim=0)) == row.count("i")
    with foveate.prune(model, spec) as trace, waits.counted() as counted:
        model.generate(**given, do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=1)
    assert any(image.kept.numel() < image.original for image in trace.images)
    assert counted.total == most, counted.ours
    assert not any("foveate" in line for line in counted.mixed), counted.mixed


OTHERS = (
    "hired:official=true",
    "prumerge:official=true",
    "prumerge_plus:official=true",
    "prumerge_plus:official=true,keep=9",
    "prumerge:attention=received,space=projected",
    "trim:space=decoder",
)


@pytest.mark.parametrize("family", ["llava-next", "qwen2.5-vl"])
@pytest.mark.parametrize("spec", [*methods.names(), *OTHERS])
def test_pictures_and_tiles_of_several_sizes_are_chosen_from_with_few_waits(
    waits: ModuleType, family: str, spec: str
) -> None:
    model = tiny.model(family, blocks=4)
    method = parse(spec) if spec in OTHERS else methods.get(spec).example()
    given = tiny_calls.repeating(tiny.inputs(model, "1i1i1i2"))
    try:
        with foveate.prune(model, method) as trace, waits.counted() as counted:
            model.generate(**given, do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=1)
    except foveate.FoveateError as error:
        pytest.skip(str(error))
    assert trace.images
    assert counted.total <= MOST, counted.ours
    assert not any("foveate" in line for line in counted.mixed), counted.mixed


@dataclass(frozen=True)
class ByHalves(Stepwise):
    """Keeps as many tokens as have features above their mean, read in two steps; `named` counts who is asked."""

    site: ClassVar[Site] = "input"
    needs = ("features",)
    adaptive: ClassVar[bool] = True
    named: list[str] = field(default_factory=list, compare=False)

    def steps(self, signals: Signals) -> Steps[Selection]:
        self.named.append("steps")
        assert signals.features is not None
        mean = signals.features.mean(dim=-1)
        (middle,) = yield [mean.mean(dim=-1)]
        (counts,) = yield [(mean > on_device(middle, mean.device)[:, None]).sum(dim=-1)]
        return Selection([row[: max(1, count)] for row, count in zip(signals.index, counts.tolist(), strict=True)])


class InItsOwnWay(ByHalves):
    def select(self, signals: Signals) -> Selection:
        self.named.append("select")
        return super().select(signals)


def test_steps_of_pictures_of_three_sizes_wait_once_each_and_keep_what_each_alone_does(waits: ModuleType) -> None:
    model = tiny.model("qwen2-vl", blocks=4)
    given = tiny_calls.repeating(tiny.inputs(model, "1i1i1i2"))
    kept = {}
    for method in (ByHalves(), InItsOwnWay()):
        with foveate.prune(model, method) as trace, waits.counted() as counted:
            model.generate(**given, do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=1)
        kept[type(method)] = [image.kept.tolist() for image in trace.images]
        together = type(method) is ByHalves
        assert counted.total == (2 + 2 if together else 2 + 2 * 3)
        assert method.named == (["steps"] * 3 if together else ["select", "steps"] * 3)
    assert kept[ByHalves] == kept[InItsOwnWay]
    assert len({len(row) for row in kept[ByHalves]}) > 1


@dataclass(frozen=True)
class Telling(Uniform):
    """Uniform, which notes what it was shown."""

    seen: list[Signals] = field(default_factory=list, compare=False)

    def select(self, signals: Signals) -> Selection:
        self.seen.append(signals)
        return super().select(signals)


@pytest.mark.parametrize("family", ["llava-next", "internvl", "llava-1.5"])
def test_what_the_host_knows_of_tiles_is_so(family: str) -> None:
    """Whole pictures, and those of which an earlier stage has taken tokens."""
    model, seen = tiny.model(family, blocks=4), list[Signals]()
    given = tiny.inputs(model, "1i1i1i2")
    with foveate.prune(model, [Telling(0.7, seen), Telling(0.3, seen)]):
        model.generate(**given, do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=1)
    assert {one.shape[1] == one.original for one in seen} == {True, False}
    for one in seen:
        tiles = torch.zeros_like(one.index) if one.tile is None else one.tile
        assert (one.tile is None) == (one.tile_counts is None)
        assert [list(image) for image in one.by_tile()] == [row.bincount().tolist() for row in tiles]
        assert one.tiles == dataclasses.replace(one, tile_counts=None).tiles
    assert any(one.tiles > 1 for one in seen) == (family != "llava-1.5")
