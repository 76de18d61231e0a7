"""Tensors of unlike sizes in one, by hand."""

from __future__ import annotations

import torch

from foveate.ops.padding import joined


def test_the_other_axes_are_filled_up_with_zeros() -> None:
    first, second = torch.tensor([[[1, 2], [3, 4]]]), torch.tensor([[[5, 6, 7]], [[8, 9, 10]]])
    wanted = [[[1, 2, 0], [3, 4, 0]], [[5, 6, 7], [0, 0, 0]], [[8, 9, 10], [0, 0, 0]]]
    assert joined([first, second]).tolist() == wanted


def test_equal_ones_and_one_axis_are_left_alone() -> None:
    assert joined([torch.tensor([[1, 2]]), torch.tensor([[3, 4]])]).tolist() == [[1, 2], [3, 4]]
    assert joined([torch.tensor([1, 2]), torch.tensor([3])]).tolist() == [1, 2, 3]
