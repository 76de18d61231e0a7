"""Positions of pruned prompts: by hand, in any chunks, twice, and where a prompt begins or ends in a picture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.serve.vllm.positions import CHANNELS, MOST, Span, columns_of, settled, split_places, waiting, with_places


def flat(length: int, spans: list[Span]) -> tuple[Tensor, Tensor, Tensor, int]:
    """Waiting positions of a prompt on one axis, its slots, and the length of the unpruned one."""
    columns, slots = columns_of(length, spans)
    whole = length + sum(span.length - span.sources.numel() for span in spans)
    return waiting(torch.arange(whole).expand(3, whole), whole, columns, slots), columns, slots, whole


def embedded(kept: list[int], extent: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return with_places(torch.zeros(len(kept), 4, dtype=dtype), torch.tensor([kept, [0] * len(kept), kept]), extent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_survive_every_type_of_embedding(dtype: torch.dtype) -> None:
    places = torch.tensor([[0, 255, 256, MOST], [1, 2, 3, 4], [9999, 0, 7, 513]])
    features = torch.randn(4, 6).to(dtype)
    given = with_places(features, places, 12345)
    assert given.shape == (4, 6 + CHANNELS) and given.dtype == dtype
    back, found = split_places(given)
    assert torch.equal(back, features)
    assert torch.equal(found[:3], places) and found[3].tolist() == [12345] * 4


# "a <....> b c": two of the four stay, then "<...>" of which one stays.
SPANS = [Span(1, torch.tensor([0, -1, -1, 5]), 6), Span(7, torch.tensor([0, -1, 4]), 5)]
LENGTH = 10


def test_text_keeps_its_unpruned_positions_and_slots_wait() -> None:
    positions, columns, slots, whole = flat(LENGTH, SPANS)
    assert whole == 14
    assert slots.nonzero().flatten().tolist() == [2, 3, 8]
    assert columns[~slots].tolist() == [0, 1, 6, 7, 8, 9, 13]
    # A slot holds where its picture begins, 1 and 9, as -1 - begin; behind the prompt stands what follows it.
    assert positions[0].tolist() == [0, 1, -2, -2, 6, 7, 8, 9, -10, 13, 14]


@pytest.mark.parametrize("stores", [LENGTH + 1, LENGTH])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 10])
def test_any_chunks_give_the_same_positions(chunk: int, stores: int) -> None:
    positions, _, slots, whole = flat(LENGTH, SPANS)
    positions = positions[:, :stores]
    rows = {2: embedded([2, 4], 6), 8: embedded([3], 5)}
    for start in range(0, LENGTH, chunk):
        for _ in range(2):  # a request that was put back comes again
            columns = [column for column in slots.nonzero().flatten().tolist() if start <= column < start + chunk]
            given = [
                rows[first][[column - first for column in columns if first <= column < first + 4]] for first in rows
            ]
            given = [one for one in given if one.shape[0]]
            found, positions, delta = settled(positions, given, torch.tensor(columns), LENGTH)
            assert [one.shape[1] for one in found] == [4] * len(given)
            assert delta == whole - LENGTH
    assert positions[0, :LENGTH].tolist() == [0, 1, 3, 5, 6, 7, 8, 9, 12, 13]
    assert positions[2, :LENGTH].tolist() == [0, 1, 3, 5, 6, 7, 8, 9, 12, 13]


@pytest.mark.parametrize("stores", [4, 3])
def test_a_prompt_that_is_a_picture_goes_on_behind_all_of_it(stores: int) -> None:
    positions, _, slots, _ = flat(3, [Span(0, torch.tensor([-1, -1, -1]), 20)])
    _, positions, delta = settled(positions[:, :stores], [embedded([1, 7, 8], 20)], slots.nonzero().flatten(), 3)
    assert positions[0, :3].tolist() == [1, 7, 8]
    assert 3 + delta == 20


def test_text_alone_counts_on() -> None:
    positions, _, _, _ = flat(5, [])
    found, positions, delta = settled(positions, [], torch.empty(0, dtype=torch.int64), 5)
    assert (found, positions[0, :5].tolist(), delta) == ([], [0, 1, 2, 3, 4], 0)
