"""The verb: what it takes, and what it refuses before any work."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from models import tiny
from models.doubles import Fixed, Ragged
from models.untouched import untouched

import foveate
from foveate import FoPru, FoveateError, Pool, Random
from foveate.runtime import support


@pytest.mark.parametrize(
    "methods",
    [
        FoPru(keep=9),
        "fopru:keep=9",
        [FoPru(keep=9)],
        ("fopru:keep=9",),
        [Random(keep=0.5), "fopru:keep=9"],
        "random:keep=0.5+fopru:keep=9",
        ["random:keep=30+random:keep=0.5", FoPru(keep=9)],
    ],
)
def test_methods_may_be_named_in_every_way(methods: Any) -> None:
    model = tiny.model()
    with foveate.prune(model, methods) as trace:
        model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=1)
    assert trace.images[0].stages[-1].method == "fopru:keep=9"
    assert trace.images[0].after == 9


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([], "no method was given; to run without pruning, call the model outside prune()"),
        ([3], "3 is no method; give a Method such as foveate.FoPru(keep=0.25), or its spec"),
        ([FoPru], "is no method; give a Method such as foveate.FoPru(keep=0.25), or its spec"),
        ("foprun", "unknown method 'foprun'; did you mean 'fopru'?"),
        ("fopru:kep=3", "fopru has no field 'kep'; did you mean 'keep'?"),
        ("fopru:keep=1.5", "keep=1.5 is no share in (0, 1]; the nearest is keep=1.0"),
        ("fopru:keep=0", "keep=0 is below 1 token; the smallest budget is keep=1"),
    ],
)
def test_what_is_no_method(methods: Any, message: str) -> None:
    with pytest.raises(FoveateError, match=re.escape(message)):
        foveate.prune(tiny.model(), methods)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (Random(keep=37), "keep=37 asks for 37 tokens but the image has 36 tokens; the most is keep=36"),
        ("fopru:strategy=row,keep=13", "whole rows of 6 tokens, but keep=13; the nearest are keep=12 and keep=18"),
        ([Random(keep=0.25), FoPru(keep=0.5)], "asks for 18 tokens but 9 of the image's 36 are left; the most is 9"),
        ([Random(keep=9), FoPru(keep=10)], "asks for 10 tokens but 9 of the image's 36 are left; the most is 9"),
        ([Random(keep=9), FoPru(keep=0.5)], "asks for 18 tokens but 9 of the image's 36 are left; the most is 9"),
        ([Random(keep=0.25), Pool(keep=0.5)], "asks for 18 tokens but 9"),
    ],
)
def test_budgets_that_cannot_be_met(methods: Any, message: str) -> None:
    """Both counts are named, before anything runs."""
    with pytest.raises(FoveateError, match=re.escape(message)):
        foveate.prune(tiny.model(), methods)


@pytest.mark.parametrize("later", [Pool(keep=4), FoPru(keep=6, strategy="row")])
def test_methods_that_need_the_whole_grid_come_first(later: Any) -> None:
    model = tiny.model()
    name = type(later).__name__
    message = f"{name}.* needs the whole grid of the image, but an earlier stage has"
    with foveate.prune(model, [Random(keep=0.5), later]), pytest.raises(FoveateError, match=message):
        model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=1)


def test_equal_budgets_compose() -> None:
    model = tiny.model()
    with foveate.prune(model, [Random(keep=9), Random(keep=0.25), Ragged(), Fixed((0,))]):
        pass


def test_models_that_cannot_be_pruned() -> None:
    model = tiny.model()
    with pytest.raises(
        FoveateError, match="Linear is no transformers model; load one with AutoModelForImageTextToText"
    ):
        foveate.prune(torch.nn.Linear(2, 2), Random())
    with pytest.raises(
        FoveateError, match=r"LlamaModel \(llama\) is no vision-language model; known families: llava-1.5"
    ):
        foveate.prune(model.get_decoder(), Random())
    with pytest.raises(FoveateError, match=r"LlavaModel has no generate\(\); load it with AutoModelForImageTextToText"):
        foveate.prune(model.model, Random())


@dataclass(frozen=True)
class Elsewhere(Random):
    """Elsewhere: acts where nothing can act."""

    site: ClassVar[Any] = "elsewhere"


def test_a_site_that_cannot_be_used() -> None:
    sites = ", ".join(support.SITES)
    with pytest.raises(
        FoveateError, match=f"elsewhere:keep=0.25 acts at site 'elsewhere'; sites that can be used: {sites}"
    ):
        foveate.prune(tiny.model(), Elsewhere())


def test_nothing_is_installed_before_the_start() -> None:
    model = tiny.model()
    with untouched(model):
        foveate.prune(model, [Random(), FoPru(keep=0.1)]).discard()
