"""Pruning inside the encoder against encoders run by hand, block by block, one picture at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from models import tiny
from models.conversations import STEPS, generate
from models.untouched import untouched
from references import reference
from references.encoder_by_hand import (
    ATTENTION,
    METHODS,
    READ,
    ROWS,
    All,
    Cut,
    Inside,
    Merging,
    RaggedCut,
    by_hand,
    close,
    features_of,
    keeping,
    strongest,
)
from torch import Tensor

import foveate
from foveate import FoPru, ImageTextInteraction, cost
from foveate.core import Method, Selection, Signals
from foveate.trace import Call

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
