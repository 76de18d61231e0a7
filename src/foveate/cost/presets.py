"""Shapes of well-known models, so that their cost is known without a download."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from foveate.families.shapes import DecoderShape, ModelShape, ProjectorShape, TowerShape


def _two_maps(name: str, decoder: DecoderShape, tower: TowerShape, merge: int = 1) -> ModelShape:
    """A model whose projector is two linear maps, on squares of `merge` patches."""
    linears = ((tower.width * merge, decoder.width), (decoder.width, decoder.width))
    return ModelShape(decoder, tower, ProjectorShape(linears, tower.tokens // merge, merge), name)


def _merger(name: str, decoder: DecoderShape, tower: TowerShape, maps: int = 1) -> ModelShape:
    """A Qwen: 2 x 2 patches become a token, through `maps` pairs of linear maps."""
    inner = 4 * tower.width
    linears = ((inner, inner), (inner, decoder.width)) * maps
    return ModelShape(decoder, tower, ProjectorShape(linears, tower.tokens // 4, 4), name)


_CLIP_L_336 = TowerShape(layers=24, width=1024, ffn=4096, heads=16, tokens=576, cls=True, patch=14, reads=23)
_CLIP_TILES = dataclasses.replace(_CLIP_L_336, put_back=True)
_CLIP_MINI = TowerShape(layers=6, width=256, ffn=1024, heads=4, tokens=576, cls=True, patch=14, reads=5)
_INTERN_300M = TowerShape(layers=24, width=1024, ffn=4096, heads=16, tokens=1024, cls=True, patch=14, put_back=True)
_QWEN_2_5 = TowerShape(
    layers=32, width=1280, ffn=3420, heads=16, tokens=1024, cls=False, patch=14, gated=True, frames=2,
    window=64, wide=(7, 15, 23, 31), own_size=True, put_back=True,
)  # fmt: skip
_QWEN_3 = TowerShape(
    layers=27,
    width=1152,
    ffn=4304,
    heads=16,
    tokens=1024,
    cls=False,
    patch=16,
    frames=2,
    own_size=True,
    put_back=True,
)

# The vocabulary is the original release's 32,000 entries, which published figures count; checkpoints converted for
# transformers pad it to 32,064 and `from_config` reads that.
_VICUNA_7B = DecoderShape(32, 4096, 11008, 32, 32, 128, 32000)
_VICUNA_13B = DecoderShape(40, 5120, 13824, 40, 40, 128, 32000)
_LLAMA3_8B = DecoderShape(32, 4096, 14336, 32, 8, 128, 128256)
_QWEN_2_5_7B = DecoderShape(28, 3584, 18944, 28, 4, 128, 152064)

_ROWS = (
    _two_maps("llava-1.5-7b", _VICUNA_7B, _CLIP_L_336),
    _two_maps("llava-1.5-13b", _VICUNA_13B, _CLIP_L_336),
    _two_maps("llava-1.6-7b", _VICUNA_7B, _CLIP_TILES),
    _two_maps("llava-1.6-13b", _VICUNA_13B, _CLIP_TILES),
    _two_maps("llava-next-8b", _LLAMA3_8B, _CLIP_TILES),
    _merger("qwen2.5-vl-3b", DecoderShape(36, 2048, 11008, 16, 2, 128, 151936, tied=True), _QWEN_2_5),
    _merger("qwen2.5-vl-7b", _QWEN_2_5_7B, _QWEN_2_5),
    _merger("qwen3-vl-8b", DecoderShape(36, 4096, 12288, 32, 8, 128, 151936), _QWEN_3, maps=4),
    _two_maps("internvl3-8b", dataclasses.replace(_QWEN_2_5_7B, vocabulary=151674), _INTERN_300M, merge=4),
    _two_maps("mini", DecoderShape(6, 256, 704, 4, 4, 64, 91, tied=True), _CLIP_MINI),
)
PRESETS: Mapping[str, ModelShape] = MappingProxyType({row.name: row for row in _ROWS})
