"""The map from the encoder's patches to the decoder's tokens, found again by asking which patch moves which token."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from models import tiny, tiny_families, tiny_parts
from torch import Tensor

from foveate.core import FoveateError
from foveate.families import family_of
from foveate.families.layouts import Encoded, Layout, merged, runs_of, tiles_of

OTHERS = tuple(name for name in tiny.FAMILIES if name != "llava-1.5")
ROWS = ("3i4", "2i1i5", "6", "1i")


def encode(model: Any, given: Any, kind: str = "image") -> tuple[Tensor, list[Tensor]]:
    """What the last block that the projector reads has put out, open to gradients, and the features made of it."""
    family = family_of(model)
    seen: list[Tensor] = []

    def open_(_: Any, __: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).detach().requires_grad_()
        seen.append(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hook = family.blocks_of(model, kind)[family.read_block(model)].register_forward_hook(open_)
    function = getattr(model.model, f"get_{kind}_features")
    names = [name for name in inspect.signature(function).parameters if name in given]
    output = function(**{name: given[name] for name in names}, return_dict=True)
    hook.remove()
    hidden = seen[0] if seen[0].ndim == 3 else seen[0][None]
    return seen[0], [*output.pooler_output, hidden]


def layouts(model: Any, given: Any, features: list[Tensor], kind: str = "image") -> list[Layout]:
    family = family_of(model)
    rows = [one.shape[0] for one in features]
    describe = family.layouts if kind == "image" else family.videos
    assert describe is not None
    tower = family.tower_of(model)[0]
    return describe(Encoded(model, tower, given, rows, lambda: runs_of(given["input_ids"], tiny_parts.IMAGE)))


SHOWN = [(name, "image", ROWS) for name in (*OTHERS, "llava-1.5/pixtral")] + [
    (name, "video", ("3v4", "2v1v5")) for name in tiny_families.with_videos()
]


@pytest.mark.parametrize(("name", "kind", "rows"), SHOWN)
def test_each_token_comes_from_the_patches_that_move_it(name: str, kind: str, rows: tuple[str, ...]) -> None:
    model = tiny.model(name)
    given = tiny.inputs(model, *rows)
    hidden, (*features, _) = encode(model, given, kind)
    summary = family_of(model).tower_of(model)[1].summary
    flat = torch.cat(features)
    found = layouts(model, given, features, kind)
    assert [one.placeholders for one in found] == [one.tokens for row in given.pictures for one in row]
    start = 0
    for layout in found:
        of_token = dict(
            zip(layout.visual.tolist(), zip(layout.patches.tolist(), _shares(layout), strict=True), strict=True)
        )
        for place in range(0, layout.placeholders, 2):
            (moved,) = torch.autograd.grad(flat[start + place].sum(), hidden, retain_graph=True)
            moved = moved if moved.ndim == 3 else moved[None]
            patches = moved[:, summary:].abs().sum(dim=-1).flatten().gt(1e-7).nonzero().squeeze(-1).tolist()
            expected = of_token.get(place, ([], []))
            assert patches == sorted({patch for patch, share in zip(*expected, strict=True) if share > 0})
        start += layout.placeholders
    assert start == flat.shape[0]


def _shares(layout: Layout) -> list[list[float]]:
    if layout.weights is None:
        return [[1.0] * layout.patches.shape[1]] * layout.patches.shape[0]
    torch.testing.assert_close(layout.weights.sum(dim=1), torch.ones(layout.weights.shape[0]))
    return layout.weights.tolist()


@pytest.mark.parametrize("name", OTHERS)
def test_every_visual_token_has_a_place(name: str) -> None:
    model = tiny.model(name)
    given = tiny.inputs(model, *ROWS)
    _, (*features, _) = encode(model, given)
    for layout in layouts(model, given, features):
        count = layout.visual.numel()
        assert layout.patches.shape[0] == count <= layout.placeholders
        assert (layout.grid is None) != (layout.tile is None)
        if layout.grid is not None:
            assert layout.grid[0] * layout.grid[1] == count
        if layout.tile is not None:
            assert layout.tile.unique().tolist() == list(range(len(layout.lengths)))


def test_newlines_are_not_visual() -> None:
    model = tiny.model("llava-next")
    given = tiny.inputs(model, "1i")
    _, (*features, _) = encode(model, given)
    (layout,) = layouts(model, given, features)
    is_newline = (features[0] == model.model.image_newline).all(dim=1)
    assert int(is_newline.sum()) == 2
    assert torch.equal(layout.visual, (~is_newline).nonzero().squeeze(-1))


def test_interpolated_tokens_share_their_patches() -> None:
    """A picture scaled down after the projector: the bilinear weights of the stock packing, found by its own output."""
    model = tiny.model("llava-onevision")
    given = tiny.inputs(model, "1i")
    hidden, (*features, _) = encode(model, given)
    (layout,) = layouts(model, given, features)
    assert layout.weights is not None
    projected = model.model.multi_modal_projector(hidden).flatten(0, 1)
    expected = (projected[layout.patches] * layout.weights[..., None]).sum(dim=1)
    torch.testing.assert_close(features[0][layout.visual], expected)


def test_tiles_of_one_run_are_one_picture_and_its_last_tile_is_the_base() -> None:
    model = tiny.model("internvl")
    given = tiny.inputs(model, "1i")
    _, (*features, _) = encode(model, given)
    (layout,) = layouts(model, given, features)
    assert len(features) == 3
    assert layout.tile is not None
    assert layout.tile.tolist() == [1] * 9 + [2] * 9 + [0] * 9
    assert layout.summary == 2


def test_squares_of_patches() -> None:
    assert merged(2, 4, 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert merged(2, 2, 1).tolist() == [[0], [1], [2], [3]]


def test_runs_of_placeholders() -> None:
    ids = torch.tensor([[9, 9, 1, 9], [2, 9, 9, 9]])
    assert runs_of(ids, 9) == [2, 1, 3]
    assert runs_of(ids, 5) == []


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("llava-next", "image_sizes"),
        ("qwen2-vl", "image_grid_thw"),
        ("video-llama-3", "image_merge_sizes"),
        ("gemma4", "image_position_ids"),
    ],
)
def test_sizes_that_were_not_given(name: str, missing: str) -> None:
    model = tiny.model(name)
    given = tiny.inputs(model, "1i")
    _, (*features, _) = encode(model, given)
    del given[missing]
    with pytest.raises(FoveateError, match=f"{missing} is missing; pass what the processor made"):
        layouts(model, given, features)


def test_pictures_whose_patches_merge_where_none_should() -> None:
    model = tiny.model("video-llama-3")
    given = tiny.inputs(model, "1i")
    _, (*features, _) = encode(model, given)
    given["image_merge_sizes"] = torch.tensor([2])
    with pytest.raises(FoveateError) as error:
        layouts(model, given, features)
    assert str(error.value) == (
        "image_merge_sizes=2 merges patches of a picture, whose tokens can then not be told apart; 1 works"
    )


def test_patches_are_found_by_their_places() -> None:
    """In whatever order they come, and wherever padding stands."""
    model = tiny.model("gemma4")
    given = tiny.inputs(model, "2i1i5")
    mixed = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    moved = {**given, "pixel_values": given["pixel_values"][:, mixed]}
    moved["image_position_ids"] = given["image_position_ids"][:, mixed]
    _, (*features, _) = encode(model, given)
    _, (*others, _) = encode(model, moved)
    torch.testing.assert_close(torch.cat(features), torch.cat(others))
    found = [layouts(model, one, features) for one in (given, moved)]
    for place, (layout, other) in enumerate(zip(*found, strict=True)):
        assert torch.equal(mixed[other.patches - 32 * place] + 32 * place, layout.patches)


def test_a_run_that_is_no_number_of_tiles() -> None:
    model = tiny.model("internvl")
    given = tiny.inputs(model, "1i")
    _, (*features, _) = encode(model, given)
    given["input_ids"][0, 5] = 3
    with pytest.raises(FoveateError, match="a run of 4 visual placeholders is no number of whole tiles of 9 tokens"):
        layouts(model, given, features)


# ---------------------------------------------------------------------------------------------------------------------
# tiles


def test_tiles_of_pictures_by_hand() -> None:
    """Two tiles of 4 patches, whose tokens stand side by side, one patch of padding; then a picture of its own."""
    first = Layout(5, torch.arange(5), torch.tensor([[0], [1], [4], [2], [5]]), (4, 4))
    second = Layout(2, torch.arange(2), torch.tensor([[8, 9], [10, 11]]), (4,), grid=(2, 1))
    tiles = tiles_of([first, second])
    assert [tile.picture for tile in tiles] == [0, 0, 1]
    assert [tile.tokens.tolist() for tile in tiles] == [[0, 1, 3], [2, 4], [0, 1]]
    assert [tile.patches.tolist() for tile in tiles] == [[[0], [1], [2]], [[0], [1]], [[0, 1], [2, 3]]]
    assert [tile.rest.tolist() for tile in tiles] == [[3], [2, 3], []]
    assert [tile.share for tile in tiles] == [(0, (3, 2)), (1, (3, 2)), None]
    assert [tile.grid for tile in tiles] == [None, None, (2, 1)]
    assert not any(tile.plain for tile in tiles)


def test_a_tile_without_tokens_has_no_share() -> None:
    tiles = tiles_of([Layout(2, torch.arange(2), torch.tensor([[0], [5]]), (2, 2, 2))])
    assert [tile.tokens.tolist() for tile in tiles] == [[0], [], [1]]
    assert [tile.share for tile in tiles] == [(0, (1, 1)), (1, (1, 1)), (1, (1, 1))]
    assert tiles[1].rest.tolist() == [0, 1]


def test_a_token_between_two_tiles_belongs_to_that_of_its_largest_share() -> None:
    weights = torch.tensor([[0.6, 0.4], [0.3, 0.7]])
    (left, right) = tiles_of([Layout(2, torch.arange(2), torch.tensor([[1, 2], [1, 3]]), (2, 2), weights)])
    assert (left.tokens.tolist(), right.tokens.tolist()) == ([0], [1])
    assert left.patches.tolist() == [[1, 1]]
    assert right.patches.tolist() == [[1, 1]]
    assert left.weights is not None and left.weights.tolist() == [[1.0, 0.0]]
    assert right.weights is not None and right.weights.tolist() == [[0.0, 1.0]]
    assert (left.rest.tolist(), right.rest.tolist()) == ([0], [0])
