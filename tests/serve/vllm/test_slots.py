"""Places of pictures in a pruned prompt, by hand: tiles with text between, ends of rows, newlines, small pictures."""

from __future__ import annotations

import pytest
import torch

from foveate.core import FoveateError
from foveate.families.layouts import Layout
from foveate.serve.vllm.asked import parts_of
from foveate.serve.vllm.slots import count_of, fitted, sources_of, units_of


def picture(tokens: int, grid: tuple[int, int] | None = None) -> Layout:
    numbers = torch.arange(tokens)
    return Layout(tokens, numbers, numbers[:, None], (tokens,), grid=grid)


def sources(text: str, layouts: list[Layout], spec: str) -> list[int]:
    """`.` is a placeholder, anything else a token of text."""
    tokens = torch.tensor([-1 if letter == "." else 7 for letter in text])
    return sources_of(tokens, units_of(tokens, layouts, parts_of(spec))).tolist()


def test_a_picture_between_its_marks_keeps_them_and_as_many_slots_as_are_left() -> None:
    assert sources("<....>", [picture(4)], "uniform:keep=3") == [0, -1, -1, -1, 5]
    assert sources("<....>", [picture(4)], "none") == [0, -1, -1, -1, -1, 5]


def test_each_tile_between_texts_is_a_picture_of_its_own() -> None:
    assert sources("a....b....c", [picture(4), picture(4)], "uniform:keep=0.5") == [0, -1, -1, 5, -1, -1, 10]


def test_the_ends_of_rows_take_a_slot_each_since_what_stands_before_them_is_known_later() -> None:
    # Rows of two, "|" behind each; the last one ends outside the picture.
    assert sources("..|..|..|", [picture(6)], "uniform:keep=2") == [-1, -1, -1, -1, 8]


def test_newlines_among_the_placeholders_stay_beside_what_is_kept() -> None:
    layout = Layout(6, torch.tensor([0, 1, 3, 4]), torch.arange(4)[:, None], (4,))
    assert sources("......", [layout], "uniform:keep=1") == [-1, -1, -1]


def test_a_picture_too_small_for_the_budget_keeps_what_it_has() -> None:
    assert count_of(parts_of("fopru:keep=64"), picture(9)) == 9
    assert fitted(parts_of("fopru:keep=64"), 9)[0].keep == 9  # type: ignore[attr-defined]
    assert fitted(parts_of("fopru:keep=4+uniform:keep=2"), 9) == list(parts_of("fopru:keep=4+uniform:keep=2"))


def test_a_later_method_cannot_ask_for_more_than_is_left() -> None:
    with pytest.raises(FoveateError, match="asks for 6 tokens but 3 of the image's 9 are left"):
        count_of(parts_of("uniform:keep=3+fopru:keep=6"), picture(9))


def test_a_processor_that_lays_pictures_out_in_another_way_is_refused() -> None:
    with pytest.raises(FoveateError, match="the prompt has 4 placeholders for a picture of 5 tokens"):
        sources("<....>", [picture(5)], "uniform:keep=3")
