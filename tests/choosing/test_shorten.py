"""Which columns of a prompt stay, on examples worked by hand, and the tensors gathered with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.choosing.images import Image
from foveate.choosing.shorten import Plan, find_images, padding_side, plan
from foveate.core import FoveateError

# Two rows of 8 columns; 9 is the placeholder, 0 the padding. Row 0 has pictures of 2 and 3 tokens, row 1 one of 3.
IDS = torch.tensor([[1, 9, 9, 2, 9, 9, 9, 3], [0, 0, 4, 9, 9, 9, 5, 6]])
MASK = IDS > 0


def images(*kept: list[int]) -> list[Image]:
    found = find_images(IDS, 9, [torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(3, 4)], None)
    return [replace(image, index=torch.tensor(index)) for image, index in zip(found, kept, strict=True)]


def shortened(made: Plan) -> list[list[int]]:
    return made.gather(IDS, 0).tolist()


def test_pictures_are_found_in_order() -> None:
    first, second, third = images([0, 1], [0, 1, 2], [0, 1, 2])
    assert [first.row, second.row, third.row] == [0, 0, 1]
    assert first.columns.tolist() == [1, 2]
    assert second.columns.tolist() == [4, 5, 6]
    assert third.columns.tolist() == [3, 4, 5]
    assert [one.original for one in (first, second, third)] == [2, 3, 3]


def test_a_grid_belongs_to_pictures_of_its_size() -> None:
    found = find_images(IDS, 9, [torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(3, 4)], (1, 3))
    assert [one.grid for one in found] == [None, (1, 3), (1, 3)]


def test_dropped_columns_leave_and_rows_are_padded_anew_on_the_left() -> None:
    made = plan(MASK, images([1], [0, 2], [1]), "left")
    assert made.original.tolist() == [[0, 2, 3, 4, 6, 7], [-1, -1, 2, 4, 6, 7]]
    assert made.filled.tolist() == made.valid.tolist() == [[True] * 6, [False] * 2 + [True] * 4]
    assert shortened(made) == [[1, 9, 2, 9, 9, 3], [0, 0, 4, 9, 5, 6]]
    assert made.speaking is not None
    assert made.speaking.tolist() == [[0, 0, 1, 2, 3, 3, 4, 5], [-1, -1, 2, 2, 3, 3, 4, 5]]
    # Columns of dropped tokens have no label, and row 1 has nothing before its first token that could predict it.
    assert made.unheard.int().tolist() == [[0, 1, 0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 0, 1, 0, 0]]


def test_or_on_the_right() -> None:
    made = plan(MASK, images([1], [0, 2], [1]), "right")
    assert made.original.tolist() == [[0, 2, 3, 4, 6, 7], [2, 4, 6, 7, -1, -1]]
    assert made.gather(IDS, -100).tolist() == [[1, 9, 2, 9, 9, 3], [4, 9, 5, 6, -100, -100]]
    assert made.speaking is not None
    assert made.speaking.tolist() == [[0, 0, 1, 2, 3, 3, 4, 5], [-1, -1, 0, 0, 1, 1, 2, 3]]


def test_padding_that_all_rows_share_is_gone() -> None:
    made = plan(MASK, images([0], [0], [0, 1, 2]), "left")
    assert made.original.tolist() == [[-1, 0, 1, 3, 4, 7], [2, 3, 4, 5, 6, 7]]


def test_a_prompt_of_which_nothing_leaves_stays_as_it_is() -> None:
    made = plan(MASK, images([0, 1], [0, 1, 2], [0, 1, 2]), "left")
    assert torch.equal(made.gather(IDS, 7), IDS)
    assert torch.equal(made.valid, MASK)
    assert made.original.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [-1, -1, 2, 3, 4, 5, 6, 7]]
    assert made.speaking is None
    assert not made.unheard.any()


def test_tokens_go_on_in_the_order_that_the_method_wants() -> None:
    made = plan(MASK, images([1, 0], [2, 0], [0, 1, 2]), "left")
    assert made.original.tolist() == [[0, 2, 1, 3, 6, 4, 7], [-1, 2, 3, 4, 5, 6, 7]]
    assert made.speaking is not None
    # Behind a picture speaks the one that comes last, wherever its column is.
    assert made.speaking.tolist() == [[0, 2, 2, 3, 5, 5, 5, 6], [-1, -1, 1, 2, 3, 4, 5, 6]]


def test_three_axes_of_positions_are_gathered_alike() -> None:
    made = plan(MASK, images([1], [0, 2], [1]), "left")
    positions = torch.arange(8).expand(3, 2, 8) + torch.tensor([0, 100, 200])[:, None, None]
    assert made.gather(positions, 0)[1].tolist() == [[100, 102, 103, 104, 106, 107], [0, 0, 102, 104, 106, 107]]


def test_rows_are_repeated_one_after_the_other() -> None:
    made = plan(MASK, images([1], [0, 2], [1]), "left")
    assert made.repeat(1) is made
    twice = made.repeat(2)
    assert twice.index.shape == (4, 6)
    assert torch.equal(twice.original[::2], made.original)
    assert torch.equal(twice.original[1::2], made.original)


@pytest.mark.parametrize(
    ("mask", "side"), [([[1, 1]], "left"), ([[0, 1]], "left"), ([[1, 0]], "right"), ([[1, 1], [1, 0]], "right")]
)
def test_the_side_of_the_callers_padding(mask: list[list[int]], side: str) -> None:
    assert padding_side(torch.tensor(mask).bool()) == side


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            [2, 3],
            "the prompt has 8 visual placeholders but its 2 images give 5 tokens; pass each image once and let the",
        ),
        ([2, 3, 4], "the prompt has 8 visual placeholders but its 3 images give 9 tokens"),
        ([2, 3, 3, 0], "image 3 has no tokens; every image needs at least 1"),
        ([2, 4, 2], "image 1 begins in row 0 and ends in row 1 of the prompts"),
    ],
)
def test_pictures_that_do_not_fit_their_placeholders(sizes: list[int], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        find_images(IDS, 9, [torch.zeros(size, 4) for size in sizes], None)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[Image]]:
    """Rows of words and pictures, padded on the left, with some tokens of each picture kept."""
    rows, sizes = [], []
    for _ in range(draw(st.integers(1, 4))):
        row: list[int] = []
        for size in draw(st.lists(st.integers(1, 5), max_size=3)):
            row += [1] * draw(st.integers(1, 3)) + [9] * size
            sizes.append(size)
        rows.append(row + [1] * draw(st.integers(1, 3)))
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    found = find_images(ids, 9, [torch.zeros(size, 1) for size in sizes], None)
    kept = [draw(st.lists(st.integers(0, image.original - 1), min_size=1, unique=True)) for image in found]
    left = [replace(image, index=torch.tensor(index)) for image, index in zip(found, kept, strict=True)]
    return ids, ids > 0, left


@given(prompts(), st.sampled_from(["left", "right"]))
def test_exactly_the_text_and_the_kept_tokens_stay(made: tuple[Tensor, Tensor, list[Image]], side: str) -> None:
    ids, mask, found = made
    result = plan(mask, found, side)  # type: ignore[arg-type]
    for row in range(ids.shape[0]):
        own = result.original[row][result.original[row] >= 0]
        text = (ids[row] == 1).nonzero().squeeze(-1).tolist()
        kept = [image.columns[image.index].tolist() for image in found if image.row == row]
        assert sorted(own.tolist()) == sorted([*text, *(column for columns in kept for column in columns)])
        # Each picture's tokens stand together, in the order wanted, and text in its own order around them.
        for columns in kept:
            place = own.tolist().index(columns[0])
            assert own.tolist()[place : place + len(columns)] == columns
        assert [column for column in own.tolist() if column in text] == text
