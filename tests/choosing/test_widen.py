"""What leaves a direct call is in the caller's columns: of methods at every site, however padded, in later turns too.

Each row must equal the row alone: by the reference without hooks, and where the encoder shortens by the row's own call
with short outputs, spread over the columns by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from models.doubles import Fixed, Ragged
from references import agreement
from torch import Tensor, nn

import foveate
from foveate import FastV, FoPru, FoveateError, PyramidDrop
from foveate.choosing.widen import chained, speakers, spread
from foveate.runtime.seams import CACHE

ROWS = ("3i4", "2i1i5", "6", "i2")
PADDINGS = ("left", "right", "both")
BY_REFERENCE: dict[str, Any] = {
    "fopru": FoPru(keep=0.25),
    "ragged": Ragged(),
    "another order": Fixed((20, 3, 11), ordered=False),
    "pyramiddrop": PyramidDrop(layers=(1, 2, 3), keep=(0.5, 0.25, 0.125)),
    "fopru+fastv": [FoPru(keep=0.5), FastV(layer=2, keep=0.25)],
    "ragged+pyramiddrop": [Ragged(), PyramidDrop(layers=(1, 3), keep=(0.2, 0.1))],
}
BY_ITSELF: dict[str, Any] = {
    "prumerge": "prumerge:keep=9",
    "tome": "tome:keep=9",
    "tome+fastv": "tome:keep=9+fastv:layer=2,keep=4",
    "vscan": "vscan:keep=8",
    "h2o": "h2o:heavy=0.2,recent=0.2",
    "fopru+snapkv": "fopru:keep=0.5+snapkv",
}
each_padding = pytest.mark.parametrize("padding", PADDINGS)


def inputs(model: Any, padding: str, *rows: str) -> dict[str, Tensor]:
    given = tiny.inputs(model, *rows, padding="left" if padding == "both" else padding)
    return tiny.completed(given, 6, 3, 1, 4) if padding == "both" else given


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_who_speaks_by_hand() -> None:
    index = torch.tensor([[0, 2, 5, 6], [0, 0, 3, 4]])
    filled = torch.tensor([[True, True, True, True], [False, False, True, True]])
    outer = speakers(index, filled, 7)
    assert outer.tolist() == [[0, 0, 1, 1, 1, 2, 3], [-1, -1, -1, 2, 3, 3, 3]]
    # Inside, row 0 loses its place 1 and row 1 its place 3; both are filled up on the left.
    inner = speakers(torch.tensor([[0, 2, 3], [0, 0, 2]]), torch.tensor([[True] * 3, [False, False, True]]), 4)
    assert inner.tolist() == [[0, 0, 1, 2], [-1, -1, 2, 2]]
    both = chained(inner, outer)
    assert both is not None
    assert both.tolist() == [[0, 0, 0, 0, 0, 1, 2], [-1, -1, -1, 2, 2, 2, 2]]
    assert chained(None, outer) is outer and chained(inner, None) is inner and chained(None, None) is None
    values = torch.tensor([[[1.0], [2.0], [3.0]], [[torch.nan], [torch.inf], [6.0]]])
    assert spread(values, both)[..., 0].tolist() == [[1, 1, 1, 1, 1, 2, 3], [0, 0, 0, 6, 6, 6, 6]]
    assert spread(values, None) is values


def test_in_another_order_the_last_one_speaks() -> None:
    assert speakers(torch.tensor([[0, 4, 2, 5]]), torch.ones(1, 4, dtype=torch.bool), 6).tolist() == [
        [0, 0, 2, 2, 2, 3]
    ]


# -- by the reference -------------------------------------------------------------------------------------------------


@each_padding
@pytest.mark.parametrize("name", BY_REFERENCE)
@torch.no_grad()
def test_a_direct_call_equals_the_reference_in_every_column(name: str, padding: str) -> None:
    model = tiny.model(decoder="qwen2")
    given = inputs(model, padding, *ROWS)
    valid = given["attention_mask"].bool()
    places = torch.randint(valid.shape[1], (len(ROWS), 5), generator=torch.Generator().manual_seed(3))
    with foveate.prune(model, BY_REFERENCE[name]) as trace:
        out = model(**given, output_hidden_states=True)
        call = trace.latest
        some = {keep: model(**given, logits_to_keep=keep).logits for keep in (1, 4)}
        shared = model(**given, logits_to_keep=places[0]).logits
        own = model(**given, logits_to_keep=places).logits
        marked = model(**given, logits_to_keep=torch.arange(valid.shape[1]) % 3 == 0).logits
        with pytest.raises(FoveateError, match=rf"logits_to_keep as a mask \(4, {valid.shape[1]}\) joins the columns"):
            model(**given, logits_to_keep=valid)
    assert out.logits.shape[:2] == valid.shape
    for row, prompt in enumerate(agreement.prompts(model, given, call)):
        logits, states = agreement.direct(model, prompt, int(valid[row].sum()))
        torch.testing.assert_close(out.logits[row, valid[row]], logits, atol=agreement.TOLERANCE, rtol=0)
        for got, expected in zip(out.hidden_states, states, strict=True):
            torch.testing.assert_close(got[row, valid[row]], expected, atol=agreement.TOLERANCE, rtol=0)
    # The head sees other rows together, which it may round in another way.
    for keep, got in some.items():
        torch.testing.assert_close(got, out.logits[:, -keep:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared, out.logits[:, places[0]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own, out.logits[torch.arange(len(ROWS))[:, None], places], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(marked, out.logits[:, ::3], atol=1e-5, rtol=1e-5)


@each_padding
@pytest.mark.parametrize("name", BY_ITSELF)
@torch.no_grad()
def test_a_direct_call_equals_each_rows_own_in_every_column(name: str, padding: str) -> None:
    model = tiny.model(blocks=6)
    given = inputs(model, padding, *ROWS)
    valid = given["attention_mask"].bool()
    with foveate.prune(model, BY_ITSELF[name]):
        together = model(**given).logits
    with foveate.prune(model, BY_ITSELF[name], short_outputs=True) as trace:
        for row in (0, 1, 3):
            alone = model(**tiny.alone(given, row, tiny.IMAGE)).logits[0]
            expected = agreement.in_columns(alone, trace.index[0], int(valid[row].sum()))
            torch.testing.assert_close(together[row, valid[row]], expected, atol=agreement.TOLERANCE, rtol=0)
    words = tiny.alone(given, 2, tiny.IMAGE)
    expected = model(**words).logits[0]
    torch.testing.assert_close(together[2, valid[2]], expected, atol=agreement.TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["fopru", "fopru+fastv", "pyramiddrop"])
@torch.no_grad()
def test_later_turns_have_their_own_columns(name: str) -> None:
    """A second picture for each row, then words: every call answers in the columns that it was given."""
    model = tiny.model()
    said = (("3i4", "2i9"), ("2i3", "1i4"), ("4", "4"))
    turns = [tiny.inputs(model, *rows, seed=seed) for seed, rows in enumerate(said)]
    ids, mask = (torch.cat([turn[key] for turn in turns], dim=1) for key in ("input_ids", "attention_mask"))
    reached, answers, cache = 0, [], None
    with foveate.prune(model, BY_REFERENCE[name]) as trace:
        for turn in turns:
            reached += turn["input_ids"].shape[1]
            out = model(**{**turn, "attention_mask": mask[:, :reached]}, use_cache=True, **{CACHE: cache})
            cache = getattr(out, CACHE)
            answers.append(out.logits)
    pictures = torch.stack([turn["pixel_values"] for turn in turns[:2]], dim=1).flatten(0, 1)
    whole = {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures}
    logits, valid = torch.cat(answers, dim=1), mask.bool()
    assert logits.shape[:2] == ids.shape
    for row, prompt in enumerate(agreement.prompts(model, whole, *trace.history)):
        expected, _ = agreement.direct(model, prompt, int(valid[row].sum()))
        torch.testing.assert_close(logits[row, valid[row]], expected, atol=agreement.TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["fopru", "fopru+fastv"])
@torch.no_grad()
def test_no_more_than_the_columns_asked_for_go_through_the_head(name: str) -> None:
    model = tiny.model()
    given = inputs(model, "both", *ROWS)
    seen: list[torch.Size] = []
    model.lm_head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape))
    with foveate.prune(model, BY_REFERENCE[name]):
        model(**given, logits_to_keep=4)
        model(**given, logits_to_keep=torch.tensor([3, 8]))
    assert seen == [(4, 4, 32), (4, 2, 32)]


# -- the loss ---------------------------------------------------------------------------------------------------------


@each_padding
@pytest.mark.parametrize("name", [*BY_REFERENCE, "tome+fastv"])
def test_the_loss_and_its_gradients_are_those_of_the_short_prompt(name: str, padding: str) -> None:
    model = tiny.model()
    given = inputs(model, padding, *ROWS)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)  # pictures among them
    if name == "another order":  # ... but where they change places, each is predicted from elsewhere
        labels = labels.masked_fill(labels == tiny.IMAGE, -100)
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    losses, gradients = [], []
    for short, more in ((True, {}), (False, {}), (False, {"shift_labels": shifted})):
        with foveate.prune(model, {**BY_REFERENCE, **BY_ITSELF}[name], short_outputs=short):
            loss = model(**given, labels=labels, **more).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
        model.zero_grad()
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], atol=0, rtol=1e-6)  # the sum may be rounded in another way
        assert gradient.keys() == gradients[0].keys()
        for key, one in gradient.items():
            torch.testing.assert_close(one, gradients[0][key], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize("name", ["fopru", "fopru+fastv"])
def test_a_trainer_evaluates_in_the_callers_columns(name: str, tmp_path: Path) -> None:
    """`compute_metrics` finds what predicts each label one column before it, as unpruned."""
    from transformers import Trainer, TrainingArguments

    model = tiny.model()
    rows = [tiny.inputs(model, layout, seed=seed) for seed, layout in enumerate(("3i4", "2i9", "1i7"))]

    def collate(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        longest = max(one["input_ids"].shape[1] for one in batch)
        made = {
            key: torch.cat([nn.functional.pad(one[key], (0, longest - one[key].shape[1])) for one in batch])
            for key in ("input_ids", "attention_mask")
        }
        ids = made["input_ids"]
        labels = ids.masked_fill((ids == tiny.IMAGE) | (ids == tiny.PAD), -100)
        return {**made, "labels": labels, "pixel_values": torch.cat([one["pixel_values"] for one in batch])}

    found: list[tuple[Tensor, Tensor]] = []

    def metrics(predicted: Any) -> dict[str, float]:
        found.append((torch.from_numpy(predicted.predictions[0]), torch.from_numpy(predicted.label_ids)))
        return {}

    settings = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=3,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=settings, eval_dataset=rows, data_collator=collate, compute_metrics=metrics)
    with foveate.prune(model, BY_REFERENCE[name]) as trace:
        result = trainer.evaluate()
    ((logits, labels),) = found
    assert logits.shape[:2] == labels.shape
    total, count = 0.0, 0
    for row, prompt in enumerate(agreement.prompts(model, collate(rows), trace.latest)):
        length = rows[row]["input_ids"].shape[1]
        expected, _ = agreement.direct(model, prompt, length)
        torch.testing.assert_close(logits[row, :length], expected, atol=agreement.TOLERANCE, rtol=0)
        total += float(nn.functional.cross_entropy(expected[:-1], labels[row, 1:length], reduction="sum"))
        count += int((labels[row, 1:length] != -100).sum())
    assert result["eval_loss"] == pytest.approx(total / count, abs=1e-4)
