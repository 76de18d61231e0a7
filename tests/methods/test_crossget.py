"""CrossGET: hand-worked importance and merges, where the cross token goes, and its learned vectors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models.batches import assert_rows_stand_alone

from foveate.core import Block, FoveateError, Signals
from foveate.methods.crossget import CrossGET
from foveate.spec import format as format_spec
from foveate.spec import parse


def signals(
    degrees: list[float], received: list[float] | None = None, cross: list[float] | None = None, **given: Any
) -> Signals:
    """One image of tokens 0, 10, 20, ... with keys of these degrees; a cross token of -1; attention per patch."""
    radians, count = torch.tensor(degrees).deg2rad(), len(degrees)
    block = Block(
        hidden=10.0 * torch.arange(count)[None, :, None],
        cls=torch.full((1, 1), 7.0),
        cross=torch.full((1, 1), -1.0),
        keys=torch.stack([radians.cos(), radians.sin()], dim=-1)[None, None],
        received_all=torch.tensor([received or [0.0] * count]),
        cross_attention=torch.tensor([[cross or [0.0] * count] * 2]),  # two heads
    )
    fields = {"index": torch.arange(count)[None], "original": count, "size": torch.ones(1, count), **given}
    return Signals(tower={"latest": block}, **fields)


def rows(answer: Any) -> list[float]:
    found: list[float] = answer.features[0].flatten().tolist()
    return found


def test_what_resembles_others_merges_and_the_cross_token_joins() -> None:
    """0 and 20 degrees are the nearest; the first may look at the second and has the highest similarity: it merges.

    Both matter equally, so that the mean comes out; the cross token takes the freed index 0.
    """
    answer = CrossGET(keep=4).select(signals([0, 20, 45, 100]))
    assert answer.indices[0].tolist() == [0, 1, 2, 3], "keep=4 of 4 keeps all"
    assert answer.features is None and answer.extra is None
    answer = CrossGET(keep=3).select(signals([0, 20, 45, 100]))
    assert answer.indices[0].tolist() == [1, 2, 3]


def test_three_patches_and_the_cross_token() -> None:
    answer = CrossGET(r=(1,)).select(signals([0, 20, 45, 100]))
    assert answer.indices[0].tolist() == [0, 1, 2, 3]
    assert rows(answer) == [-1, 5, 20, 30]
    assert answer.extra is not None and answer.extra[0].tolist() == [True, False, False, False]
    assert answer.groups is not None and answer.groups[0].tolist() == [1, 1, 2, 3]
    assert answer.ordered


def test_attention_of_both_kinds_saves_a_patch_and_weighs_the_mean() -> None:
    """Importance 0.5 + 0.5 of the first patch: the second merges into it, with softmax weights of 0 and 1."""
    shown = signals([0, 20, 45, 100], received=[0.5, 0, 0, 0], cross=[0.5, 0, 0, 0])
    answer = CrossGET(r=(1,)).select(shown)
    assert answer.indices[0].tolist() == [0, 1, 2, 3]
    assert answer.extra is not None and answer.extra[0].tolist() == [False, True, False, False]
    source = 1 / (1 + torch.e)
    expected = (0 + 2 * source * 10 + (2 * (1 - source) - 1) * 0) / 2
    torch.testing.assert_close(answer.features[0].flatten(), torch.tensor([expected, -1, 20, 30]))  # type: ignore[index]


def test_before_the_last_block_the_cross_token_runs_beside() -> None:
    answer = CrossGET(r=1).select(signals([0, 20, 45, 100], stages=2))
    assert answer.indices[0].tolist() == [1, 2, 3]
    assert rows(answer) == [5, 20, 30] and answer.extra is None


def test_a_last_block_that_merges_nothing_still_lets_it_join() -> None:
    """At the largest index that is free."""
    index = torch.tensor([[1, 2, 4]])
    answer = CrossGET(r=(2, 0)).select(signals([0, 20, 45], index=index, original=6, stage=1, stages=2))
    assert answer.indices[0].tolist() == [1, 2, 4, 5]
    assert rows(answer) == [0, 10, 20, -1]
    assert answer.groups is not None and answer.groups[0].tolist() == [0, 1, 2]


def test_the_index_freed_last_is_taken_before_older_ones() -> None:
    index = torch.tensor([[1, 2, 4, 5]])
    answer = CrossGET(r=1).select(signals([0, 20, 45, 100], index=index, original=7, stage=1, stages=2))
    assert answer.indices[0].tolist() == [1, 2, 4, 5], "patch 1 has merged; 6 had left before"
    assert answer.extra is not None and answer.extra[0].tolist() == [True, False, False, False]


def test_a_row_in_a_batch_is_the_row_alone() -> None:
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(3, *shape, generator=generator)

    block = Block(
        hidden=some(20, 4), cls=some(4), cross=some(4), keys=some(2, 20, 5), received_all=some(20),
        cross_attention=some(2, 20),
    )  # fmt: skip
    index = torch.arange(20).expand(3, 20)
    seen = Signals(original=20, index=index, size=torch.ones(3, 20), tower={"latest": block}, stages=2)
    assert_rows_stand_alone(CrossGET(keep=12), [seen, dataclasses.replace(seen, stage=1)])


# ---------------------------------------------------------------------------------------------------------------------
# the companion


def test_without_training_it_stays_what_became_of_a_copy_of_cls() -> None:
    cls, before = torch.ones(2, 3, requires_grad=True), torch.full((2, 3), 5.0, requires_grad=True)
    assert CrossGET(keep=3).companion(0, cls, None) is cls
    later = CrossGET(keep=3).companion(4, cls, before)
    assert later is not None and torch.equal(later, before) and not later.requires_grad


def stored(folder: Path, width: int = 3, blocks: int = 5) -> str:
    from foveate.modules.crossget import CrossGETConfig, CrossGETTokens, save

    tokens = CrossGETTokens(CrossGETConfig(width=width, blocks=blocks))
    assert not tokens.tokens.any(), "zero before training"
    torch.nn.init.normal_(tokens.tokens, generator=torch.Generator().manual_seed(1))
    save(tokens, folder)
    return str(folder)


def test_learned_vectors_are_added_block_by_block(tmp_path: Path) -> None:
    method = CrossGET.from_pretrained(stored(tmp_path), keep=3)
    again = parse(format_spec(method))
    assert isinstance(again, CrossGET) and again == method
    learned = method.modules.tokens
    for one in (method, again):
        first, later = one.companion(0, torch.ones(2, 3), None), one.companion(4, torch.ones(2, 3), torch.zeros(2, 3))
        assert first is not None and later is not None
        torch.testing.assert_close(first, 1 + learned[:1].expand(2, -1))
        torch.testing.assert_close(later, learned[4:].expand(2, -1))
    half = method.companion(0, torch.ones(2, 3).half(), None)
    assert half is not None and half.dtype == torch.float16


def model(width: int, blocks: int) -> Any:
    return SimpleNamespace(vision_config=SimpleNamespace(hidden_size=width, num_hidden_layers=blocks))


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    method = CrossGET.from_pretrained(stored(tmp_path), keep=3)
    method.check_model(model(3, 5))
    with pytest.raises(
        FoveateError, match="trained for an encoder with hidden_size=3, not 4; load that model, or cross"
    ):
        method.check_model(model(4, 5))
    with pytest.raises(FoveateError, match="num_hidden_layers=5, not 6"):
        method.check_model(model(3, 6))
    CrossGET(keep=3).check_model(model(4, 6))


def test_fields() -> None:
    assert CrossGET() == CrossGET(r=13) == parse("crossget")
    assert CrossGET().adaptive and not CrossGET(keep=3).adaptive
    assert CrossGET(keep=64).count(576) == (64,)
    assert CrossGET(r=(13,) * 23).count(576) == (278,), (
        "as the authors' LLaVA-1.5 has it: 277 patches and the cross token"
    )
    with pytest.raises(FoveateError, match="CrossGET: keep=1 leaves no patch; the least is keep=2"):
        CrossGET(keep=1).count(576)
    with pytest.raises(FoveateError, match="no cross tokens of CrossGET can be loaded from nowhere-at-all"):
        CrossGET.from_pretrained("nowhere-at-all")
