"""What memory holds while LVPruning's modules are trained behind a frozen decoder: weights, gradients, activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.core import FoveateError
from foveate.families.shapes import DecoderShape, ModelShape

_MODULE_HEADS = 8
_MODULE_BLOCKS = 2


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one process; a shard of what several processes share is counted whole.

    Attributes:
        weights: of the frozen model.
        modules: of the trained modules: weights, gradients and AdamW's two averages in 32 bits, and the copy that is
            computed with where that has 16.
        kept: of one row, what the backward pass needs of the forward pass.
        passing: of one row, what the widest moment of the backward pass holds besides.
    """

    weights: int
    modules: int
    kept: int
    passing: int

    def total(self, rows: int) -> int:
        """Bytes held at the widest moment with so many rows at once."""
        return self.weights + self.modules + rows * (self.kept + self.passing)

    def rows(self, memory: float) -> int:
        """The most rows at once that so many bytes hold; 0 where not one fits."""
        return max(0, math.floor((memory - self.weights - self.modules) / (self.kept + self.passing)))


def training_memory(
    model: ModelShape,
    *,
    layers: Sequence[int],
    visual: int,
    text: int,
    stored: int = 2,
    computed: int = 2,
    learned: int = 2,
    checkpointing: bool = False,
) -> TrainingMemory:
    """The memory that training LVPruning's modules takes, attention being fused.

    Nothing of a frozen matrix's input is kept, since it has no gradient: of a block stay its norms' inputs in 32 bits,
    queries, keys, values and the result of attention, the inner values of its feed-forward network, and its soft mask.
    Blocks before the first module keep nothing.

    Args:
        layers: decoder blocks that run before each module.
        visual, text: tokens of the longest row; every text token is taken for one whose prediction is learned.
        stored: bytes of a number of the frozen model and of its stream.
        computed: bytes of a number that its matrices multiply.
        learned: bytes of a number that those of the modules multiply.
        checkpointing: blocks are recomputed in the backward pass, and keep what enters them alone.

    Raises:
        FoveateError: no tokens, or no such block.
    """
    decoder, length = model.decoder, visual + text
    if min(visual, text) < 1:
        raise FoveateError(
            f"a row of {visual} visual tokens and {text} others cannot be trained on; each is at least 1"
        )
    if not layers or not 1 <= min(layers) <= max(layers) < decoder.layers:
        raise FoveateError(f"layers={tuple(layers)} are not all in 1..{decoder.layers - 1}")
    learning = range(min(layers), decoder.layers)
    each = [_block(decoder, block, length, stored, computed) for block in learning]
    mask = length**2 * computed
    entering = length * decoder.width * stored
    blocks = len(each) * (entering + mask) if checkpointing else sum(each) + len(each) * mask
    modules = len(layers) * _MODULE_BLOCKS * _module(decoder.width, visual, text, learned)
    # A frozen matrix in 32 bits is turned into 16 anew in each block, and kept until its gradient has passed.
    copies = 0 if stored == computed else decoder.weights * computed
    copies = copies // decoder.layers if checkpointing else copies
    return TrainingMemory(
        weights=model.weights * stored + copies,
        modules=len(layers) * _module_weights(decoder.width) * (16 + _copied(learned)),
        kept=blocks + modules,
        passing=_passing(decoder, length, text, stored, computed, max(each) if checkpointing else 0),
    )


def _block(decoder: DecoderShape, number: int, length: int, stored: int, computed: int) -> int:
    """Bytes that 0-based block `number` keeps of a row."""
    block, experts = decoder.each[number], decoder.experts_of(number)
    inner = (3 if block.gated else 1) * block.ffn
    if experts is not None:
        inner = 3 * (experts.chosen * experts.width + experts.shared)
    # Keys and values are repeated for every query head, since a mask comes along.
    attention = 4 * block.attention_width
    return length * (2 * 4 * block.width + computed * (attention + inner) + 4 * block.heads)


def _passing(decoder: DecoderShape, length: int, answered: int, stored: int, computed: int, again: int) -> int:
    """The wider of two moments: the loss (logits, twice in 32 bits, and their gradient), and the backward pass of a
    block (what it recomputes, the gradient of its attention's mask in every head, those of its inner values)."""
    loss = answered * decoder.vocabulary * (computed + 3 * 4)
    masks = 4 * 4 * length**2  # what the soft mask is made of, and its gradient, in 32 bits
    heads = max(block.heads for block in decoder.each) * length**2 * computed
    wide = length * (3 * stored * decoder.width + computed * 3 * max(block.ffn for block in decoder.each))
    return masks + max(loss, again + max(heads, wide))


def _copied(computed: int) -> int:
    """Bytes of the copy of a 32-bit number that is computed with; none where it is computed with itself."""
    return 0 if computed == 4 else computed


def _module_weights(width: int) -> int:
    """Weights of one decision module: query, key, value, output, D -> 2D -> D with norms, and two scores."""
    return _MODULE_BLOCKS * (8 * width**2 + 7 * width) + 2 * width + 2


def _module(width: int, visual: int, text: int, computed: int) -> int:
    """Bytes that one block of a module keeps of a row: inputs of its matrices, its own attention, unfused."""
    attention = _MODULE_HEADS * text * (4 + _copied(computed))  # the probabilities, in 32 bits and as they are used
    return visual * (computed * 21 * width // 2 + attention) + text * computed * 5 * width // 2
