"""Methods that choose inside the encoder, and the same encoder run by hand, block by block, one picture at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy
import torch
from models.conversations import generate
from models.doubles import Answer
from models.untouched import untouched
from torch import Tensor

import foveate
from foveate.core import Grid, Method, Selection, Signals, Site
from foveate.trace import Call, ImageRecord

ATTENTION = ("sdpa", "eager")
READ = 2  # the block behind which the tiny models' projectors read, of 0..3
ROWS = ("3i4", "2i1i5", "6", "i1")


def strongest(hidden: Tensor, index: Tensor, count: int) -> Tensor:
    """(K, E), (K,): the original indices of the longest rows, ascending."""
    return index[hidden.double().norm(dim=-1).topk(count).indices.sort().values]


@dataclass(frozen=True)
class Cut(Method):
    """Cut: keeps the patches with the longest hidden states behind the block before each stage."""

    site: ClassVar[Site] = "tower"

    layers: tuple[int, ...] = (1,)
    keep: tuple[int, ...] = (9,)

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(f"tower.{layer - 1}.hidden" for layer in self.layers)

    def depths(self, layers: int) -> tuple[int, ...]:
        return self.layers

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return self.keep

    def select(self, signals: Signals) -> Selection:
        count = self.keep[signals.stage]
        pairs = zip(self._hidden(signals), signals.index, strict=True)
        kept = [strongest(rows, index, count) for rows, index in pairs]
        return Selection(kept)

    def _hidden(self, signals: Signals) -> Tensor:
        hidden = signals.tower[self.layers[signals.stage] - 1].hidden
        assert hidden is not None
        return hidden


@dataclass(frozen=True)
class RaggedCut(Cut):
    """RaggedCut: keeps those above the average, with a factor; a low factor keeps all of some pictures."""

    adaptive: ClassVar[bool] = True

    factor: float = 1.0

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return None

    def select(self, signals: Signals) -> Selection:
        kept = []
        for rows, index in zip(self._hidden(signals), signals.index, strict=True):
            length = rows.double().norm(dim=-1)
            kept.append(index[length > self.factor * length.mean()])
        return Selection(kept)


@dataclass(frozen=True)
class Merging(Cut):
    """Merging: each kept patch becomes the mean of itself and the patch before it."""

    def select(self, signals: Signals) -> Selection:
        kept, features = [], []
        for rows, index in zip(self._hidden(signals), signals.index, strict=True):
            mine = strongest(rows, index, self.keep[signals.stage])
            places = torch.searchsorted(index, mine)
            kept.append(mine)
            features.append((rows[places] + rows[(places - 1).clamp(min=0)]) / 2)
        return Selection(kept, features=features, space="projected")


@dataclass(frozen=True)
class All(Cut):
    """All: keeps everything."""

    def select(self, signals: Signals) -> Selection:
        return Selection(list(signals.index))


@dataclass(eq=False)
class Seen:
    """One picture through the encoder."""

    read: Tensor  # (K, E) what the projector reads
    inputs: list[Tensor]  # of each block (CLS + K, E)
    index: Tensor  # (K,)
    last: Tensor  # (N, E) each patch's last hidden state


Leave = Sequence[tuple[int, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]]


@torch.no_grad()
def by_hand(model: Any, pixels: Tensor, stages: Leave) -> Seen:
    """One picture (1, 3, height, width), block by block.

    Args:
        stages: (blocks that run before it, (hidden (K, E), index (K,)) -> (original indices, rows that go on)).
    """
    tower = model.model.vision_tower
    hidden = tower.embeddings(pixels)
    cls = int(hasattr(tower, "pre_layrnorm"))
    if cls:
        hidden = tower.pre_layrnorm(hidden)
    index = torch.arange(hidden.shape[1] - cls)
    last = hidden[0, cls:].clone()
    inputs = []
    for number, block in enumerate(tower.encoder.layers[: READ + 1]):
        for depth, act in stages:
            if depth == number:
                index, rows = act(hidden[0, cls:], index)
                hidden = torch.cat([hidden[:, :cls], rows[None]], dim=1)
        inputs.append(hidden[0])
        hidden = block(hidden, None)
        last[index] = hidden[0, cls:]
    return Seen(hidden[0, cls:], inputs, index, last)


def keeping(wanted: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A stage that keeps original indices (K,)."""

    def act(hidden: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.stack([(index == one).nonzero().squeeze() for one in wanted])
        return wanted, hidden[places]

    return act


def of_record(model: Any, image: ImageRecord, pixels: Tensor, depths: Sequence[int]) -> Seen:
    """A picture by hand with the choices that the trace says were made."""
    inside = [stage for stage in image.stages if stage.site == "tower"]
    assert len(inside) == len(depths)
    stages = [(depth, keeping(stage.kept)) for depth, stage in zip(depths, inside, strict=True)]
    return by_hand(model, pixels[None], stages)


def features_of(model: Any, given: dict[str, Tensor], methods: Any) -> tuple[list[Tensor], Call]:
    """(K, D) of each picture as the decoder gets them, and the call."""
    got: list[Tensor] = []

    def note(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        got.extend(options["mm_encoder_outputs"]["image"].pooler_output)

    hook = model.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with untouched(model), foveate.prune(model, methods) as trace, torch.no_grad():
            model(**given)
    finally:
        hook.remove()
    return got, trace.latest


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


METHODS: dict[str, tuple[Method, tuple[int, ...]]] = {
    "fixed": (Cut(layers=(1,), keep=(9,)), (1,)),
    "as late as can be": (Cut(layers=(READ,), keep=(5,)), (READ,)),
    "two stages": (Cut(layers=(1, 2), keep=(20, 7)), (1, 2)),
    "two stages at one depth": (Cut(layers=(2, 2), keep=(20, 7)), (2, 2)),
    "ragged": (RaggedCut(layers=(1,)), (1,)),
    "ragged, two stages": (RaggedCut(layers=(1, 2), factor=0.95), (1, 2)),
    "all of some": (RaggedCut(layers=(1, 2), factor=0.75), (1, 2)),
}


@dataclass(frozen=True)
class Inside(Answer):
    """Inside: a test's own choice behind the first encoder block."""

    site: ClassVar[Site] = "tower"

    at: tuple[int, ...] = (1,)

    def depths(self, layers: int) -> tuple[int, ...]:
        return self.at


def attention_of(model: Any, seen: Seen, number: int) -> numpy.ndarray[Any, Any]:
    """(H, CLS + K, CLS + K) by an own softmax in float64."""
    block = model.model.vision_tower.encoder.layers[number]
    normed = block.layer_norm1(seen.inputs[number])
    heads = block.self_attn.num_heads

    def split(projection: Any) -> numpy.ndarray[Any, Any]:
        return projection(normed).detach().double().unflatten(-1, (heads, -1)).transpose(0, 1).numpy()

    queries, keys = split(block.self_attn.q_proj), split(block.self_attn.k_proj)
    logits = queries @ keys.transpose(0, 2, 1) / numpy.sqrt(queries.shape[-1])
    weights = numpy.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def answered(model: Any, given: dict[str, Tensor], methods: Any, **options: Any) -> tuple[Any, Call]:
    with untouched(model), foveate.prune(model, methods) as trace:
        out = generate(model, given, **options)
    return out, trace.latest
