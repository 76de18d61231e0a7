"""A model under soft masks: the same as one whose tokens are gone, and gradients for the modules alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from models import tiny
from models.untouched import untouched
from torch import Tensor
from transformers import PreTrainedModel

import foveate
from foveate.core import FoveateError, Grid, Method, Selection, Signals, Site
from foveate.modules.lvpruning import LVPruningModules, for_model
from foveate.runtime.decoder.soften import Seen, look
from foveate.train.losses import IGNORED
from foveate.train.softened import Pass, Rows, Softened, thinned, whole_rows

LAYERS = (1, 2, 3)
ROWS = ("3i4", "2i9")
KEPT = (
    (tuple(range(0, 36, 2)), tuple(range(0, 36, 4)), (0, 8, 32)),
    (tuple(range(18)), tuple(range(5, 14)), (5, 6, 13)),
)
"""Of each row, the tokens that each stage leaves: as many in both."""


@dataclass(frozen=True)
class Staged(Method):
    """Staged: keeps what it is told after each of three blocks."""

    site: ClassVar[Site] = "layer"

    def depths(self, layers: int) -> tuple[int, ...]:
        return LAYERS

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return tuple(len(stage) for stage in KEPT[0])

    def select(self, signals: Signals) -> Selection:
        return Selection([torch.tensor(row[signals.stage]) for row in KEPT])


recomputes = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "activation_checkpointing_enable"), reason="older versions recompute hooks as well"
)


def given_rows(model: Any, padding: str = "left") -> dict[str, Tensor]:
    given = tiny.inputs(model, *ROWS, padding=padding)
    labels = given["input_ids"].clone()
    labels[given["attention_mask"] == 0] = IGNORED
    labels[:, :-3] = IGNORED
    return {**given, "labels": labels}


def softened(model: Any, **options: Any) -> Softened:
    gates = for_model(model.config, layers=LAYERS).train()
    made = Softened(model, gates, (0.5, 0.3, 0.1), **options)
    made.generator = torch.Generator().manual_seed(5)
    return made


def rows_of(model: Any, given: dict[str, Tensor]) -> Rows:
    ids, mask, labels = given["input_ids"], given["attention_mask"], given["labels"]
    seen = look(model, ids, mask, {"pixel_values": given["pixel_values"]})
    return whole_rows(ids, mask, labels, seen)


def passing(given: dict[str, Tensor]) -> Pass:
    visual = given["input_ids"] == tiny.IMAGE
    return Pass(given["attention_mask"].bool() & ~visual, visual)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("decoder", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_dropping_by_mask_equals_removing(attn: str, padding: str, decoder: str, stages: int) -> None:
    """The logits of every token that stays to the end, with one stage, two and three."""
    model = tiny.model(decoder=decoder, attn=attn)
    given = tiny.inputs(model, *ROWS, padding=padding)
    method = Staged()

    def fixed(stage: int, visual: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        made = torch.zeros(visual.shape[:2])
        for row, kept in enumerate(KEPT):
            made[row, list(kept[min(stage, stages - 1)])] = 1.0
        return made

    @dataclass(frozen=True)
    class Few(Staged):
        """Few: the first stages only."""

        def depths(self, layers: int) -> tuple[int, ...]:
            return LAYERS[:stages]

        def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
            counts = method.count(original)
            assert counts is not None
            return counts[:stages]

    with torch.no_grad(), untouched(model):
        run = passing(given)
        labels = torch.full_like(given["input_ids"], IGNORED)
        rows = rows_of(model, {**given, "labels": labels})
        soft = run.run(model, LAYERS, fixed, rows)
    positions = (given["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad(), foveate.prune(model, Few()):
        really = model(**given, position_ids=positions).logits
    stays = given["attention_mask"].bool()
    for row, kept in enumerate(KEPT):
        gone = torch.ones(tiny.TOKENS, dtype=torch.bool)
        gone[list(kept[stages - 1])] = False
        stays[row, run.places[row][gone]] = False
    assert (soft - really)[stays].abs().max() < 1e-4
    with torch.no_grad():
        unpruned = model(**given, position_ids=positions).logits
    assert (unpruned - really)[stays].abs().max() > 0.1


def test_both_losses_reach_every_module_and_nothing_else() -> None:
    for weights in ({"causal_weight": 1.0, "ratio_weight": 0.0}, {"causal_weight": 0.0, "ratio_weight": 1.0}):
        model = tiny.model()
        made = softened(model, **weights)
        with untouched(model):
            made(**given_rows(model))["loss"].backward()
            for name, parameter in made.named_parameters():
                assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
                assert name.startswith("gates.stages.")
            for stage in made.gates.stages:
                assert sum(float(one.grad.abs().sum()) for one in stage.parameters()) > 0
            assert all(one.grad is None and not one.requires_grad for one in model.parameters())


def test_the_base_is_no_part_of_what_is_trained_and_saved() -> None:
    made = softened(tiny.model())
    assert {name.split(".")[0] for name in made.state_dict()} == {"gates"}
    assert not made.train().base.training


@recomputes
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_recomputed_layers_give_the_same_gradients(attn: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny.model(attn=attn)
        made = softened(model, checkpointing=checkpointing)
        loss = made(**given_rows(model))["loss"]
        loss.backward()
        found.append([loss.detach(), *(one.grad for one in made.parameters())])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_ready_features_stand_in_for_pictures() -> None:
    model = tiny.model()
    given = given_rows(model)
    whole = softened(model)(**given)
    pixels = given.pop("pixel_values")
    features = torch.stack(list(model.get_image_features(pixels, return_dict=True).pooler_output))
    torch.testing.assert_close(softened(model)(**given, features=features)["loss"], whole["loss"])


def test_thinning_leaves_some_tokens_out_as_if_they_had_been_pruned_before_the_decoder() -> None:
    model = tiny.model()
    given = given_rows(model)
    thin = thinned(rows_of(model, given), 0.25, torch.Generator().manual_seed(1))
    visual = thin.ids == tiny.IMAGE
    assert visual.sum(dim=1).tolist() == [9, 9] and torch.equal(thin.seen.visual, visual)
    left = [thin.seen.positions[row][visual[row]] - begins for row, begins in enumerate((3, 2))]
    assert left[0].tolist() != left[1].tolist()

    @dataclass(frozen=True)
    class Left(Method):
        """Left: what thinning left."""

        def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
            return (9,)

        def select(self, signals: Signals) -> Selection:
            return Selection(left)

    run = Pass(thin.mask.bool() & ~visual, visual)
    with torch.no_grad():
        soft = run.run(model, LAYERS, lambda stage, seen, text, mask: torch.ones(seen.shape[:2]), thin)
        with foveate.prune(model, Left()):
            del given["labels"]
            stock = model(**given, position_ids=(given["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(soft[:, -3:], stock[:, -3:], atol=1e-4, rtol=0)
    made = softened(model, share=0.25)(**given_rows(model))
    assert all(share * 18 == pytest.approx(round(share * 18)) for share in made["kept"].tolist())


def test_rows_of_different_pictures_are_not_thinned_together() -> None:
    ids = torch.tensor([[tiny.IMAGE, 3, 4], [tiny.IMAGE, tiny.IMAGE, 4]])
    visual = ids == tiny.IMAGE
    rows = Rows(ids, torch.ones_like(ids), ids, Seen(visual, visual, ids), torch.zeros(2, 2), visual.sum(dim=1))
    with pytest.raises(FoveateError, match=r"rows of \[1, 2\] visual tokens .* use visual_share=1.0"):
        thinned(rows, 0.5, None)


def test_the_loss_is_the_weighted_sum_and_the_shares_are_those_of_the_decisions() -> None:
    model = tiny.model()
    made = softened(model, causal_weight=0.5, ratio_weight=3.0)(**given_rows(model))
    torch.testing.assert_close(made["loss"].detach(), 0.5 * made["causal"] + 3.0 * made["ratio"])
    kept = made["kept"].tolist()
    assert len(kept) == 3 and 1 > kept[0] > kept[1] > kept[2] > 0, "what has left does not come back (eq. 10)"


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_hints_reach_the_scores_where_they_are_asked_for(share: float) -> None:
    model = tiny.model()
    wanted = torch.zeros(2, tiny.TOKENS, dtype=torch.int8)
    wanted[:, ::2] = 1
    plain = softened(model, share=share)(**given_rows(model), wanted=wanted)
    assert "hint" not in plain
    made = softened(model, share=share, hint_weight=0.5)(**given_rows(model), wanted=wanted)
    torch.testing.assert_close(made["loss"].detach(), plain["loss"].detach() + 0.5 * made["hint"])
    assert "hint" not in softened(model, hint_weight=0.5)(**given_rows(model)), "rows that do not know say nothing"


def read_by(model: Any, answers: bool) -> list[Tensor]:
    """The text masks that the modules are given."""
    made, seen = softened(model, answers=answers), []

    def watch(gates: LVPruningModules, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[3])

    made.gates.register_forward_pre_hook(watch)
    made(**given_rows(model))
    return seen


def test_modules_read_the_prompt_and_the_answers_when_told_to() -> None:
    model = tiny.model()
    prompt, everything = read_by(model, False), read_by(model, True)
    assert [mask.sum(dim=1).tolist() for mask in prompt] == [[4, 8]] * 3
    assert [mask.sum(dim=1).tolist() for mask in everything] == [[7, 11]] * 3


def test_answers_do_not_reach_the_decisions_unless_asked() -> None:
    model = tiny.model()
    given = given_rows(model)
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][:, -1] = 7
    assert torch.equal(softened(model)(**given)["kept"], softened(model)(**other)["kept"])


def test_a_limit_cuts_what_one_decision_can_ask_for() -> None:
    model = tiny.model()
    norms = []
    for limit in (None, 1e-6):
        made = softened(model, ratio_weight=0.0, limit=limit)
        made(**given_rows(model))["loss"].backward()
        norms.append(torch.cat([one.grad.flatten() for one in made.parameters()]).norm())
    assert norms[1] < norms[0] / 10


def test_modules_of_another_model_are_refused() -> None:
    model = tiny.model()
    other = tiny.model()
    other.config.text_config.hidden_size = 64
    with pytest.raises(FoveateError, match="hidden_size=32, not 64"):
        Softened(other, for_model(model.config, layers=LAYERS), (0.5, 0.3, 0.1))


def test_a_model_that_takes_no_soft_masks_is_refused_at_once() -> None:
    model = tiny.model()
    gates = for_model(model.config, layers=LAYERS)
    with pytest.raises(FoveateError, match="load the model with dtype=bfloat16, or dtype=float32"):
        Softened(model.half(), gates, (0.5, 0.3, 0.1))


def test_recomputing_is_refused_where_decisions_would_be_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):
        monkeypatch.delattr(PreTrainedModel, "activation_checkpointing_enable")
    monkeypatch.setattr("foveate.train.softened.transformers.__version__", "5.22.2")
    with pytest.raises(
        FoveateError, match=r"checkpointing=True: transformers 5\.22\.2 .* use 5\.23 or newer, or leave"
    ):
        softened(tiny.model(), checkpointing=True)
