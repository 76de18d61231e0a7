"""What pruning relies on in transformers beyond its documented interface: each name and its use, and if it is there."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import GenerationMixin

from foveate.core import FoveateError

TESTED = ("5.18", "5.24")
"""The lowest and the highest minor version of transformers that the tests run on."""

_CACHE_NAMES = ("cache", "past_key_values")
_TAKEN = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters

CACHE = next((name for name in _CACHE_NAMES if name in _TAKEN), _CACHE_NAMES[0])
"""What a cache is called where this transformers hands it on, to a model as to its layers, and where it gives it back:
`cache` since 5.24, `past_key_values` before."""

FORMER = {"pixel_values_images": "pixel_values"} | {name: CACHE for name in _CACHE_NAMES if name != CACHE}
"""What some processors and callers call an argument of a model, and its name in this transformers."""

_GENERATE = "transformers.generation.utils.GenerationMixin."

_MODELS = "transformers.models."


@dataclass(frozen=True)
class Seam:
    """One name of transformers.

    Attributes:
        name: where it is found: module, then attributes.
        use: what pruning does with it.
        arguments: that it is called with, by name or in this order.
        exact: it takes these alone, because pruning stands in for it.
    """

    name: str
    use: str
    arguments: tuple[str, ...] = ()
    exact: bool = False


SEAMS = (
    # What a handle replaces on the model while it is active.
    Seam(_GENERATE + "generate", "replaced: puts the caller's prompt back in front of the answer", ("inputs",)),
    Seam(
        _GENERATE + "_expand_inputs_for_generation",
        "replaced: the one place between encoded pictures and everything that is sized by the prompt",
        ("expand_size", "is_encoder_decoder", "input_ids"),
    ),
    Seam(
        _GENERATE + "_prepare_generated_length",
        "replaced: a caller's max_length counts the prompt that they know",
        (
            "generation_config",
            "has_default_max_length",
            "has_default_min_length",
            "model_input_name",
            "input_ids_length",
            "inputs_tensor",
        ),
        exact=True,
    ),
    Seam(
        _GENERATE + "_prepare_cache_for_generation",
        "replaced: gives the cache its timeline",
        ("generation_config", "model_kwargs"),
    ),
    Seam(
        _GENERATE + "_prepare_position_ids_for_generation",
        "replaced: where positions have several axes, those of a pruned part are the timeline's",
        ("inputs_tensor", "model_kwargs"),
        exact=True,
    ),
    Seam(
        _GENERATE + "_get_logits_processor",
        "replaced: processors are shown the caller's ids, and count in the caller's numbers",
        ("generation_config", "input_ids_seq_length", "model_kwargs"),
    ),
    Seam(
        _GENERATE + "_get_stopping_criteria",
        "replaced: criteria are shown the caller's ids",
        ("generation_config", "stopping_criteria"),
    ),
    Seam(
        _GENERATE + "prepare_inputs_for_generation",
        "replaced: comes right before each call of the model that is generate()'s own",
        ("input_ids",),
    ),
    Seam(
        _GENERATE + "_prepare_multimodal_encoder_kwargs_for_generation",
        "relied on: pictures are encoded before anything is expanded, and stand in mm_encoder_outputs",
        ("model_kwargs",),
    ),
    # Attention under observation.
    Seam("transformers.modeling_utils.AttentionInterface.register", "the probe's attention", ("key", "value")),
    Seam("transformers.masking_utils.AttentionMaskInterface.register", "the probe's mask", ("key", "value")),
    Seam("transformers.masking_utils.sdpa_mask", "that mask"),
    Seam(
        "transformers.modeling_utils.AttentionInterface.get_interface",
        "the attention that a block would have run",
        ("attn_implementation", "default"),
    ),
    *(
        Seam(f"transformers.models.{model}.eager_attention_forward", "the same, where it is the eager one")
        for model in ("clip.modeling_clip", "siglip.modeling_siglip", "llama.modeling_llama", "qwen2.modeling_qwen2")
    ),
    # Caches that know what was pruned.
    Seam("transformers.cache_utils.Cache.update", "extended", ("key_states", "value_states", "layer_idx")),
    Seam("transformers.cache_utils.Cache.get_seq_length", "extended: in places of layer 0", ("layer_idx",)),
    Seam("transformers.cache_utils.Cache.get_query_offset", "extended: in places of layer 0", ("layer_idx",)),
    Seam("transformers.cache_utils.Cache.get_mask_sizes", "extended", ("query_length", "layer_idx")),
    Seam("transformers.cache_utils.Cache.reorder_cache", "extended", ("beam_idx",)),
    Seam("transformers.cache_utils.Cache.batch_select_indices", "extended", ("indices",)),
    Seam("transformers.cache_utils.Cache.batch_repeat_interleave", "extended", ("repeats",)),
    Seam("transformers.cache_utils.Cache.crop", "extended: takes the number of tokens to remove"),
    Seam("transformers.cache_utils.Cache.reset", "extended"),
    # What would misread the positions of a pruned prompt.
    Seam(
        "transformers.masking_utils.find_packed_sequence_indices",
        "avoided: gaps in positions are read as packed sequences where there is neither mask nor cache",
        ("position_ids",),
    ),
    # How pictures are packed.
    Seam(
        "transformers.models.llava_next.modeling_llava_next.image_size_to_num_patches",
        "tiles of a picture",
        ("image_size", "grid_pinpoints", "patch_size"),
    ),
    Seam(
        "transformers.models.llava_next.modeling_llava_next.get_anyres_image_grid_shape",
        "their raster",
        ("image_size", "grid_pinpoints", "patch_size"),
    ),
    *(
        Seam(
            f"transformers.models.{model}Model.pack_image_features",
            "run on coordinates, to learn which token is which patch",
            ("image_features", "image_sizes"),
        )
        for model in (
            "llava_next.modeling_llava_next.LlavaNext",
            "llava_onevision.modeling_llava_onevision.LlavaOnevision",
        )
    ),
    *(
        Seam(
            f"transformers.models.{model}Model.get_rope_index",
            "positions on several axes",
            ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask"),
        )
        for model in (
            "qwen2_vl.modeling_qwen2_vl.Qwen2VL",
            "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VL",
            "qwen3_vl.modeling_qwen3_vl.Qwen3VL",
            "qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoe",
        )
    ),
    *(
        Seam(
            f"transformers.models.{model}TextModel._deepstack_process",
            "replaced where tokens leave before a block that adds visual features",
            ("hidden_states", "visual_pos_masks", "visual_embeds"),
            exact=True,
        )
        for model in ("qwen3_vl.modeling_qwen3_vl.Qwen3VL", "qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoe")
    ),
)


def unfit(problem: str) -> FoveateError:
    """The error where transformers does otherwise than pruning counts on.

    Args:
        problem: what was found, a sentence without its stop.
    """
    return FoveateError(
        f"{problem}. Foveate is tested with transformers {TESTED[0]} to {TESTED[1]}, and {transformers.__version__} is "
        "installed; use one of those, or leave this model unpruned"
    )


def check_seams(model: Any, layers: Sequence[Any]) -> None:
    """Refuse a model that this transformers would run in another way than pruning counts on, by signatures alone.

    Args:
        layers: of the decoder.

    Raises:
        FoveateError: naming what is gone or takes other arguments, the version, and those that are tested.
    """
    kinds: list[Any] = [type(model), type(model.base_model), frozenset(type(layer) for layer in layers)]
    problem = _first_problem(*kinds)
    if problem is not None:
        raise unfit(problem)


@functools.cache
def _first_problem(model: type, base: type, layers: Collection[type]) -> str | None:
    """Read once for each kind of model, since classes do not change."""
    return next(_problems(model, base, layers), None)


def _problems(model: type, base: type, layers: Collection[type]) -> Iterator[str]:
    for seam in SEAMS:
        of_model = seam.name.startswith(_GENERATE)
        if not of_model and seam.name.startswith(_MODELS) and seam.name.rsplit(".", 1)[0] not in sys.modules:
            continue  # of other families
        found = moved(seam, model if of_model else None)
        if found is not None:
            yield found
    if "mm_encoder_outputs" not in {*_taken(model, "forward"), *_taken(base, "forward")}:
        yield f"forward() of {model.__name__} takes no mm_encoder_outputs, the pictures as they are left"
    if "pixel_values" not in _taken(base, "get_image_features"):
        yield f"get_image_features() of {base.__name__} takes no pixel_values"
    for one, wanted in ((model, (CACHE,)), *((layer, (CACHE, "attention_mask")) for layer in layers)):
        taken = _taken(one, "forward")
        lacking = [name for name in wanted if name not in taken]
        if lacking and taken:  # one that names nothing may hand everything on
            yield f"forward() of {one.__name__} takes no {' and no '.join(lacking)} but ({', '.join(taken)})"


def moved(seam: Seam, owner: type | None = None) -> str | None:
    """What is no longer as pruning needs it, in words; None where all is well.

    Args:
        owner: class that has it, in place of the one that the seam's name states.
    """
    try:
        found = _resolve(seam.name) if owner is None else getattr(owner, seam.name.rpartition(".")[2])
    except (AttributeError, ModuleNotFoundError):
        return f"{seam.name} is gone, which pruning needs ({seam.use})"
    taken = _named(found)
    lacking = [name for name in seam.arguments if name not in taken]
    if lacking or (seam.exact and tuple(taken) != seam.arguments):
        return (
            f"{seam.name} takes ({', '.join(taken)}) where pruning ({seam.use}) counts on ({', '.join(seam.arguments)})"
        )
    return None


def _resolve(name: str) -> Any:
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


def _taken(owner: type, method: str) -> list[str]:
    found = getattr(owner, method, None)
    return [] if found is None else _named(found)


def _named(function: Any) -> list[str]:
    """The arguments that a function has names for."""
    parameters = inspect.signature(function).parameters.values()
    return [
        one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL) and one.name != "self"
    ]
