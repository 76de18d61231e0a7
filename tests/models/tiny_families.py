"""The table of tiny families beyond LLaVA-1.5: a model of random weights, its pictures, what a call of it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from models import tiny_packed as packed
from models import tiny_single as single
from models import tiny_tiled as tiled
from models.tiny_parts import IMAGE, VIDEO, Picture, Settings, finished
from torch import Tensor


def untyped(ids: Tensor) -> dict[str, Tensor]:
    """A call that is not told what its tokens are."""
    return {}


def visual_types(ids: Tensor, name: str = "mm_token_type_ids") -> dict[str, Tensor]:
    """1 for tokens of pictures, 2 for those of videos."""
    return {name: (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


def gemma_types(ids: Tensor) -> dict[str, Tensor]:
    """The same, as Gemma 3 calls it."""
    return visual_types(ids, "token_type_ids")


def prompt_types(ids: Tensor) -> dict[str, Tensor]:
    """0 for all of a prompt, whatever it shows."""
    return {"token_type_ids": torch.zeros_like(ids)}


@dataclass(frozen=True)
class Kind:
    """How a family is built, what pictures it takes, and what of them goes into a call.

    Attributes:
        type: of its configuration.
        model: its name in transformers, before `ForConditionalGeneration`.
        config: (encoder blocks, settings) -> configuration.
        picture: (model, number of the picture, pictures in its row, generator) -> Picture.
        collate: (pictures of each row, ids) -> tensors of the call beside ids and mask.
        video, collate_videos: the same for videos; None where there are none.
        types: what a call is told of each token.
    """

    type: str
    model: str
    config: Callable[[int, Settings], Any]
    picture: Callable[[Any, int, int, torch.Generator], Picture]
    collate: Callable[[Sequence[Sequence[Picture]], Tensor], dict[str, Tensor]]
    video: Callable[[Any, int, torch.Generator], Picture] | None = None
    collate_videos: Callable[[Sequence[Picture]], dict[str, Tensor]] | None = None
    types: Callable[[Tensor], dict[str, Tensor]] = untyped

    @property
    def stock(self) -> Any:
        """The model's class."""
        return getattr(transformers, f"{self.model}ForConditionalGeneration")

    def build(self, attn: str, blocks: int, settings: Settings) -> Any:
        """A tiny model with so many encoder blocks."""
        return finished(self.stock, self.config(blocks, settings), attn, 0)


# Each by the name of its row among the families; behind a "/", another member, with another decoder or encoder.
KINDS: dict[str, Kind] = {
    "llava-next": Kind("llava_next", "LlavaNext", tiled.llava_next("llama"), tiled.anyres, tiled.collate_anyres),
    "llava-1.5/pixtral": Kind("llava", "Llava", packed.pixtral, packed.rows_apart, packed.collate_any_size),
    "llava-next/mistral": Kind(
        "llava_next", "LlavaNext", tiled.llava_next("mistral"), tiled.anyres, tiled.collate_anyres
    ),
    "llava-onevision": Kind(
        "llava_onevision",
        "LlavaOnevision",
        tiled.onevision,
        tiled.anyres,
        tiled.collate_onevision,
        tiled.frames(1),
        tiled.collate_frames,
    ),
    "llava-next-video": Kind(
        "llava_next_video",
        "LlavaNextVideo",
        tiled.llava_next_video,
        tiled.anyres,
        tiled.collate_anyres,
        tiled.frames(0),
        tiled.collate_frames,
    ),
    "qwen2-vl": Kind(
        "qwen2_vl",
        "Qwen2VL",
        packed.qwen2,
        packed.patches,
        packed.collate_patches,
        packed.clip(False),
        packed.collate_clips,
        types=visual_types,
    ),
    "qwen2.5-vl": Kind(
        "qwen2_5_vl",
        "Qwen2_5_VL",
        packed.qwen2_5,
        packed.patches,
        packed.collate_patches,
        packed.clip(False),
        packed.collate_clips,
        types=visual_types,
    ),
    "qwen3-vl": Kind(
        "qwen3_vl",
        "Qwen3VL",
        partial(packed.qwen3, "Qwen3VL", {}),
        packed.patches,
        packed.collate_patches,
        packed.clip(True),
        packed.collate_clips,
        types=visual_types,
    ),
    "qwen3-vl-moe": Kind(
        "qwen3_vl_moe",
        "Qwen3VLMoe",
        partial(packed.qwen3, "Qwen3VLMoe", packed.EXPERTS),
        packed.patches,
        packed.collate_patches,
        packed.clip(True),
        packed.collate_clips,
        types=visual_types,
    ),
    "glm4v": Kind(
        "glm4v", "Glm4v", partial(packed.glm4v, "Glm4v", {}), packed.patches, packed.collate_patches, types=visual_types
    ),
    "glm4v/glm46v": Kind(
        "glm46v",
        "Glm46V",
        partial(packed.glm4v, "Glm46V", {}),
        packed.patches,
        packed.collate_patches,
        types=visual_types,
    ),
    "glm4v-moe": Kind(
        "glm4v_moe",
        "Glm4vMoe",
        partial(packed.glm4v, "Glm4vMoe", packed.SHARED),
        packed.patches,
        packed.collate_patches,
        types=visual_types,
    ),
    "glm-ocr": Kind(
        "glm_ocr",
        "GlmOcr",
        partial(packed.glm4v, "GlmOcr", {}),
        packed.patches,
        packed.collate_patches,
        types=visual_types,
    ),
    "paddleocr-vl": Kind(
        "paddleocr_vl",
        "PaddleOCRVL",
        packed.paddleocr,
        packed.flat_patches,
        packed.collate_square_patches,
        types=visual_types,
    ),
    "video-llama-3": Kind(
        "video_llama_3", "VideoLlama3", packed.video_llama_3, packed.whole_patches, packed.collate_whole_patches
    ),
    "internvl": Kind("internvl", "InternVL", tiled.internvl, tiled.tiles, tiled.collate_tiles),
    "gemma3": Kind("gemma3", "Gemma3", single.gemma3, single.square(32, 16), single.collate_square, types=gemma_types),
    "gemma4": Kind(
        "gemma4",
        "Gemma4",
        single.gemma4(hidden_size_per_layer_input=8, num_kv_shared_layers=2, use_double_wide_mlp=True),
        single.padded,
        single.collate_padded,
        types=visual_types,
    ),
    "gemma4/31b": Kind(
        "gemma4",
        "Gemma4",
        single.gemma4(
            hidden_size_per_layer_input=0,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            use_bidirectional_attention="vision",
        ),
        single.padded,
        single.collate_padded,
        types=visual_types,
    ),
    "paligemma": Kind(
        "paligemma", "PaliGemma", single.paligemma, single.square(24, 36), single.collate_square, types=prompt_types
    ),
    "deepseek-vl": Kind("deepseek_vl", "DeepseekVL", single.deepseek_vl, single.square(24, 36), single.collate_square),
    "idefics3": Kind("idefics3", "Idefics3", single.idefics("Idefics3"), single.square(32, 16), single.collate_rows),
    "smolvlm": Kind("smolvlm", "SmolVLM", single.idefics("SmolVLM"), single.square(32, 16), single.collate_rows),
    "mistral3": Kind("mistral3", "Mistral3", packed.mistral3, packed.any_size, packed.collate_any_size),
    "lighton-ocr": Kind("lighton_ocr", "LightOnOcr", packed.lighton_ocr, packed.any_size, packed.collate_any_size),
    "aya-vision": Kind("aya_vision", "AyaVision", single.aya, single.square(32, 16), single.collate_square),
    "cohere2-vision": Kind(
        "cohere2_vision", "Cohere2Vision", single.cohere2_vision, single.square(32, 16), single.collate_square
    ),
    "vipllava": Kind("vipllava", "VipLlava", single.vipllava, single.square(24, 36), single.collate_square),
    "video-llava": Kind(
        "video_llava",
        "VideoLlava",
        tiled.video_llava,
        single.square(16, 16),
        single.collate_square,
        tiled.with_cls,
        tiled.collate_frames,
    ),
}


def kind_of(model: Any) -> Kind:
    """The row of a tiny model."""
    return next(kind for kind in KINDS.values() if kind.type == model.config.model_type)


def with_videos() -> tuple[str, ...]:
    """Names of those that take videos."""
    return tuple(name for name, kind in KINDS.items() if kind.video is not None)
