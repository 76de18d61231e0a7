"""One row per model family: what its parts are called, and how its patches become tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foveate.core import FoveateError, Grid
from foveate.families import sizes
from foveate.families.family import Family
from foveate.families.lazily import (
    anyres,
    halved_frames,
    packed_blocks,
    packed_patches,
    packed_rasters,
    padded_rasters,
    plain,
    pooled_frames,
    square,
    tiled_runs,
    whole_frames,
)
from foveate.families.towers import Tower, patches_per_side

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.families.layouts import Encoded, Layout


def _llava_read(config: Any, blocks: int) -> int:
    """hidden_states[k] is the output of block k-1; of several layers the last one counts."""
    layer = config.vision_feature_layer
    layer = layer if isinstance(layer, int) else list(layer)[-1]
    return (layer if layer >= 0 else layer + blocks + 1) - 1


def _all_read(config: Any, blocks: int) -> list[int]:
    """Several layers are joined; the embeddings that the first block takes are none of its outputs."""
    layers = config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    return [(layer if layer >= 0 else layer + blocks + 1) - 1 for layer in layers]


def _deepest_read(config: Any, blocks: int) -> int:
    """Of several layers that are joined, the one nearest to the end."""
    return max(_all_read(config, blocks))


def _last_read(config: Any, blocks: int) -> int:
    return blocks - 1


def _llava_check(config: Any, tower: Tower) -> None:
    """The strategy "default" cuts off one token, "full" none: with the wrong tower, patches would be off by one."""
    strategy, right = config.vision_feature_select_strategy, "default" if tower.summary else "full"
    if strategy != right:
        raise FoveateError(
            f"vision_feature_select_strategy={strategy!r} on {tower.type}, which has {tower.summary} CLS tokens, hands "
            f"the decoder other tokens than the patches; pruning needs {right!r}"
        )


def _grid(config: Any, merge: int = 1) -> Grid:
    """The raster of one tile whose patches merge in squares."""
    side = patches_per_side(config) // merge
    return side, side


def _usual_grid(config: Any) -> Grid:
    """Of a picture of 448 x 448 pixels, where any size is taken."""
    side = 448 // (config.vision_config.patch_size * config.vision_config.spatial_merge_size)
    return side, side


def _llava_layouts(encoded: Encoded) -> list[Layout]:
    """LLaVA's own encoders see pictures of one size; Pixtral's in its place sees any."""
    if encoded.tower.config.model_type == "pixtral":
        return packed_rasters(1, encoded)
    return plain(encoded)


def _shuffle(config: Any) -> int:
    return round(1 / config.downsample_ratio)


def _pool(config: Any) -> int:
    """Patches along a side of the square that is averaged into one token."""
    return int(patches_per_side(config) // int(config.mm_tokens_per_image**0.5))


def three_axes(model: Any, ids: Tensor, mask: Tensor, given: dict[str, Any], start: Tensor) -> Tensor:
    """Positions of new tokens on the axes time, height and width, (3, B, S), each row counting on from its `start`."""
    stated = {name: given.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
    types = given.get("mm_token_type_ids")
    if types is None:
        raise FoveateError("mm_token_type_ids is missing; pass what the processor made, mm_token_type_ids among it")
    types = types[:, -ids.shape[1] :]
    stated = {name: value for name, value in stated.items() if value is not None}
    found: Tensor = model.base_model.get_rope_index(ids, types, attention_mask=mask.long(), **stated)[0]
    return (found + start[:, None]).where(mask, 0)


_SHARED = (
    "its layers take inputs of their own for each token, and the last ones the keys and values of others (E2B, E4B; "
    "not so the 31B, where they can)"
)


def _gemma4_varies(config: Any) -> dict[str, Any]:
    """Small ones have layers that hang together; in large ones pictures look ahead, in layers with a window."""
    text = config.text_config
    ahead = text.use_bidirectional_attention is not None
    alone = not text.hidden_size_per_layer_input and not text.num_kv_shared_layers
    return {"closed_decoder": None if alone else _SHARED, "two_way": ahead, "typed_past": ahead}


_WITH_TILES = "a picture with all its tiles; the newlines behind its rows stay"


_ONE_TILE = "a tile of a picture, since text stands between tiles"


_QWEN: dict[str, Any] = dict(
    image="a picture, or a video with all its frames",
    shape=sizes.qwen,
    read=_last_read,
    grid=_usual_grid,
    tower="visual",
    projector="visual.merger",
    pointwise=False,
    fixed=False,
    layouts=packed_blocks,
    videos=lambda encoded: packed_blocks(encoded, "video_grid_thw"),
    positions=three_axes,
)


_GLM: dict[str, Any] = {**_QWEN, "shape": sizes.glm, "image": "a picture", "videos": None}


_IDEFICS: dict[str, Any] = dict(
    image=_ONE_TILE,
    shape=sizes.idefics,
    read=_last_read,
    grid=lambda config: _grid(config, config.scale_factor),
    tower="vision_model",
    projector="connector",
    pointwise=False,
    layouts=lambda encoded: square(encoded.model.config.scale_factor, encoded),
)


FAMILIES = (
    Family(
        name="llava-1.5",
        types=("llava",),
        hub_ids=(
            "llava-hf/llava-1.5-7b-hf",
            "llava-hf/llava-1.5-13b-hf",
            "llava-hf/bakLlava-v1-hf",
            "mistral-community/pixtral-12b",
        ),
        towers=("clip_vision_model", "siglip_vision_model", "pixtral"),
        shape=sizes.llava,
        read=_llava_read,
        grid=_grid,
        layouts=_llava_layouts,
        check=_llava_check,
    ),
    Family(
        name="llava-next",
        types=("llava_next",),
        hub_ids=(
            "llava-hf/llava-v1.6-vicuna-7b-hf",
            "llava-hf/llava-v1.6-mistral-7b-hf",
            "llava-hf/llava-v1.6-vicuna-13b-hf",
            "llava-hf/llama3-llava-next-8b-hf",
        ),
        towers=("clip_vision_model",),
        shape=sizes.llava,
        image=_WITH_TILES,
        read=_llava_read,
        grid=_grid,
        fixed=False,
        layouts=anyres,
        gathered=True,
        check=_llava_check,
    ),
    Family(
        name="llava-onevision",
        types=("llava_onevision",),
        hub_ids=("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
        towers=("siglip_vision_model",),
        shape=sizes.onevision,
        image=_WITH_TILES + ", or a video with all its frames",
        read=_llava_read,
        grid=_grid,
        fixed=False,
        layouts=anyres,
        videos=halved_frames,
        gathered=True,
        check=_llava_check,
    ),
    Family(
        name="llava-next-video",
        types=("llava_next_video",),
        transformers="5.21",  # older ones hand over a video with its frames apart
        hub_ids=("llava-hf/LLaVA-NeXT-Video-7B-hf",),
        towers=("clip_vision_model",),
        shape=sizes.llava,
        image=_WITH_TILES + ", or a video with all its frames",
        read=_llava_read,
        grid=_grid,
        fixed=False,
        layouts=anyres,
        videos=lambda encoded: pooled_frames(encoded.model.config.spatial_pool_stride, encoded),
        gathered=True,
        check=_llava_check,
    ),
    Family(
        name="qwen2-vl",
        types=("qwen2_vl",),
        hub_ids=("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"),
        towers=("qwen2_vl_vision",),
        decoder="qwen2_vl_text",
        **_QWEN,
    ),
    Family(
        name="qwen2.5-vl",
        types=("qwen2_5_vl",),
        hub_ids=("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        towers=("qwen2_5_vl_vision",),
        decoder="qwen2_5_vl_text",
        **_QWEN,
    ),
    Family(
        name="qwen3-vl",
        types=("qwen3_vl",),
        hub_ids=("Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"),
        towers=("qwen3_vl_vision",),
        decoder="qwen3_vl_text",
        deepstack="_deepstack_process",
        also_read=lambda config, blocks: list(config.vision_config.deepstack_visual_indexes),
        **_QWEN,
    ),
    Family(
        name="qwen3-vl-moe",
        types=("qwen3_vl_moe",),
        hub_ids=("Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen3-VL-235B-A22B-Instruct"),
        towers=("qwen3_vl_moe_vision",),
        decoder="qwen3_vl_moe_text",
        deepstack="_deepstack_process",
        also_read=lambda config, blocks: list(config.vision_config.deepstack_visual_indexes),
        **_QWEN,
    ),
    Family(
        name="glm4v",
        types=("glm4v", "glm46v"),
        hub_ids=("zai-org/GLM-4.1V-9B-Thinking", "zai-org/GLM-4.6V-Flash"),
        towers=("glm4v_vision", "glm4v_moe_vision"),  # the latter within glm46v, which takes the parts of either
        **_GLM,
    ),
    Family(
        name="glm4v-moe",
        types=("glm4v_moe",),
        hub_ids=("zai-org/GLM-4.5V", "zai-org/GLM-4.6V"),
        towers=("glm4v_moe_vision",),
        **_GLM,
    ),
    Family(
        name="glm-ocr",
        types=("glm_ocr",),
        hub_ids=("zai-org/GLM-OCR",),
        towers=("glm_ocr_vision",),
        **{**_GLM, "shape": sizes.glm_ocr},
    ),
    Family(
        name="paddleocr-vl",
        types=("paddleocr_vl",),
        transformers="5.21",  # older ones take no features of an encoder that has run
        hub_ids=("PaddlePaddle/PaddleOCR-VL",),
        towers=("paddleocr_vl_vision",),
        decoder="paddleocr_vl_text",
        **{
            **_QWEN,
            "image": "a picture",
            "shape": sizes.paddle,
            "projector": "projector",
            "layouts": lambda encoded: packed_rasters(
                encoded.tower.config.spatial_merge_size, encoded, "image_grid_thw"
            ),
            "videos": None,
        },
    ),
    Family(
        name="video-llama-3",
        types=("video_llama_3",),
        hub_ids=("lkhl/VideoLLaMA3-2B-Image-HF",),
        towers=("video_llama_3_vision",),
        shape=sizes.llama3,
        read=_last_read,
        grid=lambda config: (448 // config.vision_config.patch_size,) * 2,
        tower="vision_model",
        projector="projector",
        norm="vision_model.post_layernorm",
        gathered=True,
        fixed=False,
        layouts=packed_patches,
    ),
    Family(
        name="internvl",
        types=("internvl",),
        hub_ids=("OpenGVLab/InternVL3-1B-hf", "OpenGVLab/InternVL3-8B-hf", "OpenGVLab/InternVL3_5-8B-HF"),
        towers=("internvl_vision",),
        shape=sizes.internvl,
        image="a picture with all its tiles, or a frame of a video",
        frames=True,
        read=_llava_read,
        grid=lambda config: _grid(config, _shuffle(config)),
        pointwise=False,
        fixed=False,
        layouts=lambda encoded: tiled_runs(_shuffle(encoded.model.config), encoded),
        check=_llava_check,
    ),
    Family(
        name="gemma3",
        types=("gemma3",),
        later_turns="5.23",  # older ones let no token of such a picture look ahead
        hub_ids=("google/gemma-3-4b-it", "google/gemma-3-12b-it", "google/gemma-3-27b-it"),
        towers=("siglip_vision_model",),
        shape=sizes.gemma3,
        image="a picture, or a crop of one",
        read=_last_read,
        grid=lambda config: _grid(config, _pool(config)),
        pointwise=False,
        layouts=lambda encoded: square(_pool(encoded.model.config), encoded),
        typed_past=True,
        two_way=True,
    ),
    Family(
        name="gemma4",
        types=("gemma4",),
        transformers="5.23",  # 5.18 masks the pictures of a 31B wrongly in a static cache, pruned or not
        hub_ids=("google/gemma-4-E2B-it", "google/gemma-4-E4B-it", "google/gemma-4-31B-it"),
        towers=("gemma4_vision",),
        shape=sizes.gemma4,
        read=_last_read,
        grid=lambda config: (16, 16),  # of a square picture, where the most tokens are what the processor makes
        tower="vision_tower",
        projector="embed_vision",
        pointwise=False,
        fixed=False,
        layouts=lambda encoded: padded_rasters(encoded.model.config.vision_config.pooling_kernel_size, encoded),
        closed_encoder="its blocks turn each patch by its place and norm what attention and MLP add",
        closed_decoder=_SHARED,
        varies=_gemma4_varies,
    ),
    Family(
        name="paligemma",
        types=("paligemma",),
        hub_ids=("google/paligemma-3b-mix-224", "google/paligemma2-3b-mix-448"),
        towers=("siglip_vision_model",),
        shape=sizes.paligemma,
        read=_last_read,
        grid=_grid,
        norm="vision_tower.post_layernorm",
        first_position=1,
        two_way=True,
        answers_typed=True,
    ),
    Family(
        name="deepseek-vl",
        types=("deepseek_vl",),
        hub_ids=("deepseek-community/deepseek-vl-1.3b-chat",),
        towers=("siglip_vision_model",),
        shape=sizes.deepseek,
        read=_last_read,
        grid=_grid,
        tower="vision_model",
        projector="aligner",
        norm="vision_model.post_layernorm",
    ),
    Family(
        name="idefics3",
        types=("idefics3",),
        hub_ids=("HuggingFaceM4/Idefics3-8B-Llama3",),
        towers=("idefics3_vision",),
        **_IDEFICS,
    ),
    Family(
        name="smolvlm",
        types=("smolvlm",),
        transformers="5.21",  # older ones refuse prompts with different numbers of pictures
        hub_ids=("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "HuggingFaceTB/SmolVLM-500M-Instruct"),
        towers=("smolvlm_vision",),
        frames=True,
        **{**_IDEFICS, "image": _ONE_TILE + ", or a frame of a video"},
    ),
    Family(
        name="mistral3",
        types=("mistral3",),
        hub_ids=("mistralai/Mistral-Small-3.1-24B-Instruct-2503",),
        towers=("pixtral",),
        shape=sizes.mistral3,
        read=_llava_read,
        grid=lambda config: _grid(config, config.spatial_merge_size),
        pointwise=False,
        fixed=False,
        layouts=lambda encoded: packed_rasters(encoded.model.config.spatial_merge_size, encoded),
    ),
    Family(
        name="lighton-ocr",
        types=("lighton_ocr",),
        hub_ids=("lightonai/LightOnOCR-1B-1025",),
        towers=("pixtral",),
        shape=sizes.mistral3,
        read=_last_read,
        grid=lambda config: _grid(config, config.spatial_merge_size),
        tower="vision_encoder",
        projector="vision_projection",
        pointwise=False,
        fixed=False,
        layouts=lambda encoded: packed_rasters(encoded.model.config.spatial_merge_size, encoded),
    ),
    Family(
        name="aya-vision",
        types=("aya_vision",),
        hub_ids=("CohereLabs/aya-vision-8b", "CohereLabs/aya-vision-32b"),
        towers=("siglip_vision_model",),
        shape=sizes.aya,
        image=_ONE_TILE,
        read=_llava_read,
        grid=lambda config: _grid(config, config.downsample_factor),
        pointwise=False,
        layouts=lambda encoded: square(encoded.model.config.downsample_factor, encoded),
        check=_llava_check,
    ),
    Family(
        name="cohere2-vision",
        types=("cohere2_vision",),
        hub_ids=("CohereLabs/command-a-vision-07-2025",),
        towers=("siglip_vision_model",),
        shape=sizes.aya,
        image=_ONE_TILE,
        read=_last_read,
        grid=lambda config: _grid(config, config.downsample_factor),
        pointwise=False,
        layouts=lambda encoded: square(encoded.model.config.downsample_factor, encoded),
    ),
    Family(
        name="vipllava",
        types=("vipllava",),
        transformers="5.23",  # older ones call `vision_feature_layer` by another name
        hub_ids=("llava-hf/vip-llava-7b-hf", "llava-hf/vip-llava-13b-hf"),
        towers=("clip_vision_model",),
        shape=sizes.llava,
        read=_deepest_read,
        grid=_grid,
        pointwise=False,
        also_read=_all_read,
    ),
    Family(
        name="video-llava",
        types=("video_llava",),
        transformers="5.21",  # older ones call `pixel_values` by another name
        hub_ids=("LanguageBind/Video-LLaVA-7B-hf",),
        towers=("clip_vision_model",),
        shape=sizes.llava,
        tower="image_tower",
        image="a picture, or a video with all its frames; the CLS of each frame stays",
        read=_llava_read,
        grid=_grid,
        fixed=False,
        videos=whole_frames,
        video_tower="video_tower",
        check=_llava_check,
    ),
)


UNFIT = {
    "gemma3n": "its decoder runs several streams of hidden states at once, of which no row says anything",
    "granite4_vision": "the features of a picture join the decoder at several depths, and none of them before it",
    "llama4": "forward() maps what the encoder hands over itself, so that fewer tokens cannot be handed to it",
}
"""Types of vision-language models that cannot be pruned though they seem to have the standard parts, and why not."""
