"""The nouns: what a budget means, which selections are refused, what of a signal is derived."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, Literal

import numpy
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate.core import (
    Block,
    CacheBlock,
    FoveateError,
    Method,
    Selection,
    Signals,
    check_choices,
    check_keep,
    described,
    did_you_mean,
    names_of,
    tokens_to_keep,
)
from foveate.forms import Scorer
from foveate.ops.device import Unread

# ---------------------------------------------------------------------------------------------------------------------
# keep


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (True, "keep=True is neither a number of tokens (int) nor a share of them (float)"),
        (False, "keep=False is neither a number of tokens (int) nor a share of them (float)"),
        (None, "keep=None is neither a number of tokens (int) nor a share of them (float)"),
        ("0.5", "keep='0.5' is neither a number of tokens (int) nor a share of them (float)"),
        ((0.5,), "keep=(0.5,) is neither a number of tokens (int) nor a share of them (float)"),
        (0, "keep=0 is below 1 token; the smallest budget is keep=1"),
        (-3, "keep=-3 is below 1 token; the smallest budget is keep=1"),
        (0.0, "keep=0.0 is no share in (0, 1]; the nearest is keep=0.01"),
        (-0.25, "keep=-0.25 is no share in (0, 1]; the nearest is keep=0.01"),
        (math.nan, "keep=nan is no share in (0, 1]; the nearest is keep=0.01"),
        (math.inf, "keep=inf is no share in (0, 1]; the nearest is keep=1.0"),
        (-math.inf, "keep=-inf is no share in (0, 1]; the nearest is keep=0.01"),
        (64.0, "keep=64.0 is no share in (0, 1]; the nearest is keep=1.0; write 64 without a point for tokens"),
        (1.5, "keep=1.5 is no share in (0, 1]; the nearest is keep=1.0; write 2 without a point for tokens"),
    ],
)
def test_a_keep_that_is_no_budget_is_refused(keep: object, message: str) -> None:
    with pytest.raises(FoveateError) as error:
        check_keep(keep)
    assert str(error.value) == message


def test_the_refusal_names_the_field() -> None:
    with pytest.raises(FoveateError, match=r"^heavy=0 is below 1 token; the smallest budget is heavy=1$"):
        check_keep(0, "heavy")


@pytest.mark.parametrize("keep", [1, 576, 10**9, 1.0, 0.5, 5e-324, math.nextafter(1.0, 0.0), numpy.float64(0.25)])
def test_a_keep_within_its_range_is_taken(keep: Any) -> None:
    check_keep(keep)


@pytest.mark.parametrize(
    ("keep", "original", "count"),
    [
        (1, 576, 1),
        (1.0, 576, 576),
        (576, 576, 576),
        (0.25, 576, 144),
        (0.11, 576, 63),  # 63.36
        (0.002, 576, 1),  # 1.152
        (0.0001, 576, 1),  # 0.0576, but an image keeps something
        (0.5, 5, 2),  # 2.5 goes to the even neighbour
        (0.5, 7, 4),  # 3.5 likewise
        (0.5, 1, 1),  # 0.5 would go to 0
        (0.25, 10, 2),
        (0.75, 10, 8),
    ],
)
def test_tokens_to_keep(keep: float, original: int, count: int) -> None:
    assert tokens_to_keep(keep, original) == count


@given(keep=st.floats(0, 1, exclude_min=True), original=st.integers(1, 5000))
def test_a_share_is_at_least_one_token_and_at_most_all(keep: float, original: int) -> None:
    count = tokens_to_keep(keep, original)
    assert type(count) is int
    assert 1 <= count <= original
    assert count == 1 or abs(count - keep * original) <= 0.5


@given(low=st.floats(0, 1, exclude_min=True), high=st.floats(0, 1, exclude_min=True), original=st.integers(1, 5000))
def test_a_larger_share_never_keeps_less(low: float, high: float, original: int) -> None:
    assume(low <= high)
    assert tokens_to_keep(low, original) <= tokens_to_keep(high, original)


@pytest.mark.parametrize(
    ("keep", "original", "left", "message"),
    [
        (64, 36, None, "keep=64 asks for 64 tokens but the image has 36 tokens; the most is keep=36"),
        (64, 36, 36, "keep=64 asks for 64 tokens but the image has 36 tokens; the most is keep=36"),
        (20, 36, 9, "keep=20 asks for 20 tokens but 9 of its 36 tokens are left; the most is keep=9"),
        (0.5, 36, 9, "keep=0.5 asks for 18 tokens but 9 of its 36 tokens are left; the most is keep=9"),
        (1.0, 36, 35, "keep=1.0 asks for 36 tokens but 35 of its 36 tokens are left; the most is keep=35"),
    ],
)
def test_more_than_is_left_is_refused(keep: float, original: int, left: int | None, message: str) -> None:
    with pytest.raises(FoveateError) as error:
        tokens_to_keep(keep, original, left)
    assert str(error.value) == message


def test_a_share_is_of_the_original_tokens() -> None:
    assert tokens_to_keep(0.25, 576, left=288) == 144


# ---------------------------------------------------------------------------------------------------------------------
# Signals and Selection


def indices(*rows: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


def test_a_missing_raster_is_named_with_its_reason() -> None:
    index = torch.arange(4)[None]
    assert Signals(original=4, index=index, grid=(2, 2)).raster("Pool", "do this") == (2, 2)
    with pytest.raises(FoveateError) as error:
        Signals(original=4, index=index).raster("Pool", "do this")
    assert str(error.value) == "Pool needs the whole grid of the image, but its tokens come from several tiles; do this"
    with pytest.raises(FoveateError, match="but an earlier stage has taken tokens from it; do this"):
        Signals(original=9, index=index).raster("Pool", "do this")


def test_the_shape_and_the_tiles_of_signals() -> None:
    alone = Signals(original=6, index=torch.arange(6).expand(2, 6))
    assert alone.shape == (2, 6)
    assert alone.tiles == 1
    assert Signals(original=6, index=torch.arange(6)[None], tile=torch.tensor([[0, 0, 1, 1, 2, 2]])).tiles == 3


def test_what_signals_lack() -> None:
    given = torch.zeros(1, 4)
    signals = Signals(
        original=4,
        index=given.long(),
        features=given[..., None],
        tower={"read": Block(hidden=given[..., None]), "8/24": Block(received=given)},
        cache=CacheBlock(age=given),
    )
    there = ("features", "tower.read.hidden", "tower.8/24.received", "cache.age")
    missing = ["text", "tower.read.keys", "tower.7.hidden", "decoder.normed", "cache.keys", "no", "no.sense"]
    assert signals.lacking(there) == []
    assert signals.lacking([*there, *missing]) == missing


def test_memory_is_not_shared_between_signals() -> None:
    first, second = (Signals(original=1, index=torch.zeros(1, 1)) for _ in range(2))
    first.memory["raters"] = 1
    assert second.memory == {}


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection([]), "random answered for 0 images but was asked for 2"),
        (Selection(indices([0])), "random answered for 1 images but was asked for 2"),
        (Selection(indices([0], [0], [0])), "random answered for 3 images but was asked for 2"),
        (
            Selection([torch.tensor([0]), torch.tensor([], dtype=torch.int64)]),
            "random, image 1: no token was kept; at least 1 must stay",
        ),
        (Selection(indices([0, 9], [0])), "random, image 0: kept index 9 is outside 0..8"),
        (Selection(indices([0], [-1, 3])), "random, image 1: kept index -1 is outside 0..8"),
        (Selection(indices([-1, 9], [0])), "random, image 0: kept index -1 is outside 0..8"),
        (Selection(indices([1, 1, 2], [0])), "random, image 0: 3 tokens were kept but only 2 of them are distinct"),
        (
            Selection(indices([2, 1], [0]), ordered=False, features=[torch.ones(2, 4), torch.ones(2, 4)]),
            "random, image 1: 2 feature rows for 1 kept tokens",
        ),
        (
            Selection(indices([0], [2, 1])),
            "random, image 1: kept indices do not ascend; a method that wants another order says ordered=False",
        ),
        (
            Selection(indices([0], [1]), features=[torch.ones(1, 4), torch.tensor([[1.0, math.nan]])]),
            "random, image 1: features hold NaN or infinity",
        ),
        (
            Selection(indices([0], [1]), features=[torch.tensor([[-math.inf]]), torch.ones(1, 1)]),
            "random, image 0: features hold NaN or infinity",
        ),
        (
            Selection(indices([0], [1]), features=[torch.ones(4), torch.ones(4)]),
            "random, image 0: features of shape (4,); they must be (K, D)",
        ),
        (
            Selection(indices([0], [1]), features=[torch.ones(1, 4)]),
            "random gave features for 1 images but was asked for 2",
        ),
        (
            Selection(indices([0], [1, 2]), extra=[torch.tensor([True]), torch.tensor([True])]),
            "random, image 1: the mask of extra tokens has 1 entries for 2 kept tokens",
        ),
        (
            Selection(indices([0], [1]), extra=[torch.tensor([True])]),
            "random gave masks of extra tokens for 1 images but was asked for 2",
        ),
        (
            Selection([torch.tensor([0.0]), torch.tensor([1.0])]),
            "random, image 0: kept indices are torch.float32 of shape (1,); they must be torch.int64 of shape (K,)",
        ),
        (
            Selection([torch.tensor([[0, 1], [2, 3]]), torch.tensor([0])]),
            "random, image 0: kept indices are torch.int64 of shape (2, 2); they must be torch.int64 of shape (K,)",
        ),
        (
            # A mask over the tokens is an easy mistake, and its values are valid indices.
            Selection([torch.tensor([0]), torch.tensor([False, True])]),
            "random, image 1: kept indices are torch.bool of shape (2,); they must be torch.int64 of shape (K,)",
        ),
    ],
)
def test_a_selection_that_breaks_the_contract_is_refused(selection: Selection, message: str) -> None:
    with pytest.raises(FoveateError) as error:
        selection.check(9, 2, "random")
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("rows", "stays", "message"),
    [
        ([[0, 1, 2], [3, 4, 5]], [[1, 0, 1], [0, 0, 0]], "image 1: no token was kept; at least 1 must stay"),
        ([[0, 1, 2], [3, 4, 9]], [[1, 0, 1], [0, 0, 1]], "image 1: kept index 9 is outside 0..8"),
        ([[0, 2, 1]], [[1, 1, 1]], "answered for 1 images but was asked for 2"),
    ],
)
def test_what_is_read_later_is_refused_as_well(rows: list[list[int]], stays: list[list[int]], message: str) -> None:
    with pytest.raises(FoveateError) as error:
        Selection(Unread(torch.tensor(rows), torch.tensor(stays).bool())).check(9, 2, "random")
    assert str(error.value) in {f"random {message}", f"random, {message}"}


def test_rows_of_unknown_length_are_read_once_somebody_looks() -> None:
    looks: list[list[int]] = []
    unread = Unread(
        torch.tensor([[0, 1, 2], [3, 4, 5]]),
        torch.tensor([[True, False, True], [False, True, False]]),
        [torch.tensor([7, 8])],
        lambda beside: looks.extend(one.tolist() for one in beside),
    )
    assert len(unread) == 2
    assert not looks
    assert [row.tolist() for row in unread] == [[0, 2], [4]]
    assert looks == [[7, 8]]
    checked = Selection(unread).check(9, 2, "random")
    assert [row.tolist() for row in checked.indices] == [[0, 2], [4]]


@pytest.mark.parametrize(
    "selection",
    [
        Selection(indices([0], [8])),
        Selection(indices([0, 1, 2, 3, 4, 5, 6, 7, 8], [4])),
        Selection(indices([5, 0], [8, 1]), ordered=False),
        Selection(indices([1, 2], [3]), features=[torch.ones(2, 4), torch.zeros(1, 4, dtype=torch.bfloat16)]),
        Selection(indices([1, 2], [3]), extra=[torch.tensor([False, True]), torch.tensor([False])]),
    ],
)
def test_a_selection_that_keeps_the_contract_passes(selection: Selection) -> None:
    selection.check(9, 2, "random")


@given(st.lists(st.integers(-2, 10), min_size=1, max_size=6))
def test_a_selection_passes_only_if_it_rises_within_the_image(kept: list[int]) -> None:
    right = kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < 9
    selection = Selection([torch.tensor(kept)])
    if right:
        selection.check(9, 1, "random")
    else:
        with pytest.raises(FoveateError, match=r"^random, image 0: "):
            selection.check(9, 1, "random")


# ---------------------------------------------------------------------------------------------------------------------
# Method


@dataclass(frozen=True)
class Choosing(Method):
    """Choosing: keeps what it is told to."""

    strategy: Literal["rank", "row"] = "rank"
    level: Literal[1, 2] | None = None
    name: str = "any"


class ByIndex(Scorer):
    """A scorer without a decorator of its own; it prefers later tokens."""

    def score(self, signals: Signals) -> torch.Tensor:
        return signals.index.float()


def test_a_field_outside_its_choices_is_refused() -> None:
    check_choices(Choosing("row"))
    with pytest.raises(FoveateError) as error:
        check_choices(Choosing("rows"))  # type: ignore[arg-type]
    assert str(error.value) == "strategy='rows' is not among its choices; did you mean 'row'? Choices: rank, row."


def test_a_method_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Choosing().strategy = "row"  # type: ignore[misc]


def test_a_bare_method_says_what_it_lacks() -> None:
    method = Method()
    signals = Signals(original=1, index=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match=r"^Method has no select\(\)$"):
        method.select(signals)
    with pytest.raises(NotImplementedError, match=r"^Method has no count\(\)$"):
        method.count(1)
    with pytest.raises(NotImplementedError, match=r"^Scorer has no score\(\)$"):
        Scorer().score(signals)
    assert method.needs == method.depths(32) == ()
    assert method.parts() == (method,)


def test_a_scorer_keeps_the_highest_in_raster_order() -> None:
    index = torch.tensor([[0, 2, 3, 7], [1, 4, 5, 6]])
    selection = ByIndex(keep=0.25).select(Signals(original=8, index=index))
    assert [row.tolist() for row in selection.indices] == [[3, 7], [5, 6]]
    assert selection.ordered
    assert ByIndex(keep=2).count(8) == (2,)
    assert str(ByIndex(keep=2)) == "byindex:keep=2"


def test_a_scorer_checks_its_budget() -> None:
    with pytest.raises(FoveateError, match="keep=0 is below 1 token"):
        ByIndex(keep=0)
    with pytest.raises(FoveateError, match="keep=5 asks for 5 tokens but 4 of its 8 tokens are left"):
        ByIndex(keep=5).select(Signals(original=8, index=torch.tensor([[0, 2, 3, 7]])))


def test_an_example_fills_what_has_no_default() -> None:
    @dataclass(frozen=True)
    class Demanding(Method):
        keep: float
        alpha: float = 2.0

    assert Demanding.example() == Demanding(keep=0.5, alpha=2.0)


# ---------------------------------------------------------------------------------------------------------------------
# words


@pytest.mark.parametrize(
    ("name", "choices", "hint"),
    [
        ("forpu", ["random", "fopru"], "did you mean 'fopru'? Choices: fopru, random."),
        ("zzz", ["random", "fopru"], "Choices: fopru, random."),
        ("FoPru", ["random", "fopru"], "did you mean 'fopru'? Choices: fopru, random."),
        ("any", [], "Choices: none."),
        ("", ["fopru"], "Choices: fopru."),
    ],
)
def test_did_you_mean(name: str, choices: list[str], hint: str) -> None:
    assert did_you_mean(name, choices) == hint
    assert did_you_mean(name, iter(choices)) == hint


@pytest.mark.parametrize("kind", [Signals, Block, CacheBlock])
def test_every_tensor_of_a_kind_but_those_that_come_always_is_described(kind: type) -> None:
    always = {
        "index",
        "tile",
        "tile_counts",
        "frames",
        "size",
        "memory",
        "grid",
        "prompt_length",
        "original",
        "stage",
        "stages",
        "keep",
    }
    rooms = {"tower", "decoder", "cache"}
    fields = {field.name for field in dataclasses.fields(kind)} - always - (rooms if kind is Signals else set())
    assert set(described(kind)) == fields
    for name, what in described(kind).items():
        assert what.axes.startswith("B") and set(what.axes) <= set("BNTLHDW"), name
        assert what.rooms and set(what.rooms) <= {
            "picture",
            "encoder",
            "decoder",
            "latest",
            "prompt",
            "joint",
            "cache",
        }, name
        assert what.words or what.axes == "BT", name


def test_what_is_derived_of_signals() -> None:
    """By hand, from the table of the design: which fields of a block are whose, and which count visual tokens."""
    assert names_of(Block, attention="sums") == ("received", "given", "received_all")
    assert names_of(Block, of="cls") == ("cls", "cls_attention", "key_cls", "query_cls")
    assert names_of(Signals, room="joint") == ("image_clip", "text_clip", "word_clip", "word_mask")
    assert names_of(CacheBlock, room="cache") == ("scores", "age", "keys", "window_queries")
    counted = {name: what.axes.index("N") for name, what in described(Block).items() if "N" in what.axes}
    assert counted["hidden"] == 1 and counted["keys"] == 2 and counted["text_query"] == 3 and "cls" not in counted
