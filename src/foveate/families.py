"""One row per model family: what its parts are called, and how its tower's scores map to its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from foveate.core import FoveateError, Grid


@dataclass(frozen=True)
class Tower:
    """One kind of vision encoder, by the `model_type` of its configuration."""

    type: str
    summary: int  # CLS tokens in front of the patches
    blocks: str  # attribute path from the tower to its list of blocks
    attention: str = "self_attn"  # ... from a block to its attention module, which calls the attention interface
    joint: bool = False  # a CLIPModel's head maps its patches into a space shared with texts

    def blocks_of(self, tower: nn.Module) -> nn.ModuleList:
        """The encoder's blocks in order."""
        return _at(tower, self.blocks)


TOWERS = (
    Tower("clip_vision_model", summary=1, blocks="encoder.layers", joint=True),
    Tower("siglip_vision_model", summary=0, blocks="encoder.layers"),
)


@dataclass(frozen=True)
class Family:
    """One family of models that share their seams.

    Attributes:
        name: what users call it.
        types: values of `config.model_type`.
        hub_ids: checkpoints that the family is known by.
        transformers: the lowest version that its seams are in.
        image_token: attribute of the configuration that holds the id of the visual placeholder.
        tower: attribute path from the base model to the vision encoder.
        projector: attribute path from the base model to the projector.
        pointwise: the projector maps each token by itself.
        read: the encoder block (0-based, of how many) whose output the projector reads.
        grid: raster shape of one image's tokens, from the configuration.
        check: refuses configurations whose decoder tokens are not the tower's patches.
    """

    name: str
    types: tuple[str, ...]
    hub_ids: tuple[str, ...]
    read: Callable[[Any, int], int]
    grid: Callable[[Any], Grid]
    transformers: str = "5.18"
    image_token: str = "image_token_id"
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    pointwise: bool = True
    check: Callable[[Any, Tower], None] | None = None

    def image_token_id(self, config: Any) -> int:
        """Id of the placeholder that stands for one visual token."""
        token: int = getattr(config, self.image_token)
        return token

    def tower_of(self, model: Any) -> tuple[nn.Module, Tower]:
        """The vision encoder of a model and its description.

        Raises:
            FoveateError: no row of TOWERS describes this encoder.
        """
        tower = _at(model.base_model, self.tower)
        kind = tower.config.model_type
        for row in TOWERS:
            if row.type == kind:
                return tower, row
        known = ", ".join(row.type for row in TOWERS)
        raise FoveateError(f"{self.name}: the vision encoder {kind!r} is not described; known encoders: {known}")

    def read_block(self, model: Any) -> int:
        """0-based number of the encoder block whose output the projector reads.

        Raises:
            FoveateError: the projector reads the patch embeddings, before any block, or a block that is not there.
        """
        tower, row = self.tower_of(model)
        blocks = len(row.blocks_of(tower))
        block = self.read(model.config, blocks)
        if not 0 <= block < blocks:
            raise FoveateError(
                f"{self.name}: the projector reads encoder block {block}, outside 0..{blocks - 1}; set "
                f"vision_feature_layer to 1..{blocks} or -{blocks}..-1"
            )
        return block


def _llava_read(config: Any, blocks: int) -> int:
    """hidden_states[k] is the output of block k-1; of several layers the last one counts."""
    layer = config.vision_feature_layer
    layer = layer if isinstance(layer, int) else list(layer)[-1]
    return (layer if layer >= 0 else layer + blocks + 1) - 1


def _llava_check(config: Any, tower: Tower) -> None:
    """The strategy "default" cuts off one token, "full" none: with the wrong tower, patches would be off by one."""
    strategy, right = config.vision_feature_select_strategy, "default" if tower.summary else "full"
    if strategy != right:
        raise FoveateError(
            f"vision_feature_select_strategy={strategy!r} on {tower.type}, which has {tower.summary} CLS tokens, hands "
            f"the decoder other tokens than the patches; pruning needs {right!r}"
        )


def _square_grid(config: Any) -> Grid:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side, side


FAMILIES = (
    Family(
        name="llava-1.5",
        types=("llava",),
        hub_ids=("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf", "llava-hf/bakLlava-v1-hf"),
        read=_llava_read,
        grid=_square_grid,
        check=_llava_check,
    ),
)


def family_of(model: Any) -> Family:
    """The row of a loaded model.

    Raises:
        FoveateError: the model is no vision-language model, or its family has no row.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind is None:
        raise FoveateError(
            f"{type(model).__name__} is no transformers model; load one with AutoModelForImageTextToText"
        )
    for family in FAMILIES:
        if kind in family.types:
            if not hasattr(model, "generate"):
                raise FoveateError(
                    f"{type(model).__name__} has no generate(); load it with AutoModelForImageTextToText, not AutoModel"
                )
            return family
    known = ", ".join(f"{family.name} ({', '.join(family.types)})" for family in FAMILIES)
    if not hasattr(config, "vision_config"):
        raise FoveateError(f"{type(model).__name__} ({kind}) is no vision-language model; known families: {known}")
    raise FoveateError(f"the family {kind!r} of {type(model).__name__} has no row yet; known families: {known}")


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module
