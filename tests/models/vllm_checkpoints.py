"""Tiny random checkpoints that vLLM can load, and the prompts that are asked of them, for both sides of a test."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from models import tiny, tiny_families, tiny_parts, tiny_processors
from PIL import Image

FAMILIES = (
    "llava-1.5",
    "llava-next",
    "llava-onevision",
    "qwen2-vl",
    "qwen2.5-vl",
    "qwen3-vl",
    "glm4v",
    "internvl",
    "idefics3",
    "mistral3",
    "aya-vision",
)
"""Those whose answers in vLLM are held to those on transformers."""
HEAD = 32
"""Width of a decoder's head: the smallest that vLLM's attention on a CPU takes."""


@dataclass(frozen=True)
class Prompt:
    """What is asked of a family: words and pictures in turn, and the sizes of the pictures."""

    words: tuple[str, ...]  # "w5 w6", or "" for a picture
    sizes: tuple[tuple[int, int], ...]  # (width, height)


ONE, FIRST, LAST, THREE = ("w5 w6", "", "w7 w8 w9"), ("", "w7 w9"), ("w8 w6 w5", ""), ("w5", "", "w9", "", "", "w6")
PROMPTS = (
    Prompt(ONE, ((40, 40),)),
    Prompt(ONE, ((48, 32),)),
    Prompt(FIRST, ((32, 48),)),
    Prompt(LAST, ((40, 40),)),
    Prompt(("w5", "", "w9 w4", "", "w6"), ((48, 32), (32, 32))),
    Prompt(THREE, ((32, 48), (40, 40), (48, 32))),
)


def pictures(prompt: Prompt) -> list[Image.Image]:
    """Its pictures: coarse noise, the same for the same prompt."""
    made = []
    for number, size in enumerate(prompt.sizes):
        draw = random.Random(f"{prompt} {number}")
        pixels = bytes(draw.randrange(256) for _ in range(8 * 8 * 3))
        made.append(Image.frombytes("RGB", (8, 8), pixels).resize(size, Image.Resampling.NEAREST))
    return made


def text(prompt: Prompt, holder: str) -> str:
    """The prompt as a processor takes it."""
    return " ".join(words if words else holder for words in prompt.words)


def holder(processor: Any) -> str:
    """What stands for a picture in a prompt of this processor."""
    written = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    return str(written).removeprefix("w3").strip()


def write(family: str, folder: Path) -> None:
    """A tiny model of a family with its processor."""
    model, processor = _model(family), _processor(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _model(family: str) -> Any:
    """As `tiny` makes it, with decoder heads that vLLM's attention takes."""
    if family == "llava-1.5":
        kind: Any = transformers.LlavaForConditionalGeneration
        config = tiny.model(family).config
        config.text_config.vocab_size = tiny_parts.VOCABULARY
    else:
        kind, config = tiny_families.KINDS[family].stock, tiny_families.KINDS[family].config(4, {})
    return tiny_parts.finished(kind, _widened(config), "sdpa", 0)


def _widened(config: Any) -> Any:
    decoder = config.get_text_config()
    decoder.num_attention_heads = decoder.num_key_value_heads = 1
    decoder.tie_word_embeddings = False
    if hasattr(decoder, "logit_scale"):
        decoder.logit_scale = 1.0  # vLLM multiplies by it where transformers' Aya Vision does not
    if hasattr(decoder, "head_dim"):
        decoder.head_dim = HEAD
    rope = getattr(decoder, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        rope["mrope_section"] = [8, 4, 4]
    return config


def _processor(family: str) -> Any:
    made = _MORE[family]() if family in _MORE else tiny_processors.PROCESSORS[family]()
    video = _VIDEOS.get(family)
    if video is not None:
        made.video_processor = getattr(transformers, video)()
    made.tokenizer = _saved_names(made.tokenizer, _NAMES.get(family, {}))
    return made


def _saved_names(tokenizer: Any, names: dict[str, str]) -> Any:
    """The tokenizer with the names of its tokens written to disk with it."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        pad_token=tokenizer.pad_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        padding_side="left",
        extra_special_tokens=names,
    )


_NAMES = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    "qwen2-vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "qwen2.5-vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "qwen3-vl": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    },
    "glm4v": {"image_token": "<|image|>", "video_token": "<|video|>"},
    "llava-1.5": {"image_token": "<image>"},
}
_VIDEOS = {
    "llava-onevision": "LlavaOnevisionVideoProcessor",
    "qwen2-vl": "Qwen2VLVideoProcessor",
    "qwen2.5-vl": "Qwen2VLVideoProcessor",
    "qwen3-vl": "Qwen3VLVideoProcessor",
    "glm4v": "Glm4vVideoProcessor",
    "internvl": "InternVLVideoProcessor",
}


def _mistral3() -> Any:
    pictures = transformers.PixtralImageProcessor(patch_size=8, size={"longest_edge": 64})
    tokens = tiny_processors.tokenizer("[IMG]", "[VIDEO]", ("[IMG_BREAK]", "[IMG_END]"))
    more = dict(patch_size=4, spatial_merge_size=2, image_token="[IMG]", image_break_token="[IMG_BREAK]")
    return tiny_processors._made(
        "PixtralProcessor", "[IMG]", image_processor=pictures, tokenizer=tokens, image_end_token="[IMG_END]", **more
    )


tiny_processors._MODULES["PixtralProcessor"] = "pixtral"
_MORE = {"mistral3": _mistral3}
