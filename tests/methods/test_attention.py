"""Methods that rank by CLS's attention can be told, never by themselves, to rank by what patches receive instead."""

from __future__ import annotations

import dataclasses

import pytest
import synthetic
import tiny
import torch
from untouched import untouched

import foveate
from foveate import methods
from foveate.core import Block, FoveateError, Method, Signals

NAMES = ("fastervlm", "vispruner", "scope", "score_cover")
each_name = pytest.mark.parametrize("name", NAMES)


def received(name: str, keep: int) -> Method:
    return foveate.spec.parse(f"{name}:keep={keep},attention=received")


@each_name
def test_what_is_received_takes_the_place_of_what_cls_pays(name: str) -> None:
    """The same numbers under either name give the same choice."""
    method = received(name, 9)
    assert "tower.read.received" in method.needs and "tower.read.cls_attention" not in method.needs
    seen = synthetic.signals(method, 3, (6, 6))
    block = seen.tower["read"]
    assert block.received is not None
    fields = {key: value for key, value in vars(block).items() if value is not None and key != "received"}
    twin = dataclasses.replace(seen, tower={"read": Block(**fields, cls_attention=block.received[:, None])})
    kept, same = method.select(seen), dataclasses.replace(method, attention="cls").select(twin)
    assert [row.tolist() for row in kept.indices] == [row.tolist() for row in same.indices]


def test_the_patch_that_receives_most_is_kept() -> None:
    row = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    signals = Signals(original=4, index=torch.arange(4)[None], tower={"read": Block(received=row)})
    assert received("fastervlm", 2).select(signals).indices[0].tolist() == [1, 3]


@each_name
def test_it_runs_on_an_encoder_without_cls(name: str) -> None:
    model = tiny.model(tower="siglip")
    given = tiny.inputs(model, "3i4", "2i9")
    with untouched(model), foveate.prune(model, received(name, 9)) as trace:
        model.generate(**given, max_new_tokens=2)
    assert [image.after for image in trace.images] == [9, 9]


@each_name
def test_the_refusal_names_the_way_out(name: str) -> None:
    with pytest.raises(FoveateError, match=r"needs tower\.read\.cls_attention.*attention=received reads what patches"):
        foveate.prune(tiny.model(tower="siglip"), methods.get(name)(keep=9))


@each_name
def test_other_words_are_refused(name: str) -> None:
    with pytest.raises(FoveateError, match="attention='mean' is not among its choices"):
        methods.get(name)(attention="mean")
