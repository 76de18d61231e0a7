"""What pruning relies on in transformers is there and does what it did; what has moved is named."""

from __future__ import annotations

import inspect
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from models import tiny
from models.untouched import untouched
from transformers import DynamicCache, StaticCache

import foveate
from foveate import FoveateError, Random
from foveate.runtime import generating
from foveate.runtime.decoder import cache
from foveate.runtime.seams import CACHE, SEAMS, TESTED, Seam, moved

VERSION = f"transformers {transformers.__version__}"


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name.removeprefix("transformers."))
def test_a_name_that_pruning_relies_on(seam: Seam) -> None:
    problem = moved(seam)
    if problem is not None:
        pytest.fail(problem)


def test_a_name_that_moves_is_reported() -> None:
    gone = Seam("transformers.masking_utils.no_such_mask", "an example")
    assert moved(gone) == "transformers.masking_utils.no_such_mask is gone, which pruning needs (an example)"
    changed = Seam("transformers.masking_utils.find_packed_sequence_indices", "an example", ("gaps",))
    assert moved(changed) == (
        "transformers.masking_utils.find_packed_sequence_indices takes (position_ids) where pruning (an example) "
        "counts on (gaps)"
    )
    more = Seam("transformers.modeling_utils.AttentionInterface.get_interface", "it", ("attn_implementation",), True)
    assert "takes (attn_implementation, default) where" in str(moved(more))


def test_everything_that_is_replaced_is_listed() -> None:
    listed = {seam.name.rsplit(".", 1)[1] for seam in SEAMS}
    assert set(generating.OVERRIDDEN) <= listed
    extended = {
        name for name, value in vars(cache._Timelined).items() if callable(value) and hasattr(cache.Cache, name)
    }
    assert {name for name in extended if not name.startswith("_")} <= listed
    assert len({seam.name for seam in SEAMS}) == len(SEAMS)


# ---------------------------------------------------------------------------------------------------------------------
# what does not fit is refused

RANGE = f"is tested with transformers {TESTED[0]} to {TESTED[1]}, and {transformers.__version__} is installed"
SITES = ("random:keep=0.5", "fastv:layer=2,keep=0.5", "h2o:heavy=0.1,recent=0.1", "fopru:keep=0.5+pyramiddrop")


def with_layers(forward: Any, numbers: Any = range(4)) -> Any:
    """A tiny model whose decoder layers run `forward(stock, layer, hidden_states, **options)`."""
    model = tiny.model()
    layers = model.get_decoder().layers
    stock = type(layers[0])

    class OtherLayer(stock):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Any, **options: Any) -> Any:
            return forward(partial(stock.forward, self), hidden_states, **options)

    OtherLayer.forward.__signature__ = inspect.signature(stock.forward)  # type: ignore[attr-defined]
    for number in numbers:
        layers[number].__class__ = OtherLayer
    return model


def test_layers_that_take_a_cache_by_another_name_are_refused_at_the_start() -> None:
    model = with_layers(lambda stock, hidden, entries=None, **options: stock(hidden, **options))
    layer = type(model.get_decoder().layers[0])
    parameters = inspect.signature(layer.forward).parameters.values()
    renamed = [one.replace(name="entries") if one.name == CACHE else one for one in parameters]
    layer.forward.__signature__ = inspect.Signature(renamed)
    handle = foveate.prune(model, Random(keep=0.5))
    with pytest.raises(FoveateError, match=rf"forward\(\) of OtherLayer takes no {CACHE} but \(.*entries.*{RANGE}"):
        handle.start()
    assert not handle.active


def test_models_that_take_no_encoded_pictures_are_refused_at_the_start() -> None:
    model = tiny.model()

    class OtherModel(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, cache: Any = None, past_key_values: Any = None) -> Any: ...

    class OtherBase(type(model.model)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None) -> Any: ...

    model.__class__, model.model.__class__ = OtherModel, OtherBase
    with pytest.raises(FoveateError, match=f"OtherModel takes no mm_encoder_outputs.*{RANGE}"):
        foveate.prune(model, Random(keep=0.5)).start()


def test_generate_with_other_arguments_is_refused_at_the_start() -> None:
    model = tiny.model()

    class OtherModel(type(model)):  # type: ignore[misc]
        def _prepare_cache_for_generation(self, settings: Any, model_kwargs: Any) -> Any: ...

    model.__class__ = OtherModel
    with pytest.raises(FoveateError, match=rf"_prepare_cache_for_generation takes \(settings, model_kwargs\).*{RANGE}"):
        foveate.prune(model, Random(keep=0.5)).start()


@torch.no_grad()
@pytest.mark.parametrize("spec", SITES)
@pytest.mark.parametrize("only", [range(4), [1]], ids=["all", "one"])
def test_layers_that_drop_their_cache_are_refused_at_the_first_prompt(spec: str, only: Any) -> None:
    model = with_layers(lambda stock, hidden, **options: stock(hidden, **{**options, CACHE: None}), only)
    given = tiny.inputs(model, "3i4")
    with untouched(model), foveate.prune(model, spec) as trace:
        for call in (lambda: model.generate(**given, max_new_tokens=1), lambda: model(**given)):
            with pytest.raises(FoveateError, match=f"layer {only[0]} of the cache holds 0 entries where .*{RANGE}"):
                call()
        assert not trace.history, "nothing is claimed of a prompt that was not pruned"


@torch.no_grad()
@pytest.mark.parametrize("spec", SITES)
def test_layers_that_are_handed_no_cache_are_refused_before_they_run(spec: str) -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    for layer in model.get_decoder().layers:
        layer.register_forward_pre_hook(
            lambda layer, arguments, options: (arguments, {"entries": options.pop(CACHE), **options}), with_kwargs=True
        )
    with untouched(model), foveate.prune(model, spec) as trace:
        for call in (lambda: model.generate(**given, max_new_tokens=1), lambda: model(**given)):
            with pytest.raises(FoveateError, match=rf"layer 0 .* no {CACHE} of this prompt, but \(.*entries.*{RANGE}"):
                call()
        assert not trace.history
        if "h2o" not in spec:
            model(**given, use_cache=False)  # where none is wanted, none is missed
            assert len(trace.history) == 1


@torch.no_grad()
def test_layers_that_keep_what_was_evicted_are_refused() -> None:
    def undo(stock: Any, hidden: Any, **options: Any) -> Any:
        cache = options[CACHE]
        cache.update(*[torch.zeros(1, 2, 5, 8)] * 2, layer_idx=2)  # five entries that nobody asked for
        return stock(hidden, **options)

    model = with_layers(undo, [3])
    message = "layer 2 of the cache holds 30 entries where 25 were planned"
    with foveate.prune(model, "fastv:layer=2,keep=0.5"), pytest.raises(FoveateError, match=message):
        model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=1)


@torch.no_grad()
def test_generate_that_makes_no_cache_is_refused() -> None:
    model = tiny.model()

    class OtherModel(type(model)):  # type: ignore[misc]
        def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *rest: Any) -> None:
            model_kwargs["entries"] = DynamicCache()

    model.__class__ = OtherModel
    message = rf"generate\(\) has made no {CACHE} for OtherModel.*{RANGE}"
    with foveate.prune(model, Random(keep=0.5)), pytest.raises(FoveateError, match=message):
        model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=1)


def test_a_cache_that_checkpointing_leaves_empty_is_not_missed() -> None:
    model = tiny.model()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its name from 5.23 on
    model.train()
    given = tiny.inputs(model, "3i4")
    with foveate.prune(model, "fastv:layer=2,keep=0.5") as trace:
        model(**given, use_cache=True)
    assert len(trace.history) == 1
    with foveate.prune(model, "h2o"), pytest.raises(FoveateError, match="no place, nor does gradient checkpointing"):
        model(**given, use_cache=True)


# ---------------------------------------------------------------------------------------------------------------------
# behaviour that no signature shows


def called(model: Any, *names: str) -> list[str]:
    """The order in which stock generate() calls these methods of a model."""
    order: list[str] = []
    for name in names:
        stock = getattr(model, name)

        def note(*arguments: Any, name: str = name, stock: Any = stock, **options: Any) -> Any:
            order.append(name)
            return stock(*arguments, **options)

        note.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
        setattr(model, name, note)
    return order


def test_generate_encodes_then_expands_then_counts_then_makes_the_cache() -> None:
    model = tiny.model()
    names = (
        "_prepare_multimodal_encoder_kwargs_for_generation",
        "_expand_inputs_for_generation",
        "_prepare_generated_length",
        "_prepare_cache_for_generation",
    )
    order = called(model, *names)
    model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=1)
    assert order == list(names), f"{VERSION} prepares a prompt in another order, so pruning comes too early or too late"


def test_what_generate_hands_to_the_expansion() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i1i5")
    stock, calls = model._expand_inputs_for_generation, []

    def expand(*arguments: Any, **options: Any) -> Any:
        bound = inspect.signature(stock).bind(*arguments, **options).arguments
        handed = bound["model_kwargs"]
        assert bound["expand_size"] == 2
        assert torch.equal(bound["input_ids"], given["input_ids"]), "ids are not repeated yet"
        features = handed["mm_encoder_outputs"]["image"].pooler_output
        assert [rows.shape for rows in features] == [(tiny.TOKENS, 32)] * 3
        assert handed.get("pixel_values") is None, "pictures are encoded before the expansion"
        calls.append(bound)
        return stock(*arguments, **options)

    model._expand_inputs_for_generation = expand
    model.generate(**given, max_new_tokens=1, num_beams=2)
    assert len(calls) == 1


def test_what_a_decoder_hands_its_layers() -> None:
    model = tiny.model()
    seen: list[tuple[Any, dict[str, Any], Any]] = []
    for layer in model.get_decoder().layers:
        layer.register_forward_hook(
            lambda layer, arguments, options, output: seen.append((arguments, options, output)), with_kwargs=True
        )
    given = tiny.inputs(model, "3i4", "2i1i5")
    model(**given, use_cache=True)
    wanted = {"attention_mask", "position_embeddings", "position_ids", CACHE}
    for arguments, options, output in seen:
        assert wanted <= options.keys(), f"{VERSION} hands decoder layers {sorted(options)}"
        assert len(arguments) == 1
        assert torch.is_tensor(output), "a layer answers with the hidden states alone"
        assert len(options["position_embeddings"]) == 2


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_attention_asks_its_own_configuration_each_time(part: str) -> None:
    """A module is observed by a configuration of its own, whose implementation is another."""
    model = tiny.model()
    module = next(one for one in getattr(model.model, part).modules() if hasattr(one, "q_proj"))
    shared = module.config
    module.config = type(shared)(**shared.to_dict())
    module.config._attn_implementation_internal = "nobody_knows_this"
    assert module.config._attn_implementation == "nobody_knows_this"
    with pytest.raises(KeyError, match="nobody_knows_this"):
        model(**tiny.inputs(model, "1i1"))


def test_either_name_of_a_cache_is_taken() -> None:
    """A caller's code need not change with the release: generate() and direct calls, the name of now and the other."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    longer = {"input_ids": torch.cat([given["input_ids"], torch.tensor([[7]])], dim=1)}
    found: list[list[torch.Tensor]] = []
    with warnings.catch_warnings(), foveate.prune(model, "fastv:layer=2,keep=0.5"):
        warnings.simplefilter("error")
        for name in ("cache", "past_key_values"):
            cache = DynamicCache(config=model.config.text_config)
            first = model.generate(**given, **{name: cache}, max_new_tokens=1, return_dict_in_generate=True)
            assert getattr(first, CACHE) is cache
            assert [layer.keys.shape[2] for layer in cache.layers] == [43, 43, 25, 25]
            again = model.generate(**longer, **{name: cache}, max_new_tokens=2)
            direct = DynamicCache(config=model.config.text_config)
            logits = [model(**given, **{name: direct}).logits, model(torch.tensor([[7]]), **{name: direct}).logits]
            assert [layer.keys.shape[2] for layer in direct.layers] == [44, 44, 26, 26]
            found.append([again, *logits])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_what_a_layer_of_a_cache_tells() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    dynamic = DynamicCache(config=model.config.text_config)
    model(**given, **{CACHE: dynamic})
    layer: Any = dynamic.layers[1]
    assert layer.keys.shape == layer.values.shape == (1, 2, 43, 8)
    assert layer.get_seq_length() == 43
    static = StaticCache(config=model.config.text_config, max_cache_len=50)
    fixed: Any = static.layers[1]
    assert (fixed.is_compileable, fixed.is_initialized, fixed.max_cache_len) == (True, False, 50)
    model(**given, **{CACHE: static})
    assert (fixed.is_initialized, int(fixed.cumulative_length), fixed.keys.shape[2]) == (True, 43, 50)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_encoded_pictures_are_handed_to_forward(name: str) -> None:
    model = tiny.model(name)
    parameters = {*inspect.signature(type(model).forward).parameters}
    parameters |= {*inspect.signature(type(model.base_model).forward).parameters}
    assert "mm_encoder_outputs" in parameters, f"{VERSION}: {name} takes no encoded pictures"
    encode = inspect.signature(model.base_model.get_image_features).parameters
    assert "pixel_values" in encode
