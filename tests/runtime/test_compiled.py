"""Compiled decoding on a static cache: one graph for a whole answer, whatever left the prompt and wherever."""

from __future__ import annotations

import pytest
import torch
from models import tiny
from transformers import CompileConfig

import foveate
from foveate import methods

TOKENS = 64
# Of those that act before the decoder nothing is left by then but a shorter prompt: one that drops, one that merges.
BEFORE = ["fopru", "visionzip"]
INSIDE = [name for name in methods.names() if {part.site for part in methods.get(name).example().parts()} == {"layer"}]


@pytest.mark.parametrize("name", [*BEFORE, *INSIDE])
def test_an_answer_is_one_graph(name: str) -> None:
    """No break, which `fullgraph` refuses, and no second graph on the way, which the first recompilation refuses."""
    from torch._dynamo.utils import counters

    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    torch._dynamo.reset()
    counters.clear()
    try:
        with foveate.prune(model, methods.get(name).example()), torch._dynamo.config.patch(error_on_recompile=True):
            plain = model.generate(**given, **options)
            compiled = model.generate(**given, **options, cache_implementation="static", compile_config=config)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
    finally:
        torch._dynamo.reset()
    assert torch.equal(compiled, plain)


def test_every_site_is_here() -> None:
    assert {"fastv", "pyramiddrop", "sparsevlm"} <= set(INSIDE)
