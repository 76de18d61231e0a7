"""Where positions have several axes, what follows a pruned prompt stands where it stands after the whole one.

The reference is the stock model's own: the positions that its rotary embedding is handed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import tiny
from models.doubles import Fixed
from torch import Tensor

import foveate
from foveate.families.rows import FAMILIES
from foveate.runtime.seams import CACHE

SEVERAL = tuple(row.name for row in FAMILIES if row.positions is not None)
# The last token of every picture leaves: of one that ends its prompt, of one before text, and of a second one.
LEAVES = Fixed((0, 3, 10))
ROWS = ("3i", "2i4", "1i2i")

each_family = pytest.mark.parametrize("family", SEVERAL)


@contextmanager
def positions(model: Any) -> Iterator[list[Tensor]]:
    """(3, B, n) of each call of the decoder."""
    found: list[Tensor] = []

    def note(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        handed = options["position_ids"] if "position_ids" in options else arguments[1]
        found.append(handed[-3:].expand(3, -1, -1).clone())

    hook = model.get_decoder().rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


@torch.no_grad()
def handed(model: Any, run: Callable[[], Any]) -> list[Tensor]:
    """What the decoder is handed in each call of the stock model."""
    with positions(model) as found:
        run()
    return found


@torch.no_grad()
def handed_pruned(model: Any, run: Callable[[], Any]) -> list[Tensor]:
    """The same of the pruned one."""
    with foveate.prune(model, LEAVES) as trace, positions(model) as found:
        run()
    assert all(int(image.kept[-1]) < image.original - 1 for image in trace.images), "every picture loses its last token"
    return found


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected) > 0
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


@each_family
@pytest.mark.parametrize("beams", [1, 2])
def test_an_answer_stands_where_the_unpruned_models_does(family: str, beams: int) -> None:
    model = tiny.model(family)
    given = tiny.inputs(model, *ROWS)

    def run() -> None:
        model.generate(**given, max_new_tokens=4, num_beams=beams)

    whole = handed(model, run)
    assert_same(handed_pruned(model, run)[1:], whole[1:])
    axes = whole[1][:, 0, 0].tolist()
    assert len(set(axes)) > 1, "behind a picture the axes differ, so that one number for all would be wrong"


@each_family
def test_tokens_decoded_by_hand_stand_where_the_unpruned_models_do(family: str) -> None:
    model = tiny.model(family)
    given = tiny.inputs(model, *ROWS)

    def run(given: dict[str, Tensor]) -> None:
        cache = getattr(model(**given, use_cache=True), CACHE)
        for tokens in ([5], [6, 7], [8]):
            ids = torch.tensor([tokens]).expand(given["input_ids"].shape[0], -1)
            model(input_ids=ids, **{CACHE: cache})

    pruned = handed_pruned(model, lambda: run(given))
    for row in range(len(ROWS)):  # the stock model miscounts rows that are padded
        whole = handed(model, lambda row=row: run(given.alone(row)))  # type: ignore[misc]
        assert_same([one[:, row : row + 1] for one in pruned[1:]], whole[1:])


@each_family
@pytest.mark.parametrize("second", ["4", "2i", "1i2"])
def test_a_later_turn_stands_where_the_unpruned_models_does(family: str, second: str) -> None:
    """Pictures of a later turn are no match for a cache of the stock model, which is given all of it at once."""
    model = tiny.model(family)
    first, more = tiny.inputs(model, "3i"), tiny.inputs(model, second, seed=1)
    # Every conversation goes on from the same words, whatever the model answered.
    said = torch.cat([first["input_ids"], torch.tensor([[7, 8, 9]])], dim=1)
    given, whole = first.continued(said, more)

    def run() -> None:
        cache = getattr(model.generate(**first, max_new_tokens=3, return_dict_in_generate=True), CACHE)
        model.generate(**given, max_new_tokens=3, **{CACHE: cache})

    pruned = handed_pruned(model, run)
    if "i" in second:
        expected = handed(model, lambda: model.generate(**whole, max_new_tokens=3))
        assert_same(pruned[4:], expected[1:])
        assert len(pruned) == 6
    else:
        assert_same(pruned[1:], handed(model, run)[1:])
