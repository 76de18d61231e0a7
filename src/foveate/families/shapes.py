"""The sizes of a model that its cost depends on: tower, projector and decoder, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from foveate.core import FoveateError


class UnknownShape(FoveateError):
    """No row or table says how a part's configuration states its sizes."""


def _check_sizes(part: object) -> None:
    """Refuse a shape with a size below 1."""
    for name, value in vars(part).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise FoveateError(f"{type(part).__name__}.{name}={value} is below 1; the smallest size is 1")


@dataclass(frozen=True)
class Experts:
    """What some decoder blocks have in place of one feed-forward network: several, and a router that picks for a token.

    Attributes:
        count: experts of one block.
        chosen: of them, those that each token passes.
        width: inner width of one.
        blocks: 0-based blocks that have them; the others keep one network.
        shared: inner width of what every token passes beside them; 0 for nothing.
    """

    count: int
    chosen: int
    width: int
    blocks: tuple[int, ...]
    shared: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "chosen", "width"):
            if getattr(self, name) < 1:
                raise FoveateError(f"Experts.{name}={getattr(self, name)} is below 1; the smallest size is 1")
        if self.chosen > self.count:
            raise FoveateError(f"a token cannot pass {self.chosen} of {self.count} experts; at most {self.count}")


@dataclass(frozen=True)
class DecoderShape:
    """The language model: `layers` blocks of width D, with H query heads and as many or fewer key-value heads.

    Attributes:
        ffn: inner width of the feed-forward network, in blocks without experts.
        tied: the output head shares the input embedding's weights (it multiplies all the same).
        gated: the feed-forward network has three matrices (gate, up, down), else two; experts always have three.
        experts: of the blocks that have them; None where none has.
        own_keys, own_values: a block makes keys and values; without keys it takes those of another, without values its
            keys are its values, too.
        beside: linear maps (in, out) of a block beside attention and feed-forward network.
        tables: embeddings (vocabulary, width) beside the usual one.
        blocks: the shape of each layer, where they differ; the sizes above are then those of most.
    """

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool = False
    gated: bool = True
    experts: Experts | None = None
    own_keys: bool = True
    own_values: bool = True
    beside: tuple[tuple[int, int], ...] = ()
    tables: tuple[tuple[int, int], ...] = ()
    blocks: tuple[DecoderShape, ...] = ()

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.heads % self.kv_heads:
            raise FoveateError(f"{self.heads} query heads cannot share {self.kv_heads} key-value heads evenly")
        past = [block for block in self.experts.blocks if block >= self.layers] if self.experts else []
        if past:
            raise FoveateError(f"block {past[0]} cannot have experts: the last of {self.layers} is {self.layers - 1}")
        if self.blocks and len(self.blocks) != self.layers:
            raise FoveateError(f"{len(self.blocks)} shapes of blocks for {self.layers} layers; give one for each")

    @property
    def attention_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_width

    @property
    def block_weights(self) -> int:
        """Weights of the matrices of one block without experts: attention, feed-forward and what is beside."""
        return self._beside_feed_forward + (3 if self.gated else 2) * self.width * self.ffn

    @property
    def _beside_feed_forward(self) -> int:
        """Weights of one block's query, key, value and output, and of the maps beside."""
        attention = self.width * (2 * self.attention_width + (self.own_keys + self.own_values) * self.cached_width)
        return attention + sum(inner * outer for inner, outer in self.beside)

    @property
    def cached_width(self) -> int:
        """Width of all key-value heads together."""
        return self.kv_heads * self.head_width

    @property
    def each(self) -> tuple[DecoderShape, ...]:
        """(layers,) the shape of each layer; which of them have experts `experts_of` says."""
        return self.blocks or (self,) * self.layers

    @property
    def weights(self) -> int:
        """Weights of the matrices of all blocks, every expert's among them."""
        return sum(self._weights(block, None) for block in range(self.layers))

    def experts_of(self, block: int) -> Experts | None:
        """The experts of 0-based `block`; None where it has one network."""
        return self.experts if self.experts is not None and block in self.experts.blocks else None

    def met(self, block: int) -> int:
        """Weights that one token meets in 0-based `block`: of experts only those that it passes, and the router."""
        experts = self.experts_of(block)
        return self._weights(block, None if experts is None else experts.chosen)

    def _weights(self, block: int, number: int | None) -> int:
        """Weights of a block; of its experts, `number` of them or all."""
        shape, experts = self.each[block], self.experts_of(block)
        if experts is None:
            return shape.block_weights
        number, router = experts.count if number is None else number, self.width * experts.count
        networks = 3 * self.width * (number * experts.width + experts.shared)
        return shape._beside_feed_forward + router + networks

    @property
    def head_weights(self) -> int:
        """Weights of the matrix from the last hidden state to the vocabulary."""
        return self.width * self.vocabulary

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """Read a Hugging Face text config, or the `text_config` of a larger one (object or dict).

        Raises:
            FoveateError: a decoder of unknown type, or a size that the config does not state.
        """
        from foveate.families.reading import read_decoder

        return read_decoder(config)


@dataclass(frozen=True)
class TowerShape:
    """The vision encoder, for one picture (one tile): `layers` blocks that run, of width E, on `tokens` patches.

    Attributes:
        tokens: patches of one picture, CLS not counted; of a typical one where pictures keep their own size.
        cls: a CLS token runs along with the patches.
        patch: side of a patch in pixels.
        channels: colour channels of the picture.
        gated: the feed-forward network has three matrices, else two.
        frames: pictures that one patch spans; a still picture is repeated.
        reads: blocks that run up to the one whose output the projector reads; None is all.
        window: patches that a patch attends to in the blocks that are not in `wide`; None is all.
        wide: 0-based blocks of an encoder with windows in which every patch attends to all.
        own_size: pictures are not brought to one size, so that their patches follow from their tokens.
        put_back: patches that leave inside are there again behind the block that is read, since neighbours, tiles or
            outputs of blocks are put together there.
    """

    layers: int
    width: int
    ffn: int
    heads: int
    tokens: int
    cls: bool
    patch: int
    channels: int = 3
    gated: bool = False
    frames: int = 1
    reads: int | None = None
    window: int | None = None
    wide: tuple[int, ...] = ()
    own_size: bool = False
    put_back: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.reads is not None and self.reads > self.layers:
            raise FoveateError(f"the projector reads block {self.reads} of {self.layers}; the last is {self.layers}")

    @property
    def length(self) -> int:
        """Tokens that each block sees."""
        return self.tokens + self.cls

    @property
    def attention_width(self) -> int:
        """Width of all heads together."""
        return self.width

    @property
    def block_weights(self) -> int:
        """Weights of one block's matrices."""
        return 4 * self.width**2 + (3 if self.gated else 2) * self.width * self.ffn

    @property
    def patch_weights(self) -> int:
        """Weights of the convolution that turns a patch's pixels into a token."""
        return self.channels * self.frames * self.patch**2 * self.width

    def keys(self, block: int, length: int, patches: int | None = None) -> int:
        """Tokens that each of `length` attends to in 0-based `block`.

        Args:
            patches: of the picture before any left; windows lose as many as the picture. None: none has left.
        """
        if self.window is None or block in self.wide:
            return length
        whole = length if patches is None else max(length, patches)
        return max(1, round(min(whole, self.window) * length / whole))


@dataclass(frozen=True)
class ProjectorShape:
    """What carries the encoder's tokens to the decoder: linear maps (in, out), each applied to every token.

    Attributes:
        linears: (in, out) of each linear map.
        tokens: tokens of one picture that it runs on.
        merge: neighbouring patches that make one token.
    """

    linears: tuple[tuple[int, int], ...]
    tokens: int
    merge: int = 1

    def __post_init__(self) -> None:
        _check_sizes(self)

    @property
    def weights(self) -> int:
        """Weights that each token meets."""
        return sum(inner * outer for inner, outer in self.linears)


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model: its decoder, its tower and the projector between them.

    `name` is for tables; two shapes of different names are equal when their sizes are.
    """

    decoder: DecoderShape
    tower: TowerShape
    projector: ProjectorShape
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.projector.merge > 1 and not self.tower.put_back:
            raise FoveateError(
                f"a projector that joins {self.projector.merge} patches needs them all at their places: give the tower "
                "put_back=True"
            )

    @property
    def weights(self) -> int:
        """Weights of all matrices: tower, projector, embeddings, decoder and output head; no norms, no biases."""
        decoder, tower = self.decoder, self.tower
        encoder = tower.layers * tower.block_weights + tower.patch_weights
        tables = decoder.head_weights * (1 if decoder.tied else 2)
        tables += sum(inner * outer for inner, outer in decoder.tables)
        return encoder + self.projector.weights + decoder.weights + tables

    def tiles_of(self, visual: int) -> int:
        """Pictures that the tower encodes for an image of `visual` tokens: as few as hold them."""
        return 1 if self.tower.own_size else max(1, -(-visual // self.projector.tokens))

    def patches_of(self, visual: int) -> int:
        """Patches of one encoded picture of an image of `visual` tokens."""
        return visual * self.projector.merge if self.tower.own_size else self.tower.tokens

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read the config of a vision-language model: an object with `to_dict()`, or the dict of a `config.json`.

        Raises:
            FoveateError: a model, tower or decoder of unknown type, or a size that the config does not state.
        """
        from foveate.families.reading import read_model

        return read_model(config)
