"""EvoCut: hand-worked transitions, which blocks are compared, repeated blocks, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.batches import assert_rows_stand_alone
from torch import Tensor

from foveate.core import Block, FoveateError, Signals
from foveate.methods.evocut import EvoCut
from foveate.ops.scores import distinctiveness
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(states: dict[Any, Tensor], index: Tensor | None = None, original: int | None = None) -> Signals:
    """(B, N, E) outputs of blocks."""
    batch, tokens, _ = next(iter(states.values())).shape
    index = torch.arange(tokens).repeat(batch, 1) if index is None else index
    tower = {block: Block(hidden=hidden) for block, hidden in states.items()}
    return Signals(original=original or tokens, index=index, tower=tower)


def rising(changes: Tensor, first: int = 0) -> dict[Any, Tensor]:
    """(T, B, N, E) what T blocks do -> the outputs of T + 1 blocks."""
    start = torch.randn(changes.shape[1:], generator=torch.Generator().manual_seed(9))
    states = torch.cat([start[None], start + changes.cumsum(dim=0)])
    return {first + number: state for number, state in enumerate(states)}


def test_the_token_that_changes_in_another_direction_stays() -> None:
    """Two clusters of directions and one token between them."""
    change = torch.eye(4)[torch.arange(12) % 2]
    change[7] = torch.tensor([0.6, 0.6, 0.5, 0.0])
    method = EvoCut(keep=1, blocks=(0, 1), clusters=2)
    assert method.select(signals(rising(change[None, None]))).indices[0].tolist() == [7]


def test_later_blocks_weigh_more() -> None:
    """One cluster; in the first transition token 1 stands out, in the second token 4: .95 * .05 against .05."""
    changes = torch.zeros(2, 1, 6, 2)
    changes[..., 0] = 1.0
    changes[0, 0, 1], changes[1, 0, 4] = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])
    changes[:, 0, 0] *= 2  # the longest change starts the cluster
    method = EvoCut(keep=1, blocks=(3, 4, 5), clusters=1, iterations=1)
    shown = signals(rising(changes, first=3))
    first, second = (distinctiveness(one, 1, 1) for one in changes)
    torch.testing.assert_close(method.score(shown), 0.95 * 0.05 * first + 0.05 * second, atol=1e-5, rtol=0)
    assert method.select(shown).indices[0].tolist() == [4]
    (selection,) = assert_rows_stand_alone(EvoCut(keep=2, blocks=(3, 4, 5), clusters=1, iterations=1), [shown])
    assert selection.indices[0].tolist() == [1, 4]


def test_the_papers_thirteen_transitions() -> None:
    names = [need.split(".")[1] for need in EvoCut().needs]
    assert names == [f"{block}/24" for block in range(10, 24)]
    assert {need.split(".")[2] for need in EvoCut().needs} == {"hidden"}
    assert EvoCut(blocks=(4, 9)).needs == ("tower.4.hidden", "tower.9.hidden")


def test_names_of_one_block_are_no_transition() -> None:
    """On a shallow encoder several of the paper's blocks fall together."""
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(2, 30, 5, generator=generator) for _ in range(3)]
    shallow = {f"{block}/24": states[(block - 10) * 3 // 14] for block in range(10, 24)}
    three = dict(enumerate(states))
    blocks = EvoCut(blocks=(0, 1, 2))
    assert torch.equal(EvoCut().score(signals(shallow)), blocks.score(signals(three)))
    same = dict.fromkeys(shallow, states[0])
    assert not EvoCut().score(signals(same)).any()
    assert EvoCut(keep=3).select(signals(same)).indices[0].tolist() == [0, 1, 2]


def test_an_image_that_does_not_change_leaves_the_others_alone() -> None:
    changes = torch.randn(2, 3, 20, 4, generator=torch.Generator().manual_seed(2))
    changes[1, 1] = 0.0
    shown = signals(rising(changes))
    (selection,) = assert_rows_stand_alone(EvoCut(keep=6, blocks=(0, 1, 2)), [shown])
    assert len({tuple(row.tolist()) for row in selection.indices}) == 3


def test_where_clusters_start() -> None:
    """Eight tokens one way, an outlier, eight another way, by falling length; two clusters. From tokens 4 and 12 both
    ways get one, and the outlier is 1 - 1 / sqrt(65) from the mean that it joins. The token farthest from 0 is 8."""
    way = torch.eye(3)[torch.tensor([0] * 8 + [1] + [2] * 8)]
    shown = signals(rising(way[None, None] * torch.linspace(2, 1, 17)[:, None]))
    lengths = EvoCut(keep=1, blocks=(0, 1), clusters=2, start="lengths")
    farthest = EvoCut(keep=1, blocks=(0, 1), clusters=2, start="farthest")
    assert lengths.select(shown).indices[0].tolist() == [8]
    assert lengths.score(shown)[0, 8].item() == pytest.approx(0.05 * (1 - 65**-0.5), abs=1e-6)
    assert farthest.score(shown).argmin() == 8
    assert farthest.score(shown)[0, 8].item() == pytest.approx(0, abs=1e-6)


def test_tokens_are_named_by_their_original_index() -> None:
    change = torch.eye(2)[torch.tensor([0, 0, 1, 0])][None, None]
    shown = signals(rising(change), index=torch.tensor([[14, 2, 9, 5]]), original=16)
    assert EvoCut(keep=1, blocks=(0, 1), clusters=1).select(shown).indices[0].tolist() == [9]


def test_half_precision_is_promoted() -> None:
    states = {block: state.half() for block, state in rising(torch.randn(2, 1, 40, 8)).items()}
    full = {block: state.float() for block, state in states.items()}
    method = EvoCut(blocks=(0, 1, 2))
    assert torch.equal(method.score(signals(states)), method.score(signals(full)))


def test_counts() -> None:
    assert EvoCut().count(576) == (192,)
    assert EvoCut(keep=64).count(576) == (64,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": -1}, "keep=-1 is below 1 token"),
        ({"clusters": 0}, "clusters=0 is no whole number from 1; the smallest is clusters=1"),
        ({"iterations": 1.5}, "iterations=1.5 is no whole number from 1"),
        ({"start": "random"}, "start='random' is not among its choices"),
        ({"decay": 1.0}, "decay=1.0 is outside 0 <= decay < 1; the paper's is decay=0.95"),
        ({"decay": True}, "decay=True is outside"),
        ({"blocks": (3,)}, r"blocks=\(3,\) are not two or more that rise"),
        ({"blocks": (3, 3)}, r"blocks=\(3, 3\) are not two or more that rise"),
        ({"blocks": (-1, 3)}, r"blocks=\(-1, 3\) are not all numbers of encoder blocks; the first is 0"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        EvoCut(**fields)


def test_states_that_are_no_numbers_are_refused() -> None:
    states = rising(torch.randn(1, 1, 4, 2))
    states[1][0, 2, 0] = torch.nan
    with pytest.raises(FoveateError, match="scores are NaN or infinite"):
        EvoCut(keep=1, blocks=(0, 1)).select(signals(states))


def test_a_spec_survives_the_round_trip() -> None:
    for method in (
        EvoCut(),
        EvoCut(keep=64, blocks=(10, 11, 12), clusters=4, iterations=3, start="lengths", decay=0.9),
    ):
        assert parse(format_spec(method)) == method


@given(data=st.data())
def test_exactly_count_tokens_stay(data: st.DataObject) -> None:
    """Fewer tokens than clusters, equal directions and changes of length 0 among them."""
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    start = data.draw(st.sampled_from(["farthest", "lengths"]))
    method = EvoCut(keep=data.draw(st.integers(1, tokens) | st.floats(0.01, 1.0)), blocks=(0, 1, 2), start=start)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    changes = torch.randint(-1, 2, (2, batch, tokens, 2), generator=generator).float()
    (selection,) = assert_rows_stand_alone(method, [signals(rising(changes))])
    selection.check(tokens, batch, "evocut")
    assert {(len(row),) for row in selection.indices} == {method.count(tokens)}
