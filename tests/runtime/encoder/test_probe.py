"""What the probe reads of a running encoder, against eager attention maps, and that reading changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from models.doubles import Answer
from models.untouched import untouched
from references import reference
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import foveate
from foveate import FoPru, FoveateError, Random
from foveate.core import Selection, Signals
from foveate.ops import fused
from foveate.runtime.attention import PROBE
from foveate.runtime.encoder.probe import block_number

FIELDS = ("hidden", "received", "given", "received_all", "keys")
OF_CLS = ("cls", "cls_attention", "key_cls", "query_cls")


def seen_signals(model: Any, given: dict[str, Tensor], *wants: str, direct: bool = False) -> Signals:
    """The signals that a method with these needs is given."""
    seen: list[Signals] = []

    def answer(signals: Signals) -> Selection:
        seen.append(signals)
        return Selection([row[:5] for row in signals.index])

    with foveate.prune(model, Answer(answer=answer, wants=wants)), torch.no_grad():
        if direct:
            model(**given)
        else:
            model.generate(**given, max_new_tokens=1)
    assert len(seen) == 1
    return seen[0]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", tiny.TOWERS)
@pytest.mark.parametrize("block", ["read", "last", "0", "2"])
def test_attention_equals_the_eager_maps(block: str, tower: str, attn: str, direct: bool) -> None:
    model = tiny.model(tower=tower, attn=attn)
    given = tiny.inputs(model, "3i4", "2i1i5")
    cls = int(tower == "clip")
    names = [f"tower.{block}.{name}" for name in FIELDS + (OF_CLS if cls else ())]
    signals = seen_signals(model, given, *names, direct=direct)
    number = {"read": 2, "last": 3, "0": 0, "2": 2}[block]  # hidden_states[-2] of five is the output of block 2
    got = signals.tower[int(block) if block.isdigit() else block]
    assert torch.equal(signals.tower[number].hidden, got.hidden), "a block is found by its name and by its number"
    map_ = reference.tower_attention(model, given["pixel_values"])[number].double()  # (B, H, CLS + N, CLS + N)
    patches = map_[:, :, cls:, cls:].mean(dim=1)
    close: dict[str, Any] = dict(atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(got.received.double(), patches.mean(dim=1), **close)
    torch.testing.assert_close(got.given.double(), patches.mean(dim=2), **close)
    torch.testing.assert_close(got.received_all.double(), map_.mean(dim=(1, 2))[:, cls:], **close)
    hidden = model.model.vision_tower(given["pixel_values"], output_hidden_states=True).hidden_states[number + 1]
    torch.testing.assert_close(got.hidden, hidden[:, cls:], **close)
    if cls:
        torch.testing.assert_close(got.cls_attention.double(), map_[:, :, 0, 1:], **close)
        torch.testing.assert_close(got.cls, hidden[:, 0], **close)
        # Keys and the CLS query are what the map was made of.
        scale = got.keys.shape[-1] ** -0.5
        every = torch.cat([got.key_cls[:, :, None], got.keys], dim=2)
        row = torch.einsum("bhd,bhnd->bhn", got.query_cls * scale, every).softmax(dim=-1)
        torch.testing.assert_close(row.double(), map_[:, :, 0], **close)


@pytest.mark.parametrize(("tower", "direction"), [("clip", "high"), ("clip", "low"), ("siglip", "high")])
def test_fopru_keeps_what_the_eager_maps_say(direction: Any, tower: str) -> None:
    model = tiny.model(tower=tower)
    given = tiny.inputs(model, "3i4", "2i1i5")
    maps = reference.tower_attention(model, given["pixel_values"])[2]
    scores = reference.significance(maps, skip=int(tower == "clip"), high=direction == "high")
    with foveate.prune(model, FoPru(keep=0.25, direction=direction)) as trace:
        model.generate(**given, max_new_tokens=1)
    expected = [row.topk(9).indices.sort().values.tolist() for row in scores]
    assert [image.kept.tolist() for image in trace.images] == expected
    assert expected[0] != expected[1]
    with foveate.prune(model, FoPru(keep=0.5, strategy="row", direction=direction)) as trace:
        model.generate(**given, max_new_tokens=1)
    for row, image in zip(scores, trace.images, strict=True):
        rows = row.unflatten(0, tiny.GRID).sum(dim=1).topk(3).indices.sort().values
        assert image.kept.tolist() == (rows[:, None] * 6 + torch.arange(6)).flatten().tolist()


def test_without_cls_every_patch_gives_the_same() -> None:
    """Rows of a map without CLS add up to 1, so that the less dispersed vector is flat and the first tokens win."""
    model = tiny.model(tower="siglip")
    with foveate.prune(model, FoPru(keep=9, direction="low")) as trace:
        model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=1)
    assert trace.images[0].kept.tolist() == list(range(9))


@pytest.mark.parametrize("layer", [-1, -3, 2, [-3, -2]])
def test_the_read_block_follows_the_configuration(layer: Any) -> None:
    """hidden_states[k] is the output of block k - 1; of several layers the last one counts."""
    model = tiny.model(vision_feature_layer=layer)
    given = tiny.inputs(model, "3i4")
    got = seen_signals(model, given, "tower.read.received").tower["read"].received
    number = {-1: 3, -3: 1, 2: 1}[layer] if isinstance(layer, int) else 2
    map_ = reference.tower_attention(model, given["pixel_values"])[number]
    torch.testing.assert_close(got, map_[:, :, 1:, 1:].mean(dim=(1, 2)), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_reading_leaves_the_encoders_output_bit_identical(attn: str) -> None:
    model = tiny.model(attn=attn)
    given = tiny.inputs(model, "3i4", "2i1i5")
    needs = tuple(f"tower.{block}.{name}" for block in ("0", "1", "read", "last") for name in FIELDS + OF_CLS)
    with torch.no_grad():
        plain = torch.stack(list(model.model.get_image_features(given["pixel_values"], return_dict=True).pooler_output))
        everything = Answer(answer=lambda signals: Selection(list(signals.index)), wants=needs)
        with untouched(model), foveate.prune(model, everything):
            observed = model.model.get_image_features(given["pixel_values"], return_dict=True).pooler_output
    assert torch.equal(torch.stack(list(observed)), plain)


def test_other_models_and_other_blocks_run_as_ever() -> None:
    """The registered name is used by the observed block alone: neither the sdpa entry nor another model changes."""
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    observed, other = tiny.model(), tiny.model()
    given = tiny.inputs(observed, "3i4")
    with foveate.prune(observed, FoPru(keep=0.25)):
        layers = observed.model.vision_tower.encoder.layers
        names = [layer.self_attn.config._attn_implementation for layer in layers]
        assert names == ["sdpa", "sdpa", PROBE, "sdpa"]
        assert {layer.self_attn.config._attn_implementation for layer in other.model.vision_tower.encoder.layers} == {
            "sdpa"
        }
        inside = other.generate(**given, max_new_tokens=4)
        assert observed.config.vision_config._attn_implementation == "sdpa"
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is stock
    assert torch.equal(other.generate(**given, max_new_tokens=4), inside)


def test_the_name_has_its_mask_twin() -> None:
    """An attention name without one would get no mask at all."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    with foveate.prune(tiny.model(), FoPru(keep=0.25)):
        assert PROBE in ALL_ATTENTION_FUNCTIONS
        assert PROBE in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping


def test_a_custom_attention_of_the_callers_still_runs() -> None:
    ran: list[Any] = []
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def mine(module: Any, *arguments: Any, **options: Any) -> Any:
        ran.append(module)
        return stock(module, *arguments, **options)

    AttentionInterface.register("tests_mine", mine)
    model = tiny.model()
    model.model.vision_tower.set_attn_implementation("tests_mine")
    given = tiny.inputs(model, "3i4")
    plain = tiny.model()
    with foveate.prune(model, FoPru(keep=0.25)) as trace, foveate.prune(plain, FoPru(keep=0.25)) as expected:
        model.generate(**given, max_new_tokens=1)
        plain.generate(**given, max_new_tokens=1)
    assert len(ran) == 4
    assert torch.equal(trace.images[0].kept, expected.images[0].kept)


def test_signals_name_what_they_are_of() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i1i5", "1i")
    signals = seen_signals(model, given, "features", "text", "text_mask", "after_image", "tower.read.received")
    assert signals.original == tiny.TOKENS
    assert signals.shape == (4, tiny.TOKENS)
    assert signals.grid == tiny.GRID
    assert signals.stage == 0
    assert torch.equal(signals.index, torch.arange(tiny.TOKENS).expand(4, -1))
    features = [reference.project(model, one) for one in reference.encode(model, given["pixel_values"])]
    torch.testing.assert_close(signals.features, torch.stack(features), atol=1e-5, rtol=0)
    owners = [0, 1, 1, 2]
    words, after = [7, 8, 8, 1], [4, 6, 5, 0]
    assert signals.text is not None and signals.text_mask is not None and signals.after_image is not None
    assert signals.text_mask.sum(dim=1).tolist() == words
    assert (signals.after_image & signals.text_mask).sum(dim=1).tolist() == after
    for image, row in enumerate(owners):
        ids = given["input_ids"][row]
        ids = ids[given["attention_mask"][row].bool() & (ids != tiny.IMAGE)]
        assert torch.equal(signals.text[image, : words[image]], model.get_input_embeddings()(ids))


def test_a_second_stage_sees_the_tokens_that_are_left() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4", "2i2")
    seen: list[Signals] = []

    def answer(signals: Signals) -> Selection:
        seen.append(signals)
        return Selection([row[:3] for row in signals.index])

    wants = ("features", "tower.read.received", "tower.read.keys", "tower.read.cls_attention", "tower.read.cls")
    with foveate.prune(model, [Random(keep=10), Answer(answer=answer, wants=wants)]) as trace:
        model.generate(**given, max_new_tokens=1)
    whole = seen_signals(model, given, *wants)
    (signals,) = seen
    assert signals.original == tiny.TOKENS
    assert signals.grid is None, "a grid with holes is none"
    for image in range(2):
        left = trace.images[image].stages[0].kept
        assert torch.equal(signals.index[image], left)
        for name in ("received", "cls"):
            got, full = getattr(signals.tower["read"], name), getattr(whole.tower["read"], name)
            assert torch.equal(got[image], full[image] if name == "cls" else full[image][left])
        for name in ("keys", "cls_attention"):
            got, full = getattr(signals.tower["read"], name), getattr(whole.tower["read"], name)
            assert torch.equal(got[image], full[image][:, left])
        assert torch.equal(signals.features[image], whole.features[image][left])  # type: ignore[index]


def test_signals_follow_tokens_that_change_places() -> None:
    """After a stage that hands tokens on in another order, every signal stands in that order."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    seen: list[Signals] = []

    def answer(signals: Signals) -> Selection:
        seen.append(signals)
        return Selection([row.sort().values[:3] for row in signals.index])

    for keep in (0.5, 1.0):
        second = Answer(answer=answer, wants=("features", "tower.read.received"))
        with foveate.prune(model, [FoPru(keep=keep, reorder=False), second]) as trace:
            model.generate(**given, max_new_tokens=1)
        whole = seen_signals(model, given, "features", "tower.read.received")
        order = trace.images[0].stages[0].kept
        assert not torch.equal(order, order.sort().values)
        assert torch.equal(seen[-1].index[0], order)
        assert seen[-1].grid is None
        assert torch.equal(seen[-1].tower["read"].received[0], whole.tower["read"].received[0][order])  # type: ignore[index]
        assert torch.equal(seen[-1].features[0], whole.features[0][order])  # type: ignore[index]


def test_signals_that_an_encoder_cannot_give() -> None:
    with_cls, without = tiny.model(tower="clip"), tiny.model(tower="siglip")
    method = Answer(wants=("tower.read.cls_attention", "tower.last.cls"))
    foveate.prune(with_cls, method).discard()
    message = (
        r"needs tower.read.cls_attention, tower.last.cls, which llava-1.5 with siglip_vision_model does not have; "
        r"methods that work: .*fopru, .*pool, .*random, .*uniform"
    )
    with pytest.raises(FoveateError, match=message):
        foveate.prune(without, method)
    with pytest.raises(
        FoveateError, match=r"needs tower.read.nonsense, which llava-1.5 with clip_vision_model does not"
    ):
        foveate.prune(with_cls, Answer(wants=("tower.read.nonsense",)))
    with pytest.raises(FoveateError, match="needs text_clip, image_clip, which"):
        foveate.prune(without, Answer(wants=("text_clip", "image_clip")))


@pytest.mark.parametrize(
    ("name", "blocks", "number"),
    [("read", 6, 4), ("last", 6, 5), ("3", 6, 3), ("8/24", 24, 8), ("8/24", 6, 2), ("22/24", 6, 5), ("23/24", 2, 1)],
)
def test_a_block_can_be_named_by_its_share_of_the_depth(name: str, blocks: int, number: int) -> None:
    """round(8 * 6 / 24) = 2; round(22 * 6 / 24) = round(5.5) = 6 is past the last of six."""
    assert block_number(name, blocks - 2, blocks) == number


@pytest.mark.parametrize("name", ["first", "1/", "/4", "-1", "1/x"])
def test_other_names_of_blocks_are_refused(name: str) -> None:
    with pytest.raises(FoveateError, match=f"encoder block '{name}' is no number"):
        block_number(name, 4, 6)


def test_blocks_that_are_not_there() -> None:
    model = tiny.model()
    with pytest.raises(FoveateError, match=r"encoder block 4 is outside 0\.\.3"):
        foveate.prune(model, Answer(wants=("tower.4.received",)))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava-1.5", "qwen2-vl"])
@torch.no_grad()
def test_in_bfloat16_the_attention_that_runs_says_its_rows_sums(
    name: str, attn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums are the same without, but for what bfloat16 rounds, and the encoder computes the same."""
    model = tiny.model(name, attn=attn).bfloat16()
    given = tiny.inputs(model, "1i")
    wants = [f"tower.read.{field}" for field in ("received", "given", "received_all")]
    taken = []
    stock = fused.column_sums
    monkeypatch.setattr(fused, "column_sums", lambda *given: taken.append(1) or stock(*given))
    given["pixel_values"] = given["pixel_values"].bfloat16()
    found = seen_signals(model, given, *wants, "tower.read.hidden").tower["read"]
    assert len(taken) == (attn == "sdpa" and fused.helps(torch.empty(0, dtype=torch.bfloat16)))
    monkeypatch.setattr(fused, "helps", lambda queries: False)
    wanted = seen_signals(model, given, *wants, "tower.read.hidden").tower["read"]
    assert torch.equal(found.hidden, wanted.hidden)
    for field in ("received", "given", "received_all"):
        torch.testing.assert_close(getattr(found, field), getattr(wanted, field), rtol=5e-3, atol=1e-5)
