"""Pruning inside the encoder against encoders run by hand, block by block, one picture at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy
import pytest
import torch
from models import tiny
from models.conversations import STEPS, Turn, continued, generate, rows_of, sizes, worst
from models.doubles import Answer
from models.untouched import untouched
from references import reference
from torch import Tensor

import foveate
from foveate import H2O, FastV, FoPru, FoveateError, ImageTextInteraction, Random, cost, families
from foveate.core import Grid, Method, Selection, Signals, Site
from foveate.runtime.seams import CACHE
from foveate.trace import Call, ImageRecord

ATTENTION = ("sdpa", "eager")
READ = 2  # the block behind which the tiny models' projectors read, of 0..3
ROWS = ("3i4", "2i1i5", "6", "i1")


# ---------------------------------------------------------------------------------------------------------------------
# methods for tests


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


# ---------------------------------------------------------------------------------------------------------------------
# the encoder by hand


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


@pytest.fixture
def encoder_by_hand(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the references read pictures that an encoder run by hand has encoded with the traced choices."""
    stock = reference.encode
    known: dict[bytes, tuple[ImageRecord, Sequence[int]]] = {}

    def encode(model: Any, pixel_values: Tensor | None) -> list[Tensor]:
        found = stock(model, pixel_values)
        for number, full in enumerate(found):
            assert pixel_values is not None
            image, depths = known[pixel_values[number].numpy().tobytes()]
            seen = of_record(model, image, pixel_values[number], depths)
            found[number] = torch.full_like(full, 1e3).index_copy(0, seen.index, seen.read)
        return found

    def learn(given: dict[str, Tensor], call: Call, *depths: int) -> None:
        for image, pixels in zip(call.images, given["pixel_values"], strict=True):
            known[pixels.numpy().tobytes()] = (image, depths)

    monkeypatch.setattr(reference, "encode", encode)
    return learn


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


# ---------------------------------------------------------------------------------------------------------------------
# features


@pytest.mark.parametrize("attn", ATTENTION)
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_keeping_everything_changes_no_bit(tower: str, attn: str) -> None:
    model = tiny.model(tower=tower, attn=attn)
    given = tiny.inputs(model, *ROWS)
    with torch.no_grad():
        plain = model.get_image_features(given["pixel_values"]).pooler_output
        answer = model(**given).logits
    methods: list[Method] = [All(layers=(1,))]
    if tower == "clip":
        methods.append(ImageTextInteraction(keep=1.0, where=2, visual_only=True))
    for method in methods:
        got, call = features_of(model, given, method)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, plain, strict=True))
        assert [image.after for image in call.images] == [36] * 4
        with foveate.prune(model, method), torch.no_grad():
            assert torch.equal(model(**given).logits, answer)


METHODS: dict[str, tuple[Method, tuple[int, ...]]] = {
    "fixed": (Cut(layers=(1,), keep=(9,)), (1,)),
    "as late as can be": (Cut(layers=(READ,), keep=(5,)), (READ,)),
    "two stages": (Cut(layers=(1, 2), keep=(20, 7)), (1, 2)),
    "two stages at one depth": (Cut(layers=(2, 2), keep=(20, 7)), (2, 2)),
    "ragged": (RaggedCut(layers=(1,)), (1,)),
    "ragged, two stages": (RaggedCut(layers=(1, 2), factor=0.95), (1, 2)),
    "all of some": (RaggedCut(layers=(1, 2), factor=0.75), (1, 2)),
}


@pytest.mark.parametrize(
    ("name", "attn"), [*((name, "sdpa") for name in METHODS), ("ragged, two stages", "eager"), ("all of some", "eager")]
)
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_a_pruned_encoder_equals_two_parts_by_hand(name: str, tower: str, attn: str) -> None:
    """The choice itself is made by hand as well; a batch of ragged pictures equals each picture alone."""
    method, depths = METHODS[name]
    assert isinstance(method, Cut)
    model = tiny.model(tower=tower, attn=attn)
    given = tiny.inputs(model, *ROWS)
    got, call = features_of(model, given, method)

    def act(stage: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def leave(hidden: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            if isinstance(method, RaggedCut):
                length = hidden.double().norm(dim=-1)
                wanted = index[length > method.factor * length.mean()]
            else:
                wanted = strongest(hidden, index, method.keep[stage])
            return keeping(wanted)(hidden, index)

        return leave

    stages = [(depth, act(stage)) for stage, depth in enumerate(depths)]
    for image, features, pixels in zip(call.images, got, given["pixel_values"], strict=True):
        seen = by_hand(model, pixels[None], stages)
        assert torch.equal(image.kept, seen.index)
        assert image.after < 36 or name == "all of some"
        close(features, reference.project(model, seen.read))
        plain = reference.project(model, reference.encode(model, pixels[None])[0])[image.kept]
        if image.after < 36:
            assert (features - plain).abs().max() > 1e-2, "what left is missed"
    counts = {image.after for image in call.images}
    assert (len(counts) > 1) == isinstance(method, RaggedCut)
    for row in range(4):
        if (given["input_ids"][row] == tiny.IMAGE).any():
            alone = tiny.alone(given, row, tiny.IMAGE)
            single, _ = features_of(model, alone, method)
            mine = [number for number, image in enumerate(call.images) if image.row == row]
            for number, features in zip(mine, single, strict=True):
                close(got[number], features)


def test_some_picture_keeps_all_while_another_does_not() -> None:
    """The case in which padding ends where the plain encoder would."""
    model = tiny.model()
    call = features_of(model, tiny.inputs(model, *ROWS), METHODS["all of some"][0])[1]
    counts = [image.after for image in call.images]
    assert max(counts) == 36 > min(counts)


@pytest.mark.parametrize("attn", ATTENTION)
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_padding_never_leaks(tower: str, attn: str) -> None:
    """Padded places are filled with what would spoil every sum: nothing may come of it."""
    model = tiny.model(tower=tower, attn=attn)
    given = tiny.inputs(model, *ROWS)
    method = RaggedCut(layers=(1,))
    clean, call = features_of(model, given, method)
    counts = [image.after for image in call.images]

    def spoil(block: Any, arguments: tuple[Any, ...]) -> Any:
        hidden = arguments[0].clone()
        for row, count in enumerate(counts):
            hidden[row, hidden.shape[1] - (max(counts) - count) :] = 1e4
        return (hidden, *arguments[1:])

    with foveate.prune(model, method) as trace, torch.no_grad():
        hook = model.model.vision_tower.encoder.layers[1].register_forward_pre_hook(spoil)
        got: list[Tensor] = []
        listen = model.model.register_forward_pre_hook(
            lambda *all_: got.extend(all_[2]["mm_encoder_outputs"]["image"].pooler_output), with_kwargs=True
        )
        model(**given)
        hook.remove()
        listen.remove()
    assert [image.after for image in trace.images] == counts
    for mine, theirs in zip(got, clean, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("layers", [(1,), (1, 2)])
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_merged_tokens_run_on_in_the_blocks_own_stream(layers: tuple[int, ...], tower: str) -> None:
    model = tiny.model(tower=tower)
    given = tiny.inputs(model, *ROWS)
    method = Merging(layers=layers, keep=(14, 6))
    got, call = features_of(model, given, method)

    def act(stage: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def merge(hidden: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            wanted = strongest(hidden, index, method.keep[stage])
            places = [index.tolist().index(one) for one in wanted.tolist()]
            return wanted, torch.stack([(hidden[place] + hidden[max(0, place - 1)]) / 2 for place in places])

        return merge

    stages = [(depth, act(stage)) for stage, depth in enumerate(layers)]
    for image, features, pixels in zip(call.images, got, given["pixel_values"], strict=True):
        seen = by_hand(model, pixels[None], stages)
        assert torch.equal(image.kept, seen.index)
        close(features, reference.project(model, seen.read))


def test_another_order_goes_on_in_that_order() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    order = torch.tensor([30, 2, 17, 5])
    got, call = features_of(
        model, given, Inside(answer=lambda signals: Selection([order] * signals.shape[0], ordered=False))
    )
    assert torch.equal(call.images[0].kept, order)
    seen = by_hand(model, given["pixel_values"], [(1, keeping(order))])
    close(got[0], reference.project(model, seen.read))


@dataclass(frozen=True)
class Inside(Answer):
    """Inside: a test's own choice behind the first encoder block."""

    site: ClassVar[Site] = "tower"

    at: tuple[int, ...] = (1,)

    def depths(self, layers: int) -> tuple[int, ...]:
        return self.at


def test_memory_is_carried_between_the_stages_of_one_part_only() -> None:
    model = tiny.model()
    seen: list[tuple[str, int, dict[str, Any]]] = []

    def remembering(name: str) -> Callable[[Signals], Selection]:
        def answer(signals: Signals) -> Selection:
            seen.append((name, signals.stage, dict(signals.memory)))
            signals.memory[name] = signals.stage
            return Selection([row[:-1] for row in signals.index])

        return answer

    methods = [Inside(answer=remembering("a"), at=(1, 2)), Inside(answer=remembering("b"), at=(1, 2))]
    with foveate.prune(model, methods), torch.no_grad():
        model(**tiny.inputs(model, "3i4"))
        model(**tiny.inputs(model, "3i4"))
    once = [("a", 0, {}), ("b", 0, {}), ("a", 1, {"a": 0}), ("b", 1, {"b": 0})]
    assert seen == once * 2


# ---------------------------------------------------------------------------------------------------------------------
# what later stages see


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


FIELDS = ("hidden", "received", "given", "received_all", "keys")
OF_CLS = ("cls", "cls_attention", "key_cls", "query_cls")


@pytest.mark.parametrize(
    ("name", "attn"),
    [
        ("fixed", "sdpa"),
        ("two stages", "sdpa"),
        ("ragged", "sdpa"),
        ("ragged, two stages", "eager"),
        ("all of some", "sdpa"),
    ],
)
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_signals_are_those_of_an_explicit_softmax_over_what_is_left(name: str, tower: str, attn: str) -> None:
    method, depths = METHODS[name]
    model = tiny.model(tower=tower, attn=attn)
    cls = int(tower == "clip")
    given = tiny.inputs(model, *ROWS)
    caught: list[Signals] = []

    def answer(signals: Signals) -> Selection:
        caught.append(signals)
        return Selection(list(signals.index))

    fields = FIELDS + (OF_CLS if cls else ())
    wants = tuple(f"tower.{block}.{field}" for block in ("0", "1", "read") for field in fields)
    with (
        untouched(model),
        foveate.prune(model, [method, Answer(answer=answer, wants=wants)]) as trace,
        torch.no_grad(),
    ):
        model(**given)
    rows = {
        tuple(signals.index[place].tolist()): (signals, place)
        for signals in caught
        for place in range(signals.shape[0])
    }
    assert len(rows) == 4, "every picture kept something else"
    for image, pixels in zip(trace.images, given["pixel_values"], strict=True):
        seen = of_record(model, image, pixels, depths)
        signals, place = rows[tuple(image.kept.tolist())]
        index = torch.arange(36)  # on which a block ran
        for number in range(READ + 1):
            for depth, stage in zip(depths, image.stages, strict=False):
                index = stage.kept if depth == number else index
            where = [index.tolist().index(one) for one in image.kept.tolist()]
            shown = signals.tower["read" if number == READ else number]
            for field, value in expected_block(model, seen, number, where).items():
                close(getattr(shown, field)[place].double(), torch.as_tensor(value).double())


@torch.no_grad()
def expected_block(model: Any, seen: Seen, number: int, where: list[int]) -> dict[str, Any]:
    """Fields of one picture's block at some of the places that it ran on."""
    weights = attention_of(model, seen, number)
    cls = int(hasattr(model.model.vision_tower, "pre_layrnorm"))
    block = model.model.vision_tower.encoder.layers[number]
    output = block(seen.inputs[number][None], None)[0]
    keys = block.self_attn.k_proj(block.layer_norm1(seen.inputs[number])).unflatten(-1, (4, 8)).transpose(0, 1)
    patches = weights[:, cls:, cls:].mean(axis=0)
    found: dict[str, Any] = {
        "received": patches.mean(axis=0)[where],
        "given": patches.mean(axis=1)[where],
        "received_all": weights[:, :, cls:].mean(axis=(0, 1))[where],
        "hidden": output[cls:][where],
        "keys": keys[:, cls:][:, where],
    }
    if cls:
        found |= {"cls_attention": weights[:, 0, 1:][:, where], "cls": output[0], "key_cls": keys[:, 0]}
    return found


@pytest.mark.parametrize("name", ["fixed", "ragged", "all of some"])
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_fopru_ranks_what_is_left_by_its_attention(name: str, tower: str) -> None:
    method, depths = METHODS[name]
    model = tiny.model(tower=tower)
    cls = int(tower == "clip")
    given = tiny.inputs(model, *ROWS)
    _, call = features_of(model, given, [method, FoPru(keep=4)])
    for image, pixels in zip(call.images, given["pixel_values"], strict=True):
        seen = of_record(model, image, pixels, depths)
        patches = attention_of(model, seen, READ)[:, cls:, cls:].mean(axis=0)
        sums = [patches.mean(axis=1), patches.mean(axis=0)]
        score = max(sums, key=lambda vector: vector.var(ddof=1))
        best = sorted(seen.index[numpy.argsort(-score)[:4].copy()].tolist())
        assert image.kept.tolist() == best


# ---------------------------------------------------------------------------------------------------------------------
# answers


def answered(model: Any, given: dict[str, Tensor], methods: Any, **options: Any) -> tuple[Any, Call]:
    with untouched(model), foveate.prune(model, methods) as trace:
        out = generate(model, given, **options)
    return out, trace.latest


COMPOSED: dict[str, tuple[list[Method], tuple[int, ...], tuple[str, ...]]] = {
    "tower": ([RaggedCut(layers=(1,))], (1,), tiny.TOWERS),
    "tower, fopru": ([RaggedCut(layers=(1,), factor=0.9), FoPru(keep=10)], (1,), tiny.TOWERS),
    "tower, fopru, fastv, h2o": (
        [RaggedCut(layers=(1, 2), factor=0.8), FoPru(keep=10), FastV(layer=1, keep=6), H2O(0.3, 0.3)],
        (1, 2),
        tiny.TOWERS,
    ),
    "interaction": ([ImageTextInteraction(where=2)], (2,), ("clip",)),
    "interaction in the prompt": ([ImageTextInteraction(where=1, heavy=0.2, recent=0.3)], (1,), ("clip",)),
    "interaction, alpha": ([ImageTextInteraction(alpha=0.5, where=1)], (1,), ("clip",)),
    "interaction, fixed": ([ImageTextInteraction(keep=0.25, where=1)], (1,), ("clip",)),
    "interaction, entries": ([ImageTextInteraction(where=1, heavy=6, recent=5)], (1,), ("clip",)),
    "interaction, visual only": ([ImageTextInteraction(where=2, visual_only=True)], (2,), ("clip",)),
    "interaction, output": ([ImageTextInteraction(where="output")], (), ("clip",)),
    "interaction, fastv": (
        [ImageTextInteraction(where=1, heavy=0.3, recent=0.3), FastV(layer=2, keep=3)], (1,), ("clip",),
    ),
}  # fmt: skip
CASES = [(name, tower, "sdpa") for name, (_, _, towers) in COMPOSED.items() for tower in towers]
CASES += [(name, "clip", "eager") for name in ("tower, fopru, fastv, h2o", "interaction in the prompt")]


@pytest.mark.parametrize(("name", "tower", "attn"), CASES)
def test_answers_of_a_padded_batch_equal_the_reference(name: str, tower: str, attn: str, encoder_by_hand: Any) -> None:
    methods, depths, _ = COMPOSED[name]
    model = tiny.model(tower=tower, attn=attn)
    given = tiny.inputs(model, *ROWS)
    out, call = answered(model, given, methods)
    encoder_by_hand(given, call, *depths)
    turn = Turn(given, out.sequences[:, -STEPS:], call)
    assert worst(out, rows_of([turn], model, methods)) < 1e-4
    if attn == "eager":
        assert worst(out, rows_of([turn], model, methods, renumber=True)) > 0.1
    if name in {"tower", "interaction", "interaction in the prompt"}:
        assert len({image.after for image in call.images}) > 1


@pytest.mark.parametrize("name", ["interaction in the prompt", "tower, fopru, fastv, h2o"])
def test_beams_equal_the_row_alone(name: str) -> None:
    methods, _, _ = COMPOSED[name]
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    beams: dict[str, Any] = dict(num_beams=3, num_return_sequences=2, output_scores=True)
    out, _ = answered(model, given, methods, **beams)
    for row in range(4):
        if row == 2:
            continue  # a prompt without picture is refused alone
        alone, _ = answered(model, tiny.alone(given, row, tiny.IMAGE), methods, **beams)
        mine = slice(2 * row, 2 * row + 2)
        assert torch.equal(out.sequences[mine, -STEPS:], alone.sequences[:, -STEPS:])
        close(out.sequences_scores[mine], alone.sequences_scores, 1e-4)


@pytest.mark.parametrize("name", ["interaction", "interaction in the prompt", "tower, fopru"])
@pytest.mark.parametrize("second", [("5", "3"), ("2i3", "i2")])
def test_a_second_turn_equals_the_reference(name: str, second: tuple[str, str], encoder_by_hand: Any) -> None:
    methods, depths, _ = COMPOSED[name]
    model = tiny.model()
    first = tiny.inputs(model, "3i4", "2i1i5")
    then = tiny.inputs(model, *second, seed=1)
    with untouched(model), foveate.prune(model, methods) as trace:
        out = generate(model, first)
        call = trace.latest
        given = continued(first, out.sequences, then)
        again = generate(model, given, **{CACHE: getattr(out, CACHE)})
    encoder_by_hand(first, call, *depths)
    turns = [Turn(first, out.sequences[:, -STEPS:], call)]
    later = trace.latest if "i" in second[0] else None
    assert len(trace.history) == (2 if later else 1)
    if later is not None:
        encoder_by_hand(then, later, *depths)
    turns.append(Turn(then, again.sequences[:, -STEPS:], later))
    assert worst(again, rows_of(turns, model, methods)) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# image-text interaction


def similar(seen: Tensor) -> tuple[list[int], int]:
    """(1 + N, E): patches from the most to the least similar to CLS, and where equation 3 splits them."""
    cls, patches = seen[0].double().numpy(), seen[1:].double().numpy()
    logits = patches @ cls / numpy.sqrt(len(cls))
    curve = numpy.exp(logits - logits.max())
    order = numpy.argsort(-curve, kind="stable")
    falling = (curve / curve.sum())[order]
    values = [(len(falling) - i) * (falling[0] - falling[i - 1]) for i in range(1, len(falling))]
    return order.tolist(), 1 + int(numpy.argmax(values))


@pytest.mark.parametrize("alpha", [0.075, 1.0, 2.5])
@pytest.mark.parametrize("where", [1, 2, "output"])
def test_the_head_of_the_similarity_stays(where: Any, alpha: float) -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    method = ImageTextInteraction(alpha=alpha, where=where, visual_only=True)
    got, call = features_of(model, given, method)
    depth = READ + 1 if where == "output" else where
    for image, features, pixels in zip(call.images, got, given["pixel_values"], strict=True):
        plain = by_hand(model, pixels[None], [])
        with torch.no_grad():
            shown = model.model.vision_tower.encoder.layers[depth - 1](plain.inputs[depth - 1][None], None)[0]
        order, split = similar(shown)
        assert image.kept.tolist() == sorted(order[: min(36, max(1, round(alpha * split)))])
        assert image.stages[0].site == ("input" if where == "output" else "tower")
        leave = [] if where == "output" else [(where, keeping(image.kept))]
        seen = by_hand(model, pixels[None], leave)
        close(features, reference.project(model, seen.read if leave else seen.read[image.kept]))


def test_a_fixed_count_is_the_rival_of_table_1() -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    for keep, count in ((7, 7), (0.25, 9), (1.0, 36)):
        _, call = features_of(model, given, ImageTextInteraction(keep=keep, where=1, visual_only=True))
        assert [image.after for image in call.images] == [count] * 4


def test_half_and_half_loses_nothing_in_the_prompt_and_stops_growing_there() -> None:
    """Tables 2 and 4: one-word answers are those of visual pruning alone, long ones have a capped cache."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    visual, _ = answered(model, given, ImageTextInteraction(where=2, visual_only=True))
    out, call = answered(model, given, ImageTextInteraction(where=2))
    prompt = 7 + call.images[0].after
    assert torch.equal(out.logits[0], visual.logits[0])
    assert sizes(getattr(out, CACHE)) == [(1, 2, prompt, 8)] * 4
    assert sizes(getattr(visual, CACHE)) == [(1, 2, prompt + STEPS - 1, 8)] * 4
    assert call.kv_lengths == (prompt,) * 4
    lengths: list[int] = []
    model.model.language_model.register_forward_hook(
        lambda module, arguments, output: lengths.append(getattr(output, CACHE).layers[0].keys.shape[2])
    )
    with foveate.prune(model, ImageTextInteraction(where=2)):
        generate(model, given, max_new_tokens=STEPS)
    assert lengths == [prompt] * STEPS


def test_below_one_in_total_it_prunes_in_the_prompt_too() -> None:
    model = tiny.model()
    out, call = answered(model, tiny.inputs(model, "3i4"), ImageTextInteraction(where=2, heavy=0.25, recent=0.25))
    prompt = 7 + call.images[0].after
    held = 2 * int(prompt * 0.25)
    assert call.kv_lengths == (held,) * 4
    assert sizes(getattr(out, CACHE)) == [(1, 2, held, 8)] * 4


# ---------------------------------------------------------------------------------------------------------------------
# projectors that are not pointwise


@pytest.fixture
def gridded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family as if its projector needed every patch at its place."""
    rows = tuple(dataclasses.replace(family, pointwise=False) for family in families.FAMILIES)
    monkeypatch.setattr(families, "FAMILIES", rows)


@pytest.mark.usefixtures("gridded")
@pytest.mark.parametrize(("tower", "warm"), [("clip", False), ("clip", True), ("siglip", True)])
@pytest.mark.parametrize("name", ["fixed", "two stages at one depth", "ragged, two stages", "all of some"])
def test_put_back_on_the_grid(name: str, tower: str, warm: bool) -> None:
    """The projector sees all patches, those that left with their last hidden state; the decoder gets the kept ones."""
    method, depths = METHODS[name]
    model = tiny.model(tower=tower)
    given = tiny.inputs(model, *ROWS)
    if warm:  # transformers' collector of hidden states is there before pruning begins
        with torch.no_grad():
            model(**given)
    read: list[Tensor] = []
    projector = model.model.multi_modal_projector
    hook = projector.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0]))
    got, call = features_of(model, given, method)
    hook.remove()
    assert [tuple(one.shape) for one in read] == [(4, 36, 32)]
    for number, (image, pixels) in enumerate(zip(call.images, given["pixel_values"], strict=True)):
        seen = of_record(model, image, pixels, depths)
        close(read[0][number], seen.last)
        close(got[number], reference.project(model, seen.last)[image.kept])
        assert image.after < 36 or name == "all of some"


@pytest.mark.usefixtures("gridded")
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", ["ragged", "all of some"])
def test_fopru_behind_a_grid(name: str, warm: bool) -> None:
    method, depths = METHODS[name]
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    if warm:
        with torch.no_grad():
            model(**given)
    got, call = features_of(model, given, [method, FoPru(keep=3)])
    for number, (image, pixels) in enumerate(zip(call.images, given["pixel_values"], strict=True)):
        seen = of_record(model, image, pixels, depths)
        patches = attention_of(model, seen, READ)[:, 1:, 1:].mean(axis=0)
        score = max([patches.mean(axis=1), patches.mean(axis=0)], key=lambda vector: vector.var(ddof=1))
        assert image.kept.tolist() == sorted(seen.index[numpy.argsort(-score)[:3].copy()].tolist())
        close(got[number], reference.project(model, seen.last)[image.kept])


# ---------------------------------------------------------------------------------------------------------------------
# trace


def _expected_flops(model: Any, call: Call, depths: Sequence[int], put_back: bool) -> tuple[int, int]:
    shape = cost.shape(model.config)
    cls = shape.tower.length - shape.tower.tokens
    pruned = plain = 0
    for image in call.images:
        lengths = [36] * 4
        for depth, stage in zip(depths, image.stages, strict=True):
            end = READ + 1 if put_back else 4
            lengths[depth:end] = [stage.after] * (end - depth)
        pruned += cost.tower_flops(shape.tower, convention="roofline", lengths=[length + cls for length in lengths])
        pruned += cost.projector_flops(shape.projector, tokens=36 if put_back else image.after)
        plain += cost.tower_flops(shape.tower, convention="roofline") + cost.projector_flops(shape.projector)
    return pruned, plain


@pytest.mark.parametrize(("tower", "put_back"), [("clip", False), ("siglip", False), ("clip", True)])
@pytest.mark.parametrize("name", ["as late as can be", "two stages at one depth", "ragged, two stages", "all of some"])
def test_the_trace_counts_what_was_computed(name: str, tower: str, put_back: bool, request: Any) -> None:
    if put_back:
        request.getfixturevalue("gridded")
    method, depths = METHODS[name]
    model = tiny.model(tower=tower)
    given = tiny.inputs(model, "3i4", "2i1i5")
    _, call = features_of(model, given, method)
    shape = cost.shape(model.config)
    pruned, plain = _expected_flops(model, call, depths, put_back)
    words, rows = [7, 8], [[0], [1, 2]]
    for row, mine in enumerate(rows):
        left = sum(call.images[number].after for number in mine)
        pruned += cost.decoder_flops(shape.decoder, lengths=[words[row] + left] * 4, convention="roofline")
        plain += cost.decoder_flops(shape.decoder, lengths=[words[row] + 36 * len(mine)] * 4, convention="roofline")
    assert call.budget.prefill_flops == pruned
    assert call.unpruned.prefill_flops == plain
    assert call.budget.tokens == (sum(image.after for image in call.images) / 3,) * 4
    for image in call.images:
        before = 36
        assert len(image.stages) == len(depths)
        for stage in image.stages:
            assert (stage.site, stage.layer, stage.before) == ("tower", None, before)
            assert stage.after == stage.kept.numel()
            before = stage.after
        assert image.original == 36
        assert image.grid == tiny.GRID


def test_hooks_of_others_see_the_short_blocks() -> None:
    """Tokens really leave: the blocks behind the stage run on fewer of them, CLS with them."""
    model = tiny.model()
    shapes: list[tuple[int, ...]] = []
    with foveate.prune(model, Cut(layers=(1,), keep=(9,))), torch.no_grad():
        for layer in model.model.vision_tower.encoder.layers:
            layer.register_forward_pre_hook(lambda module, arguments: shapes.append(tuple(arguments[0].shape)))
        model(**tiny.inputs(model, "3i4", "2i2"))
    assert shapes == [(2, 37, 32), (2, 10, 32), (2, 10, 32), (2, 10, 32)]


# ---------------------------------------------------------------------------------------------------------------------
# around it


@torch.no_grad()
def test_hidden_states_can_still_be_asked_for() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    with foveate.prune(model, Cut(layers=(1,), keep=(9,))):
        out = model(**given, output_hidden_states=True, output_attentions=False)
        answer = generate(model, given, output_hidden_states=True)
    assert [tuple(one.shape) for one in out.hidden_states] == [(1, 43, 32)] * 5
    close(torch.stack(answer.logits, dim=1)[:, 0], out.logits[:, -1], 1e-4)
    assert len(answer.hidden_states) == STEPS


@torch.no_grad()
def test_pictures_encoded_outside_a_call_are_not_shortened() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    plain = model.get_image_features(given["pixel_values"]).pooler_output
    with foveate.prune(model, Cut(layers=(1,), keep=(9,))) as trace:
        assert torch.equal(model.get_image_features(given["pixel_values"]).pooler_output[0], plain[0])
        first = generate(model, given)
        assert torch.equal(model.get_image_features(given["pixel_values"]).pooler_output[0], plain[0])
        again = generate(model, given)
    assert torch.equal(first.sequences, again.sequences)
    assert len(trace.history) == 2
    assert trace.images[0].after == 9


@pytest.mark.parametrize("name", ["ragged", "all of some", "two stages"])
def test_two_encodings_in_one_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that encodes its pictures one by one, as some do to save memory."""
    method, _ = METHODS[name]
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    methods = [method, FoPru(keep=3)]
    together, call = features_of(model, given, methods)
    stock = type(model.model).get_image_features

    def one_by_one(self: Any, pixel_values: Tensor, **options: Any) -> Any:
        found = [stock(self, pixel_values[[number]], **options) for number in range(pixel_values.shape[0])]
        found[0].pooler_output = [one.pooler_output[0] for one in found]
        return found[0]

    monkeypatch.setattr(type(model.model), "get_image_features", one_by_one)
    single, again = features_of(model, given, methods)
    for mine, theirs in zip(again.images, call.images, strict=True):
        assert [stage.kept.tolist() for stage in mine.stages] == [stage.kept.tolist() for stage in theirs.stages]
    for features, expected in zip(single, together, strict=True):
        close(features, expected)
    assert again.budget.prefill_flops == call.budget.prefill_flops


def test_gradients_reach_the_blocks_before_the_stage() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    weight = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight
    with foveate.prune(model, Cut(layers=(1,), keep=(9,))) as trace:
        model(**given, labels=given["input_ids"]).loss.backward()
    found = weight.grad.clone()
    model.zero_grad()
    tower = model.model.vision_tower
    hidden = tower.encoder.layers[0](tower.pre_layrnorm(tower.embeddings(given["pixel_values"])), None)
    kept = trace.images[0].kept
    hidden = torch.cat([hidden[:, :1], hidden[:, 1 + kept]], dim=1)
    for block in tower.encoder.layers[1 : READ + 1]:
        hidden = block(hidden, None)
    features = model.model.multi_modal_projector(hidden[:, 1:])
    ids = given["input_ids"]
    columns = torch.cat([torch.arange(3), 3 + kept, torch.arange(39, 43)])
    embeddings = model.get_input_embeddings()(ids).index_copy(1, 3 + kept, features)[:, columns]
    model(
        inputs_embeds=embeddings, position_ids=columns[None], labels=ids[:, columns],
        attention_mask=torch.ones_like(columns)[None],
    ).loss.backward()  # fmt: skip
    assert found.abs().max() > 1e-4
    close(found, weight.grad)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("where", ["select", "block", "projector"])
def test_an_exception_inside_leaves_nothing_behind(where: str, direct: bool) -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    broken = [True]

    def fail(*_: Any) -> None:
        if broken[0]:
            raise RuntimeError("on purpose")

    def answer(signals: Signals) -> Selection:
        if where == "select":
            fail()
        return Selection([row[: 5 + int(row[0])] for row in signals.index])

    module = {
        "block": model.model.vision_tower.encoder.layers[2],
        "projector": model.model.multi_modal_projector,
        "select": model.model.vision_tower,
    }[where]
    hook = module.register_forward_hook(fail) if where != "select" else None
    methods = [Inside(answer=answer), FoPru(keep=3)]
    with untouched(model), foveate.prune(model, methods) as trace, torch.no_grad():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="on purpose"):
                model(**given) if direct else model.generate(**given, max_new_tokens=2)
        assert trace.history == []
        broken[0] = False
        one = tiny.inputs(model, "3i4")
        assert model.get_image_features(one["pixel_values"]).pooler_output[0].shape == (36, 32)
        model(**one) if direct else model.generate(**one, max_new_tokens=2)
    assert [stage.after for stage in trace.images[0].stages] == [5, 3]
    if hook:
        hook.remove()


def test_stopping_in_the_middle_of_nothing() -> None:
    """Installed twice in a row, each time taken off in full."""
    model = tiny.model()
    handle = foveate.prune(model, ImageTextInteraction(where=2))
    for _ in range(2):
        with untouched(model):
            handle.start()
            model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=2)
            handle.stop()
    assert len(handle.trace.history) == 2


# ---------------------------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize("layer", [-2, 3])
def test_tokens_must_leave_before_the_block_that_is_read(layer: int) -> None:
    model = tiny.model(vision_feature_layer=layer)
    foveate.prune(model, ImageTextInteraction(where=2)).discard()
    with pytest.raises(
        FoveateError,
        match="image_text_interaction:where=3,visual_only=true acts after 3 encoder blocks; tokens must leave after 1 "
        "to 2 of them, before the block that the projector reads",
    ):
        foveate.prune(model, ImageTextInteraction(where=3))
    foveate.prune(tiny.model(vision_feature_layer=-1), ImageTextInteraction(where=3)).discard()
    for where in (4, 9):
        with pytest.raises(FoveateError, match=rf"where={where} is outside 1\.\.3 of an encoder of 4 blocks"):
            foveate.prune(model, ImageTextInteraction(where=where))


def test_a_projector_of_several_blocks_is_refused() -> None:
    model = tiny.model(vision_feature_layer=[-2, -1])
    with pytest.raises(FoveateError, match="a projector that reads several blocks cannot be shortened"):
        foveate.prune(model, ImageTextInteraction(where=1))


def test_an_encoder_without_cls_is_refused() -> None:
    model = tiny.model(tower="siglip")
    with pytest.raises(FoveateError, match=r"needs tower\.2/24\.cls, which llava-1\.5 with siglip_vision_model"):
        foveate.prune(model, ImageTextInteraction())
    with pytest.raises(FoveateError, match=r"needs tower\.read\.cls"):
        foveate.prune(model, ImageTextInteraction(where="output"))


@pytest.mark.parametrize("block", ["1", "read", "last"])
def test_a_stage_cannot_read_a_block_that_has_not_run(block: str) -> None:
    method = Inside(answer=lambda signals: Selection(list(signals.index)), wants=(f"tower.{block}.received",))
    with pytest.raises(
        FoveateError, match=f"reads block {block}, which has not run by then; it can read blocks 0 to 0"
    ):
        foveate.prune(tiny.model(), method)


@pytest.mark.parametrize("need", ["features", "text", "after_image"])
def test_a_stage_inside_sees_neither_text_nor_projected_tokens(need: str) -> None:
    method = Inside(answer=lambda signals: Selection(list(signals.index)), wants=(need,))
    with pytest.raises(FoveateError, match=f"needs {need} inside the encoder, which llava-1.5 with clip_vision_model"):
        foveate.prune(tiny.model(), method)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("method", [Cut(layers=(2,), keep=(9,)), FoPru(keep=9)])
def test_the_block_that_is_read_cannot_change_from_call_to_call(method: Method, direct: bool) -> None:
    """The features of an earlier block are not shortened, and "read" would name the wrong one."""
    model = tiny.model()
    given: dict[str, Any] = {**tiny.inputs(model, "3i4"), "vision_feature_layer": 1}
    with (
        untouched(model),
        foveate.prune(model, method),
        pytest.raises(FoveateError, match=r"vision_feature_layer=1 differs from the configuration's -2.*before prune"),
    ):
        model(**given) if direct else model.generate(**given, max_new_tokens=1)
    with foveate.prune(model, method) as trace:
        model.generate(**{**given, "vision_feature_layer": -2}, max_new_tokens=1)
    assert trace.images[0].after == 9


def test_a_later_stage_that_asks_for_more_than_is_left() -> None:
    model = tiny.model()
    with pytest.raises(FoveateError, match="FoPru asks for 20 tokens but 9 of the image's 36 are left"):
        foveate.prune(model, [Cut(layers=(1,), keep=(9,)), FoPru(keep=20)])
    _, call = features_of(model, tiny.inputs(model, *ROWS), [RaggedCut(layers=(1,)), FoPru(keep=16)])
    for image in call.images:
        assert image.after == min(16, image.stages[0].after)


def test_tokens_for_the_projector_do_not_fit_inside() -> None:
    model = tiny.model()

    def answer(signals: Signals) -> Selection:
        return Selection([row[:2] for row in signals.index], features=[torch.zeros(2, 32)], space="encoded")

    with (
        untouched(model),
        foveate.prune(model, Inside(answer=answer)),
        pytest.raises(FoveateError, match="tokens for the projector where only the block's own stream fits"),
    ):
        model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=1)


def test_a_random_choice_inside_the_answer_is_the_same_for_every_batch() -> None:
    """Two towers' worth of stages and a random one behind: a row in a batch equals the row alone."""
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    methods = [RaggedCut(layers=(1,)), Random(keep=5)]
    _, call = features_of(model, given, methods)
    _, alone = features_of(model, tiny.alone(given, 1, tiny.IMAGE), methods)
    assert [image.kept.tolist() for image in call.images if image.row == 1] == [
        image.kept.tolist() for image in alone.images
    ]


def test_the_reference_can_fail(encoder_by_hand: Any) -> None:
    """The plain encoder's features in place of the pruned one's are told apart."""
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    method = ImageTextInteraction(where=1, visual_only=True)
    out, call = answered(model, given, method)
    turn = Turn(given, out.sequences[:, -STEPS:], call)
    encoder_by_hand(given, call, 1)
    right = worst(out, rows_of([turn], model, [method]))
    encoder_by_hand(given, call, 2)
    assert right < 1e-4 < 0.01 < worst(out, rows_of([turn], model, [method]))
