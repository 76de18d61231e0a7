"""What pruning relies on in transformers beyond its documented interface: every such name, and what it is for."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from transformers import GenerationMixin

_CACHE_NAMES = ("cache", "past_key_values")
_TAKEN = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters

CACHE = next((name for name in _CACHE_NAMES if name in _TAKEN), _CACHE_NAMES[0])
"""What a cache is called where this transformers hands it on, to a model as to its layers, and where it gives it back:
`cache` since 5.24, `past_key_values` before."""

FORMER = {"pixel_values_images": "pixel_values"} | {name: CACHE for name in _CACHE_NAMES if name != CACHE}
"""What some processors and callers call an argument of a model, and its name in this transformers."""

_GENERATE = "transformers.generation.utils.GenerationMixin."


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
