"""The ceiling keeps exactly the patches that its boxes touch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate import spec
from foveate.core import FoveateError, Signals
from foveate.evaluate.oracle import Oracle, covered
from foveate.scenes import generator


def test_a_box_covers_the_patches_it_touches() -> None:
    # Of a 4 x 4 raster: x from 0.3 to 0.5 touches column 1 alone, y from 0.5 to 0.76 rows 2 and 3.
    assert covered([(0.3, 0.5, 0.5, 0.76)], (4, 4)).nonzero().flatten().tolist() == [9, 13]


def test_boxes_are_joined_and_a_raster_may_be_oblong() -> None:
    boxes = [(0.0, 0.0, 0.1, 0.1), (0.9, 0.9, 1.0, 1.0)]
    assert covered(boxes, (2, 3)).tolist() == [True, False, False, False, False, True]


@given(st.integers(0, 1000))
def test_the_patches_are_those_that_scenes_name(seed: int) -> None:
    scenes = generator.generate(1, seed=seed, split="test")
    for place in range(int(scenes.count[0])):
        box = tuple(edge / generator.SIZE for edge in scenes.boxes[0, place].tolist())
        assert torch.equal(covered([box], (24, 24)), scenes.patches(14)[0, place])


def test_each_picture_has_its_boxes() -> None:
    oracle = Oracle([[(0.0, 0.0, 0.5, 0.5)], [(0.5, 0.5, 1.0, 1.0), (0.0, 0.5, 0.5, 1.0)]])
    selection = oracle.select(Signals(original=4, index=torch.arange(4).repeat(2, 1), grid=(2, 2)))
    selection.check(4, 2, "oracle")
    assert [kept.tolist() for kept in selection.indices] == [[0], [2, 3]]


def test_it_plans_nothing_and_belongs_to_no_registry() -> None:
    oracle = Oracle([])
    assert (oracle.count(576), oracle.adaptive, oracle.needs) == (None, True, ())
    assert spec.format(oracle) == "oracle"
    with pytest.raises(FoveateError, match="unknown method 'oracle'"):
        spec.parse("oracle")


def test_it_refuses_other_pictures_than_its_own() -> None:
    signals = Signals(original=4, index=torch.arange(4).repeat(2, 1), grid=(2, 2))
    with pytest.raises(FoveateError, match="boxes of 1 pictures but was asked about 2"):
        Oracle([[]]).select(signals)
    with pytest.raises(FoveateError, match="the ceiling needs the raster"):
        Oracle([[], []]).select(Signals(original=4, index=signals.index))
