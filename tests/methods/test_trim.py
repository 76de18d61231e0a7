"""TRIM: hand-worked scores and means, counts of its own, both signs of relevance, and inputs that break cosines."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import synthetic
from models.batches import assert_rows_stand_alone
from torch import Tensor

from foveate.core import Block, FoveateError, Selection, Signals
from foveate.methods.trim import TRIM
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(image: Tensor, text: Tensor) -> Signals:
    """(N, C) patches and (Q, C) pieces of a question; the encoder's tokens are 0, 1, 2, ..."""
    count = len(image)
    hidden = torch.arange(float(count))[None, :, None]
    index = torch.arange(count)[None]
    return Signals(count, index, tower={"read": Block(hidden=hidden)}, image_clip=image[None], text_clip=text[None])


# The question points right. Cosines: 0.6, 1, 0, -1, 0.8; dot products: 3, 1, 0, -2, 0.8.
RIGHT = torch.tensor([[1.0, 0.0]])
FIVE = signals(torch.tensor([[3.0, 4.0], [1, 0], [0, 7], [-2, 0], [0.8, 0.6]]), RIGHT)


def values(selection: Selection) -> list[float]:
    assert selection.features is not None
    found: list[float] = selection.features[0][:, 0].tolist()
    return found


def test_what_resembles_the_question_stays_and_the_others_become_their_mean() -> None:
    selection = TRIM(keep=3).select(FIVE)
    assert selection.indices[0].tolist() == [1, 3, 4], "1 and 4 by cosine; the rest at 3, the largest that is free"
    assert values(selection) == pytest.approx([1, (0 + 2 + 3) / 3, 4])
    assert selection.extra is not None and selection.extra[0].tolist() == [False, True, False]
    assert selection.space == "encoded"


def test_relevance_can_be_negated() -> None:
    assert TRIM(keep=3, relevance="negated").select(FIVE).indices[0].tolist() == [2, 3, 4], "2 and 3, the rest at 4"


def test_the_code_takes_dot_products_and_negates_them() -> None:
    for relevance in ("direct", "negated"):
        method = TRIM(keep=3, relevance=relevance, official=True)  # type: ignore[arg-type]
        assert method.select(FIVE).indices[0].tolist() == [2, 3, 4]
    long = signals(torch.tensor([[3.0, 4.0], [1, 0], [0.5, 9], [0.8, 0.6]]), RIGHT)
    assert TRIM(keep=2, relevance="negated").select(long).indices[0].tolist() == [2, 3], "cosine 0.06"
    assert TRIM(keep=2, official=True).select(long).indices[0].tolist() == [2, 3], "product 0.5"
    first = signals(torch.tensor([[0.1, 0.0], [3.0, 40.0]]), RIGHT)
    assert TRIM(official=True).scores(first)[0].argmax() == 0, "0.1 is below 3"
    assert TRIM(relevance="negated").scores(first)[0].argmax() == 1, "a cosine of 0.07 is below 1"


def test_the_pieces_of_a_question_are_averaged() -> None:
    """Cosines to right and up: 0.6 and 0.8, 1 and 0, 0 and 1."""
    seen = signals(torch.tensor([[3.0, 4.0], [1, 0], [0, 1]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
    torch.testing.assert_close(TRIM().scores(seen), torch.tensor([[0.7, 0.5, 0.5]]).softmax(dim=-1))
    products = torch.tensor([[-(2 * 3 + 5 * 4) / 2, -1.0, -2.5]]).softmax(dim=-1)
    torch.testing.assert_close(TRIM(official=True).scores(seen), products)


def test_the_outliers_and_the_mean() -> None:
    image = torch.tensor([[-1.0, 0.0]]).repeat(12, 1)
    image[4] = image[7] = torch.tensor([1.0, 0.0])
    selection = TRIM().select(signals(image, RIGHT))
    assert selection.indices[0].tolist() == [4, 7, 11]
    assert values(selection)[:2] == [4, 7] and values(selection)[2] == pytest.approx((66 - 11) / 10)
    assert TRIM(relevance="negated").select(signals(image, RIGHT)).indices[0].tolist() == [11], "no outliers"
    assert values(TRIM().select(signals(image[:4], RIGHT))) == [1.5], "of a picture without outliers the mean"


def test_the_code_counts_outliers_over_the_batch() -> None:
    image = torch.tensor([[1.0, 0.0]]).repeat(2, 12, 1)
    image[0, 4] = image[0, 7] = torch.tensor([-9.0, 0.0])
    one = signals(image[0], RIGHT)
    both = dataclasses.replace(
        one,
        index=one.index.repeat(2, 1),
        tower={"read": Block(hidden=one.tower["read"].hidden.repeat(2, 1, 1))},
        image_clip=image,
        text_clip=RIGHT.repeat(2, 1, 1),
    )
    # Two scores of about 1 / 2 lie above the common fence of (1 + 1.5) / 12: int(12 * 2 / 24) of each image.
    assert [row.numel() for row in TRIM(official=True).select(both).indices] == [2, 2]
    assert [row.numel() for row in TRIM(relevance="negated").select(both).indices] == [3, 1]
    assert [row.numel() for row in TRIM(official=True).select(one).indices] == [3]


def test_all_go_on_as_they_are() -> None:
    selection = TRIM(keep=5).select(FIVE)
    assert selection.indices[0].tolist() == list(range(5))
    assert selection.features is None and selection.extra is None


def test_what_fixes_the_count() -> None:
    assert TRIM().count(576) is None and TRIM().adaptive and TRIM.adaptive
    assert TRIM(keep=0.25).count(576) == (144,) and not TRIM(keep=0.25).adaptive
    assert TRIM(keep=64, official=True).count(576) == (64,)


@given(
    tokens=st.integers(1, 40),
    keep=st.none() | st.integers(1, 40),
    official=st.booleans(),
    kind=st.sampled_from(["zeros", "ones", "huge", "mixed"]),
    seed=st.integers(0, 99),
)
def test_any_input_gets_the_count(tokens: int, keep: int | None, official: bool, kind: str, seed: int) -> None:
    method = TRIM(keep=None if keep is None else min(keep, tokens), official=official)
    seen = synthetic.signals(method, 2, (1, tokens), seed)
    made = {"zeros": 0.0, "ones": 1.0, "huge": 1e9}
    if kind in made:
        scale = made[kind]
        image = torch.full_like(seen.image_clip, scale) if kind != "huge" else seen.image_clip * scale
        seen = dataclasses.replace(seen, image_clip=image)
    selection = method.select(seen)
    selection.check(tokens, 2, "trim")
    if keep is not None:
        assert [row.numel() for row in selection.indices] == [min(keep, tokens)] * 2
    if selection.features is not None:
        hidden = seen.tower["read"].hidden
        for row in range(2):
            extra = selection.extra[row]
            kept = selection.indices[row][~extra].tolist()
            torch.testing.assert_close(selection.features[row][~extra], hidden[row, kept])
            dropped = [place for place in range(tokens) if place not in kept]
            assert selection.indices[row][extra].tolist() == dropped[-1:]
            torch.testing.assert_close(selection.features[row][extra][0], hidden[row, dropped].mean(dim=0))


def test_a_row_alone_is_what_it_is_in_the_batch() -> None:
    for method in (TRIM(), TRIM(keep=9), TRIM(keep=9, official=True)):
        assert_rows_stand_alone(method, [synthetic.signals(method, 3, (6, 6))])


def test_half_precision_comes_back_as_it_came() -> None:
    method = TRIM(keep=3)
    seen = synthetic.signals(method, 1, (4, 4))
    half = Block(hidden=seen.tower["read"].hidden.bfloat16())
    selection = method.select(dataclasses.replace(seen, tower={"read": half}, image_clip=seen.image_clip.half()))
    assert selection.features is not None and selection.features[0].dtype == torch.bfloat16


def test_tokens_that_have_left_are_not_taken_up_again() -> None:
    method = TRIM(keep=4)
    whole = synthetic.signals(method, 1, (4, 4))
    order = torch.tensor([5, 1, 15, 9, 3, 7, 13, 11])
    got = method.select(synthetic.narrowed(whole, Selection([order], ordered=False), 0))
    expected = method.select(synthetic.narrowed(whole, Selection([order.sort().values]), 0))
    assert torch.equal(got.indices[0], expected.indices[0])
    assert set(got.indices[0].tolist()) <= set(order.tolist())
    torch.testing.assert_close(got.features[0], expected.features[0])


def test_what_is_refused() -> None:
    with pytest.raises(FoveateError, match="relevance='negative' is not among its choices; did you mean 'negated'"):
        TRIM(relevance="negative")  # type: ignore[arg-type]
    with pytest.raises(FoveateError, match=r"keep=1.5 is no share in \(0, 1\]"):
        TRIM(keep=1.5)
    with pytest.raises(FoveateError, match="keep=6 asks for 6 tokens but the image has 5 tokens; the most is keep=5"):
        TRIM(keep=6).select(FIVE)


@pytest.mark.parametrize("text", ["trim:keep=64", "trim:keep=0.25,relevance=negated,official=true"])
def test_a_method_is_written_as_it_is_read(text: str) -> None:
    assert format_spec(parse(text)) == text
    assert parse(str(TRIM())) == TRIM()


def test_in_the_decoders_space_projected_tokens_meet_the_text_after_the_image() -> None:
    """The same cosines among what the decoder gets: 0.6, 1, 0, -1 and 0.8 to the mean of (4, 0) and (2, 0)."""
    features = torch.tensor([[3.0, 4.0], [1, 0], [0, 7], [-2, 0], [0.8, 0.6]])
    shown = Signals(
        5,
        torch.arange(5)[None],
        features=features[None],
        text=torch.tensor([[[0.0, 9.0], [4.0, 0.0], [2.0, 0.0]]]),
        text_mask=torch.ones(1, 3, dtype=torch.bool),
        after_image=torch.tensor([[False, True, True]]),
    )
    method = TRIM(keep=3, space="decoder")
    assert method.needs == ("features", "text", "text_mask", "after_image")
    assert not method.encoded
    assert TRIM(keep=3).encoded
    selection = method.select(shown)
    assert (selection.indices[0].tolist(), selection.space) == ([1, 3, 4], "projected")
    assert selection.features is not None
    torch.testing.assert_close(
        selection.features[0], torch.stack([features[1], features[[0, 2, 3]].mean(0), features[4]])
    )
    with pytest.raises(FoveateError, match="compares in CLIP's joint space, not in space='decoder'"):
        TRIM(space="decoder", official=True)
