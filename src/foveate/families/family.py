"""What one row says of a model family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foveate.core import FoveateError, Grid
from foveate.families.lazily import plain
from foveate.families.towers import TOWERS, Tower, _at

if TYPE_CHECKING:
    from torch import Tensor, nn

    from foveate.families.entries import Entries
    from foveate.families.layouts import Encoded, Layout
    from foveate.families.shapes import DecoderShape, ProjectorShape, TowerShape


@dataclass(frozen=True)
class Family:
    """One family of models that share their seams.

    Attributes:
        name: what users call it.
        types: values of `config.model_type`.
        hub_ids: checkpoints that the family is known by.
        towers: kinds of vision encoder that they have, the usual one first.
        image: what one image is to a method, and so what `keep` counts tokens of.
        transformers: the lowest version that its seams are in.
        later_turns: the lowest version that masks a picture rightly which comes when the cache is filled; None for the
            same one.
        image_token: attribute of the configuration that holds the id of the visual placeholder.
        tower: attribute path from the base model to the vision encoder.
        projector: attribute path from the base model to the projector.
        norm: attribute path from the base model to a norm between the block that is read and the projector.
        pointwise: the projector maps each token by itself.
        gathered: what makes tokens of the encoder's patches needs all of them at their places, though it merges none.
        read: the encoder block (0-based, of how many) whose output the projector reads.
        grid: raster shape of one image's tokens, from the configuration: of one tile, or of a picture of usual size.
        fixed: every image has that raster.
        layouts: how the pictures of one call come from the encoder's patches.
        videos: how its videos do; None where videos are not described.
        frames: its processor hands over the frames of a video as pictures, with text between them.
        video_tower: attribute path to the encoder of videos, of the same kind; None where one sees both.
        also_read: further encoder blocks whose output is read beside that of the usual one, by number of how many.
        closed_encoder: why no method can act inside the encoder; None where they can.
        closed_decoder: why no method can act inside the decoder or on its cache; None where they can.
        varies: fields of the row that other configurations of its types change, from the configuration.
        positions: position ids (3, B, S) of new tokens that follow `start`, where they have several axes.
        first_position: position of the first token where the model is called directly.
        deepstack: the decoder's method that adds visual features to the output of its first blocks.
        typed_past: token types are read by position, from the start of what the cache holds.
        two_way: tokens of a prompt attend to later ones of it, those of a picture or all, so it must come whole.
        answers_typed: token types are 0 in a prompt and 1 in its answer, where tokens no longer look ahead.
        shape: reads the sizes of encoder and projector, a reader of `sizes.py`; None where none is known, and what they
            compute is not counted.
        decoder: type of the decoder, where the configuration of a model names none.
        check: refuses configurations whose decoder tokens are not the tower's patches.
    """

    name: str
    types: tuple[str, ...]
    hub_ids: tuple[str, ...]
    towers: tuple[str, ...]
    read: Callable[[Any, int], int]
    grid: Callable[[Any], Grid]
    image: str = "a picture"
    transformers: str = "5.18"
    later_turns: str | None = None
    image_token: str = "image_token_id"
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    norm: str | None = None
    pointwise: bool = True
    gathered: bool = False
    fixed: bool = True
    layouts: Callable[[Encoded], list[Layout]] = plain
    videos: Callable[[Encoded], list[Layout]] | None = None
    frames: bool = False
    video_tower: str | None = None
    also_read: Callable[[Any, int], list[int]] | None = None
    closed_encoder: str | None = None
    closed_decoder: str | None = None
    varies: Callable[[Any], dict[str, Any]] | None = None
    positions: Callable[[Any, Tensor, Tensor, dict[str, Any], Tensor], Tensor] | None = None
    first_position: int = 0
    deepstack: str | None = None
    typed_past: bool = False
    two_way: bool = False
    answers_typed: bool = False
    shape: Callable[[Entries, DecoderShape, Tower], tuple[TowerShape, ProjectorShape]] | None = None
    decoder: str | None = None
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
        return tower, self.described(tower.config.model_type)

    def blocks_of(self, model: Any, kind: str = "image") -> Sequence[nn.Module]:
        """The blocks of the encoder of pictures ("image") or of videos ("video"), in order.

        Raises:
            FoveateError: no row of TOWERS describes this encoder.
        """
        tower, row = self.tower_of(model)
        if kind == "video" and self.video_tower is not None:
            tower = _at(model.base_model, self.video_tower)
        return row.blocks_of(tower)

    def described(self, kind: str) -> Tower:
        """The description of a kind of encoder.

        Raises:
            FoveateError: there is none.
        """
        for row in TOWERS:
            if row.type == kind:
                return row
        known = ", ".join(row.type for row in TOWERS)
        raise FoveateError(f"{self.name}: the vision encoder {kind!r} is not described; known encoders: {known}")

    def puts_back(self, tower: Tower) -> bool:
        """Whether patches that left inside the encoder are there again behind the block that is read.

        Neighbours become one token there, or tiles, outputs of blocks or packed pictures are put together.
        """
        return not self.pointwise or self.gathered or tower.packed

    def project(self, model: Any, encoded: Tensor) -> Tensor:
        """Encoded tokens (K, E) to decoder tokens (K, D), where the projector maps each by itself."""
        if self.norm is not None:
            encoded = _at(model.base_model, self.norm)(encoded)
        projected: Tensor = self.projector_of(model)(encoded[None])[0]
        return projected

    def projector_of(self, model: Any) -> nn.Module:
        """The module between encoder and decoder."""
        found: nn.Module = _at(model.base_model, self.projector)
        return found

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
