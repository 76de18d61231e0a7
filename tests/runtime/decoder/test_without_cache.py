"""Methods on the cache in calls that have none: what else was asked for acts, and the trace says what did not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from models.untouched import untouched

import foveate
from foveate.core import FoveateError
from foveate.runtime.decoder.evict import Evictor
from foveate.runtime.seams import CACHE

NOTE = "h2o:heavy=0.5,recent=0.5 has nothing to do: this call has no cache"
COMPOSED = {
    "image_text_interaction:keep=9": "image_text_interaction:keep=9,visual_only=true",
    "fopru:keep=0.25+h2o:heavy=0.5,recent=0.5": "fopru:keep=0.25",
}
each_composed = pytest.mark.parametrize("method", COMPOSED)


def recomputing() -> Any:
    """A model in training whose layers are computed anew for their gradients, so that nothing is cached."""
    model = tiny.model(blocks=6)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its name from 5.23 on
    return model.train()


@each_composed
def test_a_direct_call_without_cache_is_that_of_the_other_part(method: str) -> None:
    model = tiny.model(blocks=6)
    given = tiny.inputs(model, "3i4", "2i9")
    with untouched(model), foveate.prune(model, method) as trace:
        logits = model(**given, use_cache=False).logits
        assert trace.notes == (NOTE,) and trace.to_dict()["notes"] == [NOTE]
        assert str(trace).endswith(f" | {NOTE}")
        cached = model(**given, use_cache=True).logits
        assert trace.notes == () and NOTE not in str(trace)
    with foveate.prune(model, COMPOSED[method]) as trace:
        assert torch.equal(model(**given, use_cache=False).logits, logits)
        assert trace.notes == ()
    torch.testing.assert_close(cached, logits, msg="what leaves the cache leaves it after the layer has seen it")


@each_composed
def test_an_answer_without_cache_is_that_of_the_other_part(method: str) -> None:
    model = tiny.model(blocks=6)
    given = tiny.inputs(model, "3i4")
    answers = []
    for one in (method, COMPOSED[method]):
        with untouched(model), foveate.prune(model, one) as trace:
            answers.append(model.generate(**given, max_new_tokens=5, do_sample=False, use_cache=False))
        assert trace.notes == ((NOTE,) if one == method else ())
    assert torch.equal(*answers)


@each_composed
@pytest.mark.parametrize("given_cache", [None, True])
def test_training_with_recomputed_layers_is_that_of_the_other_part(
    method: str, given_cache: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the layers are computed anew, when the call is long over."""
    evicted: list[int] = []
    monkeypatch.setattr(Evictor, "after_layer", lambda self, number, *_: evicted.append(number))
    gradients = []
    for one in (method, COMPOSED[method]):
        model = recomputing()
        given = tiny.inputs(model, "3i4")
        handle = foveate.prune(model, one)
        with handle as trace:
            output = model(**given, labels=given["input_ids"], use_cache=given_cache)
            output.loss.backward()
            assert trace.notes == ((NOTE,) if one == method else ())
            assert getattr(output, CACHE) is None or getattr(output, CACHE).get_seq_length() == 0
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert not evicted and len(gradients[0]) > 20
    for name, value in gradients[0].items():
        assert torch.equal(value, gradients[1][name]), name


@pytest.mark.parametrize("method", ["h2o", "snapkv"])
def test_where_nothing_else_would_be_pruned_it_is_refused_before_any_work(method: str) -> None:
    model = tiny.model(blocks=6)
    given = tiny.inputs(model, "3i4")
    reached: list[int] = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: reached.append(1))
    message = "acts on the cache, and use_cache=False leaves it no place, nor does .*; nothing would be pruned"
    with foveate.prune(model, method) as trace:
        for call in (model, model.generate):
            with pytest.raises(FoveateError, match=message):
                call(**given, use_cache=False)
        model.train()
        with pytest.raises(FoveateError, match=message):
            model(**given)
        model.eval()
        assert not reached and not trace.history
        model(**given)
        assert trace.notes == ()
    hook.remove()
    model = recomputing()
    with foveate.prune(model, method), pytest.raises(FoveateError, match=message):
        model(**given, use_cache=True)
