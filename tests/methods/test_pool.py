"""Pool: means of neighbouring tokens, by hand and against a plain average of every cell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.core import Block, FoveateError, Grid, Selection, Signals
from foveate.methods.pool import Pool
from foveate.ops.subsets import lattice


def pooled(method: Pool, features: Tensor, grid: Grid | None, **more: Any) -> Selection:
    batch, tokens, _ = features.shape
    settings: dict[str, Any] = dict(original=tokens, index=torch.arange(tokens).expand(batch, tokens), grid=grid)
    seen = Signals(features=features, **(settings | more))
    selection = method.select(seen)
    selection.check(seen.original, batch, str(method))
    assert selection.space == "projected" and selection.ordered and selection.features is not None
    return selection


def test_blocks_of_two_by_two_by_hand() -> None:
    first = torch.tensor(
        [
            [0.0, 2.0, 10.0, 10.0],
            [4.0, 6.0, 10.0, 10.0],
            [1.0, 1.0, 0.0, 0.0],
            [1.0, 5.0, 0.0, -8.0],
        ]
    )
    features = torch.stack([first.flatten(), -first.flatten()], dim=-1)[None]  # (1, 16, 2)
    selection = pooled(Pool(), features, (4, 4))
    assert selection.indices[0].tolist() == [0, 2, 8, 10]
    assert selection.features is not None
    assert selection.features[0].tolist() == [[3.0, -3.0], [10.0, -10.0], [2.0, -2.0], [-2.0, 2.0]]


def test_cells_of_different_size_by_hand() -> None:
    # Cells of a 3 x 3 grid cut into five: {0 1} {2} {3 4} {5} {6 7 8}.
    selection = pooled(
        Pool(keep=5), torch.tensor([[[1.0], [3.0], [5.0], [7.0], [9.0], [2.0], [3.0], [4.0], [8.0]]]), (3, 3)
    )
    assert selection.indices[0].tolist() == [0, 2, 3, 5, 7]
    assert selection.features is not None
    torch.testing.assert_close(selection.features[0], torch.tensor([[2.0], [5.0], [8.0], [2.0], [5.0]]))


@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    seed=st.integers(0, 100),
    data=st.data(),
)
def test_every_token_is_the_mean_of_its_cell(
    batch: int, height: int, width: int, seed: int, data: st.DataObject
) -> None:
    tokens = height * width
    keep = data.draw(st.integers(1, tokens) | st.floats(0, 1, exclude_min=True))
    method = Pool(keep=keep)
    features = torch.randn(batch, tokens, 3, generator=torch.Generator().manual_seed(seed))
    selection = pooled(method, features, (height, width))
    (count,) = method.count(tokens) or (0,)
    cell = lattice(height, width, count)
    assert selection.features is not None
    for image in range(batch):
        kept = selection.indices[image]
        assert kept.numel() == count
        # A merged token stands in its own cell, and the cells of all of them are all cells.
        assert sorted(cell[kept].tolist()) == list(range(count))
        means = torch.stack([features[image][cell == cell[one]].mean(dim=0) for one in kept])
        torch.testing.assert_close(selection.features[image], means)


def test_means_can_be_taken_before_the_projector() -> None:
    """FoPru's "w/o Significance": what is averaged are the encoder's tokens, and they are still to be projected."""
    hidden = torch.tensor([[[0.0], [2.0], [4.0], [6.0]]])
    method = Pool(keep=1, space="encoded")
    assert method.needs == ("tower.read.hidden",) and method.encoded and not Pool().encoded
    seen = Signals(original=4, index=torch.arange(4)[None], grid=(2, 2), tower={"read": Block(hidden=hidden)})
    selection = method.select(seen)
    selection.check(4, 1, str(method))
    assert selection.space == "encoded" and selection.features is not None
    assert selection.features[0].tolist() == [[3.0]]
    with pytest.raises(FoveateError, match="space='pixels'"):
        Pool(space="pixels")  # type: ignore[arg-type]


def test_keeping_everything_changes_nothing() -> None:
    features = torch.randn(2, 12, 4)
    selection = pooled(Pool(keep=1.0), features, (3, 4))
    assert selection.features is not None
    assert torch.equal(torch.stack(selection.features), features)
    assert all(torch.equal(row, torch.arange(12)) for row in selection.indices)


def test_an_image_in_a_batch_is_pooled_as_alone() -> None:
    features = torch.randn(3, 36, 8)
    together = pooled(Pool(keep=7), features, (6, 6))
    assert together.features is not None
    for image in range(3):
        alone = pooled(Pool(keep=7), features[image : image + 1], (6, 6))
        assert alone.features is not None
        assert torch.equal(alone.indices[0], together.indices[image])
        torch.testing.assert_close(alone.features[0], together.features[image])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_single(dtype: torch.dtype) -> None:
    # In half precision 2048 + 1 is 2048 again.
    features = torch.tensor([[[2048.0], [1.0], [1.0], [1.0]]]).to(dtype)
    selection = pooled(Pool(keep=1), features, (2, 2))
    assert selection.features is not None
    assert selection.features[0].dtype == dtype
    assert selection.features[0].item() == torch.tensor(512.75).to(dtype).item()


def test_what_is_not_a_number_is_refused() -> None:
    features = torch.zeros(1, 4, 1)
    features[0, 3] = float("nan")
    with pytest.raises(FoveateError, match=r"^pool:keep=2, image 0: features hold NaN or infinity$"):
        pooled(Pool(keep=2), features, (2, 2))


def test_the_grid_must_be_whole() -> None:
    with pytest.raises(FoveateError) as error:
        pooled(Pool(), torch.zeros(1, 3, 1), None, original=9, index=torch.tensor([[0, 4, 8]]))
    assert str(error.value) == (
        "Pool needs the whole grid of the image, but an earlier stage has taken tokens from it; put Pool first, or "
        "take uniform"
    )


def test_a_wrong_budget_is_refused() -> None:
    with pytest.raises(FoveateError, match="keep=5 asks for 5 tokens but the image has 4 tokens"):
        pooled(Pool(keep=5), torch.zeros(1, 4, 1), (2, 2))
    with pytest.raises(FoveateError, match="keep=0 is below 1 token"):
        Pool(keep=0)
