"""Merging inside the encoder against encoders run by hand, block by block, one picture at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import tiny
from models.untouched import untouched
from references import merging_by_hand, reference
from references.encoder_by_hand import ATTENTION, ROWS, features_of
from references.merging_by_hand import TWO, close, indices, rows
from torch import Tensor

import foveate
from foveate import FoPru, FoveateError, cost
from foveate.core import Method, Selection, Signals
from foveate.families.towers import TOWERS
from foveate.methods.crossget import CrossGET
from foveate.methods.tome import ToMe

READ = 2  # the block behind which the tiny models' projectors read, of 0..3


# ---------------------------------------------------------------------------------------------------------------------
# features


TOME: dict[str, tuple[ToMe, tuple[int, ...]]] = {
    "a quarter": (ToMe(keep=9), (9, 9, 9)),
    "a share": (ToMe(keep=0.25), (9, 9, 9)),
    "more than every second": (ToMe(keep=6), (12, 12, 6)),
    "the least": (ToMe(keep=5), (16, 10, 5)),
    "the last takes the rest": (ToMe(keep=20), (6, 6, 4)),
    "hardly any": (ToMe(keep=34), (1, 1, 0)),
    "r": (ToMe(r=4), (4, 4, 4)),
    "r above half": (ToMe(r=17), (17, 9, 5)),
    "r per block": (ToMe(r=(20, 0, 3)), (18, 0, 3)),
    "r of the first block": (ToMe(r=(5,)), (5, 0, 0)),
    "unweighted": (ToMe(r=6, proportional=False), (6, 6, 6)),
}


@pytest.mark.parametrize(("name", "attn"), [*((name, "sdpa") for name in TOME), ("a quarter", "eager")])
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_tome_equals_the_encoder_by_hand(name: str, tower: str, attn: str) -> None:
    method, rs = TOME[name]
    model = tiny.model(tower=tower, attn=attn)
    given = tiny.inputs(model, *TWO)
    got, call = features_of(model, given, method)
    assert len(got) == 2
    for image, features, pixels in zip(call.images, got, given["pixel_values"], strict=True):
        run = merging_by_hand.tome(model, pixels[None], rs, method.proportional)
        assert image.kept.tolist() == indices(run)
        close(features, reference.project(model, rows(run)))
        assert [(stage.before, stage.after) for stage in image.stages] == [(36, 36 - sum(rs))]
        assert image.extra is None


CROSSGET: dict[str, tuple[CrossGET, tuple[int, ...]]] = {
    "a quarter": (CrossGET(keep=9), (10, 10, 8)),
    "hardly any": (CrossGET(keep=34), (1, 1, 1)),
    "not in the last block": (CrossGET(r=(4, 7)), (4, 7, 0)),
    "as published": (CrossGET(), (13, 11, 6)),
    "unweighted": (CrossGET(r=6, proportional=False), (6, 6, 6)),
}


@pytest.mark.parametrize(("name", "attn"), [*((name, "sdpa") for name in CROSSGET), ("a quarter", "eager")])
def test_crossget_equals_the_encoder_by_hand(name: str, attn: str) -> None:
    method, rs = CROSSGET[name]
    model = tiny.model(attn=attn)
    given = tiny.inputs(model, *TWO)
    got, call = features_of(model, given, method)
    for image, features, pixels in zip(call.images, got, given["pixel_values"], strict=True):
        run = merging_by_hand.crossget(model, pixels[None], rs, proportional=method.proportional)
        assert image.kept.tolist() == indices(run)
        close(features, reference.project(model, rows(run)))
        assert [(stage.before, stage.after) for stage in image.stages] == [(36, 37 - sum(rs))]
        assert image.extra is not None
        assert image.extra.tolist() == [not token.members for token in run.tokens]


def test_learned_cross_tokens(tmp_path: Any) -> None:
    from foveate.modules.crossget import CrossGETConfig, CrossGETTokens, save

    model = tiny.model()
    given = tiny.inputs(model, *TWO)
    tokens = CrossGETTokens(CrossGETConfig(width=32, blocks=4))
    torch.nn.init.normal_(tokens.tokens, std=0.5, generator=torch.Generator().manual_seed(0))
    save(tokens, tmp_path)
    got, call = features_of(model, given, f'crossget:keep=9,from="{tmp_path}"')
    untrained, _ = features_of(model, given, CrossGET(keep=9))
    assert call.images[0].stages[0].method.startswith("crossget:keep=9,")
    for number, pixels in enumerate(given["pixel_values"]):
        run = merging_by_hand.crossget(model, pixels[None], (10, 10, 8), tokens.tokens.detach())
        assert call.images[number].kept.tolist() == indices(run)
        close(got[number], reference.project(model, rows(run)))
        assert (got[number] - untrained[number]).abs().max() > 1e-2


@pytest.mark.parametrize("method", [ToMe(keep=9), ToMe(r=5), CrossGET(keep=9)], ids=str)
@pytest.mark.parametrize("attn", ATTENTION)
def test_a_batch_equals_each_picture_alone(method: Method, attn: str) -> None:
    model = tiny.model(attn=attn)
    given = tiny.inputs(model, *ROWS)
    together, call = features_of(model, given, method)
    for row in (0, 1, 3):
        single, alone = features_of(model, tiny.alone(given, row, tiny.IMAGE), method)
        mine = [number for number, image in enumerate(call.images) if image.row == row]
        for number, features, image in zip(mine, single, alone.images, strict=True):
            assert torch.equal(call.images[number].kept, image.kept)
            close(together[number], features)


@pytest.mark.parametrize("method", [ToMe(keep=1.0), ToMe(keep=36), ToMe(r=0), CrossGET(keep=1.0)], ids=str)
@pytest.mark.parametrize("attn", ATTENTION)
def test_keeping_everything_changes_no_bit(method: Method, attn: str) -> None:
    model = tiny.model(attn=attn)
    given = tiny.inputs(model, *ROWS)
    with torch.no_grad():
        plain = model.get_image_features(given["pixel_values"]).pooler_output
        answer = model(**given).logits
    got, call = features_of(model, given, [method, FoPru(keep=36, strategy="row")])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, plain, strict=True))
    assert [image.after for image in call.images] == [36] * 4
    with foveate.prune(model, method), torch.no_grad():
        assert torch.equal(model(**given).logits, answer)


def test_weighing_matters() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    weighed, first = features_of(model, given, ToMe(r=(15,)))
    plain, second = features_of(model, given, ToMe(r=(15,), proportional=False))
    assert torch.equal(first.images[0].kept, second.images[0].kept), "the first block has nothing to weigh"
    assert (weighed[0] - plain[0]).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# trace


@pytest.mark.parametrize("put_back", [False, True])
@pytest.mark.parametrize("method", [ToMe(keep=9), CrossGET(keep=9)], ids=str)
def test_the_trace_counts_what_was_computed(method: Method, put_back: bool, request: Any) -> None:
    if put_back:
        request.getfixturevalue("gridded")
    model = tiny.model()
    _, call = features_of(model, tiny.inputs(model, "3i4"), method)
    shape = cost.shape(model.config)
    lengths: Sequence[int] = (36, 27, 18) if isinstance(method, ToMe) else (37, 27, 17)
    whole = [length + 1 for length in (*lengths, 36 if put_back else 9)]
    expected = cost.tower_flops(shape.tower, convention="roofline", lengths=whole)
    expected += cost.projector_flops(shape.projector, tokens=36 if put_back else 9)
    expected += cost.decoder_flops(shape.decoder, lengths=[16] * 4, convention="roofline")
    assert call.budget.prefill_flops == expected
    assert call.budget.tokens == (9.0,) * 4
    assert call.images[0].grid == tiny.GRID


def test_the_projector_counts_what_it_maps_where_the_last_block_is_read() -> None:
    model = tiny.model(vision_feature_layer=-1)
    _, call = features_of(model, tiny.inputs(model, "3i4"), ToMe(keep=9))
    shape = cost.shape(model.config)
    tower = cost.tower_flops(shape.tower, convention="roofline", lengths=[37, 30, 23, 16])
    rest = cost.projector_flops(shape.projector, tokens=9)
    rest += cost.decoder_flops(shape.decoder, lengths=[16] * 4, convention="roofline")
    assert call.budget.prefill_flops == tower + rest


def test_the_blocks_really_run_on_fewer_tokens() -> None:
    model = tiny.model()
    inputs: list[int] = []
    hidden: list[int] = []
    layers = model.model.vision_tower.encoder.layers
    with foveate.prune(model, ToMe(keep=9)), torch.no_grad():
        hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].shape[1])) for layer in layers]
        hooks += [
            layer.mlp.register_forward_pre_hook(lambda _, given: hidden.append(given[0].shape[1])) for layer in layers
        ]
        model(**tiny.inputs(model, "3i4", "2i2"))
    assert inputs == [37, 28, 19, 10]
    assert hidden == [28, 19, 10, 10]


# ---------------------------------------------------------------------------------------------------------------------
# around it


def test_answers_follow_from_the_merged_tokens() -> None:
    """generate() on a padded batch equals each row alone, and forward() its first logits."""
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    for method in (ToMe(keep=9), CrossGET(keep=9)):
        with untouched(model), foveate.prune(model, method):
            out = model.generate(**given, max_new_tokens=5, return_dict_in_generate=True, output_logits=True)
            direct = model(**given).logits[:, -1]
            close(torch.stack(out.logits)[0], direct, 1e-4)
            for row in (0, 1, 3):
                alone = model.generate(**tiny.alone(given, row, tiny.IMAGE), max_new_tokens=5)
                assert torch.equal(out.sequences[row, -5:], alone[0, -5:])


@torch.no_grad()
def test_pictures_encoded_outside_a_call_do_not_merge() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    plain = model.get_image_features(given["pixel_values"]).pooler_output[0]
    with foveate.prune(model, CrossGET(keep=9)):
        assert torch.equal(model.get_image_features(given["pixel_values"]).pooler_output[0], plain)
        model(**given)
        assert torch.equal(model.get_image_features(given["pixel_values"]).pooler_output[0], plain)


@pytest.mark.parametrize("where", ["select", "mlp", "self_attn", "projector"])
@pytest.mark.parametrize("method", [ToMe(keep=9), CrossGET(keep=9)], ids=str)
def test_an_exception_inside_leaves_nothing_behind(method: Method, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    clean, _ = features_of(model, given, method)
    broken = [True]

    def fail(*_: Any) -> None:
        if broken[0]:
            raise RuntimeError("on purpose")

    if where == "select":
        stock = type(method).select
        monkeypatch.setattr(
            type(method),
            "select",
            lambda self, signals: fail() if signals.stage == 1 and broken[0] else stock(self, signals),
        )
        monkeypatch.setattr(type(method), "select", failing_at_the_second_block(type(method), fail))
    else:
        block = model.model.vision_tower.encoder.layers[1]
        module = model.model.multi_modal_projector if where == "projector" else getattr(block, where)
        module.register_forward_hook(fail)
    with untouched(model), foveate.prune(model, method), torch.no_grad():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="on purpose"):
                model(**given)
        broken[0] = False
        assert model.get_image_features(given["pixel_values"]).pooler_output[0].shape == (36, 32)
    again, _ = features_of(model, given, method)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, clean, strict=True))


def failing_at_the_second_block(kind: type[Method], fail: Any) -> Any:
    stock = kind.select

    def select(self: Any, signals: Signals) -> Any:
        if signals.stage == 1:
            fail()
        return stock(self, signals)

    return select


def test_a_forward_that_others_have_put_there_comes_back() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    block = model.model.vision_tower.encoder.layers[1]
    calls: list[int] = []
    stock = block.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return stock(*arguments, **options)

    block.forward = counted
    features_of(model, given, ToMe(keep=9))
    assert block.forward is counted and calls == []
    with torch.no_grad():
        model(**given)
    assert calls == [1]


def test_two_encodings_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    given = tiny.inputs(model, *ROWS)
    together, call = features_of(model, given, CrossGET(keep=9))
    stock = type(model.model).get_image_features

    def one_by_one(self: Any, pixel_values: Tensor, **options: Any) -> Any:
        found = [stock(self, pixel_values[[number]], **options) for number in range(pixel_values.shape[0])]
        found[0].pooler_output = [one.pooler_output[0] for one in found]
        return found[0]

    monkeypatch.setattr(type(model.model), "get_image_features", one_by_one)
    single, again = features_of(model, given, CrossGET(keep=9))
    assert again.budget.prefill_flops == call.budget.prefill_flops
    for features, expected in zip(single, together, strict=True):
        close(features, expected)


def test_gradients_pass_through_the_merges() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    weight = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight
    with foveate.prune(model, ToMe(keep=9)):
        loss = model(**given, labels=given["input_ids"]).loss
        loss.backward()
        step = 1e-2 * weight.grad / weight.grad.norm()
        with torch.no_grad():
            weight += step
            up = model(**given, labels=given["input_ids"]).loss
            weight -= 2 * step
            down = model(**given, labels=given["input_ids"]).loss
    assert float((up - down) / 2e-2) == pytest.approx(float(weight.grad.norm()), rel=0.05)


def test_mini_answers_with_merged_tokens() -> None:
    """The model that ships: its answer to a question, with 144 of 576 tokens."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(foveate.MINI, dtype=torch.float32)
    ids = torch.tensor([[5, *[model.config.image_token_id] * 576, 6, 7]])
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    with untouched(model), foveate.prune(model, "tome:keep=144") as trace:
        answer = model.generate(**given, max_new_tokens=2, do_sample=False)
    assert answer.shape[1] > ids.shape[1]
    assert [(stage.before, stage.after) for stage in trace.images[0].stages] == [(576, 144)]


# ---------------------------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (ToMe(keep=4), "keep=4 asks for 4 of 36 tokens, but 3 blocks .* reach 5 to 36; the least is keep=5"),
        (ToMe(keep=0.1), r"ToMe: keep=0.1 asks for 4 of 36 tokens.*the least is keep=5"),
        (CrossGET(keep=5), "keep=5 asks for 5 of 36 tokens, but 3 blocks .* reach 6 to 36; the least is keep=6"),
        (CrossGET(keep=1), "keep=1 leaves no patch; the least is keep=2"),
        (ToMe(keep=37), "keep=37 asks for 37 tokens but the image has 36 tokens; the most is keep=36"),
        (ToMe(r=(1, 1, 1, 1)), "r names 4 blocks; 3 run up to the one that the projector reads, so the most is 3"),
        ([ToMe(keep=9), CrossGET(keep=9)], "would merge in the same encoder blocks; give one of them"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_before_any_work(method: Any, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        foveate.prune(tiny.model(), method)


def test_weights_need_an_attention_that_takes_them() -> None:
    model = tiny.model()
    model.model.vision_tower.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(FoveateError, match="attention 'flash_attention_2' cannot; use proportional=false, or load the"):
        foveate.prune(model, ToMe(keep=9))
    foveate.prune(model, ToMe(keep=9, proportional=False)).discard()


def test_a_cross_token_needs_cls() -> None:
    with pytest.raises(FoveateError, match=r"needs tower\.latest\.cross, .* which llava-1\.5 with siglip_vision_model"):
        foveate.prune(tiny.model(tower="siglip"), CrossGET(keep=9))


def test_an_encoder_of_unknown_make_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = tuple(dataclasses.replace(row, children=None) for row in TOWERS)
    monkeypatch.setattr("foveate.families.family.TOWERS", known)
    with pytest.raises(FoveateError, match="how the blocks of clip_vision_model are made up is not described"):
        foveate.prune(tiny.model(), ToMe(keep=9))


def test_a_merger_reads_the_block_at_hand_only() -> None:
    @dataclass(frozen=True)
    class Reader(ToMe):
        needs = ("tower.latest.hidden", "tower.0.hidden")

    with pytest.raises(FoveateError, match="reads block 0; it can read the block in which it acts, 'latest'"):
        foveate.prune(tiny.model(), Reader(keep=9))


def test_groups_that_do_not_fit_are_refused() -> None:
    @dataclass(frozen=True)
    class Odd(ToMe):
        def select(self, signals: Signals) -> Selection:
            index = [row[:30].sort().values for row in signals.index]
            return Selection(index, groups=[torch.zeros(7, dtype=torch.int64) for _ in index])

    model = tiny.model()
    with (
        untouched(model),
        foveate.prune(model, Odd(keep=9)),
        pytest.raises(FoveateError, match="says where 7 tokens went, but 36 were there"),
    ):
        model(**tiny.inputs(model, "3i4"))


@pytest.mark.parametrize("stage", [0, 1, READ])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"indices": 36}, "image 0: kept index 36 is outside 0..35"),
        ({"indices": -1}, "image 0: kept index -1 is outside 0..35"),
        ({"groups": 99}, "image 0: group 99 is outside -1..35"),
        ({"features": float("nan")}, "image 0: features hold NaN or infinity"),
    ],
)
def test_wrong_answers_are_refused_though_they_are_read_behind_the_last_block(
    stage: int, wrong: dict[str, Any], message: str
) -> None:
    @dataclass(frozen=True)
    class Wrong(ToMe):
        def select(self, signals: Signals) -> Selection:
            hidden = signals.tower["latest"].hidden
            assert hidden is not None
            indices, features = list(signals.index.clone()), list(hidden.detach().clone())
            groups = list(torch.arange(signals.shape[1]).expand(signals.shape).clone())
            rows = {"indices": indices, "features": features, "groups": groups}
            if signals.stage == stage:
                for name, value in wrong.items():
                    rows[name][0] = rows[name][0].clone()
                    rows[name][0].view(-1)[0] = value
            return Selection(indices, features, groups=groups, ordered=False)

    model = tiny.model()
    with untouched(model), foveate.prune(model, Wrong(keep=9)), pytest.raises(FoveateError) as error:
        model(**tiny.inputs(model, "2i3"))
    assert message in str(error.value)
