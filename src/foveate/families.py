"""One row per model family: what its parts are called, and how its tower's scores map to its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core import FoveateError, Grid
from foveate.layouts import (
    Encoded,
    Layout,
    anyres,
    halved_frames,
    packed_blocks,
    packed_patches,
    packed_rasters,
    padded_rasters,
    patches_per_side,
    plain,
    pooled_frames,
    square,
    tiled_runs,
    whole_frames,
)


@dataclass(frozen=True)
class Tower:
    """One kind of vision encoder, by the `model_type` of its configuration."""

    type: str
    summary: int  # CLS tokens in front of the patches
    blocks: str  # attribute path from the tower to its list of blocks
    attention: str = "self_attn"  # ... from a block to its attention module, which calls the attention interface
    joint: bool = False  # a CLIPModel's head maps its patches into a space shared with texts
    # A block's first norm, second norm and MLP where it runs as x + attention(norm(x)), then x + mlp(norm(x)).
    children: tuple[str, str, str] | None = None
    scales: tuple[str, str] | None = None  # ... and what attention and MLP are multiplied with before they are added
    masked: bool = True  # its blocks take a mask
    packed: bool = False  # the patches of all pictures run as one sequence, each picture attending to itself
    # Blocks that see a whole picture where the others see windows, from the tower's configuration; None: all do.
    whole: Callable[[Any], list[int]] | None = None
    known: bool = True  # its blocks can be observed

    def blocks_of(self, tower: nn.Module) -> nn.ModuleList:
        """The encoder's blocks in order; none where they cannot be observed."""
        return _at(tower, self.blocks) if self.known else nn.ModuleList()


_PRE_NORM = ("layer_norm1", "layer_norm2", "mlp")
_NUMBERED = ("norm1", "norm2", "mlp")

TOWERS = (
    Tower("clip_vision_model", summary=1, blocks="encoder.layers", joint=True, children=_PRE_NORM),
    Tower("siglip_vision_model", summary=0, blocks="encoder.layers", children=_PRE_NORM),
    Tower("idefics3_vision", summary=0, blocks="encoder.layers", children=_PRE_NORM),
    Tower("smolvlm_vision", summary=0, blocks="encoder.layers", children=_PRE_NORM),
    Tower(
        "internvl_vision",
        summary=1,
        blocks="encoder.layer",
        attention="attention",
        children=("layernorm_before", "layernorm_after", "mlp"),
        scales=("lambda_1", "lambda_2"),
        masked=False,
    ),
    Tower(
        "pixtral",
        summary=0,
        blocks="transformer.layers",
        attention="attention",
        children=("attention_norm", "ffn_norm", "feed_forward"),
        packed=True,
    ),
    Tower("qwen2_vl_vision", summary=0, blocks="blocks", attention="attn", children=_NUMBERED, packed=True),
    Tower(
        "qwen2_5_vl_vision",
        summary=0,
        blocks="blocks",
        attention="attn",
        children=_NUMBERED,
        packed=True,
        whole=lambda config: list(config.fullatt_block_indexes),
    ),
    Tower("qwen3_vl_vision", summary=0, blocks="blocks", attention="attn", children=_NUMBERED, packed=True),
    Tower("qwen3_vl_moe_vision", summary=0, blocks="blocks", attention="attn", children=_NUMBERED, packed=True),
    Tower("paddleocr_vl_vision", summary=0, blocks="vision_model.encoder.layers", children=_PRE_NORM, packed=True),
    Tower("video_llama_3_vision", summary=0, blocks="encoder.layers", children=_PRE_NORM, packed=True),
    Tower("glm4v_vision", summary=0, blocks="blocks", attention="attn", children=_NUMBERED, packed=True),
    Tower("glm4v_moe_vision", summary=0, blocks="blocks", attention="attn", children=_NUMBERED, packed=True),
    Tower("gemma4_vision", summary=0, blocks="encoder.layers"),
)


@dataclass(frozen=True)
class Family:
    """One family of models that share their seams.

    Attributes:
        name: what users call it.
        types: values of `config.model_type`.
        hub_ids: checkpoints that the family is known by.
        towers: kinds of vision encoder that they have, the usual one first.
        image: what one image is to a method, and so what `keep` counts tokens of.
        transformers: the lowest version that its seams are in.
        later_turns: the lowest version that masks a picture rightly which comes when the cache is filled; None for the
            same one.
        image_token: attribute of the configuration that holds the id of the visual placeholder.
        tower: attribute path from the base model to the vision encoder.
        projector: attribute path from the base model to the projector.
        norm: attribute path from the base model to a norm between the block that is read and the projector.
        pointwise: the projector maps each token by itself.
        gathered: what makes tokens of the encoder's patches needs all of them at their places, though it merges none.
        read: the encoder block (0-based, of how many) whose output the projector reads.
        grid: raster shape of one image's tokens, from the configuration: of one tile, or of a picture of usual size.
        fixed: every image has that raster.
        layouts: how the pictures of one call come from the encoder's patches.
        videos: how its videos do; None where videos are not described.
        frames: its processor hands over the frames of a video as pictures, with text between them.
        video_tower: attribute path to the encoder of videos, of the same kind; None where one sees both.
        reads: further encoder blocks whose output is read beside that of the usual one, by number of how many.
        inside: why no method can act inside the encoder; None where they can.
        within: why no method can act inside the decoder or on its cache; None where they can.
        varies: fields of the row that other configurations of its types change, from the configuration.
        positions: position ids (3, B, S) of new tokens that follow `start`, where they have several axes.
        first_position: position of the first token where the model is called directly.
        deepstack: the decoder's method that adds visual features to the output of its first blocks.
        typed_past: token types are read by position, from the start of what the cache holds.
        two_way: tokens of a prompt attend to later ones of it, those of a picture or all, so it must come whole.
        answers_typed: token types are 0 in a prompt and 1 in its answer, where tokens no longer look ahead.
        check: refuses configurations whose decoder tokens are not the tower's patches.
    """

    name: str
    types: tuple[str, ...]
    hub_ids: tuple[str, ...]
    towers: tuple[str, ...]
    read: Callable[[Any, int], int]
    grid: Callable[[Any], Grid]
    image: str = "a picture"
    transformers: str = "5.18"
    later_turns: str | None = None
    image_token: str = "image_token_id"
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    norm: str | None = None
    pointwise: bool = True
    gathered: bool = False
    fixed: bool = True
    layouts: Callable[[Encoded], list[Layout]] = plain
    videos: Callable[[Encoded], list[Layout]] | None = None
    frames: bool = False
    video_tower: str | None = None
    reads: Callable[[Any, int], list[int]] | None = None
    inside: str | None = None
    within: str | None = None
    varies: Callable[[Any], dict[str, Any]] | None = None
    positions: Callable[[Any, Tensor, Tensor, dict[str, Any], Tensor], Tensor] | None = None
    first_position: int = 0
    deepstack: str | None = None
    typed_past: bool = False
    two_way: bool = False
    answers_typed: bool = False
    check: Callable[[Any, Tower], None] | None = None

    def image_token_id(self, config: Any) -> int:
        """Id of the placeholder that stands for one visual token."""
        token: int = getattr(config, self.image_token)
        return token

    def tower_of(self, model: Any) -> tuple[nn.Module, Tower]:
        """The vision encoder of a model and its description.

        Raises:
            FoveateError: no row of TOWERS describes this encoder.
        """
        tower = _at(model.base_model, self.tower)
        return tower, self.described(tower.config.model_type)

    def blocks_of(self, model: Any, kind: str = "image") -> nn.ModuleList:
        """The blocks of the encoder of pictures ("image") or of videos ("video"), in order.

        Raises:
            FoveateError: no row of TOWERS describes this encoder.
        """
        tower, row = self.tower_of(model)
        if kind == "video" and self.video_tower is not None:
            tower = _at(model.base_model, self.video_tower)
        return row.blocks_of(tower)

    def described(self, kind: str) -> Tower:
        """The description of a kind of encoder.

        Raises:
            FoveateError: there is none.
        """
        for row in TOWERS:
            if row.type == kind:
                return row
        known = ", ".join(row.type for row in TOWERS)
        raise FoveateError(f"{self.name}: the vision encoder {kind!r} is not described; known encoders: {known}")

    def project(self, model: Any, encoded: Tensor) -> Tensor:
        """Encoded tokens (K, E) to decoder tokens (K, D), where the projector maps each by itself."""
        if self.norm is not None:
            encoded = _at(model.base_model, self.norm)(encoded)
        projected: Tensor = _at(model.base_model, self.projector)(encoded[None])[0]
        return projected

    def read_block(self, model: Any) -> int:
        """0-based number of the encoder block whose output the projector reads.

        Raises:
            FoveateError: the projector reads the patch embeddings, before any block, or a block that is not there.
        """
        tower, row = self.tower_of(model)
        blocks = len(row.blocks_of(tower))
        block = self.read(model.config, blocks)
        if not 0 <= block < blocks:
            raise FoveateError(
                f"{self.name}: the projector reads encoder block {block}, outside 0..{blocks - 1}; set "
                f"vision_feature_layer to 1..{blocks} or -{blocks}..-1"
            )
        return block


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
    sizes = {name: given.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
    types = given.get("mm_token_type_ids")
    if types is None:
        raise FoveateError("mm_token_type_ids is missing; pass what the processor made, mm_token_type_ids among it")
    types = types[:, -ids.shape[1] :]
    sizes = {name: value for name, value in sizes.items() if value is not None}
    found: Tensor = model.base_model.get_rope_index(ids, types, attention_mask=mask.long(), **sizes)[0]
    return torch.where(mask, found + start[:, None], 0)


_SHARED = (
    "its layers take inputs of their own for each token, and the last ones the keys and values of others (E2B, E4B; "
    "not so the 31B, where they can)"
)


def _gemma4_varies(config: Any) -> dict[str, Any]:
    """Small ones have layers that hang together; in large ones pictures look ahead, in layers with a window."""
    text = config.text_config
    ahead = text.use_bidirectional_attention is not None
    alone = not text.hidden_size_per_layer_input and not text.num_kv_shared_layers
    return {"within": None if alone else _SHARED, "two_way": ahead, "typed_past": ahead}


_WITH_TILES = "a picture with all its tiles; the newlines behind its rows stay"
_ONE_TILE = "a tile of a picture, since text stands between tiles"

_QWEN: dict[str, Any] = dict(
    image="a picture, or a video with all its frames",
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
_GLM: dict[str, Any] = {**_QWEN, "image": "a picture", "videos": None}
_IDEFICS: dict[str, Any] = dict(
    image=_ONE_TILE,
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
        **_QWEN,
    ),
    Family(
        name="qwen2.5-vl",
        types=("qwen2_5_vl",),
        hub_ids=("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        towers=("qwen2_5_vl_vision",),
        **_QWEN,
    ),
    Family(
        name="qwen3-vl",
        types=("qwen3_vl",),
        hub_ids=("Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"),
        towers=("qwen3_vl_vision",),
        deepstack="_deepstack_process",
        reads=lambda config, blocks: list(config.vision_config.deepstack_visual_indexes),
        **_QWEN,
    ),
    Family(
        name="qwen3-vl-moe",
        types=("qwen3_vl_moe",),
        hub_ids=("Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen3-VL-235B-A22B-Instruct"),
        towers=("qwen3_vl_moe_vision",),
        deepstack="_deepstack_process",
        reads=lambda config, blocks: list(config.vision_config.deepstack_visual_indexes),
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
        name="paddleocr-vl",
        types=("paddleocr_vl",),
        transformers="5.21",  # older ones take no features of an encoder that has run
        hub_ids=("PaddlePaddle/PaddleOCR-VL",),
        towers=("paddleocr_vl_vision",),
        **{
            **_QWEN,
            "image": "a picture",
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
        read=_last_read,
        grid=lambda config: (16, 16),  # of a square picture, where the most tokens are what the processor makes
        tower="vision_tower",
        projector="embed_vision",
        pointwise=False,
        fixed=False,
        layouts=lambda encoded: padded_rasters(encoded.model.config.vision_config.pooling_kernel_size, encoded),
        inside="its blocks turn each patch by its place and norm what attention and MLP add",
        within=_SHARED,
        varies=_gemma4_varies,
    ),
    Family(
        name="paligemma",
        types=("paligemma",),
        hub_ids=("google/paligemma-3b-mix-224", "google/paligemma2-3b-mix-448"),
        towers=("siglip_vision_model",),
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
        read=_deepest_read,
        grid=_grid,
        pointwise=False,
        reads=_all_read,
    ),
    Family(
        name="video-llava",
        types=("video_llava",),
        transformers="5.21",  # older ones call `pixel_values` by another name
        hub_ids=("LanguageBind/Video-LLaVA-7B-hf",),
        towers=("clip_vision_model",),
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


def family_of(model: Any) -> Family:
    """The row of a loaded model; for a type that has none, one made of the standard parts that the model has.

    Raises:
        FoveateError: the model is no vision-language model, is known not to fit, or has no row and lacks a standard
            part.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind is None:
        raise FoveateError(
            f"{type(model).__name__} is no transformers model; load one with AutoModelForImageTextToText"
        )
    for family in FAMILIES:
        if kind in family.types:
            if not hasattr(model, "generate"):
                raise FoveateError(
                    f"{type(model).__name__} has no generate(); load it with AutoModelForImageTextToText, not AutoModel"
                )
            return family if family.varies is None else replace(family, **family.varies(config))
    if kind in UNFIT:
        raise FoveateError(
            f"{type(model).__name__} ({kind}) cannot be pruned: {UNFIT[kind]}; `foveate models` lists the families"
        )
    known = ", ".join(f"{family.name} ({', '.join(family.types)})" for family in FAMILIES)
    if not hasattr(config, "vision_config"):
        raise FoveateError(f"{type(model).__name__} ({kind}) is no vision-language model; known families: {known}")
    from foveate.generic import generic_family

    return generic_family(model)


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module
