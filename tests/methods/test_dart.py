"""DART: hand-worked pivots and picks, budgets that are exact, the port's order, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from golden import cases as golden_cases
from hypothesis import given
from hypothesis import strategies as st
from models.batches import assert_rows_stand_alone
from torch import Tensor

from foveate.core import Block, FoveateError, Signals
from foveate.methods.dart import DART, _quotas, _set_order
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(
    norms: Tensor,
    normed: Tensor,
    text_norms: Tensor | None = None,
    text_normed: Tensor | None = None,
    *,
    after: Tensor | None = None,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    original: int | None = None,
) -> Signals:
    """(B, N) lengths of the visual keys, (B, N, D), (B, T) lengths of the text's keys, (B, T, D)."""
    batch, tokens = norms.shape
    text_norms = torch.zeros(batch, 0) if text_norms is None else text_norms
    text_normed = torch.zeros(batch, text_norms.shape[1], normed.shape[-1]) if text_normed is None else text_normed
    everything = torch.ones(text_norms.shape, dtype=torch.bool)

    def keys(lengths: Tensor) -> Tensor:
        """Two heads of two channels whose magnitudes add up to the lengths."""
        return lengths[:, None, :, None] * torch.tensor([[-0.4, 0.1], [0.3, -0.2]])[None, :, None, :]

    return Signals(
        original=original or tokens,
        index=torch.arange(tokens).repeat(batch, 1) if index is None else index,
        decoder=Block(keys=keys(norms), text_keys=keys(text_norms), normed=normed, text_normed=text_normed),
        text_mask=everything if mask is None else mask,
        after_image=everything if after is None else after,
    )


def kept(method: DART, shown: Signals) -> list[list[int]]:
    return [row.tolist() for row in method.select(shown).indices]


def directions(*degrees: float) -> Tensor:
    """(1, N, 2)."""
    angle = torch.tensor([degrees]).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


# Lengths fall 3, 0, then the others.
NORMS = torch.tensor([[5.0, 1.0, 0.5, 9.0, 0.4, 0.3, 0.2]])


def test_pivots_take_what_resembles_them_least() -> None:
    """Pivots 3 (at 0 degrees) and 0 (at 90). 3 takes 5 (180) and 4 (120); 0 then takes 2 (300) of 1, 2, 6."""
    shown = signals(NORMS, directions(90, 20, 300, 0, 120, 180, 60))
    method = DART(keep=5, pivots=2)
    assert kept(method, shown) == [[0, 2, 3, 4, 5]]
    assert kept(DART(keep=3, pivots=2), shown) == [[0, 3, 5]], "a pick that cannot be shared is the first pivot's"
    assert kept(DART(keep=2, pivots=2), shown) == [[0, 3]]
    assert kept(DART(keep=1, pivots=2), shown) == [[3]], "the longest key of all"
    assert kept(DART(keep=7, pivots=2), shown) == [list(range(7))]


def test_text_pivots_choose_after_the_visual_ones() -> None:
    """Pivot 3 (0 degrees) takes 5 (180); the text's (240) takes 6 (60), which 3 would have had last but one."""
    text = dict(text_norms=torch.tensor([[1.0, 2.0]]), text_normed=directions(0, 240))
    shown = signals(NORMS, directions(90, 20, 300, 0, 120, 180, 60), **text)
    assert kept(DART(keep=3, pivots=1, text_pivots=1), shown) == [[3, 5, 6]]
    assert kept(DART(keep=3, pivots=1, text_pivots=0), shown) == [[3, 4, 5]]
    # Both words choose, the longer one first: 6 is taken, and the word at 0 degrees takes 4.
    assert kept(DART(keep=4, pivots=1, text_pivots=2), shown) == [[3, 4, 5, 6]]


def test_only_text_after_the_image_is_asked() -> None:
    text = dict(text_norms=torch.tensor([[7.0, 2.0, 9.0]]), text_normed=directions(0, 240, 0))
    after = torch.tensor([[False, True, True]])
    mask = torch.tensor([[True, True, False]])
    shown = signals(NORMS, directions(90, 20, 300, 0, 120, 180, 60), after=after, mask=mask, **text)
    assert kept(DART(keep=3, pivots=1), shown) == [[3, 5, 6]]


def test_rows_with_more_and_with_less_text() -> None:
    """The first prompt has two words behind the image, the second none: visual pivots do it alone."""
    norms, normed = NORMS.repeat(2, 1), directions(90, 20, 300, 0, 120, 180, 60).repeat(2, 1, 1)
    text = dict(text_norms=torch.tensor([[1.0, 2.0]] * 2), text_normed=directions(0, 240).repeat(2, 1, 1))
    after = torch.tensor([[True, True], [False, False]])
    shown = signals(norms, normed, after=after, **text)
    (selection,) = assert_rows_stand_alone(DART(keep=4, pivots=1), [shown])
    assert [row.tolist() for row in selection.indices] == [[3, 4, 5, 6], [0, 3, 4, 5]]


def test_tokens_are_named_by_their_original_index() -> None:
    index = torch.tensor([[20, 18, 3, 5, 7, 9, 11]])
    shown = signals(NORMS, directions(90, 20, 300, 0, 120, 180, 60), index=index, original=21)
    assert kept(DART(keep=3, pivots=2), shown) == [[5, 9, 20]]


@pytest.mark.parametrize(("picks", "quotas"), [(0, [0, 0, 0]), (5, [2, 2, 1]), (6, [2, 2, 2]), (1, [1, 0, 0])])
def test_picks_are_shared_evenly_the_rest_to_the_first(picks: int, quotas: list[int]) -> None:
    assert _quotas(picks, torch.tensor([[True] * 3])).tolist() == [quotas]
    there = torch.tensor([[True, False, True, True, False]])
    assert _quotas(picks, there).tolist() == [[quotas[0], 0, quotas[1], quotas[2], 0]]


def test_the_ports_order_is_that_of_a_set() -> None:
    """Places 31, 4 and 32 of the prompt: a small set has 8 slots, and 32 belongs into the first one."""
    order = _set_order(torch.tensor([[31, 4, 32, 99]]), torch.tensor([[True, True, True, False]]))
    assert order.tolist() == [[2, 1, 0, 3]] == [[[31, 4, 32].index(place) for place in {31, 4, 32}] + [3]]


def test_the_order_of_the_pivots_matters() -> None:
    """The golden files tell the port's order from that of falling norms."""
    cases = [case for case in golden_cases.load() if isinstance(case.method, DART)]
    assert cases
    different = 0
    for case in cases:
        by_norm = dataclasses.replace(case.method, official=False).select(case.signals[0])
        different += not torch.equal(by_norm.indices[0], case.expected[0].indices[0])  # type: ignore[union-attr]
        assert len(by_norm.indices[0]) == case.method.keep
    assert different


def test_the_first_blocks_run_in_full() -> None:
    assert DART().depths(32) == (2,)
    with pytest.raises(FoveateError, match=r"DART: layer=32 is outside 1\.\.31 of a decoder of 32 blocks"):
        DART(layer=32).depths(32)


def test_counts() -> None:
    assert DART().count(576) == (192,)
    assert DART(keep=64).count(576) == (64,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 0}, "keep=0 is below 1 token"),
        ({"layer": 0}, "DART: layer=0 is below 1"),
        ({"pivots": 0}, "pivots=0 is no whole number from 1; the smallest is pivots=1"),
        ({"text_pivots": -1}, "text_pivots=-1 is no whole number from 0; the smallest is text_pivots=0"),
        ({"pivots": 4.0}, "pivots=4.0 is no whole number from 1"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        DART(**fields)


def test_more_than_is_left_is_refused() -> None:
    with pytest.raises(FoveateError, match="asks for 8 tokens but 7 of its 16 tokens are left"):
        DART(keep=0.5).select(signals(NORMS, torch.rand(1, 7, 3), original=16))


def test_keys_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(FoveateError, match="1 of 7 scores are NaN or infinite"):
        DART(keep=2).select(signals(NORMS.masked_fill(NORMS == 9, torch.nan), torch.rand(1, 7, 3)))


def test_a_spec_survives_the_round_trip() -> None:
    for method in (DART(), DART(keep=64, layer=3, pivots=2, text_pivots=0, official=True)):
        assert parse(format_spec(method)) == method


def in_loops(method: DART, shown: Signals, row: int, count: int) -> list[int]:
    """One image, as the paper's steps read; equal norms and cosines to the lowest place."""
    decoder = shown.decoder
    assert decoder is not None and decoder.keys is not None and decoder.text_keys is not None
    assert decoder.normed is not None and decoder.text_normed is not None
    assert shown.text_mask is not None and shown.after_image is not None
    lengths = decoder.keys[row].abs().sum(dim=(0, 2)).tolist()
    words = decoder.text_keys[row].abs().sum(dim=(0, 2)).tolist()
    asked = [word for word in range(len(words)) if shown.text_mask[row, word] and shown.after_image[row, word]]
    image = sorted(range(len(lengths)), key=lambda token: (-lengths[token], token))[: min(method.pivots, count)]
    text = sorted(asked, key=lambda word: (-words[word], word))[: method.text_pivots]
    pivots = [decoder.normed[row, token] for token in image] + [decoder.text_normed[row, word] for word in text]
    chosen, picks = set(image), count - len(image)
    for number, pivot in enumerate(pivots):
        free = [token for token in range(len(lengths)) if token not in chosen]
        cosine = torch.nn.functional.cosine_similarity(decoder.normed[row].double(), pivot.double()[None], eps=1e-12)
        free.sort(key=lambda token: (round(cosine[token].item(), 5), token))
        chosen |= set(free[: picks // len(pivots) + (number < picks % len(pivots))])
    return sorted(chosen)


@given(data=st.data())
def test_exactly_count_tokens_stay_as_in_loops(data: st.DataObject) -> None:
    """Equal norms, tokens of length 0, few words or none, budgets below the pivots."""
    batch, tokens, words = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12)), data.draw(st.integers(0, 6))
    method = DART(
        keep=data.draw(st.integers(1, tokens) | st.floats(0.01, 1.0)),
        pivots=data.draw(st.integers(1, 5)),
        text_pivots=data.draw(st.integers(0, 5)),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    shown = signals(
        torch.randint(0, 3, (batch, tokens), generator=generator).float(),
        torch.randn(batch, tokens, 3, generator=generator) * (torch.rand(batch, tokens, 1, generator=generator) < 0.9),
        torch.randint(0, 3, (batch, words), generator=generator).float(),
        torch.randn(batch, words, 3, generator=generator),
        after=torch.arange(words) >= torch.randint(0, 4, (batch, 1), generator=generator),
        mask=torch.rand(batch, words, generator=generator) < 0.8,
    )
    (selection,) = assert_rows_stand_alone(method, [shown])
    selection.check(tokens, batch, "dart")
    (count,) = method.count(tokens) or ()
    for row in range(batch):
        assert selection.indices[row].tolist() == in_loops(method, shown, row, count)
    official = dataclasses.replace(method, official=True).select(shown)
    assert [len(row) for row in official.indices] == [count] * batch
