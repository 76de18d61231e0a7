"""One row per kind of vision encoder: what its parts are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import nn


Normal: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, by which pixels in [0, 1] are normalised."""

_CLIP: Normal = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET: Normal = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF: Normal = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Tower:
    """One kind of vision encoder, by the `model_type` of its configuration."""

    type: str
    summary: int  # CLS tokens in front of the patches
    blocks: str  # attribute path from the tower to its list of blocks
    attention: str = "self_attn"  # ... from a block to its attention module, which calls the attention interface
    joint: bool = False  # a CLIPModel's head maps its patches into a space shared with texts
    # A block's first norm, second norm and MLP where it runs as x + attention(norm(x)), then x + mlp(norm(x)).
    children: tuple[str, str, str] | None = None
    scales: tuple[str, str] | None = None  # ... and what attention and MLP are multiplied with before they are added
    masked: bool = True  # its blocks take a mask
    gated: bool = False  # its feed-forward networks have three matrices, else two
    packed: bool = False  # the patches of all pictures run as one sequence, each picture attending to itself
    # Blocks that see a whole picture where the others see windows, from the tower's configuration; None: all do.
    full_attention: Callable[[Any], list[int]] | None = None
    known: bool = True  # its blocks can be observed
    pictures: bool = True  # it is given pictures (T, 3, h, w); else the patches of all of them, a row each
    normal: Normal = _HALF  # of the pixels that encoders of this kind are trained on

    def blocks_of(self, tower: nn.Module) -> Sequence[nn.Module]:
        """The encoder's blocks in order; none where they cannot be observed."""
        return _at(tower, self.blocks) if self.known else ()


_ROWS: dict[str, Any] = {"packed": True, "pictures": False}
_PRE_NORM = ("layer_norm1", "layer_norm2", "mlp")
_NUMBERED = ("norm1", "norm2", "mlp")
_GLM: dict[str, Any] = {"attention": "attn", "children": _NUMBERED, **_ROWS}


TOWERS = (
    Tower("clip_vision_model", summary=1, blocks="encoder.layers", joint=True, children=_PRE_NORM, normal=_CLIP),
    Tower("siglip_vision_model", summary=0, blocks="encoder.layers", children=_PRE_NORM),
    Tower("idefics3_vision", summary=0, blocks="encoder.layers", children=_PRE_NORM),
    Tower("smolvlm_vision", summary=0, blocks="encoder.layers", children=_PRE_NORM),
    Tower(
        "internvl_vision",
        summary=1,
        blocks="encoder.layer",
        attention="attention",
        children=("layernorm_before", "layernorm_after", "mlp"),
        scales=("lambda_1", "lambda_2"),
        masked=False,
        normal=_IMAGENET,
    ),
    Tower(
        "pixtral",
        summary=0,
        blocks="transformer.layers",
        attention="attention",
        children=("attention_norm", "ffn_norm", "feed_forward"),
        gated=True,
        packed=True,
        normal=_CLIP,
    ),
    Tower("qwen2_vl_vision", summary=0, blocks="blocks", attention="attn", children=_NUMBERED, normal=_CLIP, **_ROWS),
    Tower(
        "qwen2_5_vl_vision",
        summary=0,
        blocks="blocks",
        attention="attn",
        children=_NUMBERED,
        gated=True,
        normal=_CLIP,
        **_ROWS,
        full_attention=lambda config: list(config.fullatt_block_indexes),
    ),
    Tower("qwen3_vl_vision", summary=0, blocks="blocks", attention="attn", children=_NUMBERED, **_ROWS),
    Tower("qwen3_vl_moe_vision", summary=0, blocks="blocks", attention="attn", children=_NUMBERED, **_ROWS),
    Tower(
        "paddleocr_vl_vision",
        summary=0,
        blocks="vision_model.encoder.layers",
        children=_PRE_NORM,
        normal=_CLIP,
        **_ROWS,
    ),
    Tower("video_llama_3_vision", summary=0, blocks="encoder.layers", children=_PRE_NORM, **_ROWS),
    Tower("glm4v_vision", summary=0, blocks="blocks", gated=True, normal=_CLIP, **_GLM),
    Tower("glm4v_moe_vision", summary=0, blocks="blocks", gated=True, normal=_CLIP, **_GLM),
    Tower("glm_ocr_vision", summary=0, blocks="blocks", gated=True, normal=_CLIP, **_GLM),
    Tower("gemma4_vision", summary=0, blocks="encoder.layers", gated=True),
)


def patches_per_side(config: Any) -> int:
    """Patches along a side of one tile."""
    vision = config.vision_config
    image, patch = (one if isinstance(one, int) else one[0] for one in (vision.image_size, vision.patch_size))
    return int(image // patch)


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module
