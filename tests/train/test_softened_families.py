"""Training's forward pass on every family: what is visual, soft masks as removal, gradients, fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from models import tiny, tiny_families
from models.untouched import untouched
from references import family_reference
from references.halving import LAYERS, TOLERANCE, Halving, stays
from torch import Tensor

import foveate
from foveate.core import FoveateError, Grid, Method, Selection, Signals
from foveate.families.rows import FAMILIES
from foveate.modules.lvpruning import for_model, load, save
from foveate.runtime.decoder.soften import look
from foveate.train.losses import IGNORED
from foveate.train.softened import Pass, Rows, Softened, thinned, whole_rows

EVERY = (*tiny.FAMILIES, *(name for name in tiny_families.KINDS if "/" in name))
ROWS = ("3i4", "2i1i5")
ANSWER = 3  # last tokens of a row
# Where the small ones of a family take no method inside the decoder, a larger one stands for it.
CLOSED = tuple(family.name for family in FAMILIES if family.closed_decoder is not None)
OPEN = tuple(name for name in EVERY if name not in CLOSED)
each_family = pytest.mark.parametrize("name", EVERY)
each_open = pytest.mark.parametrize("name", OPEN)


@dataclass(eq=False)
class Batch:
    """What training is given of some rows, and what stock transformers is given of the same."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    given: dict[str, Tensor]
    rows: Rows
    index: Tensor  # (B, N) number of each visual token within its picture
    stock: dict[str, Tensor]


def batch_of(model: Any, *rows: str, padding: str = "left") -> Batch:
    """Rows whose last tokens are an answer."""
    call = tiny.inputs(model, *(rows or ROWS), padding=padding)
    ids, mask = call["input_ids"], call["attention_mask"]
    labels = torch.full_like(ids, IGNORED)
    for row in range(len(ids)):
        answer = mask[row].nonzero()[-ANSWER:, 0]
        labels[row, answer] = ids[row, answer]
    given = {name: value for name, value in call.items() if name not in ("input_ids", "attention_mask")}
    answered = labels != IGNORED
    seen = look(model, ids, mask, given, answered=answered)
    stock = {**call, "position_ids": seen.positions}
    if model.config.model_type == "paligemma":  # as its processor writes it where it is given the answer
        stock["token_type_ids"] = (answered.cumsum(dim=1) > 0).long()
    with torch.no_grad(), foveate.prune(model, "random:keep=1.0") as trace:
        model(**stock)
    index = torch.zeros(len(ids), int(seen.visual.sum(dim=1).max()), dtype=torch.int64)
    for row in range(len(ids)):
        mine = torch.cat([torch.arange(image.original) for image in trace.images if image.row == row])
        assert mine.numel() == int(seen.visual[row].sum())
        index[row, : mine.numel()] = mine
    return Batch(ids, mask, labels, given, whole_rows(ids, mask, labels, seen), index, stock)


def run(model: Any, batch: Batch, choose: Any, layers: tuple[int, ...] = LAYERS) -> tuple[Tensor, Pass]:
    """(B, L, V) of all places."""
    rows = whole_rows(batch.ids, batch.mask, torch.full_like(batch.ids, IGNORED), batch.rows.seen)
    passing = Pass(batch.mask.bool() & ~rows.seen.holders, rows.seen.visual)
    with torch.no_grad():
        return passing.run(model, layers, choose, rows), passing


@each_family
def test_what_is_visual_is_what_inference_prunes(name: str) -> None:
    """And what takes a placeholder beside it, such as a newline, is neither visual nor text."""
    model = tiny.model(name)
    batch = batch_of(model)
    seen = batch.rows.seen
    assert torch.equal(seen.holders, batch.ids == tiny.IMAGE)
    assert not (seen.visual & ~seen.holders).any()
    has_newlines = name.partition("/")[0] in ("llava-next", "llava-onevision", "llava-next-video")
    assert bool((seen.holders & ~seen.visual).any()) == has_newlines
    if name != "llava-1.5":
        for row in range(len(ROWS)):
            pictures = family_reference.pictures(model, tiny.alone(batch_call(model), row, tiny.IMAGE))
            assert int(seen.visual[row].sum()) == sum(one.visual.numel() for one in pictures)


def batch_call(model: Any) -> Any:
    return tiny.inputs(model, *ROWS)


@each_open
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_dropping_by_mask_equals_removing(name: str, attn: str, padding: str) -> None:
    """The logits of every token that stays to the end, of three stages."""
    model = tiny.model(name, attn=attn)
    batch = batch_of(model, padding=padding)
    with untouched(model):
        soft, passing = run(model, batch, lambda stage, *_: stays(batch.index, stage).float())
    with torch.no_grad(), foveate.prune(model, Halving()):
        really = model(**batch.stock).logits
    left = batch.mask.bool()
    for row, present in enumerate(passing.present):
        left[row, passing.places[row][present & ~stays(batch.index[row], 2)]] = False
    assert (soft - really)[left].abs().max() < TOLERANCE
    with torch.no_grad():
        unpruned = model(**batch.stock, use_cache=False).logits
    assert (unpruned - really)[left].abs().max() > 0.1
    everything, _ = run(model, batch, lambda stage, visual, *_: torch.ones(visual.shape[:2]))
    assert (everything - unpruned)[batch.mask.bool()].abs().max() < TOLERANCE


@pytest.mark.parametrize("name", CLOSED)
def test_a_decoder_that_nothing_can_act_in_is_not_trained(name: str) -> None:
    model = tiny.model(name)
    gates = for_model(model.config, layers=LAYERS, seed=1).train()
    with pytest.raises(FoveateError, match=f"training acts inside the decoder, which {name} does not allow: "):
        Softened(model, gates, (0.5, 0.3, 0.1))


@each_open
def test_both_losses_reach_every_module_and_nothing_else(name: str) -> None:
    found = []
    for checkpointing in (False, True) if hasattr(tiny.model(name), "activation_checkpointing_enable") else (False,):
        model = tiny.model(name)
        batch = batch_of(model)
        gates = for_model(model.config, layers=LAYERS, seed=1).train()
        made = Softened(model, gates, (0.5, 0.3, 0.1), checkpointing=checkpointing)
        made.generator = torch.Generator().manual_seed(5)
        out = made(batch.ids, batch.mask, batch.labels, **batch.given)
        out["loss"].backward()
        for parameter in made.parameters():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
        for stage in gates.stages:
            assert sum(float(one.grad.abs().sum()) for one in stage.parameters()) > 0
        assert all(one.grad is None for one in model.parameters())
        found.append([out["loss"].detach(), *(one.grad for one in made.parameters())])
    for plain, recomputed in zip(found[0], found[-1], strict=True):
        torch.testing.assert_close(plain, recomputed)


@each_open
def test_answers_are_not_seen_before_they_are_given(name: str) -> None:
    """What predicts an answer does not depend on it, whatever looks ahead in the prompt."""
    model = tiny.model(name)
    batch = batch_of(model, "3i4", "2i9")
    first, _ = run(model, batch, lambda stage, visual, *_: torch.ones(visual.shape[:2]))
    batch.ids[:, -ANSWER:] = (batch.ids[:, -ANSWER:] + 1).clamp(2, 90)
    other, _ = run(model, batch, lambda stage, visual, *_: torch.ones(visual.shape[:2]))
    before = batch.mask.bool()
    before[:, -ANSWER:] = False
    torch.testing.assert_close(first[before], other[before], atol=1e-5, rtol=0)
    assert (first[:, -1] - other[:, -1]).abs().max() > 0.1


@each_open
def test_thinning_leaves_tokens_out_as_if_they_had_been_pruned_before_the_decoder(name: str) -> None:
    model = tiny.model(name)
    batch = batch_of(model, "3i4")
    thin = thinned(batch.rows, 0.5, torch.Generator().manual_seed(1))
    # Where its columns stood: those that stay are found by the lot that thinning draws.
    visual = batch.rows.seen.visual
    lot = torch.rand(visual.shape, generator=torch.Generator().manual_seed(1)).where(visual, -1.0)
    keep = round(0.5 * int(visual.sum()))
    chosen = torch.zeros_like(visual).scatter_(1, lot.topk(keep, dim=1).indices, True)
    assert int(thin.seen.visual.sum()) == keep
    numbers = iter(chosen[visual].split([image.original for image in images_of(model, batch)]))

    @dataclass(frozen=True)
    class Left(Method):
        """Left: what thinning left."""

        adaptive: ClassVar[bool] = True

        def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
            return None

        def select(self, signals: Signals) -> Selection:
            return Selection([next(numbers).nonzero()[:, 0] for _ in signals.index])

    passing = Pass(thin.mask.bool() & ~thin.seen.holders, thin.seen.visual)
    with torch.no_grad():
        soft = passing.run(model, LAYERS, lambda stage, seen, *_: torch.ones(seen.shape[:2]), thin)
        with foveate.prune(model, Left()):
            stock = model(**batch.stock).logits
    torch.testing.assert_close(soft[:, -ANSWER:], stock[:, -ANSWER:], atol=TOLERANCE, rtol=0)


def images_of(model: Any, batch: Batch) -> Any:
    with torch.no_grad(), foveate.prune(model, "random:keep=1.0") as trace:
        model(**batch.stock)
    return trace.images


def test_rows_that_cannot_be_are_refused() -> None:
    model = tiny.model("qwen2-vl")
    call = tiny.inputs(model, "3i4")
    ids, mask = call.pop("input_ids"), call.pop("attention_mask")
    types = {"mm_token_type_ids": call["mm_token_type_ids"]}
    with pytest.raises(FoveateError, match="the rows have 24 visual placeholders but no pixel_values were given"):
        look(model, ids, mask, types)
    del call["mm_token_type_ids"]
    with pytest.raises(FoveateError, match="mm_token_type_ids is missing; pass what the processor made"):
        look(model, ids, mask, call)
    call = tiny.inputs(model, "3v4")
    with pytest.raises(FoveateError, match="videos cannot be trained on; give rows with pictures alone"):
        look(model, call.pop("input_ids"), call.pop("attention_mask"), call)
    model = tiny.model("internvl")
    call = tiny.inputs(model, "3i4")
    ids, mask = call.pop("input_ids"), call.pop("attention_mask")
    with pytest.raises(FoveateError, match="placeholders"):
        look(model, ids[:, :-9], mask[:, :-9], call)


@pytest.mark.parametrize("name", ["qwen3-vl", "gemma3", "internvl"])
def test_training_and_inference_choose_the_same_tokens(name: str, tmp_path: Any) -> None:
    """The modules' scores within training's pass, at hard decisions, are those that inference ranks by."""
    model = tiny.model(name)
    batch = batch_of(model, "3i4", "2i9")
    save(for_model(model.config, layers=(1,), ratios=[0.5], seed=1), tmp_path / "lvpruning", "")
    gates = load(tmp_path / "lvpruning").float()
    gaps: list[Tensor] = []

    def choose(stage: int, visual: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        scores = gates(stage, visual, text, mask)
        gaps.append(scores[..., 0] - scores[..., 1])
        return torch.ones(visual.shape[:2])

    _, passing = run(model, batch, choose, (1,))
    method = foveate.LVPruning.from_pretrained(str(tmp_path), keep=(5,))
    with torch.no_grad(), foveate.prune(model, method) as trace:
        model(**batch.stock)
    for image in trace.images:
        mine = gaps[0][image.row][passing.present[image.row]]
        assert image.original == mine.numel()
        kept = torch.zeros(mine.shape, dtype=torch.bool).index_fill(0, image.kept, True)
        assert int(kept.sum()) == 5
        assert mine[kept].min() > mine[~kept].max() - 1e-5
        assert mine[kept].mean() > mine[~kept].mean() + 0.01


def test_pixels_by_their_former_name() -> None:
    """As processors of older versions call them."""
    model = tiny.model("video-llava")
    call = dict(tiny.inputs(model, "3i4"))
    ids, mask = call.pop("input_ids"), call.pop("attention_mask")
    seen = look(model, ids, mask, {"pixel_values_images": call["pixel_values"]})
    wanted = look(model, ids, mask, call)
    assert torch.equal(seen.encoded.pooler_output, wanted.encoded.pooler_output)
    assert int(seen.visual.sum()) == 16
