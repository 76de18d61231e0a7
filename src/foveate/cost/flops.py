"""Floating-point operations in two conventions, bytes of keys and values, and equivalent tokens.

`weights` counts what LVPruning's TFLOPs count (Table 1): two operations for every weight that a token meets, in the
tower, the projector, the decoder and, for every token of the prompt, the output head. Attention between tokens is free.

`roofline` counts what LLM-Viewer counts, operator by operator (Yuan et al. 2024): attention over all pairs of tokens,
no half taken off for causality; 5 operations per softmax entry, 7 per normalised value, 1 per addition, 2 per value of
the activation (at the model's width); the output head for the last token alone, one operation per weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

from foveate.core import FoveateError, did_you_mean
from foveate.families.shapes import DecoderShape, ModelShape, ProjectorShape, TowerShape

Convention: TypeAlias = Literal["weights", "roofline"]


def prefill_flops(
    shape: ModelShape,
    *,
    visual: Sequence[int],
    text: int,
    convention: Convention,
    tiles: int = 1,
    batch: int = 1,
    tower: bool | None = None,
) -> int:
    """Operations until the first token of the answer.

    Args:
        visual: (layers,) visual tokens that each decoder layer sees.
        text: all other tokens of the prompt; separators between image rows cost the same and count here.
        tiles: pictures that the tower encodes for one prompt: 1 for a plain image, more for tiles or several images.
        batch: prompts of this size.
        tower: count tower and projector; None follows the convention (`weights` counts them, `roofline` does not).

    Raises:
        FoveateError: `visual` has another number of entries than the decoder has layers, or a count is too small.
    """
    lengths = _lengths(shape.decoder, visual, text)
    total = decoder_flops(shape.decoder, lengths=lengths, convention=convention, batch=batch)
    counted = convention == "weights" if tower is None else tower
    if counted:
        total += tower_flops(shape.tower, convention=convention, tiles=tiles, batch=batch)
        total += projector_flops(shape.projector, tokens=tiles * shape.projector.tokens, batch=batch)
    return total


def decode_flops(
    shape: ModelShape | DecoderShape,
    *,
    visual: Sequence[int],
    text: int,
    convention: Convention,
    steps: int = 1,
    batch: int = 1,
) -> int:
    """Operations of `steps` decoding steps after a prefill.

    Step s attends to the prompt, to the answer so far and to its own token: visual + text + s keys. The first token of
    an answer comes out of the prefill, so an answer of m tokens takes m - 1 steps.

    Args:
        visual: (layers,) visual tokens in each layer's cache.
        text: all other tokens of the prompt.

    Raises:
        FoveateError: as `prefill_flops`.
    """
    _check_convention(convention)
    _at_least("steps", steps, 0)
    _at_least("batch", batch, 1)
    decoder = shape.decoder if isinstance(shape, ModelShape) else shape
    total = steps * _head(decoder, 1, convention)
    for block, length in enumerate(_lengths(decoder, visual, text)):
        keys = steps * length + steps * (steps + 1) // 2
        total += _block(decoder.each[block], decoder.met(block), steps, keys, convention)
    return batch * total


def decoder_flops(decoder: DecoderShape, *, lengths: Sequence[int], convention: Convention, batch: int = 1) -> int:
    """Operations of one pass of the decoder over a prompt, output head included.

    Args:
        lengths: (layers,) tokens of the prompt that each layer sees, visual and other.

    Raises:
        FoveateError: a wrong number of lengths, or a length below 1.
    """
    _check_convention(convention)
    _at_least("batch", batch, 1)
    _check_layers(decoder.layers, lengths, smallest=1)
    blocks = sum(
        _block(decoder.each[block], decoder.met(block), length, length * length, convention)
        for block, length in enumerate(lengths)
    )
    return batch * (blocks + _head(decoder, lengths[-1], convention))


def tower_flops(
    tower: TowerShape,
    *,
    convention: Convention,
    lengths: Sequence[int] | None = None,
    patches: int | None = None,
    tiles: int = 1,
    batch: int = 1,
) -> int:
    """Operations of the vision encoder: the patch convolution and the blocks, by the rules that count the decoder's.

    Args:
        lengths: (layers,) tokens that each block sees, CLS included; None is all of them.
        patches: of one picture, for encoders that keep its size; None is `tower.tokens`.
        tiles: pictures encoded for one prompt.

    Raises:
        FoveateError: a wrong number of lengths, or a length below 1.
    """
    _check_convention(convention)
    _at_least("tiles", tiles, 0)
    _at_least("batch", batch, 1)
    patches = tower.tokens if patches is None else patches
    lengths = (patches + tower.cls,) * tower.layers if lengths is None else lengths
    _check_layers(tower.layers, lengths, smallest=1)
    pairs = [length * tower.keys(block, length, patches) for block, length in enumerate(lengths)]
    weights = tower.block_weights
    blocks = sum(_block(tower, weights, length, seen, convention) for length, seen in zip(lengths, pairs, strict=True))
    return batch * tiles * (blocks + 2 * patches * tower.patch_weights)


def projector_flops(projector: ProjectorShape, *, tokens: int | None = None, batch: int = 1) -> int:
    """Operations of the projector's linear maps, the same in both conventions.

    Args:
        tokens: tokens projected for one prompt; None is all tokens of one picture.
    """
    tokens = projector.tokens if tokens is None else tokens
    _at_least("tokens", tokens, 0)
    _at_least("batch", batch, 1)
    return batch * 2 * tokens * projector.weights


def lvpruning_modules(
    decoder: DecoderShape, *, visual: Sequence[int], text: int, blocks: int = 2, batch: int = 1
) -> int:
    """Operations of LVPruning's decision modules (section 4.1), convention `weights`.

    A block holds the query and output matrices and a feed-forward network D -> 2D -> D for each visual token, and the
    key and value matrices for each text token; the scores are one linear map D -> 2 after the last block.

    Args:
        visual: (modules,) visual tokens that each module sees.
        blocks: cross-attention blocks of one module.
    """
    for count in (text, *visual):
        _at_least("tokens", count, 0)
    _at_least("blocks", blocks, 1)
    _at_least("batch", batch, 1)
    square = decoder.width**2
    return batch * sum(
        2 * (blocks * (6 * square * seen + 2 * square * text) + 2 * decoder.width * seen) for seen in visual
    )


def kv_bytes(decoder: DecoderShape, lengths_per_layer: Sequence[int], bytes_per_value: float, batch: int = 1) -> int:
    """Bytes of the keys and values in the cache.

    Args:
        lengths_per_layer: (layers,) positions that each layer's cache holds, visual and other.
        bytes_per_value: 2 for 16 bit, 1 for 8, 0.5 for 4.

    Raises:
        FoveateError: a wrong number of lengths, a negative length, or a value without size.
    """
    _check_layers(decoder.layers, lengths_per_layer, smallest=0)
    _at_least("batch", batch, 1)
    if not (math.isfinite(bytes_per_value) and bytes_per_value > 0):
        raise FoveateError(f"bytes_per_value={bytes_per_value} is no size; 16-bit values have bytes_per_value=2")
    return math.ceil(kv_values(decoder, lengths_per_layer) * batch * bytes_per_value)


def kv_values(decoder: DecoderShape, lengths_per_layer: Sequence[int]) -> int:
    """Numbers that a row's keys and values are, of the layers that have their own."""
    each = zip(decoder.each, lengths_per_layer, strict=True)
    return sum(2 * block.cached_width * length for block, length in each if block.own_keys)


def equivalent_tokens(visual: Sequence[int]) -> float:
    """Visual tokens per decoder layer, averaged over the layers: what a model that keeps one count throughout has.

    Args:
        visual: (layers,) visual tokens that each decoder layer sees.
    """
    if not visual:
        raise FoveateError("visual has no entries; it needs one count for each decoder layer, at least 1")
    return sum(visual) / len(visual)


def _block(shape: DecoderShape | TowerShape, weights: int, queries: int, pairs: int, convention: Convention) -> int:
    """Operations of one block of `weights` per token on `queries` new tokens that form `pairs` query-key pairs."""
    linear = 2 * queries * weights
    if convention == "weights":
        return linear
    attention = 4 * pairs * shape.attention_width  # scores and weighted values
    softmax = 5 * pairs * shape.heads
    pointwise = (2 * 7 + 2 * 1 + 2) * queries * shape.width  # two norms, two additions, one activation
    return linear + attention + softmax + pointwise


def _head(decoder: DecoderShape, tokens: int, convention: Convention) -> int:
    return 2 * tokens * decoder.head_weights if convention == "weights" else decoder.head_weights


def _lengths(decoder: DecoderShape, visual: Sequence[int], text: int) -> list[int]:
    _check_layers(decoder.layers, visual, smallest=0)
    _at_least("text", text, 0)
    return [seen + text for seen in visual]


def _check_layers(layers: int, lengths: Sequence[int], smallest: int) -> None:
    if len(lengths) != layers:
        raise FoveateError(f"{len(lengths)} token counts for {layers} layers; give one for each of the {layers}")
    for length in lengths:
        _at_least("tokens of a layer", length, smallest)


def _at_least(name: str, value: int, smallest: int) -> None:
    if value < smallest:
        raise FoveateError(f"{name}={value} is below {smallest}; the smallest is {smallest}")


def _check_convention(convention: str) -> None:
    if convention not in get_args(Convention):
        choices = did_you_mean(str(convention), get_args(Convention))
        raise FoveateError(f"{convention!r} is no way of counting operations; {choices}")
