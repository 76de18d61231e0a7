"""Reads the sizes of encoder and projector from a model's configuration: one reader for each way of joining them.

A row of the families names its reader. A reader takes the configuration's entries, the decoder's shape and the row of
the encoder.
"""

from __future__ import annotations

import dataclasses

from foveate.families.entries import Entries, entries, side, size
from foveate.families.shapes import DecoderShape, ProjectorShape, TowerShape
from foveate.families.towers import Tower

Sizes = tuple[TowerShape, ProjectorShape]


def llava(top: Entries, decoder: DecoderShape, row: Tower, select: str = "default") -> Sizes:
    """Two linear maps on every token that the tower gives; `select` is the strategy where the config states none."""
    tower = _plain(top, row)
    chosen = top.get("vision_feature_layers", top.get("vision_feature_layer", -2 if select == "default" else -1))
    layers = [chosen] if isinstance(chosen, int) else list(chosen)
    # The strategy "default" cuts the first token off whether or not it is a CLS.
    tokens = tower.length - (top.get("vision_feature_select_strategy", select) == "default")
    linears = ((len(layers) * tower.width, decoder.width), (decoder.width, decoder.width))
    deepest = max(layers, key=lambda layer: layer if layer >= 0 else tower.layers + 1 + layer)
    return _reading(tower, deepest), ProjectorShape(linears, tokens)


def onevision(top: Entries, decoder: DecoderShape, row: Tower) -> Sizes:
    """The same with another strategy where the config states none."""
    return llava(top, decoder, row, select="full")


def internvl(top: Entries, decoder: DecoderShape, row: Tower) -> Sizes:
    """Squares of patches become one token; then two linear maps."""
    tower = _plain(top, row)
    merge = round(1 / float(top.get("downsample_ratio", 0.5))) ** 2
    linears = ((tower.width * merge, decoder.width), (decoder.width, decoder.width))
    layer = top.get("vision_feature_layer", -1)
    return _reading(tower, layer), ProjectorShape(linears, tower.tokens // merge, merge)


def idefics(top: Entries, decoder: DecoderShape, row: Tower) -> Sizes:
    """Squares of patches become one token through one linear map."""
    tower = _plain(top, row)
    merge = size({"scale_factor": 2, **top}, "scale_factor", "the idefics3 config") ** 2
    return tower, ProjectorShape(((tower.width * merge, decoder.width),), max(1, tower.tokens // merge), merge)


def mistral3(top: Entries, decoder: DecoderShape, row: Tower) -> Sizes:
    """2 x 2 patches become one token; then two linear maps."""
    tower = _plain(top, row)
    merge = size({"spatial_merge_size": 2, **top}, "spatial_merge_size", "the mistral3 config") ** 2
    maps = ((tower.width * merge, tower.width), (tower.width, decoder.width), (decoder.width, decoder.width))
    layer = top.get("vision_feature_layer", -1)
    return _reading(tower, layer), ProjectorShape(maps, max(1, tower.tokens // merge), merge)


def paddle(top: Entries, decoder: DecoderShape, row: Tower) -> Sizes:
    """2 x 2 patches become one token through two linear maps, the first as wide as they are together."""
    tower, vision = _plain(top, row), entries(top.get("vision_config") or {})
    merge = size({"spatial_merge_size": 2, **vision}, "spatial_merge_size", "the paddleocr_vl vision config") ** 2
    inner = tower.width * merge
    return tower, ProjectorShape(((inner, inner), (inner, decoder.width)), max(1, tower.tokens // merge), merge)


def llama3(top: Entries, decoder: DecoderShape, row: Tower) -> Sizes:
    """Pictures keep their size and no patches merge; two linear maps. The config states no usual size."""
    vision = entries(top.get("vision_config") or {})
    patch = size(vision, "patch_size", "the video_llama_3 vision config")
    tower = _plain({**top, "vision_config": {**vision, "image_size": round(_TYPICAL**0.5) * patch}}, row)
    linears = ((tower.width, decoder.width), (decoder.width, decoder.width))
    return tower, ProjectorShape(linears, tower.tokens)


def aya(top: Entries, decoder: DecoderShape, row: Tower) -> Sizes:
    """Squares of patches become one token through a gated pair of linear maps."""
    tower = _plain(top, row)
    merge = size({"downsample_factor": 2, **top}, "downsample_factor", "the aya_vision config") ** 2
    inner = size({"alignment_intermediate_size": decoder.width, **top}, "alignment_intermediate_size", "aya_vision")
    maps = ((tower.width * merge, inner), (inner // 2, decoder.width))
    layer = top.get("vision_feature_layer", -1)
    return _reading(tower, layer), ProjectorShape(maps, max(1, tower.tokens // merge), merge)


def paligemma(top: Entries, decoder: DecoderShape, row: Tower) -> Sizes:
    """One linear map on every patch."""
    tower = _plain(top, row)
    return tower, ProjectorShape(((tower.width, decoder.width),), tower.tokens)


def deepseek(top: Entries, decoder: DecoderShape, row: Tower) -> Sizes:
    """Two linear maps on every patch."""
    tower = _plain(top, row)
    return tower, ProjectorShape(((tower.width, decoder.width), (decoder.width, decoder.width)), tower.tokens)


def gemma3(top: Entries, decoder: DecoderShape, row: Tower) -> Sizes:
    """Squares of patches are averaged to as many tokens as the config says; then one linear map."""
    tower = _plain(top, row)
    tokens = size({"mm_tokens_per_image": 256, **top}, "mm_tokens_per_image", "the gemma3 config")
    merge = max(1, tower.tokens // tokens)
    return tower, ProjectorShape(((tower.width, decoder.width),), tokens, merge)


def gemma4(top: Entries, decoder: DecoderShape, row: Tower) -> Sizes:
    """Pictures keep their shape; squares of patches are averaged; then one linear map."""
    vision, where = entries(top.get("vision_config") or {}), "the gemma4 vision config"
    merge = size({"pooling_kernel_size": 3, **vision}, "pooling_kernel_size", where) ** 2
    tower = TowerShape(
        layers=size(vision, "num_hidden_layers", where),
        width=size(vision, "hidden_size", where),
        ffn=size(vision, "intermediate_size", where),
        heads=size(vision, "num_attention_heads", where),
        tokens=_GEMMA4 * merge,
        cls=False,
        patch=size(vision, "patch_size", where),
    )
    return tower, ProjectorShape(((tower.width, decoder.width),), _GEMMA4, merge)


_GEMMA4 = 280  # tokens that a picture may have; the encoder runs on the patches of as many, padding among them
_TYPICAL = 1024  # patches of a picture where each keeps its own size


def qwen(top: Entries, decoder: DecoderShape, row: Tower) -> Sizes:
    """Pictures keep their size; 2 x 2 patches become one token through two linear maps."""
    vision = entries(top.get("vision_config") or {})
    where = f"the {top.get('model_type')} vision config"
    depth, patch = size(vision, "depth", where), size(vision, "patch_size", where)
    width = size(vision, "embed_dim" if "embed_dim" in vision else "hidden_size", where)
    ffn = (
        round(float(vision["mlp_ratio"]) * width) if "mlp_ratio" in vision else size(vision, "intermediate_size", where)
    )
    merge = size({"spatial_merge_size": 2, **vision}, "spatial_merge_size", where) ** 2
    window = vision.get("window_size") if row.full_attention else None
    tower = TowerShape(
        layers=depth,
        width=width,
        ffn=ffn,
        heads=size(vision, "num_heads", where),
        tokens=_TYPICAL,
        cls=False,
        patch=patch,
        channels=size({"in_channels": 3, **vision}, "in_channels", where),
        frames=size({"temporal_patch_size": 2, **vision}, "temporal_patch_size", where),
        window=(window // patch) ** 2 if window else None,
        wide=tuple(vision.get("fullatt_block_indexes") or ()) if window else (),
    )
    inner = width * merge
    # Tokens of some inner blocks (deepstack) pass through maps of their own into the decoder's first layers.
    maps = 1 + len(vision.get("deepstack_visual_indexes") or ())
    linears = ((inner, inner), (inner, decoder.width)) * maps
    return tower, ProjectorShape(linears, _TYPICAL // merge, merge)


def glm(top: Entries, decoder: DecoderShape, row: Tower) -> Sizes:
    """As Qwen's; the blocks' gated networks are as wide as what the tower hands on, and so is the projector's."""
    tower, projector = qwen(top, decoder, row)
    vision, where = entries(top.get("vision_config") or {}), f"the {row.type} config"
    out, wide = size(vision, "out_hidden_size", where), size(vision, "intermediate_size", where)
    return dataclasses.replace(tower, ffn=out), _gated_merger(tower, projector, out, wide)


def glm_ocr(top: Entries, decoder: DecoderShape, row: Tower) -> Sizes:
    """As GLM's; the blocks' networks are as wide as the config says, and the projector's as all colour channels."""
    tower, projector = qwen(top, decoder, row)
    out = size(entries(top.get("vision_config") or {}), "out_hidden_size", f"the {row.type} config")
    return tower, _gated_merger(tower, projector, out, out * tower.channels)


def _gated_merger(tower: TowerShape, projector: ProjectorShape, out: int, wide: int) -> ProjectorShape:
    """A convolution that makes one token of its patches, a linear map, and a gated network of inner width `wide`."""
    linears = ((tower.width * projector.merge, out), (out, out), (out, wide), (out, wide), (wide, out))
    return dataclasses.replace(projector, linears=linears)


def _plain(top: Entries, row: Tower) -> TowerShape:
    """The encoder of a config's `vision_config` where its sizes have the usual names, and pictures a usual size."""
    vision, where = entries(top.get("vision_config") or {}), f"the {row.type} config"
    patch = side(vision, "patch_size", where)
    return TowerShape(
        layers=size(vision, "num_hidden_layers", where),
        width=size(vision, "hidden_size", where),
        ffn=size(vision, "intermediate_size", where),
        heads=size(vision, "num_attention_heads", where),
        tokens=(side(vision, "image_size", where) // max(1, patch)) ** 2,
        cls=bool(row.summary),
        patch=patch,
        channels=size({"num_channels": 3, **vision}, "num_channels", where),
    )


def _reading(tower: TowerShape, layer: int) -> TowerShape:
    """The tower with the blocks that run up to the one whose output is read: hidden state `layer`, -1 the last."""
    reads = layer if layer >= 0 else tower.layers + 1 + layer
    # Patch embeddings (0) and blocks that are not there are refused where a method needs them.
    return dataclasses.replace(tower, reads=reads if 1 <= reads < tower.layers else None)
