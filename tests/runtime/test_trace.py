"""What the trace says of a call: counts, places, costs, times; as text and as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from models import tiny
from models.doubles import Ragged
from torch import Tensor

import foveate
from foveate import FoPru, FoveateError, Pool, Random, cost
from foveate.runtime.seams import CACHE
from foveate.trace import Trace

ROWS = ("3i4", "2i1i5", "6", "1i")


def traced(model: Any, given: dict[str, Tensor], method: Any, **options: Any) -> Trace:
    with foveate.prune(model, method) as trace:
        model.generate(**given, **{"max_new_tokens": 2, **options})
    return trace


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("method", [Random(keep=0.25), Ragged(), Random(keep=1.0), Pool(keep=0.25)])
@torch.no_grad()
def test_places_lead_back_to_the_callers_prompt(method: Any, padding: str) -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS, padding=padding)
    shortened: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda module, ids: shortened.append(ids[0]))
    with foveate.prune(model, method) as trace:
        model(**given)
    hook.remove()
    index = trace.index
    own = index >= 0
    assert index.shape == shortened[-1].shape == (4, trace.length)
    assert torch.equal(given["input_ids"].gather(1, index.clamp(min=0))[own], shortened[-1][own])
    assert given["attention_mask"].gather(1, index.clamp(min=0))[own].all(), "-1 stands for all padding, old and new"
    for row, places in enumerate(index):
        mine = places[places >= 0]
        assert mine.unique().numel() == mine.numel()
        first = int(given["attention_mask"][row].argmax())
        text = (given["input_ids"][row] != tiny.IMAGE) & given["attention_mask"][row].bool()
        assert mine.numel() == text.sum() + sum(image.after for image in trace.images if image.row == row)
        columns = (given["input_ids"][row] == tiny.IMAGE).nonzero().squeeze(-1)
        for number, image in enumerate(image for image in trace.images if image.row == row):
            kept = columns[number * tiny.TOKENS : (number + 1) * tiny.TOKENS][image.kept]
            assert set(kept.tolist()) <= set(mine.tolist())
        assert int(mine.min()) == first


def test_counts_and_rows() -> None:
    model = tiny.model()
    trace = traced(model, tiny.inputs(model, *ROWS), [Random(keep=0.5), FoPru(keep=7)])
    assert [image.row for image in trace.images] == [0, 1, 1, 3]
    assert [image.original for image in trace.images] == [36] * 4
    assert [image.grid for image in trace.images] == [tiny.GRID] * 4
    for image in trace.images:
        first, second = image.stages
        assert (first.method, first.site, first.layer) == ("random:keep=0.5", "input", None)
        assert second.method == "fopru:keep=7"
        assert (first.before, first.after, second.before, second.after) == (36, 18, 18, 7)
        assert image.after == 7
        assert torch.equal(image.kept, second.kept)
        assert image.kept.device.type == "cpu"
    assert trace.prompt_length == 80
    assert trace.length == 2 + 7 + 1 + 7 + 5
    assert trace.text == (7 + 8 + 6 + 1) / 4
    assert trace.budget.tokens == (7.0,) * 4
    assert trace.budget.equivalent_tokens == 7.0
    assert trace.unpruned.equivalent_tokens == 36.0


@pytest.mark.parametrize("decoder", ["llama", "qwen3"])
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_operations_are_those_of_the_arithmetic(tower: str, decoder: str) -> None:
    """Every row by itself, without padding: its tokens through the decoder, its pictures through the encoder."""
    model = tiny.model(decoder=decoder, tower=tower)
    given = tiny.inputs(model, *ROWS)
    shape = cost.shape(model.config)
    trace = traced(model, given, Ragged())
    words, pictures = [7, 8, 6, 1], [1, 2, 0, 1]

    def expected(counts: list[int]) -> int:
        total = 0
        for row in range(4):
            total += cost.decoder_flops(shape.decoder, lengths=[words[row] + counts[row]] * 4, convention="roofline")
            total += cost.tower_flops(shape.tower, convention="roofline", tiles=pictures[row])
            total += cost.projector_flops(shape.projector, tokens=36 * pictures[row])
        return total

    kept = [sum(image.after for image in trace.images if image.row == row) for row in range(4)]
    assert trace.budget.prefill_flops == expected(kept)
    assert trace.unpruned.prefill_flops == expected([36 * number for number in pictures])
    assert trace.budget.kv_bytes == cost.kv_bytes(shape.decoder, [trace.length] * 4, 4, batch=4)
    assert trace.unpruned.kv_bytes == cost.kv_bytes(shape.decoder, [80] * 4, 4, batch=4)


def test_operations_of_one_picture_are_those_of_a_plan() -> None:
    model = tiny.model()
    trace = traced(model, tiny.inputs(model, "3i4"), FoPru(keep=0.25))
    shape = cost.shape(model.config)
    visual = cost.visual_per_layer(FoPru(keep=0.25), 36, 4)
    assert trace.budget.tokens == visual
    planned = cost.prefill_flops(shape, visual=visual, text=7, convention="roofline", tower=True)
    assert trace.budget.prefill_flops == planned


def test_history_and_what_the_trace_shows_of_the_latest_call() -> None:
    model = tiny.model()
    with foveate.prune(model, Random(keep=9)) as trace:
        assert trace.history == []
        assert str(trace) == "nothing pruned yet"
        with pytest.raises(
            FoveateError, match="nothing has been pruned yet: the trace fills when the model sees a prompt"
        ):
            _ = trace.images
        model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=1)
        first = trace.latest
        model.generate(**tiny.inputs(model, "2i1i5"), max_new_tokens=1)
        with torch.no_grad():
            model(**tiny.inputs(model, "i9"))
    assert len(trace.history) == 3
    assert trace.history[0] is first
    assert [call.prompt_length for call in trace.history] == [43, 80, 45]
    assert trace.prompt_length == 45
    with pytest.raises(AttributeError, match="Trace has no attribute 'nonsense'"):
        _ = trace.nonsense
    assert trace.milliseconds > 0


def test_a_step_of_the_answer_is_no_call() -> None:
    model = tiny.model()
    with foveate.prune(model, Random(keep=9)) as trace, torch.no_grad():
        out = model(**tiny.inputs(model, "3i4"))
        model(input_ids=torch.tensor([[5]]), **{CACHE: getattr(out, CACHE)})
        model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=5, num_beams=2)
    assert len(trace.history) == 2


def test_the_history_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trace, "history_limit", 3)
    model = tiny.model()
    with foveate.prune(model, Random(keep=9)) as trace:
        for words in range(1, 6):
            model.generate(**tiny.inputs(model, f"{words}i4"), max_new_tokens=1)
    assert [call.prompt_length for call in trace.history] == [43, 44, 45]


def test_text_for_people() -> None:
    model = tiny.model()
    one = str(traced(model, tiny.inputs(model, "3i4"), FoPru(keep=0.25)))
    assert one.startswith("36 -> 9 tokens | prefill ")
    # 2 kv heads of 8, keys and values, 4 bytes, 4 layers, 43 and 16 entries
    assert " | KV 22 kB -> 8.19 kB | choosing " in one
    two = str(traced(model, tiny.inputs(model, "2i1i5"), [FoPru(keep=0.5), FoPru(keep=0.25)]))
    assert two.startswith("36 -> 18 -> 9 tokens in each of 2 images | ")
    ragged = traced(model, tiny.inputs(model, *ROWS), Ragged())
    counts = [image.after for image in ragged.images]
    assert str(ragged).startswith("; ".join(f"36 -> {count}" for count in counts) + " tokens | ")


def test_json_holds_everything_but_the_tensors() -> None:
    model = tiny.model()
    trace = traced(model, tiny.inputs(model, *ROWS), [Random(keep=0.5), FoPru(keep=7)])
    stored = json.loads(json.dumps(trace.to_dict()))
    assert stored["prompt_length"] == 80
    assert stored["length"] == trace.length
    assert stored["kv_lengths"] == list(trace.kv_lengths)
    assert stored["budget"] == json.loads(json.dumps(trace.budget.to_dict()))
    assert stored["unpruned"]["equivalent_tokens"] == 36.0
    assert stored["milliseconds"] == pytest.approx(trace.milliseconds)
    assert [image["row"] for image in stored["images"]] == [0, 1, 1, 3]
    assert stored["images"][2]["stages"][1] == {
        "method": "fopru:keep=7",
        "site": "input",
        "layer": None,
        "before": 18,
        "after": 7,
        "kept": trace.images[2].kept.tolist(),
    }


def test_tokens_that_are_not_to_be_drawn_are_marked() -> None:
    from models.doubles import Answer

    from foveate.core import Selection, Signals

    def answer(signals: Signals) -> Selection:
        features = [torch.zeros(2, 32)] * signals.shape[0]
        extra = [torch.tensor([False, True])] * signals.shape[0]
        return Selection([row[[4, 35]] for row in signals.index], features=features, extra=extra)

    model = tiny.model()
    trace = traced(model, tiny.inputs(model, "3i4"), Answer(answer=answer))
    assert trace.images[0].extra.tolist() == [False, True]
    assert trace.images[0].kept.tolist() == [4, 35]


@pytest.mark.parametrize(("family", "keeps"), [("llava-1.5", False), ("qwen2.5-vl", True), ("internvl", False)])
def test_whether_a_raster_has_the_pictures_proportions(family: str, keeps: bool) -> None:
    model = tiny.model(family)
    trace = traced(model, tiny.inputs(model, "2i3"), Random(keep=0.5))
    assert [image.proportional for image in trace.images] == [keeps]
