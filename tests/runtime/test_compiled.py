"""Compiled decoding on a static cache, one graph for an answer whatever left; and modules compiled by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import tiny
from models.untouched import untouched
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import CompileConfig

import foveate
from foveate import methods
from foveate.core import FoveateError

TOKENS = 64
# Of those that act before the decoder nothing is left by then but a shorter prompt: one that drops, one that merges.
BEFORE = ["fopru", "visionzip"]
INSIDE = [name for name in methods.names() if {part.site for part in methods.get(name).example().parts()} == {"layer"}]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [*BEFORE, *INSIDE])
def test_an_answer_is_one_graph(name: str) -> None:
    """No break, which `fullgraph` refuses, and no second graph on the way, which the first recompilation refuses.

    Nor when the handle is stopped and started again.
    """
    from torch._dynamo.utils import counters

    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    counters.clear()
    handle = foveate.prune(model, methods.get(name).example())
    static = {**options, "cache_implementation": "static", "compile_config": config}
    with torch._dynamo.config.patch(error_on_recompile=True):
        with handle:
            plain = model.generate(**given, **options)
            compiled = model.generate(**given, **static)
        with handle:
            again = model.generate(**given, **static)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert torch.equal(compiled, plain)
    assert torch.equal(again, plain)


def test_every_site_is_here() -> None:
    assert {"fastv", "pyramiddrop", "sparsevlm"} <= set(INSIDE)


# ---------------------------------------------------------------------------------------------------------------------
# modules that somebody has compiled


def around(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: Any) -> Any:
    model.compile(backend="aot_eager")
    return model


def its_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def decoder_around(model: Any) -> Any:
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    return model


def a_block(model: Any) -> Any:
    model.get_decoder().layers[1].compile(backend="eager")
    return model


def tower(model: Any) -> Any:
    model.model.vision_tower = torch.compile(model.model.vision_tower, backend="eager")
    return model


def head(model: Any) -> Any:
    model.lm_head.compile(backend="eager")
    return model


WAYS = (around, in_place, its_forward, decoder_around, a_block, head)


def answered(model: Any, given: dict[str, Tensor]) -> Tensor:
    """Of the prompt, and of the one token that is counted on from it."""
    out = model.generate(**given, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits)


def graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def by_hand(model: Any) -> list[tuple[str, Any, Any, Any]]:
    """Each module with what has been compiled of it."""
    own = ((name, module, vars(module)) for name, module in model.named_modules())
    return [(name, module, one.get("_compiled_call_impl"), one.get("forward")) for name, module, one in own]


def pruned(model: Any, spec: str, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """Logits of an answer and of a direct call, and how many graphs there were behind the answer."""
    from torch._dynamo.utils import counters

    counters.clear()
    with foveate.prune(model, spec) as trace:
        made = answered(model, given)
        compiled = graphs()
        direct = model(**given).logits
    assert len(trace.history) == 2
    assert trace.images[0].stages
    return made, direct, compiled


@pytest.mark.parametrize("compile_it", WAYS)
@torch.no_grad()
def test_a_compiled_model_is_pruned_as_it_was_before(compile_it: Callable[[Any], Any]) -> None:
    """Prompts run as written, tokens of the answer compiled, and all is compiled as before when the handle stops."""
    given = tiny.inputs(tiny.model(), "3i4", "2i1i5", "6")
    wanted = pruned(tiny.model(), "fopru:keep=0.5", given)
    model = compile_it(tiny.model())
    before = by_hand(model)
    with untouched(getattr(model, "_orig_mod", model)):
        got = pruned(model, "fopru:keep=0.5", given)
    torch.testing.assert_close(got[:2], wanted[:2], atol=2e-5, rtol=0)
    # generate() calls what is inside of what was wrapped; nothing is in the head's way.
    assert wanted[2] == 0
    # generate() calls what is inside of a wrapped model, and a linear map is no graph.
    assert got[2] == (compile_it not in (around, head))
    assert by_hand(model) == before


@torch.no_grad()
def test_a_graph_of_the_unpruned_model_is_none_of_the_pruned_one() -> None:
    model = a_block(tiny.model())
    given = tiny.inputs(model, "3i4")
    stock = answered(model, given)
    got = pruned(model, "fopru:keep=0.5", given)
    wanted = pruned(tiny.model(), "fopru:keep=0.5", given)
    torch.testing.assert_close(got[:2], wanted[:2], atol=2e-5, rtol=0)
    torch.testing.assert_close(answered(model, given), stock, atol=2e-5, rtol=0)
    assert not torch.allclose(got[0], stock, atol=1e-3)


@torch.no_grad()
def test_a_compiled_encoder_whose_features_alone_are_read() -> None:
    model, given = tower(tiny.model()), tiny.inputs(tiny.model(), "3i4")
    wanted = pruned(tiny.model(), "divprune:keep=0.5", given)
    got = pruned(model, "divprune:keep=0.5", given)
    torch.testing.assert_close(got[:2], wanted[:2], atol=2e-5, rtol=0)
    assert got[2] == 1


# PEFT asks a model in words that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@torch.no_grad()
def test_a_compiled_adapted_model() -> None:
    given = tiny.inputs(tiny.model(), "3i4")
    config = LoraConfig(r=2, target_modules=r".*q_proj")
    adapted = get_peft_model(tiny.model(), config).eval()
    adapted.compile(backend="eager")
    got = pruned(adapted, "fopru:keep=0.5", given)
    torch.testing.assert_close(got[:2], pruned(tiny.model(), "fopru:keep=0.5", given)[:2], atol=2e-5, rtol=0)


@pytest.mark.parametrize("spec", ["fastv:keep=0.5", "h2o", "fopru:keep=0.5+fastv:keep=0.5"])
@pytest.mark.parametrize(
    ("compile_it", "name"),
    [
        (around, "the model"),
        (its_forward, "the model"),
        (decoder_around, "model.language_model"),
        (a_block, "model.language_model.layers.1"),
    ],
)
def test_hooks_inside_a_graph_are_refused(compile_it: Callable[[Any], Any], name: str, spec: str) -> None:
    with pytest.raises(FoveateError) as error:
        foveate.prune(compile_it(tiny.model()), spec)
    assert str(error.value) == (
        f"{name} is compiled by torch.compile, and {spec.rpartition('+')[2]} acts inside the decoder while it answers, "
        "which a graph has no place for; give the model as it was before torch.compile, or use a method that acts "
        "before the decoder, such as fopru"
    )


@pytest.mark.parametrize("spec", ["fopru:keep=0.5", "tome:keep=9"])
def test_a_compiled_encoder_that_is_read_is_refused(spec: str) -> None:
    with pytest.raises(FoveateError) as error:
        foveate.prune(tower(tiny.model()), spec)
    assert str(error.value) == (
        f"model.vision_tower is compiled by torch.compile, and {spec} looks into the encoder, which a graph does not "
        "show; give that module as it was before torch.compile, or use a method that reads the features alone, such as "
        "divprune"
    )


def test_what_is_compiled_between_prune_and_start() -> None:
    model = tiny.model()
    handle = foveate.prune(model, "fastv:layer=2,keep=0.5")
    model.compile(backend="eager")
    with pytest.raises(FoveateError, match=r"the model is compiled by torch\.compile, and fastv"):
        handle.start()
    assert not handle.active
    assert not hasattr(model, "_foveate_handle")


@torch.no_grad()
def test_a_graph_that_prune_was_not_shown() -> None:
    """What torch.compile() was given is pruned; what it returned would run as if nothing were."""
    model = tiny.model()
    compiled = torch.compile(model, backend="eager")
    given = tiny.inputs(model, "3i4")
    wanted = pruned(tiny.model(), "fopru:keep=0.5", given)
    torch.testing.assert_close(pruned(model, "fopru:keep=0.5", given)[:2], wanted[:2], atol=2e-5, rtol=0)
    with foveate.prune(model, "fopru:keep=0.5"), pytest.raises(FoveateError) as error:
        compiled(**given)
    assert str(error.value) == (
        "this pruned LlavaForConditionalGeneration was called through torch.compile, and prune() was given the model "
        "without it, so that it would run unpruned; give prune() what torch.compile has returned, or stop() the handle "
        "first"
    )
