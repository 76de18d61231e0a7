"""The families of tiny.py beyond LLaVA-1.5: a tiny random model of each from its configuration, and its pictures."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

PAD, IMAGE, EOS, VIDEO = 0, 96, 1, 97
VOCABULARY = 98

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=None,
    eos_token_id=None,
)
_BLOCK = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, patch_size=4)


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture or video as a processor hands it over.

    Attributes:
        tokens: placeholders that it takes.
        pixels: what its row of `pixel_values` holds: tiles (T, 3, s, s), patches (P, d) or one (3, h, w).
        size: (h, w) in pixels or (t, h, w) in patches, where the model is told.
        row: shared by the pictures that came in one row of one call.
        video: its placeholders are those of videos.
        runs: where its rows or frames stand apart in the prompt, the placeholders of each.
    """

    tokens: int
    pixels: Tensor
    size: tuple[int, ...] = ()
    row: object = None
    video: bool = False
    runs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Kind:
    """How a family is built, what pictures it takes, and what of them goes into a call.

    Attributes:
        build: (attention, encoder blocks, settings) -> model.
        picture: (model, number of the picture, pictures in its row, generator) -> Picture.
        collate: (pictures of each row, ids) -> tensors of the call beside ids and mask.
        video, collate_videos: the same for videos; None where there are none.
    """

    build: Callable[[str, int, dict[str, Any]], Any]
    picture: Callable[[Any, int, int, torch.Generator], Picture]
    collate: Callable[[Sequence[Sequence[Picture]], Tensor], dict[str, Tensor]]
    video: Callable[[Any, int, torch.Generator], Picture] | None = None
    collate_videos: Callable[[Sequence[Picture]], dict[str, Tensor]] | None = None


def draw(module: nn.Module) -> None:
    """Weights large enough that attention is uneven and the answer depends on what is seen."""
    for name, weight in module.named_parameters(recurse=False):
        if isinstance(module, nn.Embedding):
            nn.init.normal_(weight, std=1.0)
        elif name in {"lambda_1", "lambda_2"}:
            nn.init.constant_(weight, 0.7)
        elif name in {"cls_token", "position_embeddings", "image_newline"}:
            nn.init.normal_(weight, std=1.0)
        elif weight.ndim >= 2:
            nn.init.normal_(weight, std=1.5 / math.sqrt(weight[0].numel()))
        elif name == "bias":
            nn.init.normal_(weight, std=0.1)


def finished(kind: Any, config: Any, attn: str, seed: int) -> Any:
    """A seeded model in float32 and eval mode whose answers never hold a placeholder."""
    config._attn_implementation = attn
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = kind(config)
        made.apply(draw)
        made.lm_head.weight = nn.Parameter(made.lm_head.weight.detach().clone())
        made.lm_head.weight.data[[PAD, EOS, IMAGE, VIDEO]] = 0.0
    made.generation_config.pad_token_id = PAD
    made.generation_config.eos_token_id = None
    return made.eval()


def _vision(kind: str, blocks: int, **more: Any) -> Any:
    if kind == "clip":
        return transformers.CLIPVisionConfig(**{**_BLOCK, "num_hidden_layers": blocks, "projection_dim": 16, **more})
    return transformers.SiglipVisionConfig(**{**_BLOCK, "num_hidden_layers": blocks, "vision_use_head": False, **more})


def _config(kind: Any, vision: Any, text: Any, settings: dict[str, Any], **more: Any) -> Any:
    return kind(
        vision_config=vision,
        text_config=text,
        **{"image_token_id": IMAGE, "tie_word_embeddings": False, **more, **settings},
    )


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# tiles of one size, with newline tokens: LLaVA-NeXT, LLaVA-OneVision

_SIDE = 16  # of a tile; 4 x 4 patches
_PINPOINTS = [[16, 32], [32, 16], [32, 32]]
_ANYRES = ((10, 30), (31, 14), (30, 22), (16, 16))  # padding of whole patches on either axis


def _llava_next_video(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
    config = _config(
        transformers.LlavaNextVideoConfig,
        _vision("clip", blocks, image_size=_SIDE),
        transformers.LlamaConfig(**SIZES),
        settings,
        image_grid_pinpoints=_PINPOINTS,
        video_token_id=VIDEO,
    )
    return finished(transformers.LlavaNextVideoForConditionalGeneration, config, attn, 0)


def _frames(newline: int) -> Callable[[Any, int, torch.Generator], Picture]:
    """Three frames, each of 2 x 2 tokens."""
    return lambda model, number, generator: Picture(3 * 4 + newline, _randn(generator, 3, 3, _SIDE, _SIDE), video=True)


def _collate_frames(videos: Sequence[Picture]) -> dict[str, Tensor]:
    return {"pixel_values_videos": torch.stack([one.pixels for one in videos])}


def _llava_next(decoder: str) -> Callable[[str, int, dict[str, Any]], Any]:
    def build(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
        text = {
            "llama": lambda: transformers.LlamaConfig(**SIZES),
            "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
        }[decoder]()
        config = _config(
            transformers.LlavaNextConfig,
            _vision("clip", blocks, image_size=_SIDE),
            text,
            settings,
            image_grid_pinpoints=_PINPOINTS,
        )
        return finished(transformers.LlavaNextForConditionalGeneration, config, attn, 0)

    return build


def _onevision(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
    config = _config(
        transformers.LlavaOnevisionConfig,
        _vision("siglip", blocks, image_size=_SIDE),
        transformers.Qwen2Config(**SIZES),
        settings,
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio="anyres_max_2",  # so that the largest picture is scaled down
        video_token_id=VIDEO,
    )
    return finished(transformers.LlavaOnevisionForConditionalGeneration, config, attn, 0)


def _anyres(model: Any, number: int, in_row: int, generator: torch.Generator) -> Picture:
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
    return Picture(tokens, _randn(generator, tiles, 3, _SIDE, _SIDE), size)


def _collate_anyres(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    pictures = [one for row in rows for one in row]
    most = max(one.pixels.shape[0] for one in pictures)
    pixels = torch.zeros(len(pictures), most, *pictures[0].pixels.shape[1:])
    for number, one in enumerate(pictures):
        pixels[number, : one.pixels.shape[0]] = one.pixels
    return {"pixel_values": pixels, "image_sizes": torch.tensor([one.size for one in pictures])}


def _collate_onevision(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    return {**_collate_anyres(rows, ids), "batch_num_images": torch.tensor([len(row) for row in rows])}


# ---------------------------------------------------------------------------------------------------------------------
# packed patches: Qwen-VL, Pixtral

_GRIDS = ((1, 8, 12), (1, 12, 8), (1, 8, 8))


def _qwen2(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = transformers.Qwen2VLConfig(
        vision_config=dict(depth=blocks, embed_dim=32, hidden_size=32, num_heads=4, patch_size=4, mlp_ratio=2),
        text_config=dict(**SIZES, rope_parameters=rope),
        **{"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": False, **settings},
    )
    return finished(transformers.Qwen2VLForConditionalGeneration, config, attn, 0)


def _qwen2_5(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
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
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=dict(**SIZES, rope_parameters=rope),
        **{"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": False, **settings},
    )
    return finished(transformers.Qwen2_5_VLForConditionalGeneration, config, attn, 0)


def _qwen3(kind: str, text: dict[str, Any], attn: str, blocks: int, settings: dict[str, Any]) -> Any:
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
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        text_config=dict(**SIZES, head_dim=16, rope_parameters=rope, **text),
        **{"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": False, **settings},
    )
    return finished(getattr(transformers, f"{kind}ForConditionalGeneration"), config, attn, 0)


# A dense block among those with experts.
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[1])


def _patches(model: Any, number: int, in_row: int, generator: torch.Generator) -> Picture:
    size = _GRIDS[number % len(_GRIDS)]
    return Picture(math.prod(size) // 4, _randn(generator, math.prod(size), 3 * 2 * 4 * 4), size)


def _collate_patches(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    pictures = [one for row in rows for one in row]
    return {
        "pixel_values": torch.cat([one.pixels for one in pictures]),
        "image_grid_thw": torch.tensor([one.size for one in pictures]),
    }


def _clip(apart: bool) -> Callable[[Any, int, torch.Generator], Picture]:
    """Two frames, which stand apart in the prompt or do not."""

    def video(model: Any, number: int, generator: torch.Generator) -> Picture:
        size = ((2, 8, 8), (2, 4, 8))[number % 2]
        tokens = math.prod(size) // 4
        runs = (tokens // 2,) * 2 if apart else ()
        return Picture(tokens, _randn(generator, math.prod(size), 3 * 2 * 4 * 4), size, video=True, runs=runs)

    return video


def _collate_clips(videos: Sequence[Picture]) -> dict[str, Tensor]:
    return {
        "pixel_values_videos": torch.cat([one.pixels for one in videos]),
        "video_grid_thw": torch.tensor([one.size for one in videos]),
    }


def _mistral3(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
    vision = transformers.PixtralVisionConfig(**{**_BLOCK, "num_hidden_layers": blocks, "image_size": 64})
    text = transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=8)
    config = _config(transformers.Mistral3Config, vision, text, settings, image_token_id=IMAGE)
    return finished(transformers.Mistral3ForConditionalGeneration, config, attn, 0)


def _lighton_ocr(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
    vision = transformers.PixtralVisionConfig(**{**_BLOCK, "num_hidden_layers": blocks, "image_size": 64})
    text = transformers.Qwen3Config(**SIZES, head_dim=8)
    config = _config(transformers.LightOnOcrConfig, vision, text, settings)
    return finished(transformers.LightOnOcrForConditionalGeneration, config, attn, 0)


def _any_size(model: Any, number: int, in_row: int, generator: torch.Generator) -> Picture:
    height, width = ((24, 32), (32, 40), (32, 24))[number % 3]
    return Picture(height * width // 64, _randn(generator, 3, height, width), (height, width))


def _pixtral(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
    vision = transformers.PixtralVisionConfig(**{**_BLOCK, "num_hidden_layers": blocks, "image_size": 64})
    config = _config(
        transformers.LlavaConfig,
        vision,
        transformers.MistralConfig(**SIZES, sliding_window=None),
        settings,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return finished(transformers.LlavaForConditionalGeneration, config, attn, 0)


def _rows_apart(model: Any, number: int, in_row: int, generator: torch.Generator) -> Picture:
    """A token of text ends each row of a picture."""
    height, width = ((16, 20), (20, 24))[number % 2]
    runs = (width // 4,) * (height // 4)
    return Picture(sum(runs), _randn(generator, 3, height, width), (height, width), runs=runs)


def _collate_any_size(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    pictures = [one for row in rows for one in row]
    height, width = (max(one.size[axis] for one in pictures) for axis in (0, 1))
    pixels = torch.zeros(len(pictures), 3, height, width)
    for number, one in enumerate(pictures):
        pixels[number, :, : one.size[0], : one.size[1]] = one.pixels
    return {"pixel_values": pixels, "image_sizes": torch.tensor([one.size for one in pictures])}


# ---------------------------------------------------------------------------------------------------------------------
# one size: InternVL (tiles behind each other), Gemma 3, PaliGemma, Idefics3, SmolVLM, Aya Vision, VipLLaVA


def _internvl(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
    vision = transformers.InternVLVisionConfig(
        **{**_BLOCK, "num_hidden_layers": blocks, "image_size": [24, 24], "patch_size": [4, 4]}
    )
    config = _config(transformers.InternVLConfig, vision, transformers.Qwen2Config(**SIZES), settings)
    return finished(transformers.InternVLForConditionalGeneration, config, attn, 0)


def _tiles(model: Any, number: int, in_row: int, generator: torch.Generator) -> Picture:
    tiles = (3, 1, 4)[number % 3]
    return Picture(9 * tiles, _randn(generator, tiles, 3, 24, 24))


def _collate_tiles(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": torch.cat([one.pixels for row in rows for one in row])}


def _gemma3(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
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
    vision = _vision("siglip", blocks, image_size=32)
    config = _config(transformers.Gemma3Config, vision, text, settings, mm_tokens_per_image=16)
    return finished(transformers.Gemma3ForConditionalGeneration, config, attn, 0)


def _gemma4(**more: Any) -> Callable[[str, int, dict[str, Any]], Any]:
    def build(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
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
            **_BLOCK,
            num_hidden_layers=blocks,
            num_key_value_heads=4,
            head_dim=8,
            pooling_kernel_size=2,
            position_embedding_size=16,
        )
        tokens = {"video_token_id": VIDEO, "audio_token_id": VOCABULARY}
        config = _config(transformers.Gemma4Config, vision, text, settings, **tokens)
        return finished(transformers.Gemma4ForConditionalGeneration, config, attn, 0)

    return build


_PADDED = 32  # patches that a picture is padded to


def _padded(model: Any, number: int, in_row: int, generator: torch.Generator) -> Picture:
    height, width = ((4, 6), (8, 4), (6, 4))[number % 3]
    pixels = torch.zeros(_PADDED, 48)
    pixels[: height * width] = torch.rand(height * width, 48, generator=generator)
    return Picture(height * width // 4, pixels, (height, width))


def _collate_padded(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    pictures = [one for row in rows for one in row]
    places = torch.full((len(pictures), _PADDED, 2), -1)
    for number, one in enumerate(pictures):
        height, width = one.size
        patch = torch.arange(height * width)
        places[number, : height * width] = torch.stack([patch % width, patch // width], dim=1)
    return {"pixel_values": torch.stack([one.pixels for one in pictures]), "image_position_ids": places}


def _paligemma(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
    vision = _vision("siglip", blocks, image_size=24, projection_dim=32)
    config = _config(
        transformers.PaliGemmaConfig, vision, transformers.GemmaConfig(**SIZES, head_dim=8), settings, projection_dim=32
    )
    return finished(transformers.PaliGemmaForConditionalGeneration, config, attn, 0)


def _deepseek_vl(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
    config = _config(
        transformers.DeepseekVLConfig,
        _vision("siglip", blocks, image_size=24),
        transformers.LlamaConfig(**SIZES),
        settings,
    )
    return finished(transformers.DeepseekVLForConditionalGeneration, config, attn, 0)


def _idefics(name: str) -> Callable[[str, int, dict[str, Any]], Any]:
    def build(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
        vision = dict(**_BLOCK, num_hidden_layers=blocks, image_size=32)
        text = transformers.LlamaConfig(**SIZES)
        config = _config(getattr(transformers, f"{name}Config"), vision, text, settings, scale_factor=2)
        return finished(getattr(transformers, f"{name}ForConditionalGeneration"), config, attn, 0)

    return build


def _aya(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
    text = transformers.Cohere2Config(
        **SIZES, sliding_window=12, layer_types=["sliding_attention", "full_attention"] * 2
    )
    config = _config(
        transformers.AyaVisionConfig,
        _vision("siglip", blocks, image_size=32),
        text,
        settings,
        downsample_factor=2,
        vision_feature_select_strategy="full",
    )
    return finished(transformers.AyaVisionForConditionalGeneration, config, attn, 0)


def _cohere2_vision(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
    text = transformers.Cohere2Config(
        **SIZES, sliding_window=12, layer_types=["sliding_attention", "full_attention"] * 2
    )
    config = _config(
        transformers.Cohere2VisionConfig,
        _vision("siglip", blocks, image_size=32),
        text,
        settings,
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    return finished(transformers.Cohere2VisionForConditionalGeneration, config, attn, 0)


def _glm4v(kind: str, text: dict[str, Any], attn: str, blocks: int, settings: dict[str, Any]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    vision = dict(
        depth=blocks, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4, image_size=48
    )
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        text_config=dict(**SIZES, rope_parameters=rope, **text),
        **{"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": False, **settings},
    )
    return finished(getattr(transformers, f"{kind}ForConditionalGeneration"), config, attn, 0)


# The first block is dense; every token passes one expert beside those that are picked.
_SHARED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1)


def _paddleocr(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = transformers.PaddleOCRVLConfig(
        vision_config={**_BLOCK, "num_hidden_layers": blocks, "image_size": 24},
        text_config=dict(**SIZES, head_dim=8, rope_parameters=rope, tie_word_embeddings=False),
        **{"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": False, **settings},
    )
    return finished(transformers.PaddleOCRVLForConditionalGeneration, config, attn, 0)


def _flat_patches(model: Any, number: int, in_row: int, generator: torch.Generator) -> Picture:
    size = _GRIDS[number % len(_GRIDS)]
    return Picture(math.prod(size) // 4, _randn(generator, math.prod(size), 3 * 4 * 4), size)


def _collate_square_patches(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    made = _collate_patches(rows, ids)
    return {**made, "pixel_values": made["pixel_values"].unflatten(1, (3, 4, 4))}


def _video_llama_3(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
    config = _config(
        transformers.VideoLlama3Config,
        {**_BLOCK, "num_hidden_layers": blocks},
        transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
        settings,
        video_token_id=VIDEO,
    )
    return finished(transformers.VideoLlama3ForConditionalGeneration, config, attn, 0)


def _whole_patches(model: Any, number: int, in_row: int, generator: torch.Generator) -> Picture:
    """Patches that do not merge."""
    size = ((1, 4, 6), (1, 6, 4), (1, 5, 5))[number % 3]
    return Picture(math.prod(size), _randn(generator, math.prod(size), 3 * 4 * 4), size)


def _collate_whole_patches(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    made = _collate_patches(rows, ids)
    return {**made, "image_merge_sizes": torch.ones(len(made["image_grid_thw"]), dtype=torch.int64)}


def _vipllava(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
    config = _config(
        transformers.VipLlavaConfig,
        _vision("clip", blocks, image_size=24),
        transformers.LlamaConfig(**SIZES),
        settings,
        vision_feature_layer=[-2, -3, 1],
    )
    return finished(transformers.VipLlavaForConditionalGeneration, config, attn, 0)


def _video_llava(attn: str, blocks: int, settings: dict[str, Any]) -> Any:
    config = _config(
        transformers.VideoLlavaConfig,
        _vision("clip", blocks, image_size=_SIDE),
        transformers.LlamaConfig(**SIZES),
        settings,
        video_token_id=VIDEO,
    )
    return finished(transformers.VideoLlavaForConditionalGeneration, config, attn, 0)


def _with_cls(model: Any, number: int, generator: torch.Generator) -> Picture:
    """Three frames, each of a CLS and 4 x 4 tokens."""
    return Picture(3 * 17, _randn(generator, 3, 3, _SIDE, _SIDE), video=True)


def _square(side: int, tokens: int) -> Callable[[Any, int, int, torch.Generator], Picture]:
    return lambda model, number, in_row, generator: Picture(tokens, _randn(generator, 3, side, side))


def _collate_square(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([one.pixels for row in rows for one in row])}


def _collate_rows(rows: Sequence[Sequence[Picture]], ids: Tensor) -> dict[str, Tensor]:
    """One row of pixels per prompt, filled up with empty pictures."""
    most = max(len(row) for row in rows)
    shape = next(row for row in rows if row)[0].pixels.shape
    pixels = torch.zeros(len(rows), most, *shape)
    for number, row in enumerate(rows):
        for place, one in enumerate(row):
            pixels[number, place] = one.pixels
    mask = torch.ones(len(rows), most, *shape[1:], dtype=torch.int64)
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


KINDS: dict[str, Kind] = {
    "llava-next": Kind(_llava_next("llama"), _anyres, _collate_anyres),
    "llava-1.5/pixtral": Kind(_pixtral, _rows_apart, _collate_any_size),
    "llava-next/mistral": Kind(_llava_next("mistral"), _anyres, _collate_anyres),
    "llava-onevision": Kind(_onevision, _anyres, _collate_onevision, _frames(1), _collate_frames),
    "llava-next-video": Kind(_llava_next_video, _anyres, _collate_anyres, _frames(0), _collate_frames),
    "qwen2-vl": Kind(_qwen2, _patches, _collate_patches, _clip(False), _collate_clips),
    "qwen2.5-vl": Kind(_qwen2_5, _patches, _collate_patches, _clip(False), _collate_clips),
    "qwen3-vl": Kind(functools.partial(_qwen3, "Qwen3VL", {}), _patches, _collate_patches, _clip(True), _collate_clips),
    "qwen3-vl-moe": Kind(
        functools.partial(_qwen3, "Qwen3VLMoe", _EXPERTS), _patches, _collate_patches, _clip(True), _collate_clips
    ),
    "glm4v": Kind(functools.partial(_glm4v, "Glm4v", {}), _patches, _collate_patches),
    "glm4v/glm46v": Kind(functools.partial(_glm4v, "Glm46V", {}), _patches, _collate_patches),
    "glm4v-moe": Kind(functools.partial(_glm4v, "Glm4vMoe", _SHARED), _patches, _collate_patches),
    "paddleocr-vl": Kind(_paddleocr, _flat_patches, _collate_square_patches),
    "video-llama-3": Kind(_video_llama_3, _whole_patches, _collate_whole_patches),
    "internvl": Kind(_internvl, _tiles, _collate_tiles),
    "gemma3": Kind(_gemma3, _square(32, 16), _collate_square),
    "gemma4": Kind(
        _gemma4(hidden_size_per_layer_input=8, num_kv_shared_layers=2, use_double_wide_mlp=True),
        _padded,
        _collate_padded,
    ),
    "gemma4/31b": Kind(
        _gemma4(
            hidden_size_per_layer_input=0,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            use_bidirectional_attention="vision",
        ),
        _padded,
        _collate_padded,
    ),
    "paligemma": Kind(_paligemma, _square(24, 36), _collate_square),
    "deepseek-vl": Kind(_deepseek_vl, _square(24, 36), _collate_square),
    "idefics3": Kind(_idefics("Idefics3"), _square(32, 16), _collate_rows),
    "smolvlm": Kind(_idefics("SmolVLM"), _square(32, 16), _collate_rows),
    "mistral3": Kind(_mistral3, _any_size, _collate_any_size),
    "lighton-ocr": Kind(_lighton_ocr, _any_size, _collate_any_size),
    "aya-vision": Kind(_aya, _square(32, 16), _collate_square),
    "cohere2-vision": Kind(_cohere2_vision, _square(32, 16), _collate_square),
    "vipllava": Kind(_vipllava, _square(24, 36), _collate_square),
    "video-llava": Kind(_video_llava, _square(16, 16), _collate_square, _with_cls, _collate_frames),
}

# What a call is told of each token, by model type: whether it is visual.
_TOKEN_TYPES = {
    "qwen2_vl": "mm_token_type_ids",
    "qwen2_5_vl": "mm_token_type_ids",
    "qwen3_vl": "mm_token_type_ids",
    "qwen3_vl_moe": "mm_token_type_ids",
    "paddleocr_vl": "mm_token_type_ids",
    "glm4v": "mm_token_type_ids",
    "glm46v": "mm_token_type_ids",
    "glm4v_moe": "mm_token_type_ids",
    "gemma3": "token_type_ids",
    "gemma4": "mm_token_type_ids",
}


def kind_of(model: Any) -> Kind:
    """The row of a tiny model."""
    return next(kind for name, kind in KINDS.items() if _TYPES[name] == model.config.model_type)


_TYPES = {
    "llava-next": "llava_next",
    "llava-1.5/pixtral": "llava",
    "llava-next/mistral": "llava_next",
    "llava-onevision": "llava_onevision",
    "llava-next-video": "llava_next_video",
    "qwen2-vl": "qwen2_vl",
    "qwen2.5-vl": "qwen2_5_vl",
    "qwen3-vl": "qwen3_vl",
    "qwen3-vl-moe": "qwen3_vl_moe",
    "paddleocr-vl": "paddleocr_vl",
    "video-llama-3": "video_llama_3",
    "glm4v": "glm4v",
    "glm4v/glm46v": "glm46v",
    "glm4v-moe": "glm4v_moe",
    "internvl": "internvl",
    "gemma3": "gemma3",
    "gemma4": "gemma4",
    "gemma4/31b": "gemma4",
    "paligemma": "paligemma",
    "deepseek-vl": "deepseek_vl",
    "idefics3": "idefics3",
    "smolvlm": "smolvlm",
    "mistral3": "mistral3",
    "lighton-ocr": "lighton_ocr",
    "aya-vision": "aya_vision",
    "cohere2-vision": "cohere2_vision",
    "vipllava": "vipllava",
    "video-llava": "video_llava",
}


class Call(dict[str, Tensor]):
    """Keyword arguments of a call that remember the model and the pictures of each row."""

    model: Any
    pictures: list[list[Picture]]

    def alone(self, row: int) -> Call:
        """One row as it would be by itself: without padding, with its own pictures only."""
        valid = self["attention_mask"][row].bool()
        ids = self["input_ids"][row][valid][None]
        return call(self.model, ids, torch.ones_like(ids), [self.pictures[row]])

    def continued(self, answer: Tensor, second: Call) -> tuple[Call, Call]:
        """A conversation's second call, and the whole conversation as one prompt.

        Args:
            answer: (B, S + M) ids of the first prompt and its answer.
        """
        ids = torch.cat([answer, second["input_ids"]], dim=1)
        grown = torch.ones_like(answer[:, self["input_ids"].shape[1] :])
        mask = torch.cat([self["attention_mask"], grown, second["attention_mask"]], dim=1)
        both = [[*before, *now] for before, now in zip(self.pictures, second.pictures, strict=True)]
        return call(self.model, ids, mask, second.pictures), call(self.model, ids, mask, both)


def call(
    model: Any,
    ids: Tensor,
    mask: Tensor | None,
    pictures: Sequence[Sequence[Picture]],
) -> Call:
    """The tensors of a call: ids, mask, token types and pixels."""
    made = Call(input_ids=ids)
    if mask is not None:
        made["attention_mask"] = mask
    made.update(token_types(model, ids))
    stills = [[one for one in row if not one.video] for row in pictures]
    videos = [one for row in pictures for one in row if one.video]
    kind = kind_of(model)
    if any(stills):
        made.update(kind.collate(stills, ids))
    if videos and kind.collate_videos is not None:
        made.update(kind.collate_videos(videos))
    made.model, made.pictures = model, [list(row) for row in pictures]
    return made


def token_types(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Which tokens are visual, where the model wants to be told."""
    kind = model.config.model_type
    if kind == "paligemma":
        return {"token_type_ids": torch.zeros_like(ids)}
    types = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    return {_TOKEN_TYPES[kind]: types} if kind in _TOKEN_TYPES else {}


def inputs(model: Any, rows: Sequence[str], padding: str, generator: torch.Generator, batch_mask: bool) -> Call:
    """What a processor would make of some layouts: a number is so many words, `i` a picture, `v` a video."""
    pictures: list[list[Picture]] = []
    lines: list[Tensor] = []
    number = 0
    for row in rows:
        pieces: list[Tensor] = []
        mine: list[Picture] = []
        for piece in row.replace("i", " i ").replace("v", " v ").split():
            if piece == "v":
                video = kind_of(model).video
                assert video is not None
                mine.append(dataclasses.replace(video(model, number, generator), row=lines))
                number += 1
                for run in mine[-1].runs or (mine[-1].tokens,):
                    pieces += [torch.full((run,), VIDEO), torch.randint(EOS + 1, IMAGE, (1,), generator=generator)]
            elif piece == "i":
                picture = kind_of(model).picture(model, number, row.count("i"), generator)
                mine.append(dataclasses.replace(picture, row=lines))
                number += 1
                for place, run in enumerate(mine[-1].runs or (mine[-1].tokens,)):
                    if place:
                        pieces.append(torch.randint(EOS + 1, IMAGE, (1,), generator=generator))
                    pieces.append(torch.full((run,), IMAGE))
            else:
                pieces.append(torch.randint(EOS + 1, IMAGE, (int(piece),), generator=generator))
        pictures.append(mine)
        lines.append(torch.cat(pieces))
    longest = max(one.numel() for one in lines)
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for place, one in enumerate(lines):
        where = slice(longest - one.numel(), None) if padding == "left" else slice(0, one.numel())
        ids[place, where] = one
        mask[place, where] = 1
    return call(model, ids, mask if batch_mask else None, pictures)
