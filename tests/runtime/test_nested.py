"""The model called from inside one of its own calls: each is what it would be by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny
from models.untouched import untouched
from torch import Tensor
from transformers import CompileConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import foveate
from foveate import FoveateError
from foveate.runtime.seams import CACHE

STEPS = 3
FAMILIES = ("llava-1.5", "qwen2.5-vl", "internvl")
# Inside the encoder (dropping, merging), behind it, inside the decoder (one stage, three), on the cache, and several.
METHODS = (
    "image_text_interaction:where=2,attention=received,keep=0.5",
    "tome:keep=0.5",
    "fopru:keep=0.5",
    "fastv:layer=1,keep=0.5",
    "pyramiddrop:layers=1/2/3,keep=0.5/0.3/0.2",
    "h2o:heavy=0.2,recent=0.2",
    "fopru:keep=0.5+fastv:layer=1,keep=0.25+h2o:heavy=0.3,recent=0.2",
)
each_method = pytest.mark.parametrize("method", METHODS)


def generate(model: Any, given: dict[str, Tensor], **options: Any) -> Any:
    return model.generate(**given, max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True, **options)


class Calls(LogitsProcessor):
    """Calls something before every word, as contrastive decoding does."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.found = call, []  # type: ignore[var-annotated]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.found.append(self.call())
        return scores


def assert_same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))


@each_method
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_call_for_each_word_is_what_it_is_by_itself(family: str, method: str) -> None:
    model = tiny.model(family)
    given, other = tiny.inputs(model, "3i4"), tiny.inputs(model, "2i6", "1i2i3", seed=9)
    with untouched(model):
        unpruned = model(**other).logits
        with foveate.prune(model, method) as trace:
            alone, expected = model(**other).logits, generate(model, given)
            single, whole = trace.history
            nested = Calls(lambda: model(**other).logits)
            out = generate(model, given, logits_processor=[nested])
    assert_same(out, expected)
    assert len(nested.found) == STEPS
    assert all(torch.equal(one, alone) for one in nested.found)
    if "h2o" not in method or "+" in method:  # which evicts while it decodes
        assert not torch.allclose(alone[:, -1], unpruned[:, -1], atol=1e-3)
    assert len(trace.history) == 2 + STEPS + 1
    assert [len(call.images) for call in trace.history[2:]] == [3] * STEPS + [1], "in the order in which they end"
    for call, like in zip(trace.history[2:], [single] * STEPS + [whole], strict=True):
        assert call.kv_lengths == like.kv_lengths
        for image, one in zip(call.images, like.images, strict=True):
            assert [stage.kept.tolist() for stage in image.stages] == [stage.kept.tolist() for stage in one.stages]


class Criterion(StoppingCriteria):
    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        self.call()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Streamer(BaseStreamer):
    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def put(self, value: Tensor) -> None:
        self.call()

    def end(self) -> None:
        self.call()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("where", ["processor", "criterion", "prefix", "streamer"])
@pytest.mark.parametrize("method", ["tome:keep=9", "fastv:layer=1,keep=0.25"])
@torch.no_grad()
def test_wherever_the_callers_code_runs(method: str, where: str, static: bool) -> None:
    """Also with compiled steps, which run no hook."""
    model = tiny.model()
    given, other = tiny.inputs(model, "3i4"), tiny.inputs(model, "2i6", seed=9)
    found: list[Tensor] = []
    call = lambda: found.append(model(**other).logits)  # noqa: E731
    options: dict[str, Any] = {
        "processor": {"logits_processor": [Calls(call)]},
        "criterion": {"stopping_criteria": [Criterion(call)]},
        "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: call() or list(range(tiny.VOCABULARY))},
        "streamer": {"streamer": Streamer(call)},
    }[where]
    if static:
        torch._dynamo.reset()
        config = CompileConfig(backend="eager", fullgraph=True, mode=None)  # type: ignore[arg-type]
        config._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": config}
    with foveate.prune(model, method):
        alone, expected = model(**other).logits, generate(model, given)
        out = generate(model, given, **options)
    assert torch.equal(out.sequences, expected.sequences)
    assert len(found) >= STEPS
    assert all(torch.equal(one, alone) for one in found)


@each_method
@torch.no_grad()
def test_inside_a_running_call(method: str) -> None:
    """From a hook, in the middle of encoder or decoder: what was seen so far is set aside and comes back."""
    model = tiny.model()
    given, other = tiny.inputs(model, "3i4", "2i1i5"), tiny.inputs(model, "2i6", seed=9)
    places = [model.model.vision_tower.encoder.layers[2], model.get_decoder().layers[2], model.get_decoder()]
    with foveate.prune(model, method) as trace:
        alone, expected = model(**other).logits, generate(model, given)
        direct = model(**given).logits
        for place in places:
            found: list[Tensor] = []

            def call(*_: Any, place: Any = place, found: list[Tensor] = found) -> None:
                if not found:
                    found.append(torch.empty(0))  # not inside of itself
                    found[0] = model(**other).logits

            for run in ("generate", "direct"):
                found.clear()
                before = len(trace.history)
                hook = place.register_forward_pre_hook(call)
                got = generate(model, given) if run == "generate" else model(**given).logits
                hook.remove()
                assert torch.equal(found[0], alone)
                if run == "generate":
                    assert_same(got, expected)
                else:
                    assert torch.equal(got, direct)
                assert [len(one.images) for one in trace.history[before:]] == [1, 3]


@pytest.mark.parametrize("method", ["fopru:keep=0.5", "fastv:layer=1,keep=0.5", "h2o:heavy=0.2,recent=0.2"])
@torch.no_grad()
def test_a_loop_by_hand_beside_the_answer(method: str) -> None:
    """Decoding two prompts in step, the inner one with a cache of its own."""
    model = tiny.model()
    given, other = tiny.inputs(model, "3i4"), tiny.inputs(model, "2i6", seed=9)
    words = [torch.tensor([[word]]) for word in (7, 8, 9)]

    def loop() -> Callable[[], Tensor]:
        state: dict[str, Any] = {}

        def step() -> Tensor:
            if not state:
                out = model(**other, use_cache=True)
                state.update(out=out, words=iter(words))
            else:
                out = model(input_ids=next(state["words"]), **cache_of(state["out"]))
            state["out"] = out
            return out.logits[:, -1]

        return step

    with foveate.prune(model, method):
        expected = generate(model, given)
        step = loop()
        alone = [step() for _ in range(STEPS)]
        nested = Calls(loop())
        out = generate(model, given, logits_processor=[nested])
    assert_same(out, expected)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(nested.found, alone, strict=True))


def cache_of(out: Any) -> dict[str, Any]:
    return {CACHE: out[CACHE]}


@each_method
@torch.no_grad()
def test_a_call_that_fails_inside_leaves_the_other_as_it_is(method: str) -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    wrong = {**given, "pixel_values": torch.cat([given["pixel_values"]] * 2)}

    def fail() -> None:
        with pytest.raises(FoveateError, match="72"):
            model(**wrong)

    with foveate.prune(model, method) as trace:
        expected = generate(model, given)
        out = generate(model, given, logits_processor=[Calls(fail)])
        assert len(trace.history) == 2
        assert_same(out, expected)
        assert_same(generate(model, given), expected)


@each_method
@torch.no_grad()
def test_pictures_encoded_by_hand_meanwhile_are_whole(method: str) -> None:
    model = tiny.model()
    given, other = tiny.inputs(model, "3i4"), tiny.inputs(model, "2i6", "1i2i3", seed=9)["pixel_values"]
    whole = model.model.get_image_features(other, return_dict=True).pooler_output
    with foveate.prune(model, method):
        expected = generate(model, given)
        nested = Calls(lambda: model.model.get_image_features(other, return_dict=True).pooler_output)
        out = generate(model, given, logits_processor=[nested])
    assert_same(out, expected)
    for found in nested.found:
        assert all(torch.equal(one, theirs) for one, theirs in zip(found, whole, strict=True))


@torch.no_grad()
def test_guidance_by_the_same_model_is_a_call_of_its_own() -> None:
    """transformers calls the model with words alone for each word of the answer."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    guided: dict[str, Any] = dict(guidance_scale=1.7, negative_prompt_ids=torch.tensor([[5, 6, 7]]))
    with foveate.prune(model, "fopru:keep=0.25") as trace:
        out = generate(model, given, output_scores=True, **guided)
        assert [len(call.images) for call in trace.history] == [0, 1]
    ids = torch.tensor([[5, 6, 7]])
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        without = model(input_ids=torch.cat([ids, out.sequences[:, 43 : 43 + step]], dim=1)).logits[:, -1]
        without = without.log_softmax(dim=-1)
        expected = 1.7 * (logits.log_softmax(dim=-1) - without) + without
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
