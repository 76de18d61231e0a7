"""Tiny random models, one per family, built from their configurations: seeded, on the CPU, nothing downloaded."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import tiny_calls, tiny_families
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

import foveate
from foveate.choosing.signals import JOINT
from foveate.families.rows import FAMILIES as FAMILY_ROWS
from foveate.scenes.mini import clip_tokenizer

PAD, IMAGE, EOS = 0, 96, 1
VOCABULARY = 97
IMAGE_SIDE, PATCH = 24, 4
GRID = (IMAGE_SIDE // PATCH, IMAGE_SIDE // PATCH)
TOKENS = GRID[0] * GRID[1]
WINDOW = 8  # of the decoder that slides: shorter than any prompt with an image

_SIZES = dict(
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
_VISION = dict(
    image_size=IMAGE_SIDE,
    patch_size=PATCH,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
)

# Every decoder that a stock LLaVA can host and that differs in what pruning meets: grouped heads, biases, norms of
# queries and keys, windows in all layers or in some, scaled embeddings.
_DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen2-mixed": lambda: Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=16),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=None),
    "mistral-sliding": lambda: MistralConfig(**_SIZES, sliding_window=WINDOW),
    "gemma": lambda: GemmaConfig(**_SIZES, head_dim=8),
}
DECODERS = tuple(_DECODERS)
TOWERS = ("clip", "siglip")


def model(
    family: str = "llava-1.5",
    decoder: str = "llama",
    *,
    attn: str = "sdpa",
    tower: str = "clip",
    blocks: int = 4,
    seed: int = 0,
    **settings: Any,
) -> Any:
    """A tiny random model of a family, in float32 and eval mode.

    Args:
        family: a name of FAMILIES.
        decoder: a name of DECODERS.
        attn: attention implementation of tower and decoder.
        tower: "clip" (with CLS) or "siglip" (without).
        blocks: of the tower.
        settings: further entries of the model's configuration.
    """
    _skip_on_older_transformers(family)
    key = repr((family, decoder, attn, tower, blocks, seed, settings))
    if key not in _BUILT and family in tiny_families.KINDS:
        _BUILT[key] = tiny_families.KINDS[family].build(attn, blocks, settings)
    elif key not in _BUILT:
        _BUILT[key] = _FAMILIES[family](decoder, attn, tower, blocks, seed, settings)
    return copy.deepcopy(_BUILT[key])


def _skip_on_older_transformers(family: str) -> None:
    needed = next(row.transformers for row in FAMILY_ROWS if row.name == family.partition("/")[0])
    if Version(transformers.__version__) < Version(needed):
        pytest.skip(f"{family} needs transformers {needed}")


def _llava(decoder: str, attn: str, tower: str, blocks: int, seed: int, settings: dict[str, Any]) -> Any:
    sizes = {**_VISION, "num_hidden_layers": blocks}
    vision = CLIPVisionConfig(**sizes, projection_dim=16) if tower == "clip" else SiglipVisionConfig(**sizes)
    strategy = "default" if tower == "clip" else "full"
    config = LlavaConfig(
        vision_config=vision,
        text_config=_DECODERS[decoder](),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
        **{"vision_feature_select_strategy": strategy, **settings},
    )
    config._attn_implementation = attn
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = LlavaForConditionalGeneration(config)
        made.apply(_draw)
        made.lm_head.weight.data[[PAD, EOS, IMAGE]] = 0.0  # no answer holds them by chance
    made.generation_config.pad_token_id = PAD
    made.generation_config.eos_token_id = None
    return made.eval()


def _draw(module: nn.Module) -> None:
    """Weights large enough that attention is uneven and the answer depends on what is seen."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        fan_in = module.weight[0].numel()
        nn.init.normal_(module.weight, std=1.5 / math.sqrt(fan_in))
        if module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=1.0)


_FAMILIES: dict[str, Callable[..., Any]] = {"llava-1.5": _llava}
FAMILIES = (*_FAMILIES, *(name for name in tiny_families.KINDS if "/" not in name))
_BUILT: dict[str, Any] = {}  # a copy costs less than a model; nobody is handed the original


def clip(model: Any, seed: int = 0, longest: int = 12) -> tuple[CLIPModel, Any]:
    """A tiny random CLIP around a model's own vision tower, and its tokenizer, which knows the words of scenes."""
    tokens = clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=longest,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
    )
    config = CLIPConfig(
        vision_config=model.config.vision_config.to_dict(), text_config=text.to_dict(), projection_dim=20
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = CLIPModel(config)
        made.apply(_draw)
    made.vision_model.load_state_dict(vision(model).state_dict())
    return made.eval(), tokens


def vision(model: Any) -> Any:
    """The module that holds the tower's embeddings, blocks and norms."""
    tower = getattr(model.model, "vision_tower", None) or model.model.image_tower
    return getattr(tower, "vision_model", tower)


def prune(model: Any, method: Any, **more: Any) -> Any:
    """`foveate.prune`, with a CLIP and a question where a method compares both."""
    stages = method if isinstance(method, list | tuple) else [method]
    needs = {need for stage in stages for part in stage.parts() for need in part.needs}
    if needs.intersection(JOINT) and model.config.vision_config.model_type == "clip_vision_model":
        more = {"clip": clip(model), "question": "what color is behind the dog ?", **more}
    return foveate.prune(model, method, **more)


def inputs(
    model: Any, *rows: str, padding: str = "left", seed: int = 0, tokens: int = TOKENS, batch_mask: bool = True
) -> dict[str, Tensor]:
    """What a processor would make of some prompts and their pictures.

    Args:
        rows: one layout per prompt: a number is that many text tokens, `i` an image. "3i4" is three words, an image,
            four words; "2i1i5" has two images, "6" none.
        padding: side on which shorter rows are padded.
        tokens: placeholders of an image.
        batch_mask: False leaves the attention mask out.
    """
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type != "llava" or model.config.vision_config.model_type == "pixtral":
        return tiny_calls.inputs(model, rows, padding, generator, batch_mask)
    ids = [_ids(row, generator, model.config.image_token_id, tokens) for row in rows]
    pictures = sum(row.count("i") for row in rows)
    longest = max(one.numel() for one in ids)
    padded = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, one in enumerate(ids):
        where = slice(longest - one.numel(), None) if padding == "left" else slice(0, one.numel())
        padded[number, where] = one
        mask[number, where] = 1
    made = {"input_ids": padded}
    if batch_mask:
        made["attention_mask"] = mask
    if pictures:
        made["pixel_values"] = torch.randn(pictures, 3, IMAGE_SIDE, IMAGE_SIDE, generator=generator)
    return made


def _ids(row: str, generator: torch.Generator, image: int, tokens: int) -> Tensor:
    pieces = []
    for piece in row.replace("i", " i ").split():
        if piece == "i":
            pieces.append(torch.full((tokens,), image))
        else:
            pieces.append(torch.randint(EOS + 1, IMAGE, (int(piece),), generator=generator))
    return torch.cat(pieces)


def alone(given: dict[str, Tensor], row: int, image: int) -> dict[str, Tensor]:
    """One row of a batch as it would be by itself: without padding, with its own pictures only.

    Args:
        image: id of the placeholder.
    """
    if isinstance(given, tiny_calls.Call):
        return given.alone(row)
    valid = given["attention_mask"][row].bool()
    counts = (given["input_ids"] == image).sum(dim=1) // TOKENS
    first = int(counts[:row].sum())
    made = {
        "input_ids": given["input_ids"][row][valid][None],
        "attention_mask": given["attention_mask"][row][valid][None],
    }
    if counts[row]:
        made["pixel_values"] = given["pixel_values"][first : first + int(counts[row])]
    return made


def completed(given: dict[str, Tensor], *lengths: int) -> dict[str, Tensor]:
    """Prompts with answers of different lengths behind them, padded on the right: what a trainer scores."""
    words = torch.randint(EOS + 1, IMAGE, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(7))
    there = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.cat([given["input_ids"], words.where(there > 0, PAD)], dim=1)
    mask = torch.cat([given["attention_mask"], there], dim=1)
    if isinstance(given, tiny_calls.Call):
        return tiny_calls.call(given.model, ids, mask, given.pictures)
    return {**given, "input_ids": ids, "attention_mask": mask}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words to the ids of the tiny models: w2 ... w95, <image>, <pad>, </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": PAD, "</s>": EOS, "<image>": IMAGE, **{f"w{number}": number for number in range(2, IMAGE)}}
    made = Tokenizer(models.WordLevel(words, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="w2", padding_side="left"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.image_token, fast.image_token_id = "<image>", IMAGE
    return fast


def processor(model: Any) -> Any:
    """A processor for the tiny model: words and pictures to its inputs, with a chat template."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    config = model.config
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1 if config.vision_config.model_type == "clip_vision_model" else 0,
        chat_template=(
            "{% for message in messages %}{{ 'w3' if message['role'] == 'user' else 'w4' }} "
            "{% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
            "{% if add_generation_prompt %}w4{% endif %}"
        ),
    )


def save(model: Any, folder: Any, **options: Any) -> None:
    """Write a model and its processor, as a checkpoint has them; `options` are those of the weights."""
    model.save_pretrained(folder, **options)
    processor(model).save_pretrained(folder)
