"""PruMerge+: where the spatial samples lie, counts of its own, and the samples of the authors' code."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import synthetic
from models.batches import assert_rows_stand_alone

from foveate.core import Block, Selection, Signals
from foveate.methods.prumerge import PruMerge
from foveate.methods.prumerge_plus import PruMergePlus
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(*weights: list[float]) -> Signals:
    """Images whose patches get attention in proportion to `weights`, CLS getting 1."""
    logits = torch.tensor(weights).log()
    batch, count = logits.shape
    last = Block(
        keys=torch.stack([logits, torch.ones_like(logits)], dim=-1)[:, None],
        key_cls=torch.zeros(batch, 1, 2),
        query_cls=torch.tensor([math.sqrt(2.0), 0.0]).expand(batch, 1, 2),
    )
    hidden = torch.arange(1.0, count + 1).repeat(batch, 1)[..., None]
    index = torch.arange(count).repeat(batch, 1)
    return Signals(count, index, tower={"read": Block(hidden=hidden), "last": last})


def patches(selection: Selection) -> list[list[int]]:
    """Kept places without that of the rest."""
    assert selection.extra is not None
    return [row[~extra].tolist() for row, extra in zip(selection.indices, selection.extra, strict=True)]


def image(tokens: int, **loud: float) -> list[float]:
    """Attention 1 everywhere but at the places named, such as p3=50."""
    weights = [1.0] * tokens
    for name, weight in loud.items():
        weights[int(name[1:])] = weight
    return weights


def test_half_by_attention_and_half_evenly_spaced() -> None:
    """Of 12 patches 3 and 4 lead; of the 10 that remain 2 and 9 are the middles of the halves, 7 is that of all."""
    seen = signals(image(12, p3=50, p4=40))
    assert patches(PruMergePlus(keep=5).select(seen)) == [[2, 3, 4, 9]]
    assert patches(PruMergePlus(keep=4).select(seen)) == [[3, 4, 7]], "the odd one goes to the attention"
    assert patches(PruMergePlus(keep=2).select(seen)) == [[3]]
    assert patches(PruMergePlus(keep=1).select(seen)) == [[]]
    assert patches(PruMergePlus(keep=11).select(seen)) == [[0, 1, 2, 3, 4, 5, 7, 8, 9, 11]]


def test_as_many_samples_as_outliers() -> None:
    seen = signals(image(20), image(20, p18=50, p19=60))
    selection = PruMergePlus().select(seen)
    assert [row.tolist() for row in selection.indices] == [[19], [4, 13, 17, 18, 19]]
    assert selection.extra is not None and selection.extra[1].tolist() == [False, False, True, False, False]


@given(tokens=st.integers(1, 60), seed=st.integers(0, 99), data=st.data())
def test_samples_are_spread_over_what_remains(tokens: int, seed: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, tokens))
    method = PruMergePlus(keep=keep)
    seen = synthetic.signals(method, 2, (1, tokens), seed)
    selection = method.select(seen)
    assert [row.numel() for row in selection.indices] == [keep, keep]
    if keep == tokens:
        assert selection.features is None
        return
    best = patches(PruMerge(keep=keep // 2 + 1).select(seen))
    for own, leading in zip(patches(selection), best, strict=True):
        samples = sorted(set(own) - set(leading))
        assert len(leading) == keep // 2 and len(samples) == (keep - 1) // 2
        remaining = [place for place in range(tokens) if place not in leading]
        # Each sample lies in the middle of its own stretch of what remains.
        for number, sample in enumerate(samples):
            middle = (number + 0.5) * len(remaining) / len(samples)
            assert abs(remaining.index(sample) + 0.5 - middle) <= 0.5


def test_the_merge_is_that_of_prumerge() -> None:
    """Where both keep the same patch, one token and the rest are made alike."""
    seen = signals(image(6, p3=50))
    plus, plain = PruMergePlus(keep=2).select(seen), PruMerge(keep=2).select(seen)
    assert torch.equal(plus.indices[0], plain.indices[0])
    assert plus.features is not None and plain.features is not None
    assert torch.equal(plus.features[0], plain.features[0])


def test_what_is_received_takes_the_place_of_the_attention() -> None:
    """As above: 3 and 4 lead, 2 and 9 are the middles of the halves of what remains."""
    method = PruMergePlus(keep=5, attention="received")
    assert method.needs == ("tower.read.hidden", "tower.last.keys", "tower.last.received")
    seen = signals(image(12))
    last = Block(keys=seen.tower["last"].keys, received=torch.tensor([image(12, p3=50, p4=40)]))
    quiet = dataclasses.replace(seen, tower={"read": seen.tower["read"], "last": last})
    assert patches(method.select(quiet)) == [[2, 3, 4, 9]]
    assert patches(PruMergePlus(attention="received").select(quiet)) == [[2, 3, 4, 9]], "two outliers, two samples"
    behind = dataclasses.replace(quiet, features=torch.ones(1, 12, 3))
    selection = PruMergePlus(keep=5, attention="received", space="projected").select(behind)
    assert selection.space == "projected" and patches(selection) == [[2, 3, 4, 9]]


# ---------------------------------------------------------------------------------------------------------------------
# the authors' code


def test_the_code_takes_about_three_samples_per_outlier() -> None:
    """2 of 36: spacing 18, every 6th from 0 up to 34; 6 is an outlier as well and stands once."""
    selection = PruMergePlus(official=True).select(signals(image(36, p6=50, p35=60)))
    assert patches(selection) == [[0, 6, 12, 18, 24, 30, 35]]


def test_the_code_keeps_everything_where_outliers_are_many() -> None:
    """4 of 20: spacing 5, a third of it is 1: all but the last patch, which is an outlier here; there is no rest."""
    seen = signals(image(20, p1=50, p2=50, p3=50, p19=60))
    selection = PruMergePlus(official=True).select(seen)
    assert selection.indices[0].tolist() == list(range(20))
    assert selection.extra is not None and not selection.extra[0].any()
    without = PruMergePlus(official=True).select(signals(image(20, p1=50, p2=50, p3=50, p4=60)))
    assert without.indices[0].tolist() == list(range(20))
    assert without.extra is not None and without.extra[0].nonzero().flatten().tolist() == [19]


def test_the_code_without_outliers_leaves_the_rest_alone() -> None:
    selection = PruMergePlus(official=True).select(signals(image(9)))
    assert selection.indices[0].tolist() == [8]


def test_a_sample_among_the_best_stands_once() -> None:
    """2 best of 12: spacing 6, samples 3 and 9; 9 is the best patch already."""
    method = PruMergePlus(keep=5, official=True)
    assert method.count(12) is None and method.adaptive
    selection = method.select(signals(image(12, p9=50, p4=40)))
    assert patches(selection) == [[3, 4, 9]]
    assert selection.indices[0].tolist() == [3, 4, 9, 11]
    # The lowest of the pruned patches, 0, is lost: the rest is made of 1 2 5 6 7 8 10 11, each of attention 1 / 101.
    assert selection.features is not None
    assert selection.features[0][3].item() == pytest.approx((2 + 3 + 6 + 7 + 8 + 9 + 11 + 12) / 101)


@given(tokens=st.integers(1, 50), keep=st.none() | st.integers(1, 50), seed=st.integers(0, 30))
def test_the_codes_samples_never_break(tokens: int, keep: int | None, seed: int) -> None:
    method = PruMergePlus(keep=None if keep is None else min(keep, tokens), official=True)
    selection = method.select(synthetic.signals(method, 2, (1, tokens), seed))
    selection.check(tokens, 2, "prumerge_plus")


def test_a_row_alone_is_what_it_is_in_the_batch() -> None:
    for method in (PruMergePlus(), PruMergePlus(keep=9), PruMergePlus(keep=9, official=True)):
        assert_rows_stand_alone(method, [synthetic.signals(method, 3, (6, 6))])


def test_what_fixes_the_count() -> None:
    assert PruMergePlus(keep=64).count(576) == (64,) and not PruMergePlus(keep=64).adaptive
    assert PruMergePlus().count(576) is None and PruMergePlus().adaptive


@pytest.mark.parametrize("text", ["prumerge_plus:keep=64", "prumerge_plus:keep=0.25,neighbours=8,official=true"])
def test_a_method_is_written_as_it_is_read(text: str) -> None:
    assert format_spec(parse(text)) == text
    assert parse(str(PruMergePlus())) == PruMergePlus()
