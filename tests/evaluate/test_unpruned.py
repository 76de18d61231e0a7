"""An unpruned prompt costs what the trace of a pruned one calls unpruned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny

from foveate.core import FoveateError
from foveate.evaluate.answers import greedy
from foveate.evaluate.unpruned import unpruned_budget
from foveate.prune import prune


@pytest.mark.parametrize("prompt", ["2i3", "1i4i6"])
def test_it_is_counted_as_a_trace_counts(prompt: str) -> None:
    model = tiny.model()
    inputs = tiny.inputs(model, prompt)
    with prune(model, "random:keep=4") as trace:
        greedy(model, inputs, max_new_tokens=1)
    assert unpruned_budget(model, inputs, images=prompt.count("i")) == trace.unpruned


def test_a_model_of_unknown_sizes_is_refused() -> None:
    model = SimpleNamespace(config={"model_type": "unheard_of"})
    with pytest.raises(FoveateError, match="the shape of a 'unheard_of' model is not known"):
        unpruned_budget(model, {}, images=1)
