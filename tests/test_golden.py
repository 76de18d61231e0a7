"""Every golden file of a method that is here: its official code's answers, array by array, in a batch and row alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from golden import cases as golden_cases
from golden import files as golden_files
from golden.cases import BUILDERS, CHECKS, PATHS, UNCOVERED
from golden.checks import CLOSE, Seen
from golden.files import FOLDER, Case
from models.batches import alone, answers, assert_same, row_of, rows_of, together

from foveate import methods
from foveate.core import CacheSelection

SHIPPED = Path(__file__).parent / "golden"


@cache
def cases() -> tuple[Case, ...]:
    return tuple(golden_cases.load())


def entry_of(case: Case) -> dict[str, Any]:
    return next(entry for entry in golden_files.index_of() if entry["file"] == case.name)


# ---------------------------------------------------------------------------------------------------------------------
# the files


def test_the_golden_files_are_there() -> None:
    files = {entry["file"] for entry in golden_files.index_of()}
    assert files == {path.name for path in FOLDER.glob("*.npz")}
    assert cases(), "no golden file belongs to a method that is here"


def test_a_missing_folder_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(golden_cases.load(tmp_path))


def test_every_golden_method_is_covered_or_known_not_to_be() -> None:
    kept = {entry["method"] for entry in golden_files.index_of(SHIPPED)}
    assert kept == BUILDERS.keys() | UNCOVERED
    assert BUILDERS.keys() & UNCOVERED == set()
    assert set(methods.names()) & UNCOVERED == set(), "a method that is registered needs a builder"
    assert {entry["method"] for entry in golden_files.index_of()} <= kept


def test_every_covered_file_is_a_case() -> None:
    covered = {entry["file"] for entry in golden_files.index_of() if entry["method"] in BUILDERS}
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
        assert set(golden_files.arrays_of(FOLDER, case.name)) == set(entry["arrays"])
    assert homeless == []


def test_no_place_is_left_over() -> None:
    for method, inputs in PATHS.items():
        named = {
            (name.partition("_stage")[0], array["role"] == "input")
            for entry in golden_files.index_of(SHIPPED)
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
        counted = case.method.count(signals.original)
        assert (counted is None) == case.method.adaptive
        if counted is not None:
            assert [len(kept) for kept in got.indices] == [counted[stage]] * len(got.indices)


def judged_together(case: Case) -> bool:
    """The code of some papers takes statistics over the whole batch, so that a row alone gets another answer."""
    by_batch = getattr(case.method, "keep", 0) is None or methods.name_of(case.method) == "cdpruner"
    return getattr(case.method, "official", False) and by_batch


SEVERAL_ROWS = [case for case in cases() if rows_of(case.signals[0]) > 1 and not judged_together(case)]


@pytest.mark.parametrize("case", SEVERAL_ROWS, ids=lambda case: case.name)
def test_a_row_alone_gets_the_answer_that_it_gets_in_the_batch(case: Case) -> None:
    for row in range(rows_of(case.signals[0])):
        single = [alone(stage, row) for stage in case.signals]
        for got, expected in zip(answers(case.method, single), case.expected, strict=True):
            assert_same(got, row_of(expected, row), **CLOSE)


def test_files_of_one_setting_can_be_asked_as_one_batch() -> None:
    """Two seeds of one method, setting and shape: together each gets its own answer."""
    groups: dict[Any, list[Case]] = {}
    for case in cases():
        if judged_together(case):
            continue
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
    arrays = golden_files.arrays_of(FOLDER, case.name)
    got = answers(case.method, case.signals)
    checked = set()
    for stage, suffix in enumerate(golden_files.stages_of(arrays)):
        seen = Seen(case, stage, case.signals[stage], got[stage], entry["hyperparameters"], arrays, suffix)
        for name, check in CHECKS[entry["method"]].items():
            if name + suffix in arrays:
                check(seen, arrays[name + suffix])
                checked.add(name + suffix)
    assert checked == {name for name, array in entry["arrays"].items() if array["role"] != "input"}
