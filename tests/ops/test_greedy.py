"""The greedy engine against plain loops in float64, and what holds for it whatever the numbers are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.core import FoveateError
from foveate.ops import greedy
from foveate.ops.greedy import covering, diverse, farthest
from foveate.ops.scores import cosines

SEEDS = st.integers(0, 10_000)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# references for one image, in float64, which compute every gain anew in every round


def cosine_table(features: Tensor) -> list[list[float]]:
    rows = [[float(value) for value in row] for row in features]
    lengths = [math.sqrt(sum(value * value for value in row)) for row in rows]
    return [
        [
            sum(a * b for a, b in zip(one, two, strict=True)) / (length * other)
            for two, other in zip(rows, lengths, strict=True)
        ]
        for one, length in zip(rows, lengths, strict=True)
    ]


def picked(gain: Callable[[int, list[int]], float], tokens: int, count: int) -> list[int]:
    taken: list[int] = []
    for _ in range(count):
        left = [token for token in range(tokens) if token not in taken]
        taken.append(max(left, key=lambda token: (gain(token, taken), -token)))
    return taken


def farthest_by_loops(features: Tensor, count: int, first: Any = None, weight: Any = None) -> list[int]:
    cosine, tokens = cosine_table(features), len(features)

    def gain(token: int, taken: list[int]) -> float:
        if not taken and first is not None:
            return float(first[token])
        others = taken or [other for other in range(tokens) if other != token]
        distance = min((1 - cosine[token][other] for other in others), default=0.0)
        return distance * (1.0 if weight is None or not taken else float(weight[token]))

    return picked(gain, tokens, count)


def covering_by_loops(similarity: Any, count: int, row_weight: Any = None, weight: Any = None) -> list[int]:
    table = np.asarray(similarity, dtype=np.float64)
    rows = np.ones(len(table)) if row_weight is None else np.asarray(row_weight, dtype=np.float64)

    def gain(token: int, taken: list[int]) -> float:
        best = np.maximum(table[:, taken].max(axis=1, initial=0.0), 0.0)
        value = (rows * np.maximum(table[:, token] - best, 0.0)).sum()
        return float(value * (1.0 if weight is None else float(weight[token])))

    return picked(gain, table.shape[1], count)


def diverse_by_determinants(features: Tensor, count: int, weight: Tensor) -> list[int]:
    """det(L_S) of every S that one token more would make."""
    scale = weight.double().sqrt().numpy()
    kernel = np.array(cosine_table(features)) * scale[:, None] * scale[None]

    def gain(token: int, taken: list[int]) -> float:
        chosen = [*taken, token]
        return float(np.linalg.slogdet(kernel[np.ix_(chosen, chosen)])[1])

    return picked(gain, len(features), count)


# ---------------------------------------------------------------------------------------------------------------------
# by hand


def at_angles(*degrees: float) -> Tensor:
    radians = torch.tensor([degrees]).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=-1)


def test_padding_needs_a_first_pick() -> None:
    with pytest.raises(FoveateError, match=r"with padding .* is no first pick; give first="):
        farthest(at_angles(0, 90, 180), 1, free=torch.tensor([[False, False, True]]))


def test_the_most_isolated_token_is_first_then_the_farthest() -> None:
    """Nearest neighbours are 10, 10, 40, 50 and 40 degrees away; then 180 is 50 + 0, 0 and 10 are 130 and 120 away."""
    assert farthest(at_angles(0, 10, 90, 180, 130), 5).tolist() == [[3, 0, 2, 4, 1]]


def test_mutual_neighbours_tie_and_the_lowest_index_wins() -> None:
    assert farthest(at_angles(100, 5, 0, 60), 1).tolist() == [[0]]
    assert farthest(at_angles(60, 0, 5, 100), 1).tolist() == [[0]], "60 and 100 are each other's nearest"


def test_a_weight_counts_for_candidates_after_the_first() -> None:
    features, ones = at_angles(0, 90, 180), torch.ones(1, 3)
    first = torch.tensor([[3.0, 2.0, 1.0]])
    assert farthest(features, 2, first, ones).tolist() == [[0, 2]]
    assert farthest(features, 2, first, torch.tensor([[0.0, 2.1, 1.0]])).tolist() == [[0, 1]], "1 * 2.1 beats 2 * 1"


def test_what_is_covered_already_is_no_gain() -> None:
    """Columns cover 3, 2.5 and 1; beside the first the second adds 0.5 and the third 1."""
    similarity = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, -5.0], [1.0, 0.0, 0.0], [0.0, 0.5, 1.0]]])
    assert covering(similarity, 3).tolist() == [[0, 2, 1]]
    assert covering(similarity, 2, row_weight=torch.tensor([[1.0, 1.0, 0.0, 1.0]])).tolist() == [[1, 2]]
    assert covering(similarity, 2, weight=torch.tensor([[1.0, 9.0, 1.0]])).tolist() == [[1, 0]]
    assert covering(similarity, 2, weight=torch.tensor([[0.0, 0.0, 1.0]])).tolist() == [[2, 0]]


def test_the_part_that_is_new_counts_with_its_weight() -> None:
    """Beside 0 degrees, variances are sin^2: 1/4 at 30 and 3/4 at 120 degrees."""
    features = at_angles(0, 30, 120)
    assert diverse(features, 2, torch.tensor([[1.0, 0.9, 0.9]])).tolist() == [[0, 2]]
    assert diverse(features, 2, torch.tensor([[1.0, 0.9, 0.2]])).tolist() == [[0, 1]]
    assert diverse(features, 3, torch.tensor([[1.0, 0.1, 0.9]])).tolist() == [[0, 2, 1]], "beyond the rank"


# ---------------------------------------------------------------------------------------------------------------------
# against the loops


@pytest.mark.parametrize(("tokens", "width"), [(9, 20), (20, 20), (23, 4), (40, 12), (1, 3)])
@pytest.mark.parametrize("block", [4, 384])
def test_every_order_is_that_of_the_loops(tokens: int, width: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether cosines stand in a table or are computed on demand, and factors are read, in one block or in several."""
    monkeypatch.setattr(greedy, "BLOCK", block)
    monkeypatch.setattr(greedy, "FILLED", block)
    features, first, weight = randn(3, tokens, width), rand(3, tokens, seed=1), rand(3, tokens, seed=2) + 0.1
    similarity, rows = randn(3, 7, tokens, seed=3), rand(3, 7, seed=4)
    rank = min(tokens, width)
    for image in range(3):
        one = slice(image, image + 1)
        assert farthest(features[one], tokens)[0].tolist() == farthest_by_loops(features[image], tokens)
        got = farthest(features, tokens, first, weight)[image].tolist()
        assert got == farthest_by_loops(features[image], tokens, first[image], weight[image])
        assert diverse(features, rank, weight)[image].tolist() == diverse_by_determinants(
            features[image], rank, weight[image]
        )
        count = min(tokens, 5)
        assert covering(similarity, count)[image].tolist() == covering_by_loops(similarity[image], count)
        got = covering(similarity, count, rows, weight)[image].tolist()
        assert got == covering_by_loops(similarity[image], count, rows[image], weight[image])


@given(tokens=st.integers(1, 12), width=st.integers(1, 12), seed=SEEDS, data=st.data())
def test_farthest_is_that_of_the_loops(tokens: int, width: int, seed: int, data: st.DataObject) -> None:
    features = randn(1, tokens, width, seed=seed)
    count = data.draw(st.integers(1, tokens))
    if width > 1:  # on a line, all distances are 0 or 2
        assert farthest(features, count)[0].tolist() == farthest_by_loops(features[0], count)


# ---------------------------------------------------------------------------------------------------------------------
# whatever the numbers are


Chooser = Callable[[Tensor, int, Tensor, "Tensor | None"], Tensor]
CHOOSERS: dict[str, Chooser] = {
    "farthest": lambda features, count, weight, free: farthest(features, count, weight, weight, free),
    "covering": lambda features, count, weight, free: covering(
        cosines(features, features),
        count,
        None if free is None else free.float(),
        weight,
        free,
    ),
    "diverse": lambda features, count, weight, free: diverse(features, count, weight, free),
}
each = pytest.mark.parametrize("choose", CHOOSERS.values(), ids=CHOOSERS.keys())


@pytest.fixture
def by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of any size are covered row by row, a few rows at once, as large ones are on a CPU."""
    monkeypatch.setattr(greedy, "MANY", 1)
    monkeypatch.setattr(greedy, "CACHED", 100)


@pytest.mark.parametrize("seed", range(5))
def test_covering_row_by_row_equals_the_loops(seed: int, by_rows: None) -> None:
    similarity, rows, weight = randn(2, 50, 40, seed=seed), rand(2, 50, seed=seed + 1), rand(2, 40, seed=seed + 2)
    picks = covering(similarity, 30, rows, weight)
    for image in range(2):
        assert picks[image].tolist() == covering_by_loops(similarity[image], 30, rows[image], weight[image])
        alone = covering(similarity[image : image + 1], 30, rows[image : image + 1], weight[image : image + 1])
        assert torch.equal(alone[0], picks[image])


def test_covering_row_by_row_adds_nothing_for_copies(by_rows: None) -> None:
    """Four tokens, the others their copies: when these are taken, rounding is no gain and the lowest index is next."""
    features = randn(1, 4, 30).repeat(1, 3, 1)
    picks = covering(cosines(features, features), 12)[0].tolist()
    assert sorted(picks[:4]) == [0, 1, 2, 3] and picks[4:] == list(range(4, 12))


@each
@given(data=st.data(), seed=SEEDS)
def test_exactly_as_many_distinct_tokens_come_out(choose: Chooser, data: st.DataObject, seed: int) -> None:
    """Small whole numbers: copies, opposite and zero tokens, equal weights and weights of zero are the rule."""
    tokens, width = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([1, 2, 12]))
    count = data.draw(st.integers(0, tokens))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randint(-1, 2, (2, tokens, width), generator=generator).float()
    weight = torch.randint(0, 3, (2, tokens), generator=generator).float()
    picks = choose(features, count, weight, None)
    assert picks.shape == (2, count) and picks.dtype == torch.int64
    for row in picks.tolist():
        assert len(set(row)) == count and set(row) <= set(range(tokens))
    for image in range(2):
        alone = choose(features[image : image + 1], count, weight[image : image + 1], None)
        assert torch.equal(alone[0], picks[image])
    for fewer in range(count):
        assert torch.equal(choose(features, fewer, weight, None), picks[:, :fewer]), "the first picks stand"


@each
@pytest.mark.parametrize("width", [3, 40])
def test_copies_come_last(choose: Chooser, width: int) -> None:
    """Places 6 to 11 repeat 0 to 5 in other sizes; whether a token or its copy comes first is a matter of rounding."""
    half = randn(1, 6, width)
    sizes = torch.tensor([0.5, 3.0, 1.0, 7.0, 0.1, 1.1])[:, None]
    picks = choose(torch.cat([half, half * sizes], dim=1), 12, torch.ones(1, 12), None)[0]
    new = min(6, width) if choose is CHOOSERS["diverse"] else 6
    alone = choose(half, 6, torch.ones(1, 6), None)[0]
    assert (picks[:new] % 6).tolist() == alone[:new].tolist()
    if choose is not CHOOSERS["covering"]:
        assert picks[new:].tolist() == sorted(picks[new:].tolist()), "nothing is left to be gained"


@each
def test_where_nothing_is_to_be_gained_the_lowest_index_is_next(choose: Chooser) -> None:
    equal = torch.ones(1, 7, 4)
    assert choose(equal, 7, torch.ones(1, 7), None).tolist() == [list(range(7))]
    assert choose(equal, 7, torch.zeros(1, 7), None).tolist() == [list(range(7))]
    assert choose(torch.zeros(1, 7, 4), 7, torch.ones(1, 7), None).tolist() == [list(range(7))]


def test_beyond_the_rank_the_weight_decides() -> None:
    weight = torch.tensor([[0.2, 0.9, 0.3, 1.0, 0.3, 0.5]])
    assert diverse(torch.ones(1, 6, 8), 6, weight).tolist() == [[3, 1, 5, 2, 4, 0]]


@pytest.mark.parametrize("width", [8, 16, 64])
def test_far_more_picks_than_the_rank_stay_sound(width: int) -> None:
    features = randn(2, 300, width)
    picks = diverse(features, 300, rand(2, 300, seed=1))
    assert picks.sort(dim=-1).values.tolist() == [list(range(300))] * 2


@each
@given(seed=SEEDS, width=st.sampled_from([4, 30]))
def test_permuted_tokens_are_picked_alike(choose: Chooser, seed: int, width: int) -> None:
    features, weight = randn(1, 12, width, seed=seed), rand(1, 12, seed=seed + 1) + 0.1
    moved = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    picks = choose(features[:, moved], 4, weight[:, moved], None)
    assert torch.equal(moved[picks], choose(features, 4, weight, None))


@each
@pytest.mark.parametrize("width", [4, 30])
def test_neither_the_size_of_features_nor_of_weights_matters(choose: Chooser, width: int) -> None:
    features, weight = randn(2, 12, width), rand(2, 12, seed=1) + 0.1
    sizes = 2.0 ** torch.arange(-6, 6)[None, :, None]
    expected = choose(features, 6, weight, None)
    assert torch.equal(choose(features * sizes, 6, weight, None), expected)
    assert torch.equal(choose(features, 6, weight * 4.0, None), expected)


@each
@pytest.mark.parametrize("width", [4, 30])
def test_padding_is_never_there(choose: Chooser, width: int) -> None:
    """Tokens of row 1 end after 7; whatever follows changes nothing."""
    features, weight = randn(2, 12, width), rand(2, 12, seed=1) + 0.1
    free = torch.arange(12) < torch.tensor([[12], [7]])
    features[1, 7:] = features[1, 0]
    weight[1, 7:] = 9.0
    picks = choose(features, 7, weight, free)
    assert torch.equal(picks[1:], choose(features[1:, :7], 7, weight[1:, :7], None))
    assert torch.equal(picks[:1], choose(features[:1], 7, weight[:1], None))


@each
def test_half_precision_is_promoted(choose: Chooser) -> None:
    features, weight = randn(2, 40, 16).bfloat16(), rand(2, 40, seed=1)
    assert torch.equal(choose(features, 20, weight, None), choose(features.float(), 20, weight, None))


@each
def test_inputs_stay_as_they_are_and_may_have_gradients(choose: Chooser) -> None:
    features, weight = randn(2, 10, 12).requires_grad_(), rand(2, 10, seed=1).requires_grad_()
    before = features.detach().clone(), weight.detach().clone()
    assert not choose(features, 5, weight, None).requires_grad
    assert torch.equal(features, before[0]) and torch.equal(weight, before[1])
    similarity = randn(1, 5, 6)
    whole = similarity.clone()
    covering(similarity, 4, torch.ones(1, 5))
    assert torch.equal(similarity, whole)


def test_what_has_no_order_is_refused() -> None:
    features, weight = randn(2, 5, 3), torch.ones(2, 5)
    features[1, 2, 0] = torch.nan
    for choose in (farthest, lambda one, count: diverse(one, count, weight)):
        with pytest.raises(FoveateError, match="1 of 10 vectors hold NaN or infinity; finite ones are needed"):
            choose(features, 2)
    weight[0, 0] = torch.inf
    for refused in (
        lambda: diverse(randn(2, 5, 3), 2, weight),
        lambda: farthest(randn(2, 5, 3), 2, torch.ones(2, 5), weight),
        lambda: covering(randn(2, 4, 5), 2, weight=weight),
    ):
        with pytest.raises(FoveateError, match="1 of 10 scores are NaN or infinite; finite scores are needed"):
            refused()


# ---------------------------------------------------------------------------------------------------------------------
# what a round costs


class Kernels(TorchDispatchMode):
    """Counts operations that are no views, and those that a host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.launched = self.waited = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.waited += name in {"_local_scalar_dense", "nonzero", "masked_select", "_to_copy", "_unique2"}
        self.launched += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "width", "most"),
    [("farthest", 64, 5), ("farthest", 8, 8), ("covering", 64, 7), ("diverse", 64, 9), ("diverse", 8, 13)],
)
def test_a_round_launches_few_kernels_and_waits_for_none(name: str, width: int, most: int) -> None:
    features, weight = randn(2, 40, width), rand(2, 40, seed=1)
    counted = []
    for count in (10, 30):
        with Kernels() as seen:
            CHOOSERS[name](features, count, weight, None)
        counted.append(seen)
    assert counted[0].waited == counted[1].waited
    assert counted[1].launched - counted[0].launched <= 20 * most


@pytest.mark.parametrize("tokens", [1, 7, 64, 577, 2880])
def test_the_first_of_several_maxima_is_taken(tokens: int) -> None:
    """What the engine's ties rest on."""
    scores = torch.randint(0, 3, (50, tokens), generator=torch.Generator().manual_seed(0)).float()
    scores[rand(50, tokens) < 0.5] = -torch.inf
    scores[0] = -torch.inf
    first = [row.index(max(row)) for row in scores.tolist()]
    assert scores.argmax(dim=-1).tolist() == first
