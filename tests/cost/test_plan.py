"""Planning: the visual tokens that each decoder layer sees, from the methods alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.core import FoveateError, Grid, Keep, Method, Site, tokens_to_keep
from foveate.cost import equivalent_tokens, visual_per_layer
from foveate.cost.plan import token_plan
from foveate.cost.shapes import shape
from foveate.methods.pixelprune import PixelPrune
from foveate.methods.resize import Resize


@dataclass(frozen=True)
class Before(Method):
    keep: Keep = 0.25

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return (tokens_to_keep(self.keep, original),)


@dataclass(frozen=True)
class Encoder(Before):
    site: ClassVar[Site] = "tower"


@dataclass(frozen=True)
class Ahead(Before):
    site: ClassVar[Site] = "pixels"


@dataclass(frozen=True)
class Single(Before):
    site: ClassVar[Site] = "layer"
    layer: int = 2

    def depths(self, layers: int) -> tuple[int, ...]:
        return (self.layer,)


@dataclass(frozen=True)
class Several(Method):
    site: ClassVar[Site] = "layer"
    layers: tuple[int, ...] = (1, 8, 16)
    keep: tuple[float, ...] = (0.6, 0.4, 0.2)

    def depths(self, layers: int) -> tuple[int, ...]:
        return self.layers

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return tuple(int(original * share) for share in self.keep)


class Rows(Before):
    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        assert grid is not None
        return (tiles * grid[1],)


class Adaptive(Before):
    adaptive: ClassVar[bool] = True

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return None


class Cache(Adaptive):
    site: ClassVar[Site] = "cache"


class Both(Before):
    def parts(self) -> tuple[Method, ...]:
        return (Single(keep=72), Before(keep=288))


def test_no_method_changes_nothing() -> None:
    assert visual_per_layer(None, 576, 4) == visual_per_layer([], 576, 4) == (576,) * 4


def test_before_the_decoder_every_layer_is_short() -> None:
    assert visual_per_layer(Before(), 576, 3) == visual_per_layer([Encoder()], 576, 3) == (144,) * 3


def test_layer_k_leaves_k_blocks_at_full_length() -> None:
    visual = visual_per_layer([Single(layer=2)], 576, 32)
    assert visual == (576,) * 2 + (144,) * 30
    assert equivalent_tokens(visual) == 171.0


def test_several_stages_of_one_method() -> None:
    assert visual_per_layer([Several()], 576, 32) == (576,) + (345,) * 7 + (230,) * 8 + (115,) * 16


def test_shares_are_of_the_original_tokens() -> None:
    assert visual_per_layer([Before(keep=0.5), Single(keep=0.25)], 576, 4) == (288, 288, 144, 144)


def test_methods_act_in_the_order_of_their_places() -> None:
    methods = [Single(keep=72, layer=1), Before(keep=144), Encoder(keep=288)]
    assert visual_per_layer(methods, 576, 3) == (144, 72, 72)


def test_a_method_of_several_parts() -> None:
    assert visual_per_layer([Both()], 576, 3) == (288, 288, 72)


def test_grid_and_tiles_reach_the_method() -> None:
    assert visual_per_layer([Rows()], 720, 2, grid=(12, 12), tiles=5) == (60, 60)


def test_eviction_from_the_cache_leaves_the_prefill_alone() -> None:
    assert visual_per_layer([Before(), Cache()], 576, 2) == (144, 144)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([Adaptive()], "Adaptive decides its own count"),
        ([Before(keep=144), Single(keep=288)], "Single at layer 2 asks for 288 tokens but 144 of the image's 576 are"),
        ([Single(layer=4)], "Single acts at layer 4, outside 1..3 of 4 layers; the nearest is 3"),
        ([Single(layer=0)], "Single acts at layer 0, outside 1..3 of 4 layers; the nearest is 1"),
        ([Several(layers=())], "Several acts at 0 layers () but gives 3 counts (345, 230, 115)"),
        ([Several(layers=(1, 2))], "Several acts at 2 layers (1, 2) but gives 3 counts (345, 230, 115)"),
    ],
)
def test_plans_that_are_refused(methods: list[Method], message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        visual_per_layer(methods, 576, 4)
    assert message in str(caught.value)


def test_no_image_and_no_decoder_are_refused() -> None:
    with pytest.raises(FoveateError, match="original=0 is below 1"):
        visual_per_layer(None, 0, 4)
    with pytest.raises(FoveateError, match="layers=0 is below 1"):
        visual_per_layer(None, 576, 0)
    with pytest.raises(FoveateError, match="a decoder of one layer has none"):
        visual_per_layer(Single(layer=1), 576, 1)


@given(st.integers(2, 40), st.integers(1, 600), st.data())
def test_counts_never_rise_with_depth(layers: int, original: int, data: st.DataObject) -> None:
    counts = sorted(data.draw(st.lists(st.integers(1, original), max_size=4)), reverse=True)
    depths = sorted(data.draw(st.lists(st.integers(1, layers - 1), min_size=len(counts), max_size=len(counts))))
    stages = [Single(keep=count, layer=depth) for count, depth in zip(counts, depths, strict=True)]
    visual = visual_per_layer(stages, original, layers)
    assert len(visual) == layers
    assert visual[0] == original
    assert list(visual) == sorted(visual, reverse=True)
    assert visual[-1] == (counts[-1] if counts else original)


def test_what_leaves_before_the_encoder_enters_no_block_of_it() -> None:
    """LLaVA-1.5: a quarter of 576 patches and CLS in all blocks; with a later method, its count of the original."""
    planned = token_plan(shape("llava-1.5-7b"), [Before(keep=0.125), Ahead(keep=0.25)], 576)
    assert set(planned.tower) == {145}
    assert planned.visual == (72,) * 32
    assert planned.projected == 144


def test_a_method_without_a_budget_is_not_told_to_get_one() -> None:
    with pytest.raises(FoveateError, match="nothing can be planned with it; measure it and say with kept="):
        visual_per_layer(PixelPrune(), 576, 4)


def test_what_a_method_that_decides_left_is_planned_with() -> None:
    """Of 1,296 tokens 40 % are 518, behind which stand 4 patches each, in all blocks; a later stage has its count."""
    planned = token_plan(shape("qwen2.5-vl-7b"), [PixelPrune(), Single(keep=100, layer=1)], 1296, kept=0.4)
    assert set(planned.tower) == {518 * 4}
    assert planned.visual[0] == 518 and set(planned.visual[1:]) == {100}
    assert token_plan(shape("qwen2.5-vl-7b"), PixelPrune(), 1296, kept=518).visual == (518,) * 28


def test_a_picture_that_is_scaled_down_is_planned_as_a_small_one() -> None:
    sizes = shape("qwen2.5-vl-7b")
    small, planned = token_plan(sizes, None, 324), token_plan(sizes, Resize(keep=0.25), 1296)
    assert planned == dataclasses.replace(small, parts=(Resize(keep=0.25),))
    with pytest.raises(FoveateError, match="Resize scales the picture and stands alone, and 2 methods were given"):
        token_plan(sizes, [Resize(keep=0.25), Single(keep=100, layer=1)], 1296)
