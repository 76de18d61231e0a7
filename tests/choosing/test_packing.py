"""From patches to tokens by hand: means, shares, tiles, pictures of several sizes, and what stays among the tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foveate.choosing.images import Apart, Image
from foveate.choosing.packing import to_tokens
from foveate.core import Block, FoveateError
from foveate.families.layouts import Layout


def layout(patches: list[list[int]], *, weights: list[list[float]] | None = None, summary: int = 0) -> Layout:
    count = len(patches)
    shares = None if weights is None else torch.tensor(weights)
    return Layout(count, torch.arange(count), torch.tensor(patches), (4,), shares, summary=summary)


def one(block: Block, *layouts: Layout, packed: bool = False) -> Block:
    return to_tokens({"read": block}, layouts, packed)["read"]


def test_a_token_shows_the_mean_of_its_patches() -> None:
    block = Block(received=torch.tensor([[1.0, 2.0, 3.0, 5.0]]), hidden=torch.tensor([[[1.0], [3.0], [5.0], [9.0]]]))
    made = one(block, layout([[0, 1], [2, 3]]))
    assert made.received is not None and made.hidden is not None
    assert made.received.tolist() == [[1.5, 4.0]]
    assert made.hidden.tolist() == [[[2.0], [7.0]]]


def test_shares_weigh_the_patches() -> None:
    block = Block(received=torch.tensor([[1.0, 2.0, 3.0, 5.0]]))
    made = one(block, layout([[0, 3], [1, 2]], weights=[[0.25, 0.75], [1.0, 0.0]]))
    assert made.received is not None
    assert made.received.tolist() == [[4.0, 2.0]]


def test_tiles_stand_behind_each_other_and_the_base_tile_lends_its_cls() -> None:
    """Two encoded tiles, the second the base: heads stay in front of the tokens."""
    attention = torch.arange(8.0).view(2, 1, 4)
    block = Block(cls_attention=attention, cls=torch.tensor([[1.0], [2.0]]))
    made = one(block, layout([[number] for number in range(8)], summary=1))
    assert made.cls_attention is not None and made.cls is not None
    assert made.cls_attention.tolist() == [[list(range(8))]]
    assert made.cls.tolist() == [[2.0]]


def test_pictures_of_several_sizes_are_padded() -> None:
    block = Block(received=torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    made = one(block, layout([[0], [1], [2]]), layout([[3]]), packed=True)
    assert made.received is not None
    assert made.received.tolist() == [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]


def test_tokens_that_are_the_patches_stay_as_they_are() -> None:
    block = Block(received=torch.rand(2, 4))
    plain = [layout([[number + 4 * picture] for number in range(4)], summary=picture) for picture in range(2)]
    assert one(block, *plain).received is block.received


def test_an_encoding_that_is_too_short() -> None:
    with pytest.raises(FoveateError) as error:
        one(Block(received=torch.rand(1, 4)), layout([[4]]))
    assert str(error.value) == "encoder block read saw 4 patches where the pictures of the prompt have 5"


@pytest.mark.parametrize(("kept", "expected"), [([0, 2], [0, 9, 2, 9]), ([2, 0], [2, 9, 0, 9]), ([1], [9, 1, 9])])
def test_newlines_keep_their_places_among_what_is_left(kept: list[int], expected: list[int]) -> None:
    """Columns 3, 5 and 6 are visual, 4 and 7 newlines; a method's own order goes into the places of what it keeps."""
    apart = Apart(torch.tensor([4, 7]), torch.full((2, 1), 9.0))
    whole = Image.placed(0, torch.tensor([3, 5, 6]), torch.zeros(3, 1), None, apart=apart)
    image = replace(whole, index=torch.tensor(kept))
    rows: Tensor = torch.tensor(kept, dtype=torch.float32)[:, None]
    assert image.woven(rows)[:, 0].tolist() == expected
