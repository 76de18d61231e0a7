"""What pruning relies on in transformers is there and does what it did; what has moved is named."""

from __future__ import annotations

import importlib
import inspect
import warnings
from typing import Any

import pytest
import tiny
import torch
import transformers
from transformers import DynamicCache, StaticCache

import foveate
from foveate.runtime import cache, generating
from foveate.runtime.seams import CACHE, SEAMS, Seam

VERSION = f"transformers {transformers.__version__}"


def resolve(name: str) -> Any:
    """What a dotted name stands for: the longest part of it that is a module, then attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


def moved(seam: Seam) -> str | None:
    """What is no longer as pruning needs it, in words; None where all is well."""
    try:
        found = resolve(seam.name)
    except (AttributeError, ModuleNotFoundError):
        return f"{seam.name} is gone from {VERSION}. Pruning needs it ({seam.use}): find what took its place"
    parameters = inspect.signature(found).parameters
    taken = [name for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD and name != "self"]
    lacking = [name for name in seam.arguments if name not in taken]
    if lacking or (seam.exact and tuple(taken) != seam.arguments):
        return (
            f"{seam.name} of {VERSION} takes ({', '.join(taken)}) where pruning ({seam.use}) counts on "
            f"({', '.join(seam.arguments)}): see what changed, then the code that calls or replaces it"
        )
    return None


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name.removeprefix("transformers."))
def test_a_name_that_pruning_relies_on(seam: Seam) -> None:
    problem = moved(seam)
    if problem is not None:
        pytest.fail(problem)


def test_a_name_that_moves_is_reported() -> None:
    gone = Seam("transformers.masking_utils.no_such_mask", "an example")
    assert moved(gone) == (
        f"transformers.masking_utils.no_such_mask is gone from {VERSION}. Pruning needs it (an example): find what "
        "took its place"
    )
    changed = Seam("transformers.masking_utils.find_packed_sequence_indices", "an example", ("gaps",))
    assert moved(changed) == (
        f"transformers.masking_utils.find_packed_sequence_indices of {VERSION} takes (position_ids) where pruning (an "
        "example) counts on (gaps): see what changed, then the code that calls or replaces it"
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
