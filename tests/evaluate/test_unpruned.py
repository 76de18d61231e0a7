"""An unpruned prompt costs what the trace of a pruned one calls unpruned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from models import tiny

from foveate.core import FoveateError
from foveate.evaluate.unpruned import unpruned_budget
from foveate.inference.answers import greedy
from foveate.prune import prune


@pytest.mark.parametrize("prompt", ["2i3", "1i4i6"])
def test_it_is_counted_as_a_trace_counts(prompt: str) -> None:
    model = tiny.model()
    inputs = tiny.inputs(model, prompt)
    with prune(model, "random:keep=4") as trace:
        greedy(model, inputs, max_new_tokens=1)
    assert unpruned_budget(model, inputs, images=prompt.count("i")) == trace.unpruned


@pytest.mark.filterwarnings("ignore:'newcomer' is no family")
def test_of_a_model_without_a_row_the_decoder_is_counted() -> None:
    known, model = tiny.model(), tiny.model()
    model.config.model_type = "newcomer"
    inputs = tiny.inputs(known, "2i3")
    with prune(model, "random:keep=4") as trace:
        greedy(model, inputs, max_new_tokens=1)
    counted = unpruned_budget(model, inputs, images=1)
    assert counted.kv_bytes == trace.unpruned.kv_bytes == unpruned_budget(known, inputs, images=1).kv_bytes
    assert 0 < counted.prefill_flops < unpruned_budget(known, inputs, images=1).prefill_flops


def test_a_model_without_sizes_is_refused() -> None:
    with pytest.raises(FoveateError, match="is no transformers model"):
        unpruned_budget(SimpleNamespace(config={"model_type": "unheard_of"}), {}, images=1)
