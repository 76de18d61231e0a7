"""Methods that rank by CLS's attention can be told, never by themselves, to rank by what patches receive instead."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import synthetic, tiny
from models.batches import assert_rows_stand_alone
from models.untouched import untouched

import foveate
from foveate import methods
from foveate.core import Block, FoveateError, Method, Selection, Signals
from foveate.spec import format as format_spec
from foveate.spec import parse

CHOOSING = ("fastervlm", "vispruner", "scope", "score_cover", "hired", "vscan")
"""What they hand on depends on nothing of CLS but its attention."""
MERGING = ("visionzip", "prumerge", "prumerge_plus")
NAMES = (*CHOOSING, *MERGING, "image_text_interaction")
OFFICIAL = ("hired", "vscan", *MERGING)
PART = {"vscan": ",where=input", "image_text_interaction": ",visual_only=true"}
"""For a part before the decoder alone."""
each_name = pytest.mark.parametrize("name", NAMES)
each_merging = pytest.mark.parametrize("name", MERGING)


def received(name: str, keep: int, more: str = "") -> Method:
    return parse(f"{name}:keep={keep},attention=received{PART.get(name, '')}{more}")


@pytest.mark.parametrize("name", CHOOSING)
def test_what_is_received_takes_the_place_of_what_cls_pays(name: str) -> None:
    """The same numbers under either name give the same choice."""
    method = received(name, 9)
    seen = synthetic.signals(method, 3, (6, 6))
    twins = {}
    for number, block in seen.tower.items():
        assert block.received is not None
        fields = {key: value for key, value in vars(block).items() if value is not None and key != "received"}
        twins[number] = Block(**fields, cls_attention=block.received[:, None])
    kept = method.select(seen)
    same = dataclasses.replace(method, attention="cls").select(dataclasses.replace(seen, tower=twins))
    assert isinstance(kept, Selection) and isinstance(same, Selection)
    assert [row.tolist() for row in kept.indices] == [row.tolist() for row in same.indices]


@each_name
def test_it_asks_for_nothing_of_cls(name: str) -> None:
    fields = {need.rpartition(".")[2] for need in received(name, 9).needs}
    assert "received" in fields
    assert not fields & {"cls", "cls_attention", "key_cls", "query_cls"}
    assert "received" not in {need.rpartition(".")[2] for need in methods.get(name)(keep=9).needs}


def test_the_patch_that_receives_most_is_kept() -> None:
    row = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    signals = Signals(original=4, index=torch.arange(4)[None], tower={"read": Block(received=row)})
    assert received("fastervlm", 2).select(signals).indices[0].tolist() == [1, 3]


@each_name
def test_it_runs_on_an_encoder_without_cls(name: str) -> None:
    model = tiny.model(tower="siglip", blocks=6)
    given = tiny.inputs(model, "3i4", "2i9")
    with untouched(model), foveate.prune(model, received(name, 9)) as trace:
        model.generate(**given, max_new_tokens=2)
    assert [image.after for image in trace.images] == [9, 9]


@each_name
def test_the_refusal_names_the_way_out(name: str) -> None:
    with pytest.raises(FoveateError, match=r"needs tower\.\S+cls.*with attention=received it runs"):
        foveate.prune(tiny.model(tower="siglip"), methods.get(name)(keep=9))


@each_name
def test_other_words_are_refused(name: str) -> None:
    with pytest.raises(FoveateError, match="attention='mean' is not among its choices"):
        methods.get(name)(attention="mean")


@pytest.mark.parametrize("name", OFFICIAL)
def test_authors_code_that_reads_cls_is_not_asked_about_anything_else(name: str) -> None:
    with pytest.raises(FoveateError, match="official=True is the authors' code, which ranks by CLS, not by attention="):
        methods.get(name)(official=True, attention="received")


@each_name
def test_a_method_is_written_as_it_is_read(name: str) -> None:
    method = received(name, 9)
    assert "attention=received" in format_spec(method) and parse(format_spec(method)) == method
    for part in parse(f"{name}:attention=received").parts():
        assert parse(format_spec(part)) == part


def test_the_cross_token_starts_as_a_copy_of_cls() -> None:
    with pytest.raises(FoveateError, match="crossget has no field 'attention'"):
        parse("crossget:attention=received")


# ---------------------------------------------------------------------------------------------------------------------
# merging behind the projector


@each_merging
def test_tokens_are_merged_in_either_space_alike(name: str) -> None:
    """Where the projector changes nothing, what is merged behind it is what is merged before it."""
    before, behind = received(name, 9), received(name, 9, ",space=projected")
    assert "features" in behind.needs and "tower.read.hidden" not in behind.needs
    assert set(behind.needs) - {"features"} == set(before.needs) - {"tower.read.hidden"}
    assert before.encoded and not behind.encoded
    seen = synthetic.signals(before, 2, (6, 6))
    one, other = before.select(seen), behind.select(dataclasses.replace(seen, features=seen.tower["read"].hidden))
    assert isinstance(one, Selection) and isinstance(other, Selection)
    assert (one.space, other.space) == ("encoded", "projected")
    assert one.features is not None and other.features is not None
    for row in range(2):
        assert torch.equal(one.indices[row], other.indices[row])
        assert torch.equal(one.features[row], other.features[row])


@each_merging
def test_merging_projectors_take_what_is_merged_behind_them(name: str) -> None:
    model = tiny.model("qwen2-vl")
    given = tiny.inputs(model, "3i4", "2i9")
    with pytest.raises(FoveateError, match="merges tokens of the encoder, and the projector of qwen2-vl takes no"):
        foveate.prune(model, received(name, 2))
    with untouched(model), foveate.prune(model, received(name, 2, ",space=projected")) as trace:
        model.generate(**given, max_new_tokens=2)
    assert [image.after for image in trace.images] == [2, 2]


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_cls_may_rank_what_is_merged_behind_the_projector(name: str) -> None:
    model = tiny.model("internvl")
    with foveate.prune(model, parse(f"{name}:keep=2,space=projected")) as trace:
        model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=2)
    assert [image.after for image in trace.images] == [2]


def test_cls_itself_has_no_place_behind_the_projector() -> None:
    with pytest.raises(FoveateError, match="no token of CLS, which attention='cls' hands on; write attention='receiv"):
        parse("visionzip:space=projected")


@each_merging
def test_spaces_that_are_refused(name: str) -> None:
    with pytest.raises(FoveateError, match="space='decoder' is not among its choices"):
        methods.get(name)(space="decoder")
    official = "official=True is the authors' code, which merges tokens of the encoder, not space='projected'"
    with pytest.raises(FoveateError, match=official):
        methods.get(name)(official=True, space="projected")


# ---------------------------------------------------------------------------------------------------------------------
# what every method promises


@each_name
@given(
    grid=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    projected=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_counts_are_exact_and_rows_stand_alone(
    name: str, grid: tuple[int, int], projected: bool, seed: int, data: st.DataObject
) -> None:
    tokens = grid[0] * grid[1]
    keep = data.draw(st.integers(1, tokens))
    method = received(name, keep, ",space=projected" if projected and name in MERGING else "")
    assert method.count(tokens, grid) == (keep,) and not method.adaptive
    (selection,) = assert_rows_stand_alone(method, [synthetic.signals(method, 3, grid, seed)])
    selection.check(tokens, 3, name)
    assert [row.numel() for row in selection.indices] == [keep] * 3
