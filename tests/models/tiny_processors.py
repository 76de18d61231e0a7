"""Stock processors for the tiny models: words and pictures to their inputs, each with a chat template of its kind.

They read pictures through Pillow, and those that also take videos are built without what does, since transformers needs
torchvision for that. With `backend` "torchvision" they are what users have who installed it. Pixtral's and Cohere's
need it for pictures too, and SmolVLM's needs num2words.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import transformers
from models import tiny
from models.tiny_parts import EOS, IMAGE, PAD, VIDEO
from transformers import PreTrainedTokenizerFast, ProcessorMixin

_TEMPLATE = (
    "{% for message in messages %}{{ 'w3' if message['role'] == 'user' else 'w4' }} "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}HOLDER {% elif part['type'] == 'video' %}CLIP "
    "{% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}w4{% endif %}"
)
_NO_VIDEOS = SimpleNamespace(model_input_names=[])
backend = "pil"
_TILES = [[16, 32], [32, 16], [32, 32]]


# Where a processor is defined: the one that transformers itself hands out may ask for torchvision.
_MODULES = {
    "LlavaNextProcessor": "llava_next",
    "LlavaNextVideoProcessor": "llava_next_video",
    "LlavaOnevisionProcessor": "llava_onevision",
    "VideoLlavaProcessor": "video_llava",
    "Glm4vProcessor": "glm4v",
    "Glm46VProcessor": "glm46v",
    "VideoLlama3Processor": "video_llama_3",
    "PaddleOCRVLProcessor": "paddleocr_vl",
    "Qwen2VLProcessor": "qwen2_vl",
    "Qwen2_5_VLProcessor": "qwen2_5_vl",
    "Qwen3VLProcessor": "qwen3_vl",
    "InternVLProcessor": "internvl",
    "Gemma3Processor": "gemma3",
    "Idefics3Processor": "idefics3",
    "AyaVisionProcessor": "aya_vision",
    "PixtralProcessor": "pixtral",
    "Cohere2VisionProcessor": "cohere2_vision",
}


def tokenizer(image: str = "<image>", video: str = "<video>", more: tuple[str, ...] = (), **names: str) -> Any:
    """Words to the ids of the tiny models: w2 ..., and a special token of its own for each of `more`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    first = IMAGE - len(more)
    words = {"<pad>": PAD, "</s>": EOS, image: IMAGE, video: VIDEO}
    words |= {word: first + number for number, word in enumerate(more)}
    words |= {f"w{number}": number for number in range(2, first)}
    made = Tokenizer(models.WordLevel(words, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="w2", padding_side="left"
    )
    fast.add_special_tokens({"additional_special_tokens": [image, video, *more]})
    assert len(fast) == VIDEO + 1, "no word was added"
    for name, token in {"image": image, "video": video, **names}.items():
        setattr(fast, f"{name}_token", token)
        setattr(fast, f"{name}_token_id", fast.convert_tokens_to_ids(token))
    return fast


def _pictures(kind: str, **settings: Any) -> Any:
    """The part of a processor that reads pictures."""
    return getattr(transformers, kind + ("Pil" if backend == "pil" else ""))(**settings)


def _videos(kind: str, **settings: Any) -> Any:
    """The part that reads videos; what stands in for it where nobody can."""
    return _NO_VIDEOS if backend == "pil" else getattr(transformers, kind)(**settings)


def _made(kind: str, holder: str, clip: str = "<video>", **parts: Any) -> Any:
    """A processor whose videos nobody asks for, but where torchvision reads them."""
    module = f"transformers.models.{_MODULES[kind]}.processing_{_MODULES[kind]}"
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        return getattr(importlib.import_module(module), kind)(
            **parts, chat_template=_TEMPLATE.replace("HOLDER", holder).replace("CLIP", clip)
        )


def _llava_next() -> Any:
    crop = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pictures = _pictures("LlavaNextImageProcessor", **crop, image_grid_pinpoints=_TILES)
    more = dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    return _made("LlavaNextProcessor", "<image>", image_processor=pictures, tokenizer=tokenizer(), **more)


def _llava_next_video() -> Any:
    next_ = _llava_next()
    crop = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    videos = _videos("LlavaNextVideoVideoProcessor", **crop)
    parts = dict(image_processor=next_.image_processor, tokenizer=next_.tokenizer, video_processor=videos)
    more = dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    return _made("LlavaNextVideoProcessor", "<image>", **parts, **more)


def _video_llava() -> Any:
    crop = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    videos = _videos("VideoLlavaVideoProcessor", **crop)
    parts = dict(image_processor=_pictures("CLIPImageProcessor", **crop), tokenizer=tokenizer(), video_processor=videos)
    return _made("VideoLlavaProcessor", "<image>", **parts, patch_size=4)


def _glm(name: str) -> Callable[[], Any]:
    def made() -> Any:
        sizes = dict(patch_size=4, merge_size=2, temporal_patch_size=2)
        pictures = _pictures(f"{name}ImageProcessor", **sizes, size={"shortest_edge": 512, "longest_edge": 3072})
        start, end = "<|begin_of_image|>", "<|end_of_image|>"
        tokens = tokenizer("<|image|>", "<|video|>", (start, end, "<|begin_of_video|>", "<|end_of_video|>"))
        parts = dict(image_processor=pictures, tokenizer=tokens, video_processor=_NO_VIDEOS)
        return _made(f"{name}Processor", f"{start}<|image|>{end}", **parts)

    return made


def _video_llama_3() -> Any:
    pictures = _pictures("VideoLlama3ImageProcessor", patch_size=4, merge_size=1, min_pixels=128, max_pixels=384)
    tokens = tokenizer("<|image_pad|>", "<|video_pad|>")
    parts = dict(image_processor=pictures, tokenizer=tokens, video_processor=_NO_VIDEOS)
    return _made("VideoLlama3Processor", "<|image_pad|>", **parts)


def _paddleocr() -> Any:
    pictures = _pictures(
        "PaddleOCRVLImageProcessor", patch_size=4, merge_size=2, temporal_patch_size=1, min_pixels=512, max_pixels=1536
    )
    image, start, end = "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>"
    parts = dict(image_processor=pictures, tokenizer=tokenizer(image, "<|video_pad|>", (start, end)))
    return _made("PaddleOCRVLProcessor", f"{start}{image}{end}", **parts)


def _onevision() -> Any:
    pictures = _pictures("LlavaOnevisionImageProcessor", size={"height": 16, "width": 16}, image_grid_pinpoints=_TILES)
    more = dict(num_image_tokens=16, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_2")
    more["video_processor"] = _videos("LlavaOnevisionVideoProcessor", size={"height": 16, "width": 16})
    return _made("LlavaOnevisionProcessor", "<image>", image_processor=pictures, tokenizer=tokenizer(), **more)


def _qwen(kind: str) -> Callable[[], Any]:
    def build() -> Any:
        sizes = dict(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=512, max_pixels=1536)
        pictures = _pictures("Qwen2VLImageProcessor", **sizes)
        videos = _videos("Qwen3VLVideoProcessor" if "3" in kind else "Qwen2VLVideoProcessor", **sizes)
        image, start, end = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
        tokens = tokenizer(image, "<|video_pad|>", (start, end), vision_start=start, vision_end=end)
        parts = dict(image_processor=pictures, tokenizer=tokens, video_processor=videos)
        return _made(kind, f"{start}{image}{end}", f"{start}<|video_pad|>{end}", **parts)

    return build


def _internvl() -> Any:
    pictures = _pictures(
        "GotOcr2ImageProcessor", size={"height": 24, "width": 24}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    context, start, end = "<IMG_CONTEXT>", "<img>", "</img>"
    tokens = tokenizer(context, "<video>", (start, end), start_image=start, end_image=end, context_image=context)
    videos = _videos("InternVLVideoProcessor", size={"height": 24, "width": 24})
    parts = dict(image_processor=pictures, tokenizer=tokens, video_processor=videos, image_seq_length=9)
    return _made("InternVLProcessor", context, **parts)


def _gemma3() -> Any:
    pictures = _pictures("Gemma3ImageProcessor", size={"height": 32, "width": 32})
    start, end = "<start_of_image>", "<end_of_image>"
    tokens = tokenizer("<image_soft_token>", "<video>", (start, end), boi=start, eoi=end)
    return _made("Gemma3Processor", start, image_processor=pictures, tokenizer=tokens, image_seq_length=16)


def _idefics3() -> Any:
    pictures = _pictures("Idefics3ImageProcessor", size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    places = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
    tokens = tokenizer(more=("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *places))
    return _made("Idefics3Processor", "<image>", image_processor=pictures, tokenizer=tokens, image_seq_len=16)


def _aya() -> Any:
    pictures = _pictures(
        "GotOcr2ImageProcessor", size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    tiles = tuple(f"TILE_{number}" for number in range(1, 5))
    marks = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL", *tiles)
    tokens = tokenizer("<|IMG_PATCH|>", "<video>", (*marks, "<image>"))
    more = dict(patch_size=4, img_size=32, downsample_factor=2)
    return _made("AyaVisionProcessor", "<image>", image_processor=pictures, tokenizer=tokens, **more)


def _pixtral() -> Any:
    sizes = {"size": {"longest_edge": 40}, "patch_size": {"height": 8, "width": 8}}
    pictures = _pictures("PixtralImageProcessor", **sizes)
    tokens = tokenizer("[IMG]", "<video>", ("[IMG_BREAK]", "[IMG_END]"))
    parts = dict(image_processor=pictures, tokenizer=tokens, patch_size=4, spatial_merge_size=2)
    return _made("PixtralProcessor", "[IMG]", **parts)


def _cohere2() -> Any:
    pictures = _pictures("Cohere2VisionImageProcessor", size={"height": 32, "width": 32}, patch_size=4, max_patches=4)
    start, end, line = "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>"
    tokens = tokenizer("<|IMG_PATCH|>", "<video>", (start, end, line), boi=start, eoi=end, img_line_break=line)
    return _made("Cohere2VisionProcessor", "<|IMG_PATCH|>", image_processor=pictures, tokenizer=tokens)


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava-1.5": lambda: tiny.processor(tiny.model()),
    "llava-next": _llava_next,
    "llava-onevision": _onevision,
    "llava-next-video": _llava_next_video,
    "qwen2-vl": _qwen("Qwen2VLProcessor"),
    "qwen2.5-vl": _qwen("Qwen2_5_VLProcessor"),
    "qwen3-vl": _qwen("Qwen3VLProcessor"),
    "qwen3-vl-moe": _qwen("Qwen3VLProcessor"),
    "paddleocr-vl": _paddleocr,
    "video-llama-3": _video_llama_3,
    "glm4v": _glm("Glm4v"),
    "glm4v-moe": _glm("Glm4v"),
    "glm-ocr": _glm("Glm46V"),
    "internvl": _internvl,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "aya-vision": _aya,
    "vipllava": lambda: tiny.processor(tiny.model()),
    "video-llava": _video_llava,
}
WITH_TORCHVISION = {**PROCESSORS, "mistral3": _pixtral, "cohere2-vision": _cohere2}
