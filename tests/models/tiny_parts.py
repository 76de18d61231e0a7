"""What the tiny families are made of: sizes, one picture, the parts of a configuration, weights."""

from __future__ import annotations

import math
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
BLOCK = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, patch_size=4)

Settings = dict[str, Any]
"""Entries of a configuration that a test gives."""


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


def encoder(kind: str, blocks: int, **more: Any) -> Any:
    """The configuration of a CLIP ("clip", with CLS) or a SigLIP."""
    if kind == "clip":
        return transformers.CLIPVisionConfig(**{**BLOCK, "num_hidden_layers": blocks, "projection_dim": 16, **more})
    return transformers.SiglipVisionConfig(**{**BLOCK, "num_hidden_layers": blocks, "vision_use_head": False, **more})


def joined(kind: Any, vision: Any, text: Any, settings: Settings, **more: Any) -> Any:
    """The configuration of a whole model."""
    return kind(
        vision_config=vision,
        text_config=text,
        **{"image_token_id": IMAGE, "tie_word_embeddings": False, **more, **settings},
    )


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    """Pixels."""
    return torch.randn(*shape, generator=generator)
