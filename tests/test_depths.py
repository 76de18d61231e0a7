"""Depths: a paper's blocks on decoders of other heights, and depths that no decoder has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.core import FoveateError
from foveate.depths import check_depths, scaled_layers


@pytest.mark.parametrize(
    ("stages", "of", "layers", "depths"),
    [
        ((2,), 32, 32, (2,)),
        ((2,), 32, 40, (2,)),  # 2.5 goes to the even neighbour
        ((8, 16, 24), 32, 6, (2, 3, 4)),  # 1.5, 3, 4.5
        ((8, 16, 24), 32, 40, (10, 20, 30)),
        ((3, 7, 16), 32, 4, (1, 2, 3)),  # 0.375, 0.875, 2: at least 1, then rising
        ((1, 8, 16), 32, 6, (1, 2, 3)),  # 0.19, 1.5, 3
        ((30, 31), 32, 4, (2, 3)),  # 3.75, 3.875: the last block stays behind them
    ],
)
def test_scaled_layers(stages: tuple[int, ...], of: int, layers: int, depths: tuple[int, ...]) -> None:
    assert scaled_layers(stages, of, layers) == depths


@given(
    stages=st.sets(st.integers(1, 31), min_size=1, max_size=6).map(lambda found: tuple(sorted(found))),
    layers=st.integers(1, 96),
)
def test_scaled_layers_rise_within_the_decoder(stages: tuple[int, ...], layers: int) -> None:
    if layers <= len(stages):
        with pytest.raises(FoveateError):
            scaled_layers(stages, 32, layers)
    else:
        depths = scaled_layers(stages, 32, layers)
        assert len(depths) == len(stages)
        check_depths(depths, layers, "method")


def test_too_few_blocks_for_the_stages() -> None:
    with pytest.raises(FoveateError, match=r"^3 stages need a decoder of at least 4 blocks, not 3$"):
        scaled_layers((8, 16, 24), 32, 3)


@pytest.mark.parametrize(
    ("depths", "message"),
    [
        ((0,), "fastv: layer=0 is outside 1..5 of a decoder of 6 blocks"),
        ((2, 6), "fastv: layer=6 is outside 1..5 of a decoder of 6 blocks"),
        ((3, 3), "fastv: layers (3, 3) do not rise strictly; nearest: (3,)"),
        ((4, 2, 3), "fastv: layers (4, 2, 3) do not rise strictly; nearest: (2, 3, 4)"),
    ],
)
def test_wrong_depths(depths: tuple[int, ...], message: str) -> None:
    with pytest.raises(FoveateError) as error:
        check_depths(depths, 6, "fastv")
    assert str(error.value) == message


def test_right_depths_pass() -> None:
    check_depths((), 1, "fopru")
    check_depths((1, 2, 5), 6, "fastv")
