"""SparseVLM: hand-worked raters, scores and recycling, its published stages, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.batches import answers, assert_rows_stand_alone
from torch import Tensor

from foveate.core import Block, FoveateError, Signals
from foveate.methods.sparsevlm import SparseVLM
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(
    text_query: Tensor,
    *,
    index: Tensor | None = None,
    original: int | None = None,
    stage: int = 0,
    hidden: Tensor | None = None,
    **given: Any,
) -> Signals:
    """One word that rates, unless the text is given."""
    batch, _, words, tokens = text_query.shape
    index = torch.arange(tokens).repeat(batch, 1) if index is None else index
    everything = torch.ones(batch, words, dtype=torch.bool)
    text = dict(features=torch.ones(batch, tokens, 2), text=torch.ones(batch, words, 2))
    return Signals(
        original=original or tokens,
        index=index,
        stage=stage,
        decoder=Block(text_query=text_query, hidden=hidden),
        **{"text_mask": everything, "after_image": everything, **text, **given},
    )


def raters(method: SparseVLM, shown: Signals) -> list[list[bool]]:
    method.select(shown)
    found: list[list[bool]] = shown.memory["raters"].tolist()
    return found


ONE = SparseVLM(layers=(1,), keep=(1,))
FOUR = math.log(4)


def test_words_above_the_mean_share_rate() -> None:
    """Shares of the three words: 4/6, 1/6, 1/6 for both visual tokens; the mean is 1/3."""
    text = torch.tensor([[[FOUR, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    shown = signals(torch.rand(1, 2, 3, 2), features=torch.tensor([[[1.0, 0.0], [1.0, 7.0]]]), text=text)
    assert raters(ONE, shown) == [[True, False, False]]


def test_only_words_after_the_image_rate() -> None:
    """Without the first word the shares are 4/5 and 1/5; padding, which would win, has none."""
    text = torch.tensor([[[9.0], [FOUR], [0.0], [99.0]]])
    shown = signals(
        torch.rand(1, 2, 4, 2),
        features=torch.ones(1, 2, 1),
        text=text,
        text_mask=torch.tensor([[True, True, True, False]]),
        after_image=torch.tensor([[False, True, True, True]]),
    )
    assert raters(ONE, shown) == [[False, True, False, False]]


def test_where_no_word_stands_out_all_rate() -> None:
    assert raters(ONE, signals(torch.rand(1, 2, 1, 4))) == [[True]]
    assert raters(ONE, signals(torch.rand(1, 2, 4, 4))) == [[True] * 4]


def test_an_image_without_text_behind_it_is_refused() -> None:
    after = torch.tensor([[True, True], [False, False]])
    with pytest.raises(FoveateError, match="image 1 is followed by none; put the question after the image"):
        ONE.select(signals(torch.rand(2, 1, 2, 4), after_image=after))
    with pytest.raises(FoveateError, match="image 0 is followed by none"):
        ONE.select(signals(torch.rand(1, 1, 0, 4)))


def test_the_mean_over_heads_and_raters_decides() -> None:
    words = torch.tensor([[[FOUR], [FOUR], [-9.0]]])  # the third one does not rate
    attention = torch.tensor([[[[0.4, 0.0, 0.1], [0.0, 0.2, 0.1], [0.0, 0.0, 9.0]]] * 2])
    attention[0, 1, 0, 0] = 0.2  # means over heads 0.3 and 0, over raters 0.15; the others 0.1 and 0.1
    shown = signals(attention, features=torch.ones(1, 3, 1), text=words)
    assert SparseVLM(layers=(1,), keep=(1,)).select(shown).indices[0].tolist() == [0]
    assert SparseVLM(layers=(1,), keep=(2,)).select(shown).indices[0].tolist() == [0, 1], "the lowest index on a tie"


def test_raters_are_chosen_once() -> None:
    method = SparseVLM(layers=(1, 2), keep=(2, 1))
    text = torch.tensor([[[FOUR], [0.0]]])
    first = signals(torch.rand(1, 1, 2, 4), features=torch.ones(1, 4, 1), text=text)
    attention = torch.tensor([[[[0.1, 0.3], [0.9, 0.0]]]])
    later = signals(attention, index=torch.tensor([[1, 3]]), original=4, stage=1, features=None, text=None)
    assert answers(method, [first, later])[1].indices[0].tolist() == [3], "the first word alone rates"


@pytest.mark.parametrize(
    ("keep", "stages"), [(192, (300, 200, 110)), (128, (303, 110, 36)), (96, (238, 48, 26)), (64, (66, 30, 17))]
)
def test_published_budgets_name_their_stages(keep: int, stages: tuple[int, ...]) -> None:
    assert SparseVLM(keep=keep).count(576) == stages
    assert SparseVLM(keep=keep, recycle=True).count(576) == stages, "recycled tokens are counted in"


def test_published_budgets_are_in_proportion_elsewhere() -> None:
    assert SparseVLM(keep=192).count(144) == (75, 50, 28)  # 110 / 4 = 27.5, half to even
    assert SparseVLM().count(576) == (300, 200, 110)


@pytest.mark.parametrize(("layers", "depths"), [(32, (3, 7, 16)), (40, (4, 9, 20)), (4, (1, 2, 3)), (6, (1, 2, 3))])
def test_the_depths_scale_with_the_decoder(layers: int, depths: tuple[int, ...]) -> None:
    assert SparseVLM().depths(layers) == depths


# ---------------------------------------------------------------------------------------------------------------------
# recycling


def test_recycled_tokens_are_means_that_stand_where_the_best_rated_member_stood() -> None:
    """Of 12 tokens 5 are to stay: 4 themselves; of the 8 others int(2.4) + 1 = 3 are merged into int(.3) + 1 = 1."""
    rating = torch.tensor([12.0, 3, 11, 7, 10, 2, 8, 1, 9, 6, 5, 4])  # best: 0 2 4 8, then 6 3 9
    hidden = torch.arange(24.0).reshape(1, 12, 2)
    shown = signals(rating.reshape(1, 1, 1, 12), hidden=hidden)
    selection = SparseVLM(layers=(1,), keep=(5,), recycle=True).select(shown)
    assert selection.indices[0].tolist() == [0, 2, 4, 6, 8]
    assert selection.features is not None
    # Tokens 3, 6 and 9 are (6, 7), (12, 13) and (18, 19).
    torch.testing.assert_close(selection.features[0], torch.tensor([[0.0, 1], [4, 5], [8, 9], [12, 13], [16, 17]]))


def test_two_heaps_become_two_tokens() -> None:
    """Of 50 tokens 13 are to stay: 11 themselves; of the 39 others int(11.7) + 1 = 12 are merged into int(1.2) + 1."""
    tokens, own = 50, 11
    hidden = torch.zeros(1, tokens, 1)
    hidden[0, own : own + 12, 0] = torch.tensor([0.0, 9, 0.1, 9.1, 0.2, 9.2, 0.3, 9.3, 0.4, 9.4, 0.5, 9.5])
    shown = signals(torch.arange(tokens, 0, -1.0).reshape(1, 1, 1, tokens), hidden=hidden)
    selection = SparseVLM(layers=(1,), keep=(own + 2,), recycle=True).select(shown)
    assert selection.indices[0].tolist() == list(range(own + 2))
    assert selection.features is not None
    torch.testing.assert_close(selection.features[0][own:, 0], torch.tensor([0.25, 9.25]))


def test_keeping_everything_recycles_nothing() -> None:
    selection = SparseVLM(layers=(1,), keep=(1.0,), recycle=True).select(
        signals(torch.rand(1, 2, 3, 6), hidden=torch.rand(1, 6, 4))
    )
    assert selection.indices[0].tolist() == list(range(6)) and selection.features is None


def test_equal_tokens_are_still_told_apart_the_same_way_each_time() -> None:
    shown = signals(torch.ones(1, 2, 3, 100), hidden=torch.ones(1, 100, 4))
    method = SparseVLM(layers=(1,), keep=(20,), recycle=True)
    selection = method.select(shown)
    selection.check(100, 1, "sparsevlm")
    assert len(selection.indices[0]) == 20 and torch.equal(selection.features[0], torch.ones(20, 4))
    assert torch.equal(method.select(shown).indices[0], selection.indices[0])


def test_the_seed_decides_between_equally_dense_tokens() -> None:
    """Tokens so far apart that every density is 0: which of them are centres is the noise's choice."""
    hidden = 100 * torch.eye(100)[None]
    shown = signals(torch.arange(100, 0, -1.0).reshape(1, 1, 1, 100), hidden=hidden)
    chosen = {
        tuple(SparseVLM(layers=(1,), keep=(20,), recycle=True, seed=seed).select(shown).indices[0].tolist())
        for seed in range(4)
    }
    assert len(chosen) > 1


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseVLM(keep=100), r"keep=100 is no budget of the paper's tables \(192, 128, 96, 64\)"),
        (lambda: SparseVLM(keep=192.0), r"keep=192\.0 is no budget"),  # type: ignore[arg-type]
        (lambda: SparseVLM(keep=(0.2, 0.3, 0.1)), r"rises from 0\.2 to 0\.3"),
        (lambda: SparseVLM(keep=(0.3, 0.2)), "2 budgets .* the paper's layers are"),
        (lambda: SparseVLM(keep=192, layers=(1, 2)), "3 budgets .* for 2 layers"),
        (lambda: SparseVLM(seed=-1), "seed=-1 is no whole number from 0"),
        (lambda: SparseVLM(keep=(9, 9, 9)).count(8), "asks for 9 tokens but the image has 8"),
        (
            lambda: SparseVLM(keep=(5, 3, 1), recycle=True).count(12),
            "recycle=True makes at least 2 tokens of 3, keep asks for 1; the least is 2",
        ),
        (lambda: SparseVLM().depths(3), "3 stages need a decoder of at least 4 blocks"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        make()


def test_the_hidden_states_are_needed_for_recycling_only() -> None:
    assert "decoder.hidden" not in SparseVLM().needs
    assert "decoder.hidden" in SparseVLM(recycle=True).needs


def test_a_spec_survives_the_round_trip() -> None:
    for method in (SparseVLM(), SparseVLM(keep=64, recycle=True, seed=3), SparseVLM(layers=(2,), keep=(0.5,))):
        assert parse(format_spec(method)) == method
    assert parse("sparsevlm:keep=64") == SparseVLM(keep=64)


@given(st.data())
def test_exactly_count_tokens_stay_ascending_and_rows_stand_alone(data: st.DataObject) -> None:
    batch, heads, words = (data.draw(st.integers(1, most)) for most in (3, 3, 5))
    tokens = data.draw(st.integers(4, 40))
    recycle = data.draw(st.booleans())
    first = data.draw(st.integers(4, tokens))
    method = SparseVLM(layers=(1, 2), keep=(first, data.draw(st.integers(3, first))), recycle=recycle)
    counts = method.count(tokens)
    assert counts is not None
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    mask = torch.ones(batch, words + 1, dtype=torch.bool)
    mask[0, words] = False  # row 0 is padded

    def rand(*shape: int) -> Tensor:
        return torch.randint(0, 8, shape, generator=generator) / 8

    shown, index = [], torch.arange(tokens).repeat(batch, 1)
    for stage, count in enumerate(counts):
        left = index.shape[1]
        text = dict(features=rand(batch, left, 2), text=rand(batch, words + 1, 2), text_mask=mask, after_image=mask)
        asked = signals(
            rand(batch, heads, words + 1, left),
            index=index,
            original=tokens,
            stage=stage,
            hidden=rand(batch, left, 3),
            **text,
        )
        shown.append(asked)
        selection = assert_rows_stand_alone(method, shown)[-1]
        selection.check(tokens, batch, "sparsevlm")
        assert [len(kept) for kept in selection.indices] == [count] * batch
        index = torch.stack(selection.indices)


def test_padding_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    attention, text = torch.rand(1, 2, 5, 30, generator=generator), torch.rand(1, 5, 4, generator=generator)
    features = torch.rand(1, 30, 4, generator=generator)
    alone = signals(attention, features=features, text=text)
    mask = torch.tensor([[True] * 5 + [False] * 3])
    padded = signals(
        torch.nn.functional.pad(attention, (0, 0, 0, 3), value=torch.nan),
        features=features,
        text=torch.nn.functional.pad(text, (0, 0, 0, 3), value=50.0),
        text_mask=mask,
        after_image=mask,
    )
    method = SparseVLM()
    assert torch.equal(method.select(alone).indices[0], method.select(padded).indices[0])
