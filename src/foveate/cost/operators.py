"""The operators of a transformer block, each with its operations, the values it moves and its kernel launches.

Operations and values are those that LLM-Viewer counts (Yuan et al. 2024), its habits included: the query's activations
are read at the width of the keys while a prompt runs, an addition reads one operand, the activation of the feed-forward
network runs at the model's width, and the output head takes one operation per weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from foveate.cost.devices import Hardware, Precision
from foveate.families.shapes import DecoderShape, Experts, ProjectorShape, TowerShape

_ROTARY, _RMS_NORM = 10, 8  # kernels of transformers' plain modules
_ROUTING = 17  # ... and of its router and the grouped products behind it, beside the matrices and the activation


@dataclass(frozen=True)
class Operator:
    """One step: operations, values read and written, and the kernels that a plain PyTorch module launches for it.

    Attributes:
        weights: weights read; `read` and `written` are activations, `cache_read` and `cache_written` keys and values.
        stored: the written activations are a stage's own, kept in memory until the next operator reads them.
    """

    flops: int
    weights: int = 0
    read: int = 0
    written: int = 0
    cache_read: int = 0
    cache_written: int = 0
    launches: int = 1

    def bytes_moved(self, precision: Precision) -> float:
        """Bytes between memory and processor."""
        activations = (self.read + self.written) * precision.activations
        cached = (self.cache_read + self.cache_written) * precision.cache
        return (self.weights * precision.weights + activations + cached) / 8

    def seconds(self, hardware: Hardware, precision: Precision) -> float:
        """Its time on the roofline."""
        return hardware.seconds(self.flops, self.bytes_moved(precision), precision)


def decoder_block(
    shape: DecoderShape, *, queries: int, keys: int, batch: int, fused: bool, experts: Experts | None = None
) -> list[Operator]:
    """One block on `queries` new tokens that attend to `keys` tokens; `fused` attention stores no map.

    Args:
        experts: those of this block; None where it has one feed-forward network.
    """
    attention, cached = shape.attention_width, shape.cached_width
    tokens = queries * batch
    asked = cached if queries > 1 else attention
    return [
        Operator(7 * tokens * shape.width, read=tokens * shape.width, written=tokens * shape.width, launches=_RMS_NORM),
        linear(shape.width, attention, tokens),
        *(linear(shape.width, cached, tokens, cache=True) for _ in range(shape.own_keys + shape.own_values)),
        Operator(0, launches=_ROTARY + 2),  # LLM-Viewer counts neither rotary positions nor growing the cache
        *_attention(
            queries, keys, batch, heads=shape.heads, width=attention, kept=cached, asked=asked, fused=fused, cache=True
        ),
        linear(attention, shape.width, tokens),
        _add(tokens, shape.width),
        Operator(7 * tokens * shape.width, read=tokens * shape.width, written=tokens * shape.width, launches=_RMS_NORM),
        *(
            _feed_forward(shape.width, shape.ffn, shape.gated, tokens)
            if experts is None
            else _routed(shape.width, experts, tokens)
        ),
        _add(tokens, shape.width),
        *(linear(inner, outer, tokens) for inner, outer in shape.beside),
    ]


def tower_block(shape: TowerShape, *, tokens: int, keys: int, batch: int, fused: bool) -> list[Operator]:
    """One block of the encoder by the rules of the decoder's, without a cache."""
    rows, width = tokens * batch, shape.width
    norm = Operator(7 * rows * width, read=rows * width, written=rows * width, launches=_RMS_NORM if shape.gated else 1)
    return [
        norm,
        *(linear(width, width, rows) for _ in range(3)),
        *_attention(tokens, keys, batch, heads=shape.heads, width=width, kept=width, asked=width, fused=fused),
        linear(width, width, rows),
        _add(rows, width),
        norm,
        *_feed_forward(width, shape.ffn, shape.gated, rows),
        _add(rows, width),
    ]


def output_head(shape: DecoderShape, *, batch: int) -> list[Operator]:
    """The last token's logits, and what happens once around the blocks: embedding, positions, the last norm."""
    around = 22 - 1
    return [
        Operator(0, launches=around),
        Operator(
            batch * shape.head_weights,
            weights=shape.head_weights,
            read=batch * shape.width,
            written=batch * shape.vocabulary,
        ),
    ]


def patch_embedding(shape: TowerShape, *, patches: int, batch: int) -> list[Operator]:
    """The convolution that makes tokens of pixels, and what happens once around the blocks."""
    convolution = linear(shape.patch_weights // shape.width, shape.width, patches * batch)
    return [convolution, Operator(0, launches=8 - 1)]


def projection(shape: ProjectorShape, *, tokens: int, batch: int) -> list[Operator]:
    """The projector's linear maps on `tokens` tokens."""
    return [linear(inner, outer, tokens * batch) for inner, outer in shape.linears]


def linear(inner: int, outer: int, tokens: int, *, cache: bool = False) -> Operator:
    """A matrix on `tokens` rows; with `cache` its output goes to the cache."""
    made = {"cache_written" if cache else "written": outer * tokens}
    return Operator(2 * inner * outer * tokens, weights=inner * outer, read=inner * tokens, **made)


def _attention(
    queries: int,
    keys: int,
    batch: int,
    *,
    heads: int,
    width: int,
    kept: int,
    asked: int,
    fused: bool,
    cache: bool = False,
) -> list[Operator]:
    """Scores, softmax and weighted values over all pairs, no half taken off for causality."""
    product, pairs = 2 * queries * keys * width * batch, heads * queries * keys * batch
    source = "cache_read" if cache else "read"
    held = keys * kept * batch
    if fused:
        read = {"read": queries * width * batch, "cache_read": 0}
        read[source] += 2 * held
        return [Operator(2 * product + 5 * pairs, written=queries * width * batch, **read)]
    read = {"read": queries * asked * batch, "cache_read": 0}
    read[source] += held
    weighed = {"read": pairs, "cache_read": 0}
    weighed[source] += held
    return [
        Operator(product, written=pairs, **read),
        Operator(5 * pairs, read=pairs, written=pairs),
        Operator(product, written=queries * width * batch, **weighed),
    ]


def _feed_forward(width: int, ffn: int, gated: bool, tokens: int) -> Iterable[Operator]:
    """Gate, up and down, or up and down."""
    for _ in range(2 if gated else 1):
        yield linear(width, ffn, tokens)
    rows = tokens * width
    yield Operator(2 * rows, read=2 * rows, written=rows, launches=2 if gated else 3)
    yield linear(ffn, width, tokens)


def _routed(width: int, experts: Experts, tokens: int) -> Iterable[Operator]:
    """A router, the experts that it picks, and what every token passes beside them.

    Of the weights of experts, as many are read as tokens can reach: a batch reaches all of them, one token its own.
    """
    yield linear(width, experts.count, tokens)
    yield Operator(0, launches=_ROUTING)  # sorting tokens by their experts is not counted
    passed, reached = tokens * experts.chosen, min(experts.count, tokens * experts.chosen)
    for part in _feed_forward(width, experts.width, True, passed):
        yield dataclasses.replace(part, weights=part.weights * reached)
    if experts.shared:
        yield from _feed_forward(width, experts.shared, True, tokens)
        yield _add(tokens, width)


def _add(tokens: int, width: int) -> Operator:
    return Operator(tokens * width, read=tokens * width, written=tokens * width)
