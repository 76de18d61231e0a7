"""`mini`, the small stock LLaVA of the scenes, and the CLIP model beside it: configs, tokenizers, processor, saving."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import PushToHubMixin

from foveate.paths import checked
from foveate.runs import whole_folder
from foveate.scenes import vocabulary

FOLDER = Path(__file__).parent / "checkpoint"
"""The trained `mini` that ships with the package; `clip/` inside it is the CLIP model that shares its vision tower."""

SIZE, PATCH, GRID = 336, 14, 24
TOKENS = GRID * GRID
END_WORD, END = "<end>", len(vocabulary.WORDS)
PAD, BOS, EOS, IMAGE = (vocabulary.WORDS.index(word) for word in ("<pad>", "<bos>", "<eos>", "<image>"))

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role']=='user' %}"
    "{% for c in m['content'] %}{% if c['type']=='image' %} <image>{% endif %}{% endfor %} USER"
    "{% for c in m['content'] %}{% if c['type']=='text' %} {{ c['text'] }}{% endif %}{% endfor %}"
    "{% else %} ASSISTANT{% for c in m['content'] %} {{ c['text'] }}{% endfor %} <eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT{% endif %}"
)


def vision_config(*, size: int = SIZE, width: int = 256, layers: int = 6) -> CLIPVisionConfig:
    """CLIP at 336 / 14 pixels: 576 patches, 6 blocks of width 256 with 4 heads."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=size,
        patch_size=PATCH,
        projection_dim=width,
    )


def llava_config(*, size: int = SIZE, width: int = 256, layers: int = 6) -> LlavaConfig:
    """The config of `mini`; other sizes serve tests only.

    The projector reads the output of the last but one vision block, as LLaVA-1.5 does.
    """
    text = LlamaConfig(
        vocab_size=len(vocabulary.WORDS),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlavaConfig(
        vision_config=vision_config(size=size, width=width, layers=layers),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=(size // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def build(seed: int = 0, config: LlavaConfig | None = None) -> LlavaForConditionalGeneration:
    """An untrained `mini` in float32 whose weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config or llava_config())
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    return model


def _word_level(template: str, extra: tuple[str, ...] = ()) -> Tokenizer:
    words = {word: place for place, word in enumerate((*vocabulary.WORDS, *extra))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = [(word, words[word]) for word in template.split() if word in words]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer: a word's id is its place in `vocabulary.WORDS`; a word outside it becomes `<pad>`.

    It adds no token by itself (the chat template writes `<bos>`) and pads on the left, as generation needs.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=_word_level("$A"),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<pad>",
        extra_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=1024,
    )


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """The same words and ids for CLIP's text tower: `<bos> words <end>`, padded on the right.

    `<end>` is one word more than `mini` has: transformers reads end id 2 (`<eos>`) as the sentinel of old CLIP
    checkpoints and would pool at the highest id of a text instead of at its end.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=_word_level("<bos> $A <end>", extra=(END_WORD,)),
        bos_token="<bos>",
        eos_token=END_WORD,
        pad_token="<pad>",
        unk_token="<pad>",
        extra_special_tokens=["<image>"],
        padding_side="right",
        model_max_length=32,
    )


def image_processor() -> CLIPImageProcessorPil:
    """Resize to 336 x 336 without cropping and normalise each channel to (value / 255 - 0.5) / 0.25."""
    side = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )


def processor() -> LlavaProcessor:
    """Image processor, tokenizer and chat template of `mini`: one `<image>` becomes 576 tokens."""
    return LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """What `image_processor` does to a 336 x 336 picture: (B, 3, 336, 336) uint8 to float32."""
    return (pixels.float() / 255 - 0.5) / 0.25


def clip_config(vision: CLIPVisionConfig, *, width: int = 128, layers: int = 3, joint: int = 128) -> CLIPConfig:
    """CLIP around mini's vision tower: a text tower of 3 blocks of width 128 and a joint space of 128 dimensions."""
    text = CLIPTextConfig(
        vocab_size=END + 1,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=END,
        projection_dim=joint,
    )
    tower = {**vision.to_dict(), "projection_dim": joint}
    return CLIPConfig(text_config=text.to_dict(), vision_config=tower, projection_dim=joint)


def build_clip(model: LlavaForConditionalGeneration, seed: int = 0, config: CLIPConfig | None = None) -> CLIPModel:
    """A float32 `CLIPModel` whose vision tower holds `model`'s weights; text tower and projections are untrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIPModel(config or clip_config(model.config.vision_config))
    clip.vision_model.load_state_dict(tower(model).state_dict())
    return clip


def tower(model: LlavaForConditionalGeneration) -> Any:
    """The module of `model` that holds the vision blocks, whatever wraps it."""
    vision = model.model.vision_tower
    return getattr(vision, "vision_model", vision)


def save(model: LlavaForConditionalGeneration, folder: str | Path) -> Path:
    """Write `model` in bfloat16 with tokenizer, processor and chat template, ready for plain `from_pretrained`.

    Every file appears whole: all are written to a temporary folder beside `folder` and then moved, the weights last.
    """
    return _save(model, (processor(),), checked(folder))


def save_clip(clip: CLIPModel, folder: str | Path) -> Path:
    """Write `clip` in bfloat16 with its tokenizer and image processor, as `save` does."""
    return _save(clip, (clip_tokenizer(), image_processor()), checked(folder))


def _save(model: PreTrainedModel, companions: tuple[PushToHubMixin, ...], folder: Path) -> Path:
    config = copy.deepcopy(model.config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = torch.bfloat16
    with torch.device("meta"):
        half = type(model)(config)
    weights = {name: value.detach().to("cpu", torch.bfloat16) for name, value in model.state_dict().items()}
    half = half.to(torch.bfloat16)
    half.load_state_dict(weights, assign=True)
    half.tie_weights()
    if model.can_generate():
        half.generation_config = model.generation_config
    with whole_folder(folder) as temporary:
        half.save_pretrained(temporary)
        for companion in companions:
            companion.save_pretrained(temporary)
    return folder
