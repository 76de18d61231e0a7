"""Models of well-known shapes with random weights, and prompts for them: how fast one runs needs no checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.core import FoveateError, Keep, tokens_to_keep
from foveate.cost import ModelShape, shape

# ---------------------------------------------------------------------------------------------------------------------
# Configurations


@dataclass(frozen=True)
class _Recipe:
    """How the models of a family are built, and what pictures they take.

    Attributes:
        presets: what the names of its presets begin with.
        kind: the name of its classes in transformers.
        vision: the encoder's configuration.
        more: entries of the whole configuration.
        picture: of a model, the placeholders that a picture takes and what goes into a call for `batch` of them.
    """

    presets: tuple[str, ...]
    kind: str
    vision: Callable[[ModelShape], dict[str, Any]]
    picture: Callable[[Any, int, torch.Generator], tuple[int, dict[str, Tensor]]]
    more: Callable[[ModelShape], dict[str, Any]] = lambda sizes: {}


def _clip(sizes: ModelShape) -> dict[str, Any]:
    tower = sizes.tower
    return dict(
        model_type="clip_vision_model",
        hidden_size=tower.width,
        intermediate_size=tower.ffn,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        image_size=round(tower.tokens**0.5) * tower.patch,
        patch_size=tower.patch,
    )


def _intern(sizes: ModelShape) -> dict[str, Any]:
    made = _clip(sizes)
    square = {name: [made[name]] * 2 for name in ("image_size", "patch_size")}
    return {**made, **square, "model_type": "internvl_vision"}


def _packed(sizes: ModelShape) -> dict[str, Any]:
    """A Qwen's encoder; its windows and deepstack where the shape has them."""
    tower, decoder = sizes.tower, sizes.decoder
    made: dict[str, Any] = dict(
        depth=tower.layers,
        hidden_size=tower.width,
        intermediate_size=tower.ffn,
        num_heads=tower.heads,
        patch_size=tower.patch,
        out_hidden_size=decoder.width,
    )
    if tower.window is not None:
        made |= dict(window_size=round(tower.window**0.5) * tower.patch, fullatt_block_indexes=list(tower.wide))
    maps = len(sizes.projector.linears) // 2
    if maps > 1:
        made["deepstack_visual_indexes"] = [round(tower.layers * (one + 1) / maps) - 1 for one in range(maps - 1)]
    return made


def _text(sizes: ModelShape, kind: str) -> dict[str, Any]:
    """The decoder's configuration."""
    decoder = sizes.decoder
    made: dict[str, Any] = dict(
        hidden_size=decoder.width,
        intermediate_size=decoder.ffn,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        vocab_size=decoder.vocabulary,
        max_position_embeddings=32768,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,  # an answer is as long as it is asked to be
    )
    half = decoder.head_width // 2
    if kind == "Qwen2_5_VL":
        sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
        made["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    elif kind == "Qwen3VL":
        sections = [half - 2 * (half // 3), half // 3, half // 3]
        rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": sections, "mrope_interleaved": True}
        made |= {"head_dim": decoder.head_width, "rope_parameters": rope}
    elif kind == "InternVL":
        made["model_type"] = "qwen2"
    else:
        made |= {"model_type": "llama", "head_dim": decoder.head_width}
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of noise


def _one_tile(model: Any, batch: int, generator: torch.Generator) -> tuple[int, dict[str, Tensor]]:
    vision = model.config.vision_config
    side = vision.image_size
    return (side // vision.patch_size) ** 2, {"pixel_values": torch.rand(batch, 3, side, side, generator=generator)}


def _five_tiles(model: Any, batch: int, generator: torch.Generator) -> tuple[int, dict[str, Tensor]]:
    """A square picture in 2 x 2 tiles beside the whole of it, with a newline behind each row of patches."""
    vision = model.config.vision_config
    side, row = vision.image_size, vision.image_size // vision.patch_size
    pixels = torch.rand(batch, 5, 3, side, side, generator=generator)
    return row**2 + 2 * row * (2 * row + 1), {
        "pixel_values": pixels,
        "image_sizes": torch.full((batch, 2), 2 * side),
    }


def _tile_and_whole(model: Any, batch: int, generator: torch.Generator) -> tuple[int, dict[str, Tensor]]:
    """A square picture in 2 x 2 tiles beside the whole of it."""
    vision = model.config.vision_config
    side, patches = vision.image_size[0], (vision.image_size[0] // vision.patch_size[0]) ** 2
    pixels = torch.rand(5 * batch, 3, side, side, generator=generator)
    return 5 * round(patches * model.config.downsample_ratio**2), {"pixel_values": pixels}


def _any_size(model: Any, batch: int, generator: torch.Generator, keep: Keep = 1.0) -> tuple[int, dict[str, Tensor]]:
    """A square picture of 896 pixels, or the largest one of `keep` of its tokens."""
    vision = model.config.vision_config
    tokens = 896 // (vision.patch_size * vision.spatial_merge_size)
    row = math.isqrt(tokens_to_keep(keep, tokens**2)) * vision.spatial_merge_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return row**2 // vision.spatial_merge_size**2, {
        "pixel_values": torch.rand(batch * row**2, values, generator=generator),
        "image_grid_thw": torch.tensor([[1, row, row]] * batch),
    }


_RECIPES = (
    _Recipe(("llava-1.5", "mini"), "Llava", _clip, _one_tile),
    _Recipe(
        ("llava-1.6", "llava-next"),
        "LlavaNext",
        _clip,
        _five_tiles,
        lambda sizes: {"image_grid_pinpoints": [[2 * _clip(sizes)["image_size"]] * 2]},
    ),
    _Recipe(("qwen2.5-vl",), "Qwen2_5_VL", _packed, _any_size),
    _Recipe(("qwen3-vl",), "Qwen3VL", _packed, _any_size),
    _Recipe(("internvl3",), "InternVL", _intern, _tile_and_whole),
)


# ---------------------------------------------------------------------------------------------------------------------
# Models and prompts


def scaled(preset: str, layers: int | None = None) -> ModelShape:
    """A preset's shape, with `layers` blocks in tower and decoder where it has more.

    Raises:
        FoveateError: no such preset, or fewer than two layers.
    """
    made = shape(preset)
    if layers is None:
        return made
    if layers < 2:
        raise FoveateError(f"layers={layers} leaves no block to prune between; the smallest is 2")
    blocks = min(layers, made.tower.layers)
    reads = None if made.tower.reads is None else blocks - 1
    wide = tuple(block for block in made.tower.wide if block < blocks)
    tower = dataclasses.replace(made.tower, layers=blocks, reads=reads, wide=wide)
    decoder = dataclasses.replace(made.decoder, layers=min(layers, made.decoder.layers))
    return dataclasses.replace(made, tower=tower, decoder=decoder)


def random_model(
    sizes: str | ModelShape,
    *,
    layers: int | None = None,
    device: Any = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Any:
    """A model with random weights, in eval mode.

    Args:
        sizes: a preset's name, or the shape of one that keeps its name.
        layers: blocks of tower and decoder at most, of a preset; None is its own.

    Raises:
        FoveateError: as `scaled`, or a shape of no known family.
    """
    import transformers

    sizes = scaled(sizes, layers) if isinstance(sizes, str) else sizes
    recipe = next((one for one in _RECIPES if sizes.name.startswith(one.presets)), None)
    if recipe is None:
        known = ", ".join(prefix for one in _RECIPES for prefix in one.presets)
        raise FoveateError(f"{sizes.name!r} cannot be built with random weights; names begin with {known}")
    config = getattr(transformers, f"{recipe.kind}Config")(
        vision_config=recipe.vision(sizes),
        text_config=_text(sizes, recipe.kind),
        image_token_id=sizes.decoder.vocabulary - 1,
        tie_word_embeddings=sizes.decoder.tied,
        **recipe.more(sizes),
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = getattr(transformers, f"{recipe.kind}ForConditionalGeneration")(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def random_inputs(
    model: Any, *, text: int = 60, batch: int = 1, seed: int = 0, keep: Keep | None = None
) -> dict[str, Tensor]:
    """`batch` prompts of one picture of noise between two halves of `text` random tokens.

    Args:
        model: of `random_model`.
        keep: tokens to which the picture is scaled down, or a share of those of the whole one; None for the whole.

    Raises:
        FoveateError: fewer than one prompt or one token of text, or `keep` where all pictures are brought to one size.
    """
    for name, value in (("text", text), ("batch", batch)):
        if value < 1:
            raise FoveateError(f"{name}={value} is below 1; the smallest is 1")
    config, generator = model.config, torch.Generator().manual_seed(seed)
    recipe = next(one for one in _RECIPES if type(model).__name__ == f"{one.kind}ForConditionalGeneration")
    if keep is not None and recipe.picture is not _any_size:
        raise FoveateError(
            f"keep={keep} scales the picture down, and {type(model).__name__} is given pictures of one size; the "
            "nearest that leaves tokens out evenly is uniform"
        )
    tokens, given = recipe.picture(model, batch, generator, **({} if keep is None else {"keep": keep}))
    highest = min(config.image_token_id, 5000)  # far from the ids of what a prompt's pictures begin and end with
    words = torch.randint(min(5, highest - 1), highest, (batch, text), generator=generator)
    picture = torch.full((batch, tokens), config.image_token_id)
    ids = torch.cat([words[:, : text // 2], picture, words[:, text // 2 :]], dim=1)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}
    if "image_grid_thw" in made:
        made["mm_token_type_ids"] = (ids == config.image_token_id).long()
    made["pixel_values"] = made["pixel_values"].to(model.dtype)
    return {name: value.to(model.device) for name, value in made.items()}


def random_clip(model: Any, seed: int = 0) -> tuple[Any, Any]:
    """A CLIP with a random text tower of CLIP-L's shape around a model's own vision tower, and a tokenizer.

    For methods that compare question and picture in CLIP's joint space.

    Raises:
        FoveateError: the model's vision tower is no CLIP's.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    from foveate.scenes.mini import clip_tokenizer

    tokens = clip_tokenizer()
    vision = model.config.vision_config
    if vision.model_type != "clip_vision_model":
        raise FoveateError(f"a {vision.model_type} has no text tower beside it; llava presets have a CLIP's")
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=min(12, vision.num_hidden_layers),
        num_attention_heads=12,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
    )
    config = CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=768)
    torch.manual_seed(seed)
    made = CLIPModel(config).to(device=model.device, dtype=model.dtype).eval()
    tower = model.base_model.vision_tower
    made.vision_model.load_state_dict(getattr(tower, "vision_model", tower).state_dict())
    return made, tokens
