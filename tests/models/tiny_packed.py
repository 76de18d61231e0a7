"""Tiny families whose encoder sees patches of all pictures as one sequence: Qwen-VL, GLM, Pixtral and their kin."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from models.tiny_parts import BLOCK, IMAGE, SIZES, VIDEO, Picture, Settings, joined, randn
from torch import Tensor

_GRIDS = ((1, 8, 12), (1, 12, 8), (1, 8, 8))


def qwen2(blocks: int, settings: Settings) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return transformers.Qwen2VLConfig(
        vision_config=dict(depth=blocks, embed_dim=32, hidden_size=32, num_heads=4, patch_size=4, mlp_ratio=2),
        text_config=dict(**SIZES, rope_parameters=rope),
        **{"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": False, **settings},
    )


def qwen2_5(blocks: int, settings: Settings) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = dict(
        depth=blocks,
        hidden_size=32,
        out_hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        patch_size=4,
        window_size=16,
        fullatt_block_indexes=[blocks // 2 - 1, blocks - 1],
    )
    return transformers.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=dict(**SIZES, rope_parameters=rope),
        **{"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": False, **settings},
    )


def qwen3(kind: str, text: Settings, blocks: int, settings: Settings) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = dict(
        depth=blocks,
        hidden_size=32,
        out_hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        patch_size=4,
        num_position_embeddings=36,
        deepstack_visual_indexes=[1, 2],
    )
    return getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        text_config=dict(**SIZES, head_dim=16, rope_parameters=rope, **text),
        **{"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": False, **settings},
    )


# A dense block among those with experts.
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[1])


def patches(model: Any, number: int, in_row: int, generator: torch.Generator) -> Picture:
    size = _GRIDS[number % len(_GRIDS)]
    return Picture(math.prod(size) // 4, randn(generator, math.prod(size), 3 * 2 * 4 * 4), size)


def collate_patches(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    pictures = [one for row in rows for one in row]
    return {
        "pixel_values": torch.cat([one.pixels for one in pictures]),
        "image_grid_thw": torch.tensor([one.size for one in pictures]),
    }


def clip(apart: bool) -> Callable[[Any, int, torch.Generator], Picture]:
    """Two frames, which stand apart in the prompt or do not."""

    def video(model: Any, number: int, generator: torch.Generator) -> Picture:
        size = ((2, 8, 8), (2, 4, 8))[number % 2]
        tokens = math.prod(size) // 4
        runs = (tokens // 2,) * 2 if apart else ()
        return Picture(tokens, randn(generator, math.prod(size), 3 * 2 * 4 * 4), size, video=True, runs=runs)

    return video


def collate_clips(videos: Sequence[Picture]) -> dict[str, Tensor]:
    return {
        "pixel_values_videos": torch.cat([one.pixels for one in videos]),
        "video_grid_thw": torch.tensor([one.size for one in videos]),
    }


def glm4v(kind: str, text: Settings, blocks: int, settings: Settings) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    vision = dict(
        depth=blocks, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4, image_size=48
    )
    return getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        text_config=dict(**SIZES, rope_parameters=rope, **text),
        **{"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": False, **settings},
    )


# The first block is dense; every token passes one expert beside those that are picked.
SHARED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1)


def paddleocr(blocks: int, settings: Settings) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return transformers.PaddleOCRVLConfig(
        vision_config={**BLOCK, "num_hidden_layers": blocks, "image_size": 24},
        text_config=dict(**SIZES, head_dim=8, rope_parameters=rope, tie_word_embeddings=False),
        **{"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": False, **settings},
    )


def flat_patches(model: Any, number: int, in_row: int, generator: torch.Generator) -> Picture:
    size = _GRIDS[number % len(_GRIDS)]
    return Picture(math.prod(size) // 4, randn(generator, math.prod(size), 3 * 4 * 4), size)


def collate_square_patches(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    made = collate_patches(rows, ids)
    return {**made, "pixel_values": made["pixel_values"].unflatten(1, (3, 4, 4))}


def video_llama_3(blocks: int, settings: Settings) -> Any:
    return joined(
        transformers.VideoLlama3Config,
        {**BLOCK, "num_hidden_layers": blocks},
        transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
        settings,
        video_token_id=VIDEO,
    )


def whole_patches(model: Any, number: int, in_row: int, generator: torch.Generator) -> Picture:
    """Patches that do not merge."""
    size = ((1, 4, 6), (1, 6, 4), (1, 5, 5))[number % 3]
    return Picture(math.prod(size), randn(generator, math.prod(size), 3 * 4 * 4), size)


def collate_whole_patches(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    made = collate_patches(rows, ids)
    return {**made, "image_merge_sizes": torch.ones(len(made["image_grid_thw"]), dtype=torch.int64)}


def mistral3(blocks: int, settings: Settings) -> Any:
    vision = transformers.PixtralVisionConfig(**{**BLOCK, "num_hidden_layers": blocks, "image_size": 64})
    text = transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=8)
    return joined(transformers.Mistral3Config, vision, text, settings, image_token_id=IMAGE)


def lighton_ocr(blocks: int, settings: Settings) -> Any:
    vision = transformers.PixtralVisionConfig(**{**BLOCK, "num_hidden_layers": blocks, "image_size": 64})
    text = transformers.Qwen3Config(**SIZES, head_dim=8)
    return joined(transformers.LightOnOcrConfig, vision, text, settings)


def any_size(model: Any, number: int, in_row: int, generator: torch.Generator) -> Picture:
    height, width = ((24, 32), (32, 40), (32, 24))[number % 3]
    return Picture(height * width // 64, randn(generator, 3, height, width), (height, width))


def pixtral(blocks: int, settings: Settings) -> Any:
    vision = transformers.PixtralVisionConfig(**{**BLOCK, "num_hidden_layers": blocks, "image_size": 64})
    return joined(
        transformers.LlavaConfig,
        vision,
        transformers.MistralConfig(**SIZES, sliding_window=None),
        settings,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )


def rows_apart(model: Any, number: int, in_row: int, generator: torch.Generator) -> Picture:
    """A token of text ends each row of a picture."""
    height, width = ((16, 20), (20, 24))[number % 2]
    runs = (width // 4,) * (height // 4)
    return Picture(sum(runs), randn(generator, 3, height, width), (height, width), runs=runs)


def collate_any_size(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    pictures = [one for row in rows for one in row]
    height, width = (max(one.size[axis] for one in pictures) for axis in (0, 1))
    pixels = torch.zeros(len(pictures), 3, height, width)
    for number, one in enumerate(pictures):
        pixels[number, :, : one.size[0], : one.size[1]] = one.pixels
    return {"pixel_values": pixels, "image_sizes": torch.tensor([one.size for one in pictures])}
