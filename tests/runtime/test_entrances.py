"""Every way into a model: each public module above the decoder's layers prunes, or refuses at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny
from models.untouched import untouched
from torch import Tensor
from transformers import ImageTextToTextPipeline
from transformers.generation.continuous_batching import ContinuousMixin

import foveate
from foveate import FoveateError
from foveate.runtime.seams import CACHE

ROWS = ("3i4", "2i1i5", "6")
METHODS = ("tome:keep=0.5", "fopru:keep=0.5", "fastv:layer=1,keep=0.5", "h2o:heavy=0.2,recent=0.2")
each_method = pytest.mark.parametrize("method", METHODS)


def head(model: Any, out: Any) -> Tensor:
    """Logits of what a base model gives."""
    return model.get_output_embeddings()(out.last_hidden_state)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_the_base_model_of_every_family(family: str) -> None:
    """As embedders, reward heads and losses that are fused with the head call it."""
    model = tiny.model(family)
    given = tiny.inputs(model, "3i4", "2i6")
    with untouched(model), foveate.prune(model, "random:keep=0.5") as trace:
        expected = model(**given, use_cache=False)
        out = model.base_model(**given, use_cache=False)
        assert len(trace.history) == 2
        first, second = trace.history
        assert [image.after for image in first.images] == [image.after for image in second.images]
        again = model(**given, use_cache=False)
    assert torch.equal(again.logits, expected.logits)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    logits = head(model, out)
    logits = torch.tanh(logits / cap) * cap if cap else logits
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)


@each_method
@pytest.mark.parametrize("family", ["llava-1.5", "qwen2.5-vl"])
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_the_base_model_with_methods_at_every_site(padding: str, family: str, method: str) -> None:
    model = tiny.model(family)
    given = tiny.inputs(model, *ROWS, padding=padding)
    with untouched(model), foveate.prune(model, method) as trace:
        expected = model(**given).logits
        out = model.model(**given)
        assert len(trace.history) == 2
        by_position = model.model(
            given["input_ids"], **{name: one for name, one in given.items() if name != "input_ids"}
        )
    torch.testing.assert_close(head(model, out), expected, atol=1e-5, rtol=0)
    assert torch.equal(by_position.last_hidden_state, out.last_hidden_state)


@each_method
@torch.no_grad()
def test_decoding_by_hand_with_the_base_model(method: str) -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")

    def loop(call: Callable[..., Any], logits: Callable[[Any], Tensor]) -> Tensor:
        out = call(**given, use_cache=True)
        found = [logits(out)[:, -1]]
        for word in (7, 8, 9):
            cache = {CACHE: out[CACHE]}
            out = call(input_ids=torch.tensor([[word]]), **cache)
            found.append(logits(out)[:, -1])
        return torch.stack(found)

    with foveate.prune(model, method):
        expected = loop(model, lambda out: out.logits)
        got = loop(model.model, lambda out: head(model, out))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_call_past_the_hooks_of_the_model() -> None:
    """Some wrappers call `forward` by name."""
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    with foveate.prune(model, "fastv:layer=1,keep=0.5") as trace:
        expected = model(**given).logits
        got = model.forward(**given).logits
        assert len(trace.history) == 2
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_loss_on_the_base_model_reaches_the_encoder() -> None:
    model = tiny.model().train()
    given = tiny.inputs(model, "3i4")
    with foveate.prune(model, "fopru:keep=0.5"):
        model.model(**given).last_hidden_state.square().mean().backward()
    assert model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad.abs().max() > 0


# -- the decoder by itself --------------------------------------------------------------------------------------------


@each_method
@torch.no_grad()
def test_the_decoder_refuses_what_may_be_visual(method: str) -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    embeddings = model.get_input_embeddings()(given["input_ids"])
    words = torch.tensor([[5, 6, 7]])
    expected = model.get_decoder()(words).last_hidden_state
    message = (
        "LlamaModel of this pruned model was called by itself, where nothing says what is visual, so it would run "
        "unpruned; call the LlavaForConditionalGeneration or LlavaModel around it with input_ids and pixel_values, or"
    )
    with untouched(model), foveate.prune(model, method) as trace:
        logits = model(**given).logits
        with pytest.raises(FoveateError, match=message):
            model.get_decoder()(inputs_embeds=embeddings)
        with pytest.raises(FoveateError, match=message):
            model.model.language_model(given["input_ids"])
        assert torch.equal(model.get_decoder()(words).last_hidden_state, expected), "words are words"
        assert len(trace.history) == 1
        assert torch.equal(model(**given).logits, logits)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_the_decoder_of_every_family_refuses_embeddings(family: str) -> None:
    model = tiny.model(family)
    embeddings = model.get_input_embeddings()(tiny.inputs(model, "6")["input_ids"])
    name = type(model.get_decoder()).__name__
    with foveate.prune(model, "random:keep=0.5"), pytest.raises(FoveateError, match=f"{name} of this pruned model was"):
        model.get_decoder()(inputs_embeds=embeddings)


# -- continuous batching ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused_at_once(name: str) -> None:
    model = tiny.model()
    ids = tiny.inputs(model, "3i4")["input_ids"][0].tolist()
    stock = getattr(model, name)
    arguments = {"inputs": [ids]} if name == "generate_batch" else {}
    with untouched(model), foveate.prune(model, "fopru:keep=0.5"):
        with pytest.raises(FoveateError, match="continuous batching takes ids alone, so that no picture reaches this"):
            getattr(model, name)(**arguments)
        assert getattr(model, name).__name__ == name
    assert getattr(model, name) == stock


def test_no_other_way_into_continuous_batching_is_known() -> None:
    known = {"generate_batch", "init_continuous_batching", "continuous_batching_context_manager"}
    closes = {"destroy_cached_continuous_batching_manager"}
    public = {
        name for name in vars(ContinuousMixin) if not name.startswith("_") and callable(vars(ContinuousMixin)[name])
    }
    assert public - closes <= known, "what is new in transformers must prune or be refused"


# -- pipelines --------------------------------------------------------------------------------------------------------


def test_a_pipeline_is_pruned_as_its_model() -> None:
    """Which brings the processor that some methods read the question with."""
    from PIL import Image

    model = tiny.model()
    pipeline = ImageTextToTextPipeline(model=model, processor=tiny.processor(model))
    picture = Image.effect_mandelbrot((30, 40), (-2, -1, 1, 1), 50).convert("RGB")
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "w5 w6 w7"}]}]
    options: dict[str, Any] = {"max_new_tokens": 4, "return_full_text": False}
    with foveate.prune(model, "fopru:keep=0.25"):
        expected = pipeline(text=chat, **options)
    with untouched(model), foveate.prune(pipeline, "fopru:keep=0.25") as trace:
        assert pipeline(text=chat, **options) == expected
    assert trace.images[0].after == 9
    handle = foveate.prune(pipeline, "trim:keep=9", clip=tiny.clip(model))
    with handle:
        assert pipeline(text=chat, **options)
        with pytest.raises(FoveateError, match="another handle already prunes this model"):
            foveate.prune(model, "random").start()
        foveate.restore(pipeline)
    assert not handle.active
