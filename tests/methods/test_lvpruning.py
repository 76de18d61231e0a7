"""LVPruning: counts and depths as published, scores that read the text, modules that fit or are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from models.batches import assert_rows_stand_alone
from torch import Tensor

import foveate
from foveate.core import Block, FoveateError, Signals
from foveate.cost.flops import lvpruning_modules
from foveate.cost.shapes import shape
from foveate.methods.lvpruning import LVPruning
from foveate.modules.lvpruning import for_model, save
from foveate.ops.subsets import even_order
from foveate.spec import format as format_spec
from foveate.spec import parse


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Modules for the tiny model."""
    return save(for_model(tiny.model().config, layers=(1, 2, 3), seed=1), tmp_path_factory.mktemp("lvp"))


def signals(seed: int = 0, batch: int = 2, tokens: int = 12, stage: int = 0, **changes: Any) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])[:batch]
    decoder = Block(
        hidden=torch.randn(batch, tokens, 32, generator=generator),
        text_hidden=torch.randn(batch, 4, 32, generator=generator),
    )
    index = torch.arange(tokens).expand(batch, tokens)
    return Signals(
        **{"original": tokens, "index": index, "stage": stage, "decoder": decoder, "text_mask": mask, **changes}
    )


@pytest.mark.parametrize(("rho", "counts"), [(0.6, (345, 230, 115)), (0.5, (288, 172, 57)), (0.45, (259, 144, 28))])
def test_counts_are_shares_of_the_original_tokens_rounded_down(rho: float, counts: tuple[int, ...]) -> None:
    assert LVPruning(keep=(rho, rho - 0.2, round(rho - 0.4, 2))).count(576) == counts
    assert LVPruning(keep=(32, 32, 32)).count(576) == (32, 32, 32)
    assert LVPruning().count(3) == (1, 1, 1)


@pytest.mark.parametrize(("layers", "depths"), [(32, (1, 8, 16)), (40, (1, 10, 20)), (6, (1, 2, 3)), (4, (1, 2, 3))])
def test_the_depths_scale_with_the_decoder(layers: int, depths: tuple[int, ...]) -> None:
    assert LVPruning().depths(layers) == depths
    assert LVPruning(layers=(2, 3), keep=(0.5, 0.1)).depths(layers) == (2, 3)


def test_the_tokens_stay_whose_keeping_outweighs_their_removal(folder: Path) -> None:
    method = LVPruning.from_pretrained(str(folder), keep=(5, 3, 2))
    for stage, count in enumerate((5, 3, 2)):
        shown = signals(stage=stage)
        assert shown.decoder is not None and shown.text_mask is not None
        scores = method.modules.float()(stage, shown.decoder.hidden, shown.decoder.text_hidden, shown.text_mask)
        best = (scores[..., 0] - scores[..., 1]).topk(count).indices.sort().values
        chosen = method.select(shown).indices
        assert [row.tolist() for row in chosen] == best.tolist()


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Modules that say how much is to be spread evenly."""
    made = for_model(tiny.model().config, layers=(1, 2, 3), seed=1, evenness=True)
    return save(made, tmp_path_factory.mktemp("spread"))


@pytest.mark.parametrize(("even", "spread_out"), [(0.0, 0), (0.5, 3), (1.0, 6)])
def test_a_share_of_the_budget_is_an_even_lattice_of_what_the_scores_leave(
    folder: Path, even: float, spread_out: int
) -> None:
    method = LVPruning.from_pretrained(str(folder), keep=(6, 3, 2), even=even)
    shown = signals(grid=(3, 4))
    scores = method._score(shown)
    rank = even_order(3, 4)
    for row, kept in enumerate(method.select(shown).indices):
        best = scores[row].argsort(descending=True, stable=True).tolist()
        rest = sorted(best[6 - spread_out :], key=lambda token: int(rank[token]))
        assert kept.tolist() == sorted(best[: 6 - spread_out] + rest[:spread_out])


def test_a_later_stage_spreads_over_the_same_order(folder: Path) -> None:
    """Where tokens have left there is no grid any more, but an even lattice of an even lattice is one."""
    method = LVPruning.from_pretrained(str(folder), keep=(6, 3, 2), even=1.0)
    first = signals(batch=1, grid=(3, 4))
    kept = method.select(first).indices[0]
    later = signals(batch=1, tokens=6, stage=1, original=12, index=kept[None], memory=first.memory)
    assert method.select(later).indices[0].tolist() == sorted(even_order(3, 4).argsort()[:3].tolist())


def test_modules_that_have_a_say_in_it_decide_by_text_and_budget_unless_told(spread: Path, folder: Path) -> None:
    method = LVPruning.from_pretrained(str(spread), keep=(6, 3, 2))
    shown = signals(grid=(3, 4))
    shares = method._even_shares(shown, 0.5)
    assert shares is not None and shares[0] != shares[1] and all(0 < share < 1 for share in shares)
    assert method._even_shares(shown, 0.1) != shares
    told = LVPruning.from_pretrained(str(spread), keep=(6, 3, 2), even=0.25)
    assert told._even_shares(shown, 0.5) == [0.25, 0.25]
    assert LVPruning.from_pretrained(str(spread), keep=(6, 3, 2), even=0.0)._even_shares(shown, 0.5) is None
    assert LVPruning.from_pretrained(str(folder), keep=(6, 3, 2))._even_shares(shown, 0.5) is None
    for seed in range(3):
        assert_rows_stand_alone(method, [signals(seed, grid=(3, 4))])


def test_with_borders_classes_come_in_order_and_each_is_spread_evenly(folder: Path) -> None:
    plain = LVPruning.from_pretrained(str(folder), keep=(6, 3, 2))
    shown = signals(grid=(3, 4))
    scores = plain._score(shown)
    border = scores[0].sort().values[3].item()  # eight of twelve are above it
    method = LVPruning.from_pretrained(str(folder), keep=(6, 3, 2), borders=(border,))
    rank = even_order(3, 4)
    for row, kept in enumerate(method.select(shown).indices):
        order = sorted(range(12), key=lambda token: (bool(scores[row, token] <= border), int(rank[token])))
        assert kept.tolist() == sorted(order[:6])
    assert plain.select(shown).indices[0].tolist() != method.select(shown).indices[0].tolist()


def test_modules_bring_the_borders_that_they_were_made_for(tmp_path: Path) -> None:
    made = for_model(tiny.model().config, layers=(1, 2, 3), seed=1, borders=[-2.0, 2.0])
    save(made, tmp_path)
    shown = signals(grid=(3, 4))
    own = LVPruning.from_pretrained(str(tmp_path), keep=(6, 3, 2)).select(shown).indices
    told = LVPruning.from_pretrained(str(tmp_path), keep=(6, 3, 2), borders=(-2.0, 2.0)).select(shown).indices
    none = LVPruning.from_pretrained(str(tmp_path), keep=(6, 3, 2), borders=()).select(shown).indices
    assert [row.tolist() for row in own] == [row.tolist() for row in told]
    assert [row.tolist() for row in own] != [row.tolist() for row in none]


def test_borders_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(FoveateError, match=r"borders=\(nan,\) are not all finite numbers"):
        LVPruning(path="random", borders=(float("nan"),))


@pytest.mark.parametrize("even", [-0.1, 1.5, True])
def test_a_share_outside_the_budget_is_refused(even: float) -> None:
    with pytest.raises(FoveateError, match=rf"even={even} is no share of the budget from 0.0 to 1.0"):
        LVPruning(path="random", even=even)


def test_indices_are_the_original_ones(folder: Path) -> None:
    method = LVPruning.from_pretrained(str(folder), keep=(5, 3, 2))
    index = torch.arange(12).expand(2, 12) * 3
    (first,), (second,) = ([method.select(signals(**more)).indices] for more in ({}, {"index": index, "original": 36}))
    assert [row.tolist() for row in second] == [(row * 3).tolist() for row in first]


def test_another_question_keeps_other_tokens_in_its_own_row_only(folder: Path) -> None:
    method = LVPruning.from_pretrained(str(folder), keep=(4, 3, 2))
    shown = signals()
    assert shown.decoder is not None and shown.decoder.text_hidden is not None
    words = shown.decoder.text_hidden.clone()
    words[1, :2] = 3 * words[0, :2].flip(0)
    other = dataclasses.replace(shown, decoder=dataclasses.replace(shown.decoder, text_hidden=words))
    before, after = (method.select(one).indices for one in (shown, other))
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_rows_stand_alone(folder: Path) -> None:
    method = LVPruning.from_pretrained(str(folder), keep=(6, 3, 2))
    for seed in range(5):
        assert_rows_stand_alone(method, [signals(seed)])


def test_a_spec_names_the_folder(folder: Path) -> None:
    method = LVPruning.from_pretrained(str(folder), keep=(9, 0.1, 0.05))
    text = format_spec(method)
    assert text == f'lvpruning:keep=9/0.1/0.05,from="{folder}"'
    assert parse(text) == method and parse(text).modules is not None  # type: ignore[attr-defined]
    assert parse(format_spec(LVPruning(path="random", even=0.8))) == LVPruning(path="random", even=0.8)
    assert parse("lvpruning:from=random,keep=3/2/1") == LVPruning(keep=(3, 2, 1), path="random")
    assert "modules" not in repr(method)


def test_it_prunes_a_model_and_leaves_it_as_it_was(folder: Path) -> None:
    model = tiny.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = tiny.inputs(model, "3i4", "2i9")
    method = LVPruning.from_pretrained(str(folder), keep=(18, 9, 4))
    with foveate.prune(model, [foveate.FoPru(keep=0.75), method]) as trace:
        model.generate(**given, max_new_tokens=2)
        assert set(model.state_dict()) == set(before)
    assert [stage.after for stage in trace.images[0].stages] == [27, 18, 9, 4]
    assert [stage.layer for stage in trace.images[0].stages] == [None, 1, 2, 3]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_runs_in_the_models_dtype(folder: Path) -> None:
    model = tiny.model().bfloat16()
    given = tiny.inputs(model, "3i4")
    given["pixel_values"] = given["pixel_values"].bfloat16()
    method = LVPruning.from_pretrained(str(folder), keep=(18, 9, 4))
    with foveate.prune(model, method) as trace:
        model.generate(**given, max_new_tokens=1)
    assert trace.images[0].after == 4


def test_after_an_adaptive_stage_the_modules_go_along(folder: Path) -> None:
    from models.doubles import Ragged

    model = tiny.model()
    method = LVPruning.from_pretrained(str(folder), keep=(20, 10, 3))
    with foveate.prune(model, [Ragged(), method]) as trace:
        model.generate(**tiny.inputs(model, "3i4", "2i9"), max_new_tokens=1)
    for image in trace.images:
        left = image.stages[0].after
        assert [stage.after for stage in image.stages[1:]] == [min(20, left), min(10, left), min(3, left)]


def test_the_trace_counts_the_modules(folder: Path) -> None:
    model = tiny.model()
    method = LVPruning.from_pretrained(str(folder), keep=(18, 9, 4))
    decoder = shape(model.config).decoder
    assert method.flops(36, 7) == lvpruning_modules(decoder, visual=[36], text=7)
    with foveate.prune(model, method) as trace:
        model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=1)
    with foveate.prune(model, LVPruning(path="random", keep=(18, 9, 4))) as other:
        model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=1)
    assert trace.budget.prefill_flops == other.budget.prefill_flops
    assert [stage.flops for stage in trace.images[0].stages] == [
        lvpruning_modules(decoder, visual=[seen], text=7) for seen in (36, 18, 9)
    ]
    with foveate.prune(model, foveate.PyramidDrop(layers=(1, 2, 3), keep=(18, 9, 4))) as plain:
        model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=1)
    modules = lvpruning_modules(decoder, visual=[36, 18, 9], text=7)
    assert trace.budget.prefill_flops - plain.budget.prefill_flops == modules
    assert trace.unpruned.prefill_flops == plain.unpruned.prefill_flops


def wider() -> Any:
    config = tiny.model().config
    config.text_config.hidden_size = 64
    return config


REFUSED: dict[str, tuple[Callable[[str], Any], str]] = {
    "no modules on a model": (lambda path: foveate.prune(tiny.model(), LVPruning()), r"write lvpruning:from=FOLDER"),
    "no modules when asked": (lambda path: LVPruning().select(signals()), r"write lvpruning:from=FOLDER"),
    "another model": (lambda path: LVPruning.from_pretrained(path).check_model(wider()), "hidden_size=32, not 64"),
    "another width": (
        lambda path: LVPruning.from_pretrained(path).select(
            signals(decoder=Block(hidden=torch.zeros(2, 12, 8), text_hidden=torch.zeros(2, 4, 8)))
        ),
        "read hidden states of 32 values, the decoder has 8",
    ),
    "no such folder": (lambda path: LVPruning.from_pretrained("nowhere"), "no decision modules can be loaded from"),
    "too few budgets": (lambda path: LVPruning.from_pretrained(path, keep=(0.5,)), r"1 budgets \(0.5,\) for the 3"),
    "other layers": (
        lambda path: LVPruning.from_pretrained(path, layers=(1, 2, 4)),
        r"layers=\(1, 2, 4\), but the modules in .* belong after \(1, 2, 3\)",
    ),
    "rising budgets": (lambda path: LVPruning.from_pretrained(path, keep=(0.1, 0.2, 0.3)), "rises from 0.1 to 0.2"),
    "two budgets": (lambda path: LVPruning(keep=(0.5, 0.25)), "2 budgets .* for 3 layers"),
    "more than is left": (lambda path: LVPruning(keep=(0.5, 20, 3)).count(36), "asks for 20 tokens but 18 of its 36"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str, folder: Path) -> None:
    call, message = REFUSED[case]
    with pytest.raises(FoveateError, match=message):
        call(str(folder))


def test_random_modules_take_the_width_that_they_meet() -> None:
    method = LVPruning.example()
    shown = signals()
    kept = method.select(shown).indices
    assert [len(row) for row in kept] == [6, 6]
    assert [row.tolist() for row in LVPruning.example().select(shown).indices] == [row.tolist() for row in kept]
    hidden: Tensor = torch.randn(2, 12, 6)
    narrow = Block(hidden=hidden, text_hidden=torch.randn(2, 4, 6))
    assert [len(row) for row in method.select(dataclasses.replace(shown, decoder=narrow)).indices] == [6, 6]
