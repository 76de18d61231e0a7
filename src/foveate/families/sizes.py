"""Reads the sizes of tower, projector and decoder from a model's configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from foveate.core import FoveateError, did_you_mean
from foveate.families.shapes import DecoderShape, Experts, ModelShape, ProjectorShape, TowerShape

Entries = Mapping[str, Any]

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
    "glm4v_text": {},
    "gemma4_text": {},
    "cohere2": {},
    "qwen3_vl_moe_text": {},
    "glm4v_moe_text": {},
    "paddleocr_vl_text": {},
}

# ... those of them whose blocks have experts.
_SPARSE = ("qwen3_vl_moe_text", "glm4v_moe_text")

# What a config.json of these families calls its decoder where `text_config` is missing or names no type.
_OWN_DECODER = {
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "paddleocr_vl": "paddleocr_vl_text",
}

# Towers of plain blocks, two feed-forward matrices (Pixtral: three): does a CLS token run along?
_PLAIN_TOWERS = {
    "clip_vision_model": True,
    "siglip_vision_model": False,
    "internvl_vision": True,
    "idefics3_vision": False,
    "smolvlm_vision": False,
    "pixtral": False,
    "paddleocr_vl_vision": False,
    "video_llama_3_vision": False,
}
# ... those of them that keep the size of pictures.
_OWN_SIZE = ("pixtral", "paddleocr_vl_vision", "video_llama_3_vision")


def read_model(config: Any) -> ModelShape:
    """The shape of a vision-language model from its config.

    Raises:
        FoveateError: a model, tower or decoder of unknown type, or a size that the config does not state.
    """
    top = _entries(config)
    family = str(top.get("model_type"))
    if family not in _FAMILIES:
        raise FoveateError(f"the shape of a {family!r} model is not known; {did_you_mean(family, _FAMILIES)}")
    decoder = read_decoder(top)
    tower, projector = _FAMILIES[family](top, decoder)
    name = str(top.get("_name_or_path") or family).rstrip("/").rsplit("/", 1)[-1]
    return ModelShape(decoder, tower, projector, name)


def assume_model(config: Any) -> ModelShape:
    """The shape of a model of unknown type: its decoder by the usual names of sizes; tower and projector count nothing.

    Raises:
        FoveateError: a size that the config does not state.
    """
    top = _entries(config)
    text = {key: value for key, value in _entries(top.get("text_config") or top).items() if value is not None}
    where = f"the {text.get('model_type')} config"
    width, heads = _size(text, "hidden_size", where), _size(text, "num_attention_heads", where)
    decoder = DecoderShape(
        layers=_size(text, "num_hidden_layers", where),
        width=width,
        ffn=_size(text, "intermediate_size", where),
        heads=heads,
        kv_heads=_size({"num_key_value_heads": heads, **text}, "num_key_value_heads", where),
        head_width=_size({"head_dim": width // max(1, heads), **text}, "head_dim", where),
        vocabulary=_size(text, "vocab_size", where),
    )
    tower = TowerShape(layers=1, width=1, ffn=1, heads=1, tokens=1, cls=False, patch=1, channels=1, own_size=True)
    return ModelShape(decoder, tower, ProjectorShape(((1, 1),), 1), str(top.get("model_type")))


def read_decoder(config: Any) -> DecoderShape:
    """The decoder of a config, or of its `text_config`.

    Raises:
        FoveateError: a decoder of unknown type, or a size that the config does not state.
    """
    top = _entries(config)
    given = _entries(top.get("text_config") or top)
    family = str(top.get("model_type"))
    kind = str(_OWN_DECODER.get(family) or given.get("model_type") or ("llama" if "text_config" in top else None))
    if kind not in _DECODERS:
        raise FoveateError(f"the shape of a {kind!r} decoder is not known; {did_you_mean(kind, _DECODERS)}")
    stated = {key: value for key, value in given.items() if value is not None}
    text: dict[str, Any] = {**_DECODERS[kind], **stated}
    where = f"the {kind} config"
    width, heads = _size(text, "hidden_size", where), _size(text, "num_attention_heads", where)
    # By default this one says that the head is tied, and stock transformers asks the whole model alone.
    heard = kind != "qwen3_vl_moe_text" and text.get("tie_word_embeddings")
    shape = DecoderShape(
        layers=_size(text, "num_hidden_layers", where),
        width=width,
        ffn=_size(text, "intermediate_size", where),
        heads=heads,
        kv_heads=_size({"num_key_value_heads": heads, **text}, "num_key_value_heads", where),
        head_width=_size({"head_dim": width // max(1, heads), **text}, "head_dim", where),
        vocabulary=_size(text, "vocab_size", where),
        tied=bool(top.get("tie_word_embeddings") or heard),
        experts=_experts(text, where) if kind in _SPARSE else None,
    )
    return _gemma4_decoder(text, shape) if kind == "gemma4_text" else shape


def _experts(text: Entries, where: str) -> Experts | None:
    """The experts of a decoder, in the blocks that have them: from some block on, every so many, or not in a list."""
    layers, every = _size(text, "num_hidden_layers", where), int(text.get("decoder_sparse_step") or 1)
    dense = {*range(int(text.get("first_k_dense_replace") or 0)), *(text.get("mlp_only_layers") or ())}
    blocks = tuple(block for block in range(layers) if block not in dense and (block + 1) % every == 0)
    if not blocks:
        return None
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    width = _size(text, "moe_intermediate_size", where)
    return Experts(
        count=_size(text, next((name for name in names if name in text), names[-1]), where),
        chosen=_size(text, "num_experts_per_tok", where),
        width=width,
        blocks=blocks,
        shared=int(text.get("n_shared_experts") or 0) * width,
    )


def _gemma4_decoder(text: Entries, shape: DecoderShape) -> DecoderShape:
    """Wide heads where a layer has no window, the last layers without keys and values, inputs of each layer's own.

    Every layer counts on all tokens, though transformers runs the last ones on the last token alone where it can.
    """
    where = "the gemma4_text config"
    if text.get("enable_moe_block"):
        raise FoveateError("the shape of a gemma4 decoder with experts is not known")
    count, kinds = shape.layers, text.get("layer_types")
    if kinds is None or len(kinds) != count:
        raise FoveateError(f"{where} states layer_types={kinds!r}; a config object made by transformers fills them in")
    inner = int(text.get("hidden_size_per_layer_input") or 0)
    # The map that makes a layer's input of the token, the gate, and the way back.
    beside = ((shape.width, inner), (shape.width, inner), (inner, shape.width)) if inner else ()
    shared = int(text.get("num_kv_shared_layers") or 0)
    stated = text.get("per_layer_config")
    blocks = []
    for number, kind in enumerate(kinds):
        whole, own = kind == "full_attention", number < count - shared
        # An object of transformers says it of each layer that differs, a config.json of all without a window.
        mine = {} if stated is None else stated.get(str(number)) or stated.get(number) or {}
        if whole and stated is None:
            mine = {"head_dim": text.get("global_head_dim", 512)}
            if text.get("attention_k_eq_v"):
                mine["num_key_value_heads"] = text.get("num_global_key_value_heads") or shape.kv_heads
        blocks.append(
            dataclasses.replace(
                shape,
                layers=1,
                ffn=shape.ffn * (2 if text.get("use_double_wide_mlp") and not own else 1),
                kv_heads=_size({"num_key_value_heads": shape.kv_heads, **mine}, "num_key_value_heads", where),
                head_width=_size({"head_dim": shape.head_width, **mine}, "head_dim", where),
                own_keys=own,
                own_values=own and not (whole and text.get("attention_k_eq_v")),
                beside=beside,
            )
        )
    tables = ((_size(text, "vocab_size_per_layer_input", where), count * inner),) if inner else ()
    return dataclasses.replace(shape, tables=tables, blocks=tuple(blocks))


def _llava(top: Entries, decoder: DecoderShape, select: str = "default") -> tuple[TowerShape, ProjectorShape]:
    """Two linear maps on every token that the tower gives; `select` is the strategy where the config states none."""
    tower = _plain_tower(top)
    chosen = top.get("vision_feature_layers", top.get("vision_feature_layer", -2 if select == "default" else -1))
    layers = [chosen] if isinstance(chosen, int) else list(chosen)
    # The strategy "default" cuts the first token off whether or not it is a CLS.
    tokens = tower.length - (top.get("vision_feature_select_strategy", select) == "default")
    linears = ((len(layers) * tower.width, decoder.width), (decoder.width, decoder.width))
    deepest = max(layers, key=lambda layer: layer if layer >= 0 else tower.layers + 1 + layer)
    return _reading(tower, deepest), ProjectorShape(linears, tokens)


def _tiled(top: Entries, decoder: DecoderShape, select: str = "default") -> tuple[TowerShape, ProjectorShape]:
    """The same, where what the tower gives is put together behind it: tiles of a picture, or outputs of blocks."""
    tower, projector = _llava(top, decoder, select)
    return dataclasses.replace(tower, put_back=True), projector


def _onevision(top: Entries, decoder: DecoderShape) -> tuple[TowerShape, ProjectorShape]:
    return _tiled(top, decoder, select="full")


def _internvl(top: Entries, decoder: DecoderShape) -> tuple[TowerShape, ProjectorShape]:
    """Squares of patches become one token; then two linear maps."""
    tower = _plain_tower(top)
    merge = round(1 / float(top.get("downsample_ratio", 0.5))) ** 2
    linears = ((tower.width * merge, decoder.width), (decoder.width, decoder.width))
    layer = top.get("vision_feature_layer", -1)
    return _reading(tower, layer), ProjectorShape(linears, tower.tokens // merge, merge)


def _idefics(top: Entries, decoder: DecoderShape) -> tuple[TowerShape, ProjectorShape]:
    """Squares of patches become one token through one linear map."""
    tower = _plain_tower(top)
    merge = _size({"scale_factor": 2, **top}, "scale_factor", "the idefics3 config") ** 2
    return tower, ProjectorShape(((tower.width * merge, decoder.width),), max(1, tower.tokens // merge), merge)


def _mistral3(top: Entries, decoder: DecoderShape) -> tuple[TowerShape, ProjectorShape]:
    """2 x 2 patches become one token; then two linear maps."""
    tower = _plain_tower(top)
    merge = _size({"spatial_merge_size": 2, **top}, "spatial_merge_size", "the mistral3 config") ** 2
    maps = ((tower.width * merge, tower.width), (tower.width, decoder.width), (decoder.width, decoder.width))
    layer = top.get("vision_feature_layer", -1)
    return _reading(tower, layer), ProjectorShape(maps, max(1, tower.tokens // merge), merge)


def _paddle(top: Entries, decoder: DecoderShape) -> tuple[TowerShape, ProjectorShape]:
    """2 x 2 patches become one token through two linear maps, the first as wide as they are together."""
    # Published ones call the encoder by the name of the whole.
    vision = {**_entries(top.get("vision_config") or {}), "model_type": "paddleocr_vl_vision"}
    tower = _plain_tower({**top, "vision_config": vision})
    merge = _size({"spatial_merge_size": 2, **vision}, "spatial_merge_size", "the paddleocr_vl vision config") ** 2
    inner = tower.width * merge
    return tower, ProjectorShape(((inner, inner), (inner, decoder.width)), max(1, tower.tokens // merge), merge)


def _llama3(top: Entries, decoder: DecoderShape) -> tuple[TowerShape, ProjectorShape]:
    """Pictures keep their size and no patches merge; two linear maps. The config states no usual size."""
    vision = _entries(top.get("vision_config") or {})
    patch = _size(vision, "patch_size", "the video_llama_3 vision config")
    tower = _plain_tower({**top, "vision_config": {**vision, "image_size": round(_TYPICAL**0.5) * patch}})
    linears = ((tower.width, decoder.width), (decoder.width, decoder.width))
    return tower, ProjectorShape(linears, tower.tokens)


def _aya(top: Entries, decoder: DecoderShape) -> tuple[TowerShape, ProjectorShape]:
    """Squares of patches become one token through a gated pair of linear maps."""
    tower = _plain_tower(top)
    merge = _size({"downsample_factor": 2, **top}, "downsample_factor", "the aya_vision config") ** 2
    inner = _size({"alignment_intermediate_size": decoder.width, **top}, "alignment_intermediate_size", "aya_vision")
    maps = ((tower.width * merge, inner), (inner // 2, decoder.width))
    layer = top.get("vision_feature_layer", -1)
    return _reading(tower, layer), ProjectorShape(maps, max(1, tower.tokens // merge), merge)


def _paligemma(top: Entries, decoder: DecoderShape) -> tuple[TowerShape, ProjectorShape]:
    tower = _plain_tower(top)
    return tower, ProjectorShape(((tower.width, decoder.width),), tower.tokens)


def _deepseek(top: Entries, decoder: DecoderShape) -> tuple[TowerShape, ProjectorShape]:
    tower = _plain_tower(top)
    return tower, ProjectorShape(((tower.width, decoder.width), (decoder.width, decoder.width)), tower.tokens)


def _gemma3(top: Entries, decoder: DecoderShape) -> tuple[TowerShape, ProjectorShape]:
    """Squares of patches are averaged to as many tokens as the config says; then one linear map."""
    tower = _plain_tower(top)
    tokens = _size({"mm_tokens_per_image": 256, **top}, "mm_tokens_per_image", "the gemma3 config")
    merge = max(1, tower.tokens // tokens)
    return tower, ProjectorShape(((tower.width, decoder.width),), tokens, merge)


def _gemma4(top: Entries, decoder: DecoderShape) -> tuple[TowerShape, ProjectorShape]:
    """Pictures keep their shape; squares of patches are averaged; then one linear map."""
    vision, where = _entries(top.get("vision_config") or {}), "the gemma4 vision config"
    merge = _size({"pooling_kernel_size": 3, **vision}, "pooling_kernel_size", where) ** 2
    tower = TowerShape(
        layers=_size(vision, "num_hidden_layers", where),
        width=_size(vision, "hidden_size", where),
        ffn=_size(vision, "intermediate_size", where),
        heads=_size(vision, "num_attention_heads", where),
        tokens=_GEMMA4 * merge,
        cls=False,
        patch=_size(vision, "patch_size", where),
        gated=True,
    )
    return tower, ProjectorShape(((tower.width, decoder.width),), _GEMMA4, merge)


_GEMMA4 = 280  # tokens that a picture may have; the encoder runs on the patches of as many, padding among them
_TYPICAL = 1024  # patches of a picture where each keeps its own size


def _qwen(top: Entries, decoder: DecoderShape) -> tuple[TowerShape, ProjectorShape]:
    """Pictures keep their size; 2 x 2 patches become one token through two linear maps."""
    vision = _entries(top.get("vision_config") or {})
    kind = str(top.get("model_type"))
    where = f"the {kind} vision config"
    depth, patch = _size(vision, "depth", where), _size(vision, "patch_size", where)
    width = _size(vision, "embed_dim" if "embed_dim" in vision else "hidden_size", where)
    ffn = (
        round(float(vision["mlp_ratio"]) * width)
        if "mlp_ratio" in vision
        else _size(vision, "intermediate_size", where)
    )
    side = _size({"spatial_merge_size": 2, **vision}, "spatial_merge_size", where)
    window = vision.get("window_size") if kind == "qwen2_5_vl" else None
    tower = TowerShape(
        layers=depth,
        width=width,
        ffn=ffn,
        heads=_size(vision, "num_heads", where),
        tokens=_TYPICAL,
        cls=False,
        patch=patch,
        channels=_size({"in_channels": 3, **vision}, "in_channels", where),
        gated=kind == "qwen2_5_vl",
        frames=_size({"temporal_patch_size": 2, **vision}, "temporal_patch_size", where),
        window=(window // patch) ** 2 if window else None,
        wide=tuple(vision.get("fullatt_block_indexes") or ()) if window else (),
        own_size=True,
    )
    merge = side**2
    inner = width * merge
    # Tokens of some inner blocks (deepstack) pass through maps of their own into the decoder's first layers.
    maps = 1 + len(vision.get("deepstack_visual_indexes") or ())
    linears = ((inner, inner), (inner, decoder.width)) * maps
    return tower, ProjectorShape(linears, _TYPICAL // merge, merge)


def _glm(top: Entries, decoder: DecoderShape) -> tuple[TowerShape, ProjectorShape]:
    """As Qwen's; the blocks' gated networks are as wide as what the tower hands on, and so is the projector's."""
    tower, projector = _qwen(top, decoder)
    vision = _entries(top.get("vision_config") or {})
    out, wide = (_size(vision, name, "the glm4v vision config") for name in ("out_hidden_size", "intermediate_size"))
    linears = ((tower.width * projector.merge, out), (out, out), (out, wide), (out, wide), (wide, out))
    return dataclasses.replace(tower, ffn=out, gated=True), dataclasses.replace(projector, linears=linears)


_FAMILIES: Mapping[str, Callable[[Entries, DecoderShape], tuple[TowerShape, ProjectorShape]]] = {
    "llava": _llava,
    "llava_next": _tiled,
    "llava_next_video": _tiled,
    "llava_onevision": _onevision,
    "video_llava": _llava,
    "vipllava": _tiled,
    "idefics3": _idefics,
    "smolvlm": _idefics,
    "mistral3": _mistral3,
    "lighton_ocr": _mistral3,
    "aya_vision": _aya,
    "cohere2_vision": _aya,
    "internvl": _internvl,
    "paligemma": _paligemma,
    "deepseek_vl": _deepseek,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "qwen3_vl_moe": _qwen,
    "paddleocr_vl": _paddle,
    "video_llama_3": _llama3,
    "glm4v": _glm,
    "glm46v": _glm,
    "glm4v_moe": _glm,
}


def _plain_tower(top: Entries) -> TowerShape:
    """The tower of a config's `vision_config`, where every picture is brought to one size."""
    vision = _entries(top.get("vision_config") or {})
    kind = str(vision.get("model_type"))
    if kind not in _PLAIN_TOWERS:
        raise FoveateError(f"the shape of a {kind!r} tower is not known; {did_you_mean(kind, _PLAIN_TOWERS)}")
    where = f"the {kind} config"
    patch, side = _side(vision, "patch_size", where), _side(vision, "image_size", where)
    return TowerShape(
        layers=_size(vision, "num_hidden_layers", where),
        width=_size(vision, "hidden_size", where),
        ffn=_size(vision, "intermediate_size", where),
        heads=_size(vision, "num_attention_heads", where),
        tokens=(side // max(1, patch)) ** 2,
        cls=_PLAIN_TOWERS[kind],
        patch=patch,
        channels=_size({"num_channels": 3, **vision}, "num_channels", where),
        gated=kind == "pixtral",
        own_size=kind in _OWN_SIZE,
        put_back=kind in _OWN_SIZE,
    )


def _reading(tower: TowerShape, layer: int) -> TowerShape:
    """The tower with the blocks that run up to the one whose output is read: hidden state `layer`, -1 the last."""
    reads = layer if layer >= 0 else tower.layers + 1 + layer
    # Patch embeddings (0) and blocks that are not there are refused where a method needs them.
    return dataclasses.replace(tower, reads=reads if 1 <= reads < tower.layers else None)


def _entries(config: Any) -> Entries:
    """The entries of a config, whatever it is made of."""
    if isinstance(config, Mapping):
        return config
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if hasattr(config, "__dict__"):
        return dict(vars(config))
    raise FoveateError(f"a {type(config).__name__} is no config: it has neither entries nor to_dict()")


def _size(entries: Entries, key: str, where: str) -> int:
    value = entries.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise FoveateError(
            f"{where} states {key}={value!r}, which is no size; "
            "a config object made by transformers fills in what a config.json leaves out"
        )
    return value


def _side(entries: Entries, key: str, where: str) -> int:
    """A side of a square, given once or for both directions."""
    value = entries.get(key)
    if isinstance(value, list | tuple) and len(set(value)) == 1:
        return _size({key: value[0]}, key, where)
    return _size(entries, key, where)
