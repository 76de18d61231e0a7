"""Tiny families whose pictures are tiles of one size, and videos frames: LLaVA-NeXT, InternVL, Video-LLaVA and kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from models.tiny_parts import BLOCK, SIZES, VIDEO, Picture, Settings, encoder, joined, randn
from torch import Tensor

_SIDE = 16  # of a tile; 4 x 4 patches
_PINPOINTS = [[16, 32], [32, 16], [32, 32]]
_ANYRES = ((10, 30), (31, 14), (30, 22), (16, 16))  # padding of whole patches on either axis


def llava_next_video(blocks: int, settings: Settings) -> Any:
    return joined(
        transformers.LlavaNextVideoConfig,
        encoder("clip", blocks, image_size=_SIDE),
        transformers.LlamaConfig(**SIZES),
        settings,
        image_grid_pinpoints=_PINPOINTS,
        video_token_id=VIDEO,
    )


def frames(newline: int) -> Callable[[Any, int, torch.Generator], Picture]:
    """Three frames, each of 2 x 2 tokens."""
    return lambda model, number, generator: Picture(3 * 4 + newline, randn(generator, 3, 3, _SIDE, _SIDE), video=True)


def collate_frames(videos: Sequence[Picture]) -> dict[str, Tensor]:
    return {"pixel_values_videos": torch.stack([one.pixels for one in videos])}


def llava_next(decoder: str) -> Callable[[int, Settings], Any]:
    def build(blocks: int, settings: Settings) -> Any:
        text = {
            "llama": lambda: transformers.LlamaConfig(**SIZES),
            "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
        }[decoder]()
        return joined(
            transformers.LlavaNextConfig,
            encoder("clip", blocks, image_size=_SIDE),
            text,
            settings,
            image_grid_pinpoints=_PINPOINTS,
        )

    return build


def onevision(blocks: int, settings: Settings) -> Any:
    return joined(
        transformers.LlavaOnevisionConfig,
        encoder("siglip", blocks, image_size=_SIDE),
        transformers.Qwen2Config(**SIZES),
        settings,
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio="anyres_max_2",  # so that the largest picture is scaled down
        video_token_id=VIDEO,
    )


def anyres(model: Any, number: int, in_row: int, generator: torch.Generator) -> Picture:
    """Tiles and the number of tokens that stock packing makes of them, newlines included."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    onevision = model.config.model_type == "llava_onevision"
    size = _ANYRES[(number + 2 * onevision) % len(_ANYRES)]
    tiles = 1
    if not (onevision and in_row > 1):
        tiles = image_size_to_num_patches(size, _PINPOINTS, _SIDE)
    pack: dict[str, Any] = {"image_sizes": [size], "image_newline": torch.zeros(1)}
    if onevision:
        pack["vision_aspect_ratio"] = model.config.vision_aspect_ratio
    else:
        pack["vision_feature_select_strategy"] = "default"
    patches = (_SIDE // 4) ** 2
    tokens = model.model.pack_image_features([torch.zeros(tiles, patches, 1)], **pack)[0][0].shape[0]
    return Picture(tokens, randn(generator, tiles, 3, _SIDE, _SIDE), size)


def collate_anyres(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    pictures = [one for row in rows for one in row]
    most = max(one.pixels.shape[0] for one in pictures)
    pixels = torch.zeros(len(pictures), most, *pictures[0].pixels.shape[1:])
    for number, one in enumerate(pictures):
        pixels[number, : one.pixels.shape[0]] = one.pixels
    return {"pixel_values": pixels, "image_sizes": torch.tensor([one.size for one in pictures])}


def collate_onevision(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    return {**collate_anyres(rows, ids), "batch_num_images": torch.tensor([len(row) for row in rows])}


def internvl(blocks: int, settings: Settings) -> Any:
    vision = transformers.InternVLVisionConfig(
        **{**BLOCK, "num_hidden_layers": blocks, "image_size": [24, 24], "patch_size": [4, 4]}
    )
    return joined(transformers.InternVLConfig, vision, transformers.Qwen2Config(**SIZES), settings)


def tiles(model: Any, number: int, in_row: int, generator: torch.Generator) -> Picture:
    tiles = (3, 1, 4)[number % 3]
    return Picture(9 * tiles, randn(generator, tiles, 3, 24, 24))


def collate_tiles(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": torch.cat([one.pixels for row in rows for one in row])}


def video_llava(blocks: int, settings: Settings) -> Any:
    return joined(
        transformers.VideoLlavaConfig,
        encoder("clip", blocks, image_size=_SIDE),
        transformers.LlamaConfig(**SIZES),
        settings,
        video_token_id=VIDEO,
    )


def with_cls(model: Any, number: int, generator: torch.Generator) -> Picture:
    """Three frames, each of a CLS and 4 x 4 tokens."""
    return Picture(3 * 17, randn(generator, 3, 3, _SIDE, _SIDE), video=True)
