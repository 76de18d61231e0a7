"""Tiny families whose pictures have one size, or are padded to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from models.tiny_parts import BLOCK, SIZES, VIDEO, VOCABULARY, Picture, Settings, encoder, joined, randn
from torch import Tensor


def gemma3(blocks: int, settings: Settings) -> Any:
    text = transformers.Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        query_pre_attn_scalar=8,
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": 100.0} for kind in ("sliding_attention", "full_attention")
        },
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    )
    vision = encoder("siglip", blocks, image_size=32)
    return joined(transformers.Gemma3Config, vision, text, settings, mm_tokens_per_image=16)


def gemma4(**more: Any) -> Callable[[int, Settings], Any]:
    def build(blocks: int, settings: Settings) -> Any:
        text = transformers.Gemma4TextConfig(
            **SIZES,
            head_dim=8,
            global_head_dim=16,
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 100.0},
            },
            vocab_size_per_layer_input=VOCABULARY,
            **more,
        )
        vision = transformers.Gemma4VisionConfig(
            **BLOCK,
            num_hidden_layers=blocks,
            num_key_value_heads=4,
            head_dim=8,
            pooling_kernel_size=2,
            position_embedding_size=16,
        )
        tokens = {"video_token_id": VIDEO, "audio_token_id": VOCABULARY}
        return joined(transformers.Gemma4Config, vision, text, settings, **tokens)

    return build


_PADDED = 32  # patches that a picture is padded to


def padded(model: Any, number: int, in_row: int, generator: torch.Generator) -> Picture:
    height, width = ((4, 6), (8, 4), (6, 4))[number % 3]
    pixels = torch.zeros(_PADDED, 48)
    pixels[: height * width] = torch.rand(height * width, 48, generator=generator)
    return Picture(height * width // 4, pixels, (height, width))


def collate_padded(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    pictures = [one for row in rows for one in row]
    places = torch.full((len(pictures), _PADDED, 2), -1)
    for number, one in enumerate(pictures):
        height, width = one.size
        patch = torch.arange(height * width)
        places[number, : height * width] = torch.stack([patch % width, patch // width], dim=1)
    return {"pixel_values": torch.stack([one.pixels for one in pictures]), "image_position_ids": places}


def paligemma(blocks: int, settings: Settings) -> Any:
    vision = encoder("siglip", blocks, image_size=24, projection_dim=32)
    return joined(
        transformers.PaliGemmaConfig, vision, transformers.GemmaConfig(**SIZES, head_dim=8), settings, projection_dim=32
    )


def deepseek_vl(blocks: int, settings: Settings) -> Any:
    return joined(
        transformers.DeepseekVLConfig,
        encoder("siglip", blocks, image_size=24),
        transformers.LlamaConfig(**SIZES),
        settings,
    )


def idefics(name: str) -> Callable[[int, Settings], Any]:
    def build(blocks: int, settings: Settings) -> Any:
        vision = dict(**BLOCK, num_hidden_layers=blocks, image_size=32)
        text = transformers.LlamaConfig(**SIZES)
        return joined(getattr(transformers, f"{name}Config"), vision, text, settings, scale_factor=2)

    return build


def aya(blocks: int, settings: Settings) -> Any:
    text = transformers.Cohere2Config(
        **SIZES, sliding_window=12, layer_types=["sliding_attention", "full_attention"] * 2
    )
    return joined(
        transformers.AyaVisionConfig,
        encoder("siglip", blocks, image_size=32),
        text,
        settings,
        downsample_factor=2,
        vision_feature_select_strategy="full",
    )


def cohere2_vision(blocks: int, settings: Settings) -> Any:
    text = transformers.Cohere2Config(
        **SIZES, sliding_window=12, layer_types=["sliding_attention", "full_attention"] * 2
    )
    return joined(
        transformers.Cohere2VisionConfig,
        encoder("siglip", blocks, image_size=32),
        text,
        settings,
        downsample_factor=2,
        alignment_intermediate_size=64,
    )


def vipllava(blocks: int, settings: Settings) -> Any:
    return joined(
        transformers.VipLlavaConfig,
        encoder("clip", blocks, image_size=24),
        transformers.LlamaConfig(**SIZES),
        settings,
        vision_feature_layer=[-2, -3, 1],
    )


def square(side: int, tokens: int) -> Callable[[Any, int, int, torch.Generator], Picture]:
    return lambda model, number, in_row, generator: Picture(tokens, randn(generator, 3, side, side))


def collate_square(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([one.pixels for row in rows for one in row])}


def collate_rows(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    """One row of pixels per prompt, filled up with empty pictures."""
    most = max(len(row) for row in rows)
    shape = next(row for row in rows if row)[0].pixels.shape
    pixels = torch.zeros(len(rows), most, *shape)
    for number, row in enumerate(rows):
        for place, one in enumerate(row):
            pixels[number, place] = one.pixels
    mask = torch.ones(len(rows), most, *shape[1:], dtype=torch.int64)
    return {"pixel_values": pixels, "pixel_attention_mask": mask}
