"""The sizes of a model that its cost depends on: tower, projector and decoder, read from a config or from a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from foveate.core import FoveateError, did_you_mean


def _check_sizes(part: object) -> None:
    """Refuse a shape with a size below 1."""
    for name, value in vars(part).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise FoveateError(f"{type(part).__name__}.{name}={value} is below 1; the smallest size is 1")


@dataclass(frozen=True)
class DecoderShape:
    """The language model: `layers` blocks of width D, with H query heads and as many or fewer key-value heads.

    Attributes:
        ffn: inner width of the feed-forward network.
        tied: the output head shares the input embedding's weights (it multiplies all the same).
        gated: the feed-forward network has three matrices (gate, up, down), else two.
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

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.heads % self.kv_heads:
            raise FoveateError(f"{self.heads} query heads cannot share {self.kv_heads} key-value heads evenly")

    @property
    def attention_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_width

    @property
    def block_weights(self) -> int:
        """Weights of one block's matrices: query, key, value, output and feed-forward."""
        attention = 2 * self.width * (self.attention_width + self.kv_heads * self.head_width)
        return attention + (3 if self.gated else 2) * self.width * self.ffn

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
        return _decoder(_entries(config))


@dataclass(frozen=True)
class TowerShape:
    """The vision encoder, for one picture (one tile): `layers` blocks that run, of width E, on `tokens` patches.

    Attributes:
        tokens: patches of one picture, CLS not counted.
        cls: a CLS token runs along with the patches.
        patch: side of a patch in pixels.
        channels: colour channels of the picture.
        gated: the feed-forward network has three matrices, else two.
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

    def __post_init__(self) -> None:
        _check_sizes(self)

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
        return self.channels * self.patch**2 * self.width


@dataclass(frozen=True)
class ProjectorShape:
    """What carries the encoder's tokens to the decoder: linear maps (in, out), each applied to every token.

    Attributes:
        linears: (in, out) of each linear map.
        tokens: tokens of one picture that it runs on.
    """

    linears: tuple[tuple[int, int], ...]
    tokens: int

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

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read the config of a LLaVA-like model: an object with `to_dict()`, or the dict of a `config.json`.

        Raises:
            FoveateError: a model, tower or decoder of unknown type, or a size that the config does not state.
        """
        top = _entries(config)
        family = str(top.get("model_type"))
        if family not in _FAMILIES:
            raise FoveateError(f"the shape of a {family!r} model is not known; {did_you_mean(family, _FAMILIES)}")
        decoder, tower = _decoder(top), _tower(top)
        chosen = top.get("vision_feature_layer", -2)
        read = 1 if isinstance(chosen, int) else len(chosen)
        # The strategy "default" cuts the first token off whether or not it is a CLS.
        tokens = tower.length - (top.get("vision_feature_select_strategy", _FAMILIES[family]) == "default")
        linears = ((read * tower.width, decoder.width), (decoder.width, decoder.width))
        name = str(top.get("_name_or_path") or family).rstrip("/").rsplit("/", 1)[-1]
        return cls(decoder, tower, ProjectorShape(linears, tokens), name)


# Families whose projector is two linear maps on every token that the tower gives, each with the strategy that selects
# those tokens where the config leaves it out.
_FAMILIES = {"llava": "default", "llava_next": "default", "llava_onevision": "full"}

# Towers of plain blocks (two feed-forward matrices): does a CLS token run along?
_TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}

# Decoders of gated blocks, each with the sizes that its config.json may leave out.
_DECODERS: Mapping[str, Mapping[str, int]] = {
    "llama": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "mistral": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "qwen2": {},
    "qwen3": {},
    "qwen2_vl_text": {},
    "qwen2_5_vl_text": {},
    "qwen3_vl_text": {},
}


def _entries(config: Any) -> Mapping[str, Any]:
    """The entries of a config, whatever it is made of."""
    if isinstance(config, Mapping):
        return config
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if hasattr(config, "__dict__"):
        return dict(vars(config))
    raise FoveateError(f"a {type(config).__name__} is no config: it has neither entries nor to_dict()")


def _size(entries: Mapping[str, Any], key: str, where: str) -> int:
    value = entries.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise FoveateError(
            f"{where} states {key}={value!r}, which is no size; "
            "a config object made by transformers fills in what a config.json leaves out"
        )
    return value


def _decoder(top: Mapping[str, Any]) -> DecoderShape:
    """The decoder of a config, or of its `text_config`."""
    given = _entries(top.get("text_config") or top)
    kind = str(given.get("model_type") or ("llama" if "text_config" in top else None))
    if kind not in _DECODERS:
        raise FoveateError(f"the shape of a {kind!r} decoder is not known; {did_you_mean(kind, _DECODERS)}")
    stated = {key: value for key, value in given.items() if value is not None}
    text: dict[str, Any] = {**_DECODERS[kind], **stated}
    where = f"the {kind} config"
    width, heads = _size(text, "hidden_size", where), _size(text, "num_attention_heads", where)
    return DecoderShape(
        layers=_size(text, "num_hidden_layers", where),
        width=width,
        ffn=_size(text, "intermediate_size", where),
        heads=heads,
        kv_heads=_size({"num_key_value_heads": heads, **text}, "num_key_value_heads", where),
        head_width=_size({"head_dim": width // max(1, heads), **text}, "head_dim", where),
        vocabulary=_size(text, "vocab_size", where),
        tied=bool(top.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    )


def _tower(top: Mapping[str, Any]) -> TowerShape:
    """The tower of a config's `vision_config`."""
    vision = _entries(top.get("vision_config") or {})
    kind = str(vision.get("model_type"))
    if kind not in _TOWERS:
        raise FoveateError(f"the shape of a {kind!r} tower is not known; {did_you_mean(kind, _TOWERS)}")
    where = f"the {kind} config"
    patch = _size(vision, "patch_size", where)
    return TowerShape(
        layers=_size(vision, "num_hidden_layers", where),
        width=_size(vision, "hidden_size", where),
        ffn=_size(vision, "intermediate_size", where),
        heads=_size(vision, "num_attention_heads", where),
        tokens=(_size(vision, "image_size", where) // max(1, patch)) ** 2,
        cls=_TOWERS[kind],
        patch=patch,
        channels=_size({"num_channels": 3, **vision}, "num_channels", where),
    )


def _llava(name: str, decoder: DecoderShape, tower: TowerShape) -> ModelShape:
    linears = ((tower.width, decoder.width), (decoder.width, decoder.width))
    return ModelShape(decoder, tower, ProjectorShape(linears, tower.tokens), name)


_CLIP_L_336 = TowerShape(layers=24, width=1024, ffn=4096, heads=16, tokens=576, cls=True, patch=14)
_CLIP_MINI = TowerShape(layers=6, width=256, ffn=1024, heads=4, tokens=576, cls=True, patch=14)

# The vocabulary is the original release's 32,000 entries, which published figures count; checkpoints converted for
# transformers pad it to 32,064 and `from_config` reads that.
_ROWS = (
    _llava("llava-1.5-7b", DecoderShape(32, 4096, 11008, 32, 32, 128, 32000), _CLIP_L_336),
    _llava("llava-1.5-13b", DecoderShape(40, 5120, 13824, 40, 40, 128, 32000), _CLIP_L_336),
    _llava("mini", DecoderShape(6, 256, 704, 4, 4, 64, 91, tied=True), _CLIP_MINI),
)
PRESETS: Mapping[str, ModelShape] = MappingProxyType({row.name: row for row in _ROWS})


def shape(name_or_config: Any) -> ModelShape:
    """The shape of a preset by its name, of a config (object or dict), or the shape itself.

    Raises:
        FoveateError: no preset has that name, or the config's model is not known.
    """
    if isinstance(name_or_config, ModelShape):
        return name_or_config
    if not isinstance(name_or_config, str):
        return ModelShape.from_config(name_or_config)
    found = PRESETS.get(name_or_config.lower())
    if found is None:
        raise FoveateError(f"no preset is called {name_or_config!r}; {did_you_mean(name_or_config.lower(), PRESETS)}")
    return found
