"""Every golden file of a method that is here: its official code's answers, array by array, in a batch and row alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import golden_cases
import numpy as np
import pytest
import torch
from batches import alone, answers, assert_same, row_of, rows_of, together
from golden_cases import BUILDERS, FOLDER, PATHS, UNCOVERED, Case
from torch import Tensor

from foveate import methods
from foveate.core import CacheSelection, Selection, Signals
from foveate.ops.scores import causal_received, rated, window_attention
from foveate.ops.subsets import descending

CLOSE = dict(rtol=1e-4, atol=1e-5)
"""How floating-point arrays compare, as the index recommends."""

SHIPPED = Path(__file__).parent / "golden"


@cache
def cases() -> tuple[Case, ...]:
    return tuple(golden_cases.load())


def entry_of(case: Case) -> dict[str, Any]:
    return next(entry for entry in golden_cases.index_of() if entry["file"] == case.name)


# ---------------------------------------------------------------------------------------------------------------------
# the files


def test_the_golden_files_are_there() -> None:
    files = {entry["file"] for entry in golden_cases.index_of()}
    assert files == {path.name for path in FOLDER.glob("*.npz")}
    assert cases(), "no golden file belongs to a method that is here"


def test_a_missing_folder_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(golden_cases.load(tmp_path))


def test_every_golden_method_is_covered_or_known_not_to_be() -> None:
    kept = {entry["method"] for entry in golden_cases.index_of(SHIPPED)}
    assert kept == BUILDERS.keys() | UNCOVERED
    assert BUILDERS.keys() & UNCOVERED == set()
    assert set(methods.names()) & UNCOVERED == set(), "a method that is registered needs a builder"
    assert {entry["method"] for entry in golden_cases.index_of()} <= kept


def test_every_covered_file_is_a_case() -> None:
    covered = {entry["file"] for entry in golden_cases.index_of() if entry["method"] in BUILDERS}
    assert {case.name for case in cases()} == covered


def test_a_registered_method_without_builder_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(BUILDERS, "fastv")
    with pytest.raises(LookupError, match="'fastv' is registered, but no builder"):
        list(golden_cases.load())


def test_every_array_has_a_place() -> None:
    """Inputs in `Signals`, everything else in a check below."""
    homeless = []
    for case in cases():
        entry = entry_of(case)
        for name, array in entry["arrays"].items():
            plain = name.partition("_stage")[0]
            known = PATHS if array["role"] == "input" else CHECKS
            if plain not in known[entry["method"]]:
                homeless.append((case.name, name, array["role"]))
        assert set(golden_cases.arrays_of(FOLDER, case.name)) == set(entry["arrays"])
    assert homeless == []


def test_no_place_is_left_over() -> None:
    for method, inputs in PATHS.items():
        named = {
            (name.partition("_stage")[0], array["role"] == "input")
            for entry in golden_cases.index_of(SHIPPED)
            if entry["method"] == method
            for name, array in entry["arrays"].items()
        }
        assert named == {(name, True) for name in inputs} | {(name, False) for name in CHECKS[method]}


# ---------------------------------------------------------------------------------------------------------------------
# the answers


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_the_answer_is_the_official_one(case: Case) -> None:
    for got, expected in zip(answers(case.method, case.signals), case.expected, strict=True):
        assert_same(got, expected, **CLOSE)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_selection_keeps_the_contract_and_the_count(case: Case) -> None:
    for stage, got in enumerate(answers(case.method, case.signals)):
        signals = case.signals[stage]
        if isinstance(got, CacheSelection):
            assert got.positions.shape[-1] == sum(case.method.budget(signals.cache.prompt_length))
            continue
        got.check(signals.original, signals.shape[0], case.name)
        assert [len(kept) for kept in got.indices] == [case.method.count(signals.original)[stage]] * len(got.indices)


@pytest.mark.parametrize("case", [case for case in cases() if rows_of(case.signals[0]) > 1], ids=lambda case: case.name)
def test_a_row_alone_gets_the_answer_that_it_gets_in_the_batch(case: Case) -> None:
    for row in range(rows_of(case.signals[0])):
        single = [alone(stage, row) for stage in case.signals]
        for got, expected in zip(answers(case.method, single), case.expected, strict=True):
            assert_same(got, row_of(expected, row), **CLOSE)


def test_files_of_one_setting_can_be_asked_as_one_batch() -> None:
    """Two seeds of one method, setting and shape: together each gets its own answer."""
    groups: dict[Any, list[Case]] = {}
    for case in cases():
        first = case.signals[0]
        groups.setdefault((case.method, len(case.signals), first.shape, first.original), []).append(case)
    several = [group for group in groups.values() if len(group) > 1]
    assert several
    for group in several:
        batch = [together(list(stages)) for stages in zip(*(case.signals for case in group), strict=True)]
        row = 0
        got_together = answers(group[0].method, batch)
        for case in group:
            for own in range(rows_of(case.signals[0])):
                for got, expected in zip(got_together, case.expected, strict=True):
                    assert_same(row_of(got, row), row_of(expected, own), **CLOSE)
                row += 1


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_every_stored_array_is_reproduced(case: Case) -> None:
    entry = entry_of(case)
    arrays = golden_cases.arrays_of(FOLDER, case.name)
    got = answers(case.method, case.signals)
    checked = set()
    for stage, suffix in enumerate(golden_cases.stages_of(arrays)):
        seen = Seen(case, stage, case.signals[stage], got[stage], entry["hyperparameters"], arrays, suffix)
        for name, check in CHECKS[entry["method"]].items():
            if name + suffix in arrays:
                check(seen, arrays[name + suffix])
                checked.add(name + suffix)
    assert checked == {name for name, array in entry["arrays"].items() if array["role"] != "input"}


# ---------------------------------------------------------------------------------------------------------------------
# what each array is compared with


@dataclasses.dataclass(frozen=True)
class Seen:
    """One stage of a case with everything that a check may look at."""

    case: Case
    stage: int
    signals: Signals
    got: Any
    settings: dict[str, Any]
    arrays: dict[str, np.ndarray]
    suffix: str

    @property
    def indices(self) -> np.ndarray:
        """(B, K)."""
        return torch.stack(self.got.indices).numpy()

    @property
    def tokens(self) -> np.ndarray:
        """(N,) original index of each token of this SparseVLM stage, in the order of the cited code: kept, recycled."""
        if self.stage == 0:
            return self.signals.index[0].numpy()
        before = "" if self.stage == 1 else f"_stage{self.stage}"
        earlier = Seen(self.case, self.stage - 1, self.case.signals[self.stage - 1], None, {}, self.arrays, before)
        kept = earlier.tokens[self.arrays["keep_sorted" + before][0]]
        return np.concatenate([kept, earlier.stand_ins])

    @property
    def stand_ins(self) -> np.ndarray:
        """(C,) where the recycled tokens of this stage stand, in the order of the cited code."""
        expected = self.case.expected[self.stage]
        assert isinstance(expected, Selection) and expected.features is not None
        distance = torch.cdist(torch.from_numpy(self.arrays["recycled" + self.suffix][0]), expected.features[0])
        return expected.indices[0][distance.argmin(dim=1)].numpy()


def scores_are(score: Callable[[Seen], Any]) -> Callable[[Seen, np.ndarray], None]:
    def check(seen: Seen, stored: np.ndarray) -> None:
        np.testing.assert_allclose(np.asarray(score(seen)), stored, **CLOSE)

    return check


def equal_to(answer: Callable[[Seen], Any]) -> Callable[[Seen, np.ndarray], None]:
    def check(seen: Seen, stored: np.ndarray) -> None:
        np.testing.assert_array_equal(np.asarray(answer(seen)), stored)

    return check


def same_set_as(answer: Callable[[Seen], Any]) -> Callable[[Seen, np.ndarray], None]:
    """For arrays in the order of the cited code's top-k, whose neighbours rounding may swap."""

    def check(seen: Seen, stored: np.ndarray) -> None:
        np.testing.assert_array_equal(np.asarray(answer(seen)), np.sort(stored, axis=-1))

    return check


def fastv_positions(seen: Seen) -> np.ndarray:
    """(1, P + K + T): every kept token has its original position."""
    start, tokens = seen.settings["image_token_start_index"], seen.settings["image_token_length"]
    after = start + tokens + np.arange(seen.settings["text_tokens"])
    return np.concatenate([np.arange(start), start + seen.indices[0], after])[None]


def places(seen: Seen) -> np.ndarray:
    """(B, K) where the kept tokens stood among those present."""
    present = seen.signals.index.numpy()
    return np.stack([np.searchsorted(row, kept) for row, kept in zip(present, seen.indices, strict=True)])


def raters(seen: Seen) -> Tensor:
    memory: dict[str, Any] = {}
    seen.case.method.select(dataclasses.replace(seen.case.signals[0], memory=memory))
    return memory["raters"]


def sparse_scores(seen: Seen) -> np.ndarray:
    """(1, N) in the order of the cited code."""
    assert seen.signals.decoder is not None and seen.signals.decoder.text_query is not None
    ascending = rated(seen.signals.decoder.text_query, raters(seen)).numpy()
    return ascending[:, np.searchsorted(np.sort(seen.tokens), seen.tokens)]


def sparse_ranks(seen: Seen, first: int, last: int) -> np.ndarray:
    """(1, n) places, in the order of the cited code, of the tokens rated `first` to `last`."""
    return np.sort(descending(torch.from_numpy(sparse_scores(seen))).numpy()[:, first:last])


def sparse_own(seen: Seen) -> np.ndarray:
    kept = seen.settings["kept_per_stage"][seen.stage]
    found = sparse_ranks(seen, 0, kept)
    assert set(seen.tokens[found[0]]) <= set(seen.indices[0])
    return found


def sparse_pool(seen: Seen) -> np.ndarray:
    kept, size = seen.settings["kept_per_stage"][seen.stage], seen.arrays["recycle" + seen.suffix].shape[1]
    return sparse_ranks(seen, kept, kept + size)


def sparse_merged(seen: Seen) -> np.ndarray:
    """(1, C, D) features of the recycled tokens, in the order of the cited code."""
    where = np.searchsorted(seen.indices[0], seen.stand_ins)
    return seen.got.features[0].numpy()[where][None]


def h2o_scores(seen: Seen) -> Tensor:
    """From a whole map by way of queries and keys that have it as their attention."""
    assert seen.signals.cache is not None and seen.signals.cache.scores is not None
    if "attention" not in seen.arrays:
        return seen.signals.cache.scores
    attention = torch.from_numpy(seen.arrays["attention"])
    identity = torch.eye(attention.shape[-1]).expand_as(attention)
    return causal_received(attention.clamp(min=1e-30).log(), identity, scale=1.0)


def snapkv_scores(seen: Seen) -> Tensor:
    assert seen.signals.cache is not None
    queries, keys = seen.signals.cache.window_queries, seen.signals.cache.keys
    assert queries is not None and keys is not None
    return window_attention(queries, keys, seen.settings["kernel_size"])


def older(seen: Seen) -> np.ndarray:
    """(1, H, K) kept positions before the newest ones."""
    newest = seen.settings.get("recent_size", seen.settings.get("window_size"))
    return seen.got.positions[..., :-newest].numpy()


CHECKS: dict[str, dict[str, Callable[[Seen, np.ndarray], None]]] = {
    "fastv": {
        "scores": scores_are(lambda seen: seen.case.method.score(seen.signals)),
        "keep": same_set_as(lambda seen: seen.indices),
        "keep_sorted": equal_to(lambda seen: seen.indices),
        "position_ids": equal_to(fastv_positions),
    },
    "pyramiddrop": {
        "keep": same_set_as(places),
        "keep_sorted": equal_to(places),
        "kept_original": equal_to(lambda seen: seen.indices),
    },
    "sparsevlm": {
        "raters": equal_to(lambda seen: raters(seen)[0].nonzero().T),
        "scores": scores_are(sparse_scores),
        "keep": same_set_as(sparse_own),
        "keep_sorted": equal_to(sparse_own),
        "recycle": same_set_as(sparse_pool),
        "recycled": scores_are(sparse_merged),
    },
    "h2o": {
        "scores": scores_are(h2o_scores),
        "keep": same_set_as(older),
        "keep_sorted": equal_to(lambda seen: seen.got.positions),
    },
    "snapkv": {
        "scores": scores_are(snapkv_scores),
        "keep": same_set_as(older),
        "keep_sorted": equal_to(lambda seen: seen.got.positions),
        "keep_all": same_set_as(lambda seen: seen.got.positions),
    },
}
"""How each array that is no input is reproduced; `_stage2` and later suffixes are left out."""
